"""Replay: the state, and the rows of a projection, made anew from the past; and compared with those at hand.

Two histories are compared by hashes that the database computes: each table as a whole first,
then, where they differ, ever shorter stretches, down to the first position that differs.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from agentflow.domain.fold import fold
from agentflow.domain.snapshot import state_hash
from agentflow.domain.state import Namespace, Verdict
from agentflow.errors import InvalidRequest
from agentflow.frames import judge
from agentflow.log.port import Message
from agentflow_projections.chain import START, chained
from agentflow_projections.database import Checkpoint, Database, sql
from agentflow_projections.past import TO_THE_END, Past, Progress, Until, begin_by, walk
from agentflow_projections.rows import Recorder
from agentflow_projections.seed import seed

ROWS_MAX: Final = 50_000
"""Rows that are written at once."""
_SHIFTS: Final = (16, 8, 0)
_WHOLE: Final = 62

Ask = Callable[[str, Mapping[str, Any]], Awaitable[Sequence[Sequence[Any]]]]
"""Asks a history in SQL, with parameters; the rows of the answer."""


class Replayed(Struct, frozen=True, kw_only=True):
    """What a replay came to."""

    namespace: str
    first_seq: int
    """The first message that was read."""
    seq: int
    """The last one."""
    time_ms: int
    """Log time there."""
    messages: int
    events: int
    verdicts: dict[str, int]
    """Events by what the fold made of them."""
    state: dict[str, int]
    """What the state holds, by kind."""
    hash: str
    """Digest of the state: equal for every fold of the same log."""
    seconds: float

    @property
    def events_per_s(self) -> float:
        """How fast it was."""
        return self.events / self.seconds if self.seconds else 0.0


class Difference(Struct, frozen=True, kw_only=True):
    """A table that is not what the log says."""

    table: str
    expected_rows: int
    """As the log has it."""
    found_rows: int


class Verified(Struct, frozen=True, kw_only=True):
    """How a projection compares with the log, up to a position."""

    seq: int
    tables: dict[str, int]
    """Rows by table, as the log has them."""
    differences: list[Difference]
    differs_at: int | None
    """The first position at which a row differs, is missing or too much."""
    chain: bool | None
    """Whether the projection's hash chain is that of the log; None: not compared."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and self.chain is not False


class _Counts:
    """What was read, in numbers."""

    def __init__(self) -> None:
        self.messages = 0
        self.verdicts: Counter[str] = Counter()

    def add(self, verdicts: Sequence[Verdict]) -> None:
        """One more message."""
        self.messages += 1
        for verdict in verdicts:
            self.verdicts[verdict.kind] += 1


async def replay(past: Past, *, until: Until = TO_THE_END, progress: Progress | None = None) -> Replayed:
    """Fold the past from its beginning."""
    state, counts = begin_by(past, until), _Counts()
    first_seq = state.seq + 1
    begun = time.perf_counter()

    def apply(message: Message) -> None:
        judged = judge(message.subject, message.data, message.headers)
        counts.add(fold(state, message.seq, message.time_ns, judged))
        state.ended.clear()

    await walk(past, state, apply, until=until, progress=progress)
    return Replayed(
        namespace=past.namespace,
        first_seq=first_seq,
        seq=state.seq,
        time_ms=state.clock_ms,
        messages=counts.messages,
        events=counts.verdicts.total(),
        verdicts={str(kind): count for kind, count in sorted(counts.verdicts.items())},
        state=contents(state),
        hash=state_hash(state),
        seconds=time.perf_counter() - begun,
    )


def contents(state: Namespace) -> dict[str, int]:
    """What a state holds, by kind."""
    return {
        "open tasks": len(state.tasks),
        "ready": state.queue.size,
        "running": state.running,
        "open workflows": len(state.workflows),
        "accepted tasks": state.accepted,
        "remembered ids": len(state.closed),
        "workers": len(state.workers),
        "masters": len(state.masters),
        "held locks": sum(map(len, state.locks.values())),
        "epoch": state.epoch,
    }


