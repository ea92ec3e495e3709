"""No-op tasks per second of AgentFlow and of its peers, on this machine, in one run.

    python -m tests.bench.bench_peers [--tasks N] [--agentflow-tasks N] [--runs 3] [--json]

From before the first submit until the last completion is known, client, workers and broker all
on this machine. Each peer is measured in two ways. `recorded` is AgentFlow's own job: the outcome
of every task is stored by the peer's own result mechanism, and the client that submitted has
read it. `unrecorded` is the peer at its fastest: results are off, and a task counts as soon as its body ran.
`ratio_best_peer` compares AgentFlow with the best peer recorded, `ratio_best_peer_unrecorded`
with the best one unrecorded.

Each has the settings that were fastest by hand; why is told in its module under `peers`. The rounds
are interleaved, so that a busy minute on the machine does not fall on one of them alone, and the
median counts. Every run has fresh processes, a fresh broker and a warm-up.

Two things are not alike. AgentFlow syncs to disk before every acknowledgement, and no peer does so
unless it is told to: that is to their advantage, and one more row, taskiq_nats_fsync, shows what it
costs. AgentFlow is handed its tasks with `submit_many`, which packs hundreds of events into one
message, so one acknowledgement and its sync cover hundreds of tasks: that is to its own. Dask's `map` does
likewise; Celery, Dramatiq and taskiq send each task as a message of its own, whatever their `group`
says. AgentFlow's client also packs what is submitted one by one at the same time: 500 coroutines that each
`submit` gave 23,000 to 28,000 tasks/s by hand, 10,000 tasks handed over at once 28,000 to 34,000. The
ratios say nothing about a client that awaits each submit before the next.

Prints a table, and as the last line one JSON object. What fails once has no figure, gets a line that
says why, and makes the exit status 1; the ratio it belongs to is then null, since the best peer is
not known.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.bench.conditions import command_version, conditions, conditions_table, cores
from tests.bench.peers.__main__ import PEERS
from tests.bench.peers.processes import end
from tests.bench.peers.way import RECORDED, UNRECORDED

_REPOSITORY: Final = Path(__file__).parents[2]
_RUN_LIMIT_S: Final = 300.0
_OUTPUT_TAIL_CHARACTERS: Final = 600
_AGENTFLOW: Final = "agentflow"
_AGENTFLOW_TASKS: Final = 200_000
_AGENTFLOW_KEY: Final = "noop_tasks_per_s"
_AGENTFLOW_SETTINGS: Final = (
    "client, leader, one worker with 8 slots; submit_many, three durable events a task, hundreds of events"
    " a message; nats-server with sync_interval always, one sync a message"
)
_DURABILITY: Final = {
    _AGENTFLOW: "on disk before every acknowledgement (sync_interval always), which covers hundreds of tasks",
    "celery": "none: Redis without snapshots or append-only file",
    "dramatiq": "none: Redis without snapshots or append-only file",
    "taskiq_nats": "tasks on disk within 2 min (sync_interval's default), results in Redis as above",
    "taskiq_nats_fsync": "on disk before every acknowledgement, which covers one task (sync_interval always, appendfsync always)",
    "dask": "none: everything in memory",
}
_FSYNC: Final = (
    "agentflow and taskiq_nats_fsync: before every acknowledgement; the others: none, see the table"
)


class RunFailedError(Exception):
    """One run of one participant gave no figure; the message says why."""


@dataclass(frozen=True)
class Sample:
    """What one run of one participant gave."""

    tasks: int
    tasks_per_s: float
    settings: str
    versions: Mapping[str, str]


@dataclass
class Participant:
    """Someone measured in one way, and what is known so far; `run` raises RunFailedError."""

    name: str
    way: str
    run: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None

    @property
    def label(self) -> str:
        """As it is named while it runs."""
        return f"{self.name} {self.way}"

    @property
    def key(self) -> str:
        """Under which the JSON object has its rate."""
        return f"{self.name}_tasks_per_s" if self.way == RECORDED else f"{self.name}_{self.way}_tasks_per_s"

    @property
    def tasks_per_s(self) -> float | None:
        """The median of its runs, or None when one of them failed."""
        if self.error is not None or not self.samples:
            return None
        return median(sample.tasks_per_s for sample in self.samples)


def main() -> int:
    """Run the comparison and print it; the exit status says whether everybody finished."""
    arguments = _parse_arguments()
    # Without this SIGTERM would end us before the `finally` clause that ends the run under way.
    signal.signal(signal.SIGTERM, _leave)
    participants = [
        Participant(_AGENTFLOW, RECORDED, _agentflow_run(arguments.agentflow_tasks)),
        *(
            Participant(peer, way, _peer_run(peer, way, arguments.tasks))
            for peer, ways in PEERS.items()
            for way in ways
        ),
    ]
    under = conditions(fsync=_FSYNC)
    run_rounds(participants, arguments.runs)
    under |= {
        "redis-server": command_version("redis-server", "--version").partition(" sha=")[0],
        **_versions(participants),
    }
    if not arguments.as_json:
        console = Console()
        console.print(conditions_table(under))
        console.print(comparison_table(participants))
        for participant in participants:
            line = f"{participant.label}: {_settings_or_error(participant)}"
            console.print(line, highlight=False, markup=False)
    print(json.dumps(figures(participants, arguments.runs)))
    return int(any(participant.error is not None for participant in participants))


def run_rounds(participants: Sequence[Participant], rounds: int) -> None:
    """Run everybody once a round, telling the progress on stderr.

    One that failed is not run again: it has no figure whatever the other rounds would give.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("peers", total=rounds * len(participants))
        for number in range(1, rounds + 1):
            for participant in participants:
                if participant.error is None:
                    progress.update(bar, description=f"round {number}: {participant.label}")
                    line = f"round {number} of {rounds}: {_run_once(participant)}"
                    console.print(line, highlight=False, markup=False)
                progress.advance(bar)


