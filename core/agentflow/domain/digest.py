"""Digests of folds, at positions that all folds of a log agree on without asking each other.

Whoever folds the same log comes to the same state. So that it shows when somebody does not,
each fold takes a digest of its state at every EVERY-th message, and at the first one in each
EVERY_MS of log time, and they are compared. A digest must cost little however much is open or
remembered: counts and whatever is small go in whole, of the rest the oldest open tasks and the
ids that ended last. Numbers that count everything that ever happened (tickets, lines, tasks
accepted) tell most differences apart that lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import islice
from typing import Any, Final

import msgspec
from msgspec import Struct

from agentflow.domain.snapshot import PLAIN
from agentflow.domain.state import Namespace, Task, Worker

FORM: Final = 1
"""Raised with every change of what goes into a digest; only those of one form are compared."""
EVERY: Final = 4_096
"""Messages; a power of two."""
EVERY_MS: Final = 10_000
TASKS_MAX: Final = 500
IDS_MAX: Final = 5_000
KEPT: Final = 64
"""Digests kept, one's own and those of each other fold."""
OTHERS_MAX: Final = 64

_encode: Final = msgspec.msgpack.Encoder(order="deterministic").encode


class Digest(Struct, frozen=True, gc=False):
    """What a fold came to at a position."""

    seq: int
    hash: str


class Difference(Struct, frozen=True, omit_defaults=True):
    """Another fold of the same log came to something else."""

    other: str
    """Whose fold."""
    seq: int
    """The first of the positions compared at which they differ."""
    agreed_seq: int = 0
    """The last one before at which they were the same; 0: they never were, as far as is known."""


class Digests:
    """The digests of one fold. To be told after each message."""

    def __init__(self, state: Namespace) -> None:
        self.kept: Final[dict[int, str]] = {}
        """Hashes by position, the latest."""
        self.on_digest: Callable[[Digest], None] | None = None
        self._state = state
        self._next_ms = _after(state.clock_ms) if state.seq else 0

    def folded(self) -> None:
        """A message was folded."""
        state = self._state
        if state.seq % EVERY and state.clock_ms < self._next_ms:
            return
        self._next_ms = _after(state.clock_ms)
        if state.level > state.knows:
            return  # this fold leaves out what it does not understand
        made = Digest(state.seq, digest(state))
        self.kept[made.seq] = made.hash
        if len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        if self.on_digest is not None:
            self.on_digest(made)


def _after(clock_ms: int) -> int:
    """The beginning of the next stretch of log time."""
    return (clock_ms // EVERY_MS + 1) * EVERY_MS


def digest(state: Namespace) -> str:
    """The digest of a state."""
    parts = (
        FORM,
        [getattr(state, name) for name in _PLAIN],
        state.policy,
        list(state.masters.values()),
        [list(holdings.values()) for holdings in state.locks.values()],
        state.lock_users,
        [_worker(worker) for worker in state.workers.values()],
        _counts(state),
        [_task(task) for task in islice(state.tasks.values(), TASKS_MAX)],
        _ids(state),
    )
    return blake2b(_encode(parts), digest_size=16).hexdigest()


_PLAIN: Final = tuple(name for name in PLAIN if name not in {"server_ms", "newest", "parts_seq"})
"""Of those, what two folds that know the same agree on at any time."""


def _counts(state: Namespace) -> tuple[Any, ...]:
    queue, closed = state.queue, state.closed
    return (
        len(state.tasks),
        len(state.workflows),
        len(state.terms),
        len(state.expectations),
        len(state.cancels),
        len(state.struck),
        len(state.answers),
        len(state.announcements),
        len(state.parts),
        (queue.size, queue.tickets, queue.numbers),
        sorted(queue.depth_by_priority().items()),
        (len(closed.current), len(closed.previous), len(closed.early), closed.horizon_ms),
    )


def _worker(worker: Worker) -> tuple[Any, ...]:
    return (
        worker.name,
        worker.incarnation,
        worker.draining,
        len(worker.held),
        (worker.quick_us, worker.slow, worker.suspects),
        (worker.used_cpu, worker.used_memory_mb, worker.used_gpus),
        worker.assigned_seq,
        worker.completed,
        worker.failed,
    )


def _task(task: Task) -> tuple[Any, ...]:
    return (
        task.id,
        task.state,
        task.priority,
        (task.attempt, task.failures, task.losses),
        (task.ready_ms, task.due_ms, task.ticket, task.number),
        (task.started, task.suspect, task.stopping, task.cancel is not None),
        task.worker.incarnation if task.worker is not None else 0,
    )


def _ids(state: Namespace) -> tuple[str, str]:
    """The ids that ended last, and what is remembered of them."""
    latest = list(islice(reversed(state.closed.current.items()), IDS_MAX))
    return "\n".join(key for key, _ in latest), str(sum(packed for _, packed in latest))


class Agreement:
    """Compares the digests of one's own fold with those that others tell of theirs."""

    def __init__(self, own: dict[int, str]) -> None:
        self._own = own
        self._heard: dict[str, dict[int, str]] = {}
        self._agreed: dict[str, int] = {}
        self.differences: Final[dict[str, Difference]] = {}
        """By whose fold differs, as long as it does."""

    def hear(self, other: str, said: Digest) -> Difference | None:
        """Somebody told a digest; a difference that was not known yet."""
        if other not in self._heard and len(self._heard) >= OTHERS_MAX:
            self.forget(next(iter(self._heard)))
        heard = self._heard.setdefault(other, {})
        heard[said.seq] = said.hash
        if len(heard) > KEPT:
            del heard[min(heard)]
        return self._compare(other, said.seq)

    def reached(self, seq: int) -> list[Difference]:
        """One's own fold has a digest for a position; differences that were not known yet."""
        found = (self._compare(other, seq) for other in list(self._heard))
        return [difference for difference in found if difference is not None]

    def forget(self, other: str) -> None:
        """That fold is no more."""
        for known in (self._heard, self._agreed, self.differences):
            known.pop(other, None)

    def _compare(self, other: str, seq: int) -> Difference | None:
        own, said = self._own.get(seq), self._heard[other].get(seq)
        if own is None or said is None:
            return None
        if own == said:
            self._agreed[other] = max(seq, self._agreed.get(other, 0))
            self.differences.pop(other, None)
            return None
        if other in self.differences:
            return None
        found = self.differences[other] = Difference(other, seq, self._agreed.get(other, 0))
        return found
