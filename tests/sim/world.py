"""One run: a cluster that works while things go wrong, is healed, and has to come to rest."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from msgspec import Struct

from agentflow.errors import Disconnected
from agentflow.limits import LEVEL, LEVEL_FIRST
from tests.sim.bodies import BRIEF, FUNCTIONS
from tests.sim.check import Evidence, check
from tests.sim.client import Intent, SimClient
from tests.sim.cluster import NAMESPACE, Cluster
from tests.sim.faults import Faults
from tests.sim.loop import Process, Stuck
from tests.sim.machine import one_machine
from tests.sim.master import SimMaster
from tests.sim.network import Link, Weather
from tests.sim.worker import NameTaken, Shape, SimWorker

TASKS: Final = 2_000
MASTERS: Final = 3
_MASTERS: Final = tuple(f"m{number}" for number in range(1, MASTERS + 1))
CLIENTS: Final = 3
HARM_S: Final = 60.0
"""How long things go wrong."""
REST_S_MAX: Final = 150.0
"""By when, after that, the cluster has to be at rest."""
_LOOK_S: Final = 0.5
_CALM_LOOKS: Final = 4
_MESSAGES_MAX: Final = 5_000
"""A log that is longer than this, and ten messages for each task, grows without need."""
_BURY_S: Final = 30.0
_DISPENSABLE: Final = ("w3", "w4")


class Report(Struct, frozen=True):
    """What came of one seed."""

    seed: int
    tasks: int
    messages: int
    violations: list[str]
    looked: dict[str, int]
    seen: dict[str, int]
    faults: dict[str, int]
    """Faults injected, by kind."""
    harmed: dict[str, int]
    """What they did to single messages and writes."""
    simulated_s: float
    wall_s: float
    digest: str
    """Of log, verdicts and trace."""
    trace: list[str]


class _Node:
    """What is started anew under the same name whenever its process ends."""

    def __init__(self, name: str, make: Callable[[Link], Any]) -> None:
        self.name = name
        self.make = make
        self.process = Process(name)
        self.program: Any = None
        self.ended = True


class World:
    """A cluster and everything around it. See `tests.sim.faults.Targets`."""

    def __init__(self, seed: int, tasks: int) -> None:
        self.cluster: Final = Cluster(seed)
        self._chance = self.cluster.chance("world")
        self._loop = self.cluster.loop
        self._nodes: dict[str, _Node] = {}
        self._dead: list[Process] = []
        self._leases = self.cluster.leases
        self._levels: dict[str, int] = {}
        """The contract level each master knows from its next start on."""
        self._intents: list[Intent] = []
        self._observed: list[Any] = []
        self._failures: list[str] = []
        self._unrest_left = ""
        self._over = False
        """Nothing is started any more."""
        self._clients_left: dict[str, int] = {}
        self._tasks = tasks
        self._messages_max = _MESSAGES_MAX + 10 * tasks
        self.cluster.on_killer = self._kill_for_task

    # Running.

    def run(self) -> None:
        """All of it."""
        try:
            self._loop.run(self._run())
        except Stuck as stuck:
            self._failures.append(f"the loop: {stuck}")
        self._failures += self._loop.errors

    async def _run(self) -> None:
        async with self.cluster.network.log:
            self._build()
            await Faults(self.cluster, self).run(HARM_S)
            self._heal()
            await self._rest()

    def _build(self) -> None:
        self._levels = dict.fromkeys(_MASTERS, self._chance.choice((LEVEL_FIRST, LEVEL)))
        for number in range(1, MASTERS + 1):
            self._add(f"m{number}", partial(self._master, f"m{number}"))
        for shape in _shapes(self._chance):
            self._add(shape.name, partial(SimWorker, self.cluster, shape=shape))
        for number in range(CLIENTS):
            name = f"c{number + 1}"
            quota = self._tasks // CLIENTS + (number < self._tasks % CLIENTS)
            self._clients_left[name] = quota
            self._add(name, partial(self._client, name))

    def _master(self, name: str, link: Link) -> SimMaster:
        return SimMaster(self.cluster, link, name, self._leases, self._levels[name])

    def _client(self, name: str, link: Link) -> SimClient:
        return SimClient(self.cluster, link, name, self._clients_left[name])

    def _add(self, name: str, make: Callable[[Link], Any]) -> None:
        node = self._nodes[name] = _Node(name, make)
        self._start(node)

    def _start(self, node: _Node) -> None:
        if not node.ended or self._over:
            return
        node.ended = False
        node.process = Process(node.name)
        link = self.cluster.network.link(node.process)
        self._loop.start(node.process, self._main(node, node.process, link))

    async def _main(self, node: _Node, process: Process, link: Link) -> None:
        """A process from its start to its end."""
        try:
            node.program = node.make(link)
            await node.program.run()
        except NameTaken:
            self.cluster.counts["names_taken"] += 1
        except Disconnected:
            self.cluster.counts["starts_without_server"] += 1
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it is, it is a finding
            self._failures.append(f"{node.name}: {error!r}")
        self._loop.outside(self._loop.time(), self._on_end, node, process)

    def _on_end(self, node: _Node, process: Process) -> None:
        if node.process is not process or node.ended:
            return
        self.cluster.trace("ended", node.name)
        self._collect(node)
        if node.name in self._clients_left and not self._clients_left[node.name]:
            return
        self._start_later(node)

    def _collect(self, node: _Node) -> None:
        """What an ended process leaves behind."""
        node.ended = True
        process = node.process
        process.killed = True
        self.cluster.network.links[node.name].close()
        self._dead.append(process)
        program = node.program
        if isinstance(program, SimClient):
            self._intents += program.intents
            done = sum(len(intent.tasks) for intent in program.intents)
            self._clients_left[node.name] = max(0, self._clients_left[node.name] - done)
        elif isinstance(program, SimMaster):
            self._observed += program.observed

    def _start_later(self, node: _Node) -> None:
        after_s = 0.01 if self._chance.random() < 0.25 else self._chance.uniform(0.3, 6.0)
        self._loop.outside(self._loop.time() + after_s, self._start, node)

    # To be harmed.

    @property
    def leader(self) -> str:
        """Name of a master that leads; "" if none does."""
        return next((node.name for node in self._masters() if node.program.leading), "")

    def _masters(self) -> list[_Node]:
        nodes = self._nodes.values()
        return [node for node in nodes if isinstance(node.program, SimMaster) and not node.ended]

    def names(self) -> list[str]:
        """All nodes that run."""
        return [node.name for node in self._nodes.values() if not node.ended]

    def pause(self, name: str, for_s: float) -> None:
        """Stop a process, and let it go on later."""
        process = self._nodes[name].process
        self._loop.stop_process(process)
        self._loop.outside(self._loop.time() + for_s, self._loop.continue_process, process)

    def crash(self, name: str) -> None:
        """Kill a process; it is started anew."""
        if self._kill(name):
            self._start_later(self._nodes[name])

    def bury_worker(self, name: str) -> bool:
        """Kill a worker for good, if the others can do without it."""
        return name in _DISPENSABLE and self._kill(name)

    def _kill(self, name: str) -> bool:
        node = self._nodes[name]
        if node.ended:
            return False
        self._collect(node)
        return True

    def drain(self, name: str) -> None:
        """Ask a worker or master to leave; it is started anew."""
        node = self._nodes[name]
        if not node.ended and node.program is not None:
            self._loop.call_in(node.process, node.program.leave)

    def lose_bucket(self, name: str) -> bool:
        """Delete a bucket of leases, if there is one."""
        if name not in self._leases.buckets:
            return False
        self._leases.delete(name)
        return True

    def upgrade(self) -> str:
        """Have the next master start anew that does not know the latest level."""
        name = next((name for name, level in self._levels.items() if level < LEVEL), "")
        if name:
            self._levels[name] = LEVEL
            self.drain(name)
        return name

    def _kill_for_task(self, name: str) -> None:
        self.cluster.faults["killed_by_task"] += 1
        self._loop.outside(self._loop.time(), self.crash, name)

    # Coming to rest.

    def _heal(self) -> None:
        self.cluster.trace("healed")
        self.cluster.network.start_server()
        for link in self.cluster.network.links.values():
            link.weather = Weather()
            link.heal()
        for node in self._nodes.values():
            self._loop.continue_process(node.process)
        while self.upgrade():
            pass

    async def _rest(self) -> None:
        """Wait until nothing is left to do."""
        until = self._loop.time() + REST_S_MAX
        calm = 0
        last_seq = 0
        while calm < _CALM_LOOKS:
            await asyncio.sleep(_LOOK_S)
            stream = self.cluster.network.stream
            is_calm = stream.last_seq == last_seq and not self._unrest()
            calm = calm + 1 if is_calm else 0
            last_seq = stream.last_seq
            if self._failures or self._loop.time() > until or last_seq > self._messages_max:
                self._unrest_left = self._unrest() or "the log still grows"
                return

    def _unrest(self) -> str:
        """What is still to come; "" if nothing."""
        clients = [name for name in self._clients_left if not self._nodes[name].ended]
        if clients or len(self._masters()) < MASTERS:
            return f"clients at work: {clients}, masters there: {len(self._masters())}"
        leaders = [node.name for node in self._masters() if node.program.leading]
        if len(leaders) != 1:
            return f"leaders: {leaders}"
        for node in self._masters():
            state = node.program.state
            if state.seq != self.cluster.network.stream.last_seq:
                return f"{node.name} has folded up to {state.seq}"
            left = {
                "tasks": len(state.tasks),
                "workflows": len(state.workflows),
                "answers": len(state.answers),
                "announcements": len(state.announcements),
            }
            if any(left.values()):
                return f"{left}: {list(state.tasks)[:2]}"
        return ""

    # Afterwards.

    def evidence(self) -> Evidence:
        """What is to be judged."""
        observed = self._observed + [each for node in self._masters() for each in node.program.observed]
        clients = [node.program for node in self._nodes.values() if isinstance(node.program, SimClient)]
        running = [client for client in clients if not self._nodes[client.name].ended]
        return Evidence(
            seed=self.cluster.seed,
            namespace=NAMESPACE,
            messages=list(self.cluster.network.stream.messages),
            intents=self._intents + [intent for client in running for intent in client.intents],
            journal=self.cluster.journal,
            holds=self.cluster.holds,
            observed=observed,
            states={node.name: node.program.state for node in self._masters()},
            failures=self._failures,
            unrest=self._unrest_left,
        )

    def bury(self) -> None:
        """End everything, also what was killed, so that nothing of it runs in another world."""
        self._over = True
        for link in self.cluster.network.links.values():
            link.cut(there=True, back=True)
            link.connected = False
        processes = [*self._dead, *(node.process for node in self._nodes.values())]
        for process in processes:
            self._loop.revive_process(process)
        with suppress(Stuck):  # what cannot even be cancelled is left to its fate
            self._loop.run(_end(processes))
        for process in processes:
            for task in process.tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]


async def _end(processes: list[Process]) -> None:
    tasks = [task for process in processes for task in process.tasks]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_BURY_S)


def _shapes(chance: Any) -> list[Shape]:
    """Workers of several kinds; together they can run everything."""
    shapes = []
    for number in range(1, 6):
        everything = number <= 2
        shapes.append(
            Shape(
                name=f"w{number}",
                slots=chance.choice((2, 8, 24)),
                ahead=chance.choice((0, 128, 256)),
                cpu=chance.choice((2.0, 8.0)),
                memory_mb=chance.choice((1_000, 4_000)),
                gpus=chance.choice((1, 6)) if everything else 0,
                group="blue" if everything else chance.choice(("", "red")),
                functions=(BRIEF, *(FUNCTIONS if everything else FUNCTIONS[: chance.choice((1, 2))])),
            )
        )
    return shapes


def simulate(seed: int, tasks: int = TASKS) -> Report:
    """Run one seed and judge it."""
    began = time.perf_counter()
    world = World(seed, tasks)
    try:
        with one_machine(world.cluster):
            world.run()
        return _report(world, time.perf_counter() - began)
    finally:
        world.bury()


def _report(world: World, run_s: float) -> Report:
    began = time.perf_counter()
    evidence = world.evidence()
    findings = check(evidence)
    cluster = world.cluster
    digest = hashlib.sha256(f"{findings.digest} {cluster.trace.digest()}".encode()).hexdigest()
    return Report(
        seed=cluster.seed,
        tasks=sum(len(intent.tasks) for intent in evidence.intents),
        messages=len(evidence.messages),
        violations=findings.violations,
        looked={str(name): count for name, count in findings.looked.items()},
        seen=dict(findings.seen + cluster.counts + cluster.network.seen),
        faults=dict(cluster.faults),
        harmed=dict(cluster.network.harmed),
        simulated_s=cluster.loop.time(),
        wall_s=run_s + time.perf_counter() - began,
        digest=digest,
        trace=cluster.trace.lines,
    )
