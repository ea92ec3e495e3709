"""No-op tasks per second of AgentFlow and of its peers, on this machine, in one run.

    python -m tests.bench.bench_peers [--tasks N] [--agentflow-tasks N] [--runs 3] [--json]

From before the first submit until the last completion is known, client, workers and broker all
on this machine. Each participant has the settings that were fastest by hand; why is told in
its module under `peers`. The rounds are interleaved, so that a busy minute on the machine does
not fall on one of them alone, and the median counts. Every run has fresh processes, a fresh
broker and a warm-up.

The peers store no results and do not sync to disk before they acknowledge; AgentFlow records
three events a task and syncs them. The comparison is to their advantage, on purpose.

Prints a table, and as the last line one JSON object. A participant that fails once has no figure,
gets a row that says why, and makes the exit status 1; the ratio is then null, since the
best peer is not known.
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

_REPOSITORY: Final = Path(__file__).parents[2]
_RUN_LIMIT_S: Final = 300.0
_OUTPUT_TAIL_CHARACTERS: Final = 600
_AGENTFLOW: Final = "agentflow"
_AGENTFLOW_TASKS: Final = 200_000
_AGENTFLOW_KEY: Final = "noop_tasks_per_s"
_AGENTFLOW_SETTINGS: Final = (
    "client, leader, one worker with 8 slots; three durable events a task,"
    " nats-server with sync_interval always"
)
_FSYNC: Final = (
    "agentflow: sync_interval always; taskiq-nats: JetStream default, every 2 min;"
    " Redis (celery, dramatiq): none (no snapshots, no append-only file); dask: nothing durable"
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
    """One row of the comparison and what is known of it so far; `run` raises RunFailedError."""

    name: str
    run: Callable[[], Sample]
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None

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
        Participant(_AGENTFLOW, _agentflow_run(arguments.agentflow_tasks)),
        *(Participant(peer, _peer_run(peer, arguments.tasks)) for peer in PEERS),
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
            line = f"{participant.name}: {_settings_or_error(participant)}"
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
                    progress.update(bar, description=f"round {number}: {participant.name}")
                    line = f"round {number} of {rounds}: {_run_once(participant)}"
                    console.print(line, highlight=False, markup=False)
                progress.advance(bar)


def figures(participants: Sequence[Participant], runs: int) -> dict[str, float | int | None]:
    """The figures under the keys by which they are known; null where there is none."""
    rates = {
        f"{participant.name}_tasks_per_s": _rounded(participant.tasks_per_s) for participant in participants
    }
    ratio = _ratio(_rate_of(participants, _AGENTFLOW), best_peer(participants))
    return {"ratio_best_peer": _rounded(ratio, 2), **rates, "cores": cores(), "runs": runs}


def best_peer(participants: Sequence[Participant]) -> float | None:
    """The rate of the fastest peer, or None when not every peer has one."""
    rates = [participant.tasks_per_s for participant in participants if participant.name != _AGENTFLOW]
    known = [rate for rate in rates if rate is not None]
    return max(known) if known and len(known) == len(rates) else None


def comparison_table(participants: Sequence[Participant]) -> Table:
    """A row for each participant, a failed one included."""
    table = Table(title="No-op tasks per second, first submit to last completion", title_justify="left")
    table.add_column("who", style="bold", no_wrap=True)
    for heading in ("tasks", "median tasks/s", "runs", "x best peer"):
        table.add_column(heading, justify="right")
    best = best_peer(participants)
    for participant in participants:
        table.add_row(*_row(participant, best), style="red" if participant.error is not None else None)
    return table


def _run_once(participant: Participant) -> str:
    try:
        sample = participant.run()
    except RunFailedError as error:
        participant.error = str(error)
        return f"{participant.name} FAILED: {error}"
    participant.samples.append(sample)
    return f"{participant.name} {sample.tasks_per_s:,.0f} tasks/s over {sample.tasks:,} tasks"


def _row(participant: Participant, best: float | None) -> tuple[str, ...]:
    runs = "\n".join(f"{sample.tasks_per_s:,.0f}" for sample in participant.samples) or "-"
    tasks = f"{participant.samples[0].tasks:,}" if participant.samples else "-"
    rate = participant.tasks_per_s
    if rate is None:
        return participant.name, tasks, "ERROR", runs, "-"
    ratio = _ratio(rate, best)
    shown = "-" if ratio is None else f"{ratio:.2f}"
    return participant.name, tasks, f"{rate:,.0f}", runs, shown


def _settings_or_error(participant: Participant) -> str:
    if participant.error is not None:
        return f"ERROR: {participant.error}"
    return participant.samples[0].settings


def _agentflow_run(tasks: int) -> Callable[[], Sample]:
    def run() -> Sample:
        found = _run_module("tests.bench.noop", "--tasks", str(tasks), "--runs", "1", "--json")
        return Sample(tasks, _number(found, _AGENTFLOW_KEY), _AGENTFLOW_SETTINGS, {})

    return run


def _peer_run(peer: str, tasks: int | None) -> Callable[[], Sample]:
    asked = () if tasks is None else ("--tasks", str(tasks))

    def run() -> Sample:
        found = _run_module("tests.bench.peers", peer, *asked)
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


def _rate_of(participants: Sequence[Participant], name: str) -> float | None:
    return next(participant.tasks_per_s for participant in participants if participant.name == name)


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
