"""`just bench`: what AgentFlow does on this machine, as a table and as one JSON object.

With names, only those figures:

    python -m tests.bench.bench [NAME ...] [--quick]
"""

from __future__ import annotations

import argparse
from typing import Final

import uvloop
from rich.console import Console

from tests.bench.conditions import conditions
from tests.bench.figures import all_figures
from tests.bench.results import Targets, figures_table, measure_named, print_last_line, show

TARGETS: Final[Targets] = {
    "noop_tasks_per_s": ("no-op tasks/s, one worker of 8 slots", 40_000, True),
    "noop8_tasks_per_s": ("no-op tasks/s, 8 workers of 4 slots", 25_000, True),
    "cpu_us_per_task": ("CPU a task, all processes, µs", 50, False),
    "latency_p50_ms": ("submit to result at 100/s, p50, ms", 2, False),
    "latency_p99_ms": ("submit to result at 100/s, p99, ms", 5, False),
    "relay_p50_ms": ("three bare fsynced messages on the same way, p50, ms", None, False),
    "relay_p99_ms": ("the same, p99, ms", None, False),
    "latency_ratio_to_relay": ("ratio of the medians", None, False),
    "chain3_p50_ms": ("chain of 3, p50, ms", 5, False),
    "chain3_p99_ms": ("chain of 3, p99, ms", 12, False),
    "singles_per_s": ("50 clients, single submissions/s", None, True),
    "bare_publishes_per_s": ("the same connections, bare publishes/s", None, True),
    "singles_ratio": ("ratio of the two", 0.8, True),
    "fan10k_s": ("fan-out to 10,000 and in, s", 1, False),
    "infeasible_ratio": ("rate behind 200,000 that fit nowhere", 0.8, True),
    "backlog1m_leader_rss_mb": ("a million queued: leader, MB", 1_536, False),
    "backlog1m_server_rss_mb": ("a million queued: nats-server, MB", 400, False),
    "backlog1m_rate_per_s": ("a million worked off, tasks/s", None, True),
    "backlog1m_rate_ratio": ("its rate to that with 10,000 queued", 0.8, True),
    "shell_per_s": ("shell tasks (`true`)/s", None, True),
    "bare_process_per_s": ("bare asyncio subprocesses/s", None, True),
    "shell_ratio": ("ratio of the two", 0.7, True),
    "up_ready_s": ("`agentflow up` to ready, s", 2, False),
    "import_ms": ("`import agentflow`, ms", 180, False),
}


def main() -> None:
    """Measure, print the conditions, the table, and as the last line the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--quick", action="store_true", help="small numbers: does it work?")
    given = parser.parse_args()
    before = conditions()
    found = uvloop.run(measure_named(all_figures(given.quick), given.names, Console(stderr=True)))
    show(before, figures_table("AgentFlow", TARGETS, found), width=110)
    print_last_line(found, before)


if __name__ == "__main__":
    main()