async def project(
    past: Past,
    database: Database,
    *,
    until: Until = TO_THE_END,
    progress: Progress | None = None,
) -> Namespace:
    """Write a past into an empty database: first what its first state knows, then what follows."""
    state = begin_by(past, until)
    begin = Checkpoint(f"past of {past.namespace}", 0, state.seq + 1, state.seq, START)
    if state.seq:
        database.commit(seed(state), begin, at_ms=state.clock_ms)
    recorder, chain = Recorder(state), START

    def apply(message: Message) -> None:
        nonlocal chain
        recorder.apply(message)
        state.ended.clear()
        chain = chained(chain, message)
        if recorder.size >= ROWS_MAX:
            commit()

    def commit() -> None:
        database.commit(recorder.take(), replace(begin, seq=state.seq, chain=chain), at_ms=state.clock_ms)

    await walk(past, state, apply, until=until, progress=progress)
    commit()
    return state


async def verify(
    past: Past, ask: Ask, *, until: Until = TO_THE_END, progress: Progress | None = None
) -> Verified:
    """Compare a projection with what the past says, from where on both know all up to where it reaches.

    Raises InvalidRequest if the two have nothing in common to be compared.
    """
    ((first_seq, found_seq, chain),) = await ask("SELECT first_seq, seq, hex(chain) FROM checkpoint", {})
    if found_seq > past.last_seq:
        raise InvalidRequest(
            f"the projection reaches to position {found_seq}, the log only to {past.last_seq}: is it another's?"
        )
    end = min(found_seq, until.seq) if until.seq is not None else found_seq
    with (
        tempfile.TemporaryDirectory(prefix="agentflow-replay-") as folder,
        Database(Path(folder) / "replay.duckdb", past.namespace) as database,
    ):
        begun = begin_by(past, replace(until, seq=end)).seq
        state = await project(past, database, until=replace(until, seq=end), progress=progress)
        low = max(begun + 1, first_seq)
        compared = await compare(asking(database), ask, low=low, high=state.seq)
        expected = database.checkpoint()
    whole = expected is not None and state.seq == found_seq and not begun and first_seq <= 1
    same_chain = expected.chain.hex().upper() == chain if whole and expected is not None else None
    return replace(compared, chain=same_chain)


def asking(database: Database) -> Ask:
    """Asks a database that is open here."""

    async def ask(query: str, parameters: Mapping[str, Any]) -> Sequence[Sequence[Any]]:
        rows: Sequence[Sequence[Any]] = database.ask(query, parameters).fetchall()
        return rows

    return ask


async def compare(expected: Ask, found: Ask, *, low: int, high: int) -> Verified:
    """Compare two histories from one position to another."""
    ours, theirs = [await _fingerprints(each, _WHOLE, low, high) for each in (expected, found)]
    tables = sorted({name for name, _ in ours} | {name for name, _ in theirs})
    differences = [
        Difference(
            table=name,
            expected_rows=ours.get((name, 0), (0, ""))[0],
            found_rows=theirs.get((name, 0), (0, ""))[0],
        )
        for name in tables
        if ours.get((name, 0)) != theirs.get((name, 0))
    ]
    return Verified(
        seq=high,
        tables={name: rows for (name, _), (rows, _) in ours.items()},
        differences=differences,
        differs_at=await _first_difference(expected, found, low, high) if differences else None,
        chain=None,
    )


async def _first_difference(expected: Ask, found: Ask, low: int, high: int) -> int:
    for shift in _SHIFTS:
        ours, theirs = [await _fingerprints(each, shift, low, high) for each in (expected, found)]
        first = min(stretch for (_, stretch), _ in set(ours.items()) ^ set(theirs.items()))
        low, high = max(low, first << shift), min(high, ((first + 1) << shift) - 1)
    return low


async def _fingerprints(ask: Ask, shift: int, low: int, high: int) -> dict[tuple[str, int], tuple[int, str]]:
    rows = await ask(sql("fingerprints.sql"), {"shift": shift, "low": low, "high": high})
    return {(table, stretch): (count, digest) for table, stretch, count, digest in rows}