def figures(participants: Sequence[Participant], runs: int) -> dict[str, float | int | None]:
    """The figures under the keys by which they are known; null where there is none."""
    agentflow = next(
        participant.tasks_per_s for participant in participants if participant.name == _AGENTFLOW
    )
    return {
        "ratio_best_peer": _rounded(_ratio(agentflow, best_peer(participants, RECORDED)), 2),
        "ratio_best_peer_unrecorded": _rounded(_ratio(agentflow, best_peer(participants, UNRECORDED)), 2),
        **{participant.key: _rounded(participant.tasks_per_s) for participant in participants},
        "cores": cores(),
        "runs": runs,
    }


def best_peer(participants: Sequence[Participant], way: str) -> float | None:
    """The rate of the fastest peer in that way, or None when not every peer has one."""
    rates = [who.tasks_per_s for who in participants if who.name != _AGENTFLOW and who.way == way]
    known = [rate for rate in rates if rate is not None]
    return max(known) if known and len(known) == len(rates) else None


def comparison_table(participants: Sequence[Participant]) -> Table:
    """A row for each name, with what it gave in either way, failed ones included."""
    title = "No-op tasks per second, first submit to last completion: median, and the runs"
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("who", style="bold", no_wrap=True)
    table.add_column("recorded:\noutcomes stored\nand read", justify="right")
    table.add_column("unrecorded:\nbody ran,\nresults off", justify="right")
    table.add_column("durability", overflow="fold")
    for name in dict.fromkeys(participant.name for participant in participants):
        cells = {who.way: _cell(who) for who in participants if who.name == name}
        failed = any(who.error is not None for who in participants if who.name == name)
        row = (name, cells.get(RECORDED, "-"), cells.get(UNRECORDED, "-"), _DURABILITY[name])
        table.add_row(*row, style="red" if failed else None)
    return table


def _run_once(participant: Participant) -> str:
    try:
        sample = participant.run()
    except RunFailedError as error:
        participant.error = str(error)
        return f"{participant.label} FAILED: {error}"
    participant.samples.append(sample)
    return f"{participant.label} {sample.tasks_per_s:,.0f} tasks/s over {sample.tasks:,} tasks"


def _cell(participant: Participant) -> str:
    rate = participant.tasks_per_s
    if rate is None:
        return "ERROR"
    runs = " ".join(f"{sample.tasks_per_s:,.0f}" for sample in participant.samples)
    return f"{rate:,.0f}\n({runs})"


def _settings_or_error(participant: Participant) -> str:
    if participant.error is not None:
        return f"ERROR: {participant.error}"
    return participant.samples[0].settings


def _agentflow_run(tasks: int) -> Callable[[], Sample]:
    def run() -> Sample:
        found = _run_module("tests.bench.noop", "--tasks", str(tasks), "--runs", "1", "--json")
        return Sample(tasks, _number(found, _AGENTFLOW_KEY), _AGENTFLOW_SETTINGS, {})

    return run


def _peer_run(peer: str, way: str, tasks: int | None) -> Callable[[], Sample]:
    asked = () if tasks is None else ("--tasks", str(tasks))

    def run() -> Sample:
        found = _run_module("tests.bench.peers", peer, way, *asked)
        done = int(_number(found, "tasks"))
        return Sample(done, done / _number(found, "seconds"), found["settings"], found["versions"])

    return run


def _run_module(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module` and return the JSON object in its last line."""
    argv = (sys.executable, "-m", module, *arguments)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(argv, cwd=_REPOSITORY, stdout=output, stderr=errors)
        try:
            status = process.wait(_RUN_LIMIT_S)
        except subprocess.TimeoutExpired:
            message = f"python -m {module} had not ended after {_RUN_LIMIT_S:.0f} s"
            raise RunFailedError(message) from None
        finally:
            end(process)
        output.seek(0)
        errors.seek(0)
        if status != 0:
            message = f"python -m {module} ended with status {status}: {_tail(errors.read())}"
            raise RunFailedError(message)
        return _last_object(module, output.read())


def _last_object(module: str, output: str) -> dict[str, Any]:
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        found = None
    if not isinstance(found, dict):
        message = f"python -m {module} should end with a JSON object, but ended with {_tail(output)!r}"
        raise RunFailedError(message)
    return found


def _number(found: Mapping[str, Any], key: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        message = f"expected a positive number under {key!r}, found {value!r}"
        raise RunFailedError(message)
    return float(value)


def _tail(text: str) -> str:
    return text.strip()[-_OUTPUT_TAIL_CHARACTERS:]


def _versions(participants: Sequence[Participant]) -> dict[str, str]:
    """The versions that the runs themselves reported."""
    return {
        name: version
        for who in participants
        for sample in who.samples
        for name, version in sample.versions.items()
    }


def _ratio(rate: float | None, best: float | None) -> float | None:
    return None if rate is None or best is None else rate / best


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_peers", description=__doc__)
    parser.add_argument("--tasks", type=_positive, help="for each peer, instead of its own number")
    parser.add_argument(
        "--agentflow-tasks", type=_positive, default=_AGENTFLOW_TASKS, help="default %(default)s"
    )
    parser.add_argument("--runs", type=_positive, default=3, help="interleaved rounds, default %(default)s")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the JSON object only")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        message = f"expected a positive whole number, found {text}"
        raise argparse.ArgumentTypeError(message)
    return value


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit("ended by SIGTERM")


if __name__ == "__main__":
    sys.exit(main())
