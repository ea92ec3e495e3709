"""nats-servers of our own, for one machine: started, watched, restarted and stopped.

What can go wrong with a child process that keeps the data, and what is done about it:

- *Two servers on one folder destroy it.* A lock on a file in the folder is held by us and,
  through the inherited descriptor, by the server itself: it is free only when both are gone.
- *A server of somebody else answers on our port.* The port is read from the file the server
  writes for its own process id, and what answers there must know the random name we gave it.
- *We are killed and the server lives on.* The kernel sends it SIGTERM when we die
  (PR_SET_PDEATHSIG). It is set by a launcher, five lines of Python that then become the
  server, and not between fork and exec of our own process, which may have threads.
- *Ctrl-C in the terminal reaches the server before we have drained.* It runs in a session of
  its own.
- *The disk is full, so it cannot even log.* Its stdout and stderr go to memory.
- *The disk was full, and it goes on refusing.* Who watches the disk (`disk_full`, `disk_roomy`) lets it
  be started anew.
- *One of several servers dies.* Each is watched by itself; the others go on without it.
"""

from agentflow_nodes.embedded.folder import disk_full, disk_roomy
from agentflow_nodes.embedded.program import VERSION_MIN, find_server
from agentflow_nodes.embedded.replicated import EmbeddedCluster, replicas_of
from agentflow_nodes.embedded.server import EmbeddedServer, Sync

__all__ = [
    "VERSION_MIN",
    "EmbeddedCluster",
    "EmbeddedServer",
    "Sync",
    "disk_full",
    "disk_roomy",
    "find_server",
    "replicas_of",
]
