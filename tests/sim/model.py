"""A second opinion: what a log says of its tasks, followed by rules of its own.

The fold says what became of each event; the model takes what was applied and asks whether it
could be, from nothing but the events before it. It shares no code with the fold.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

from msgspec import Struct, field

from agentflow.events import (
    Event,
    LeaderElected,
    LockAcquired,
    LockLost,
    LockReleased,
    Needs,
    Retry,
    TaskAssigned,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskQuarantined,
    TaskRetried,
    TaskStarted,
    TaskStop,
    TaskSubmitted,
    TaskTimedOut,
    Work,
    WorkerDrainRequested,
    WorkerJoined,
    WorkerLeft,
    WorkerLost,
    WorkflowCancelRequested,
    WorkflowSubmitted,
)
from agentflow.limits import LEVEL_FIRST

VIOLATIONS_MAX: Final = 1_000
"""More are not noted."""
LOSSES_MAX: Final = 3
_CPU_TOLERANCE: Final = 1e-6
_MS_TOLERANCE: Final = 1
_NEVER: Final = 2**62


class Check(enum.StrEnum):
    """What must hold."""

    IN_ORDER = "only what is ready is assigned"
    DEPENDENCIES = "dependencies come first"
    ATTEMPTS = "attempts count 1 to n"
    SUSPECTS = "suspects are told"
    LIVING = "assigned to the living"
    ROOM = "no worker holds more than it has room for"
    RUNNING = "outcomes are of what runs"
    CURRENT = "nothing superseded is applied"
    TAKEN_BACK = "only what runs is taken back"
    BACKS_OFF = "only what backs off is tried again"
    BACKOFF = "backoffs are kept"
    WAITING = "given up only while it waits"
    ASKED = "cancelled on request only"
    LOSSES = "quarantined for losses only"
    ONE_OUTCOME = "one outcome for each task"
    ONE_END = "a worker ends once"
    STOPS = "stops are for what runs"
    ONE_LEADER = "one leader for each epoch"
    ONE_TASK = "an id is one task"
    LEADER = "only the leader decides"
    FENCE = "the log refuses a deposed leader"
    BASIS = "a decision follows its basis"
    REPLAY = "a decision follows from what was known"
    NOWHERE = "nothing from nowhere"
    STORED = "what was acknowledged is in the log"
    COUNTS = "what was acknowledged counts"
    REFUSED = "what was refused is not in the log"
    ASSIGNED = "nothing runs that was not assigned"
    BEGUN = "nothing begins after it was taken back or cancelled"
    RUN_ONCE = "no assignment is run twice"
    EXCLUSIVE = "a lock is one holder's"
    TOKENS = "later holders of a lock have higher tokens"
    GRANTS = "a lock's tokens rise in the log"
    SAID = "suspects begin only after it was recorded"
    INPUTS = "dependencies' results are handed over"
    ENDS = "every task ends"
    AGREE = "the fold and the model agree"
    SAME = "every fold is the same"
    ONCE = "what is folded counts once"
    KNOWN = "what is applied speaks of something there is"
    REST = "the cluster comes to rest"
    PROCESSES = "no process fails"


class Where(Struct):
    """Position, log time and speaker of an event."""

    seq: int
    clock_ms: int
    actor: str
    epoch: int = 0
    decided_ms: int = 0


class Attempt(Struct):
    """From its assignment to whatever took it from its worker."""

    number: int
    incarnation: int
    worker: str
    assigned_seq: int
    suspect: bool
    started_seq: int = _NEVER
    ended_seq: int = _NEVER


class Life(Struct):
    """A task."""

    id: str
    needs: Needs
    retry: Retry | None
    submitted_seq: int
    state: str = "ready"
    """waiting (for others), backoff, ready, running, or a final state."""
    waits_for: set[str] = field(default_factory=set)
    dependents: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    failures: int = 0
    losses: int = 0
    suspect: bool = False
    cancel: bool = False
    failed_ms: int = 0
    ended_seq: int = _NEVER


class Incarnation(Struct):
    """A worker from its joining to its end."""

    worker: str
    joined: WorkerJoined
    held: dict[str, Life] = field(default_factory=dict)
    ended_seq: int = _NEVER


FINAL: Final = frozenset({"completed", "failed", "skipped", "cancelled"})


class Model:
    """Takes the applied events one after the other. What cannot be is in `violations`."""

    def __init__(self) -> None:
        self.violations: Final[list[str]] = []
        self.looked: Final[Counter[str]] = Counter()
        """What the checks looked at, by name."""
        self.seen: Final[Counter[str]] = Counter()
        """Situations."""
        self.lives: Final[dict[str, Life]] = {}
        self.flows: Final[dict[str, list[str]]] = {}
        self.incarnations: Final[dict[int, Incarnation]] = {}
        self.epoch = 0
        self._current: dict[str, int] = {}
        self._level = LEVEL_FIRST
        self._tokens: dict[str, int] = {}

    def must(self, holds: object, check: Check, *about: object) -> None:
        """One look of one check."""
        self.looked[check] += 1
        if not holds and len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(f"{check}: {' '.join(map(str, about))}")

    def take(self, event: Event, where: Where) -> None:  # noqa: C901, PLR0912 - it only routes
        """An event that the fold applied."""
        match event:
            case TaskSubmitted():
                self._submitted(event, where)
            case TaskAssigned():
                self._assigned(event, where)
            case TaskCompleted():
                self._completed(event, where)
            case TaskFailed():
                self._failed(event, where)
            case TaskStarted():
                self._started(event, where)
            case TaskDeclined():
                self._unassign(self.lives[event.id], where, "ready")
            case WorkerJoined():
                self._joined(event, where)
            case WorkerLost():
                self._lost(event.incarnation, where)
            case WorkerLeft():
                self._left(event.incarnation, where)
            case TaskRetried():
                self._retried(event, where)
            case TaskTimedOut() | TaskQuarantined() | TaskCancelled():
                self._given_up(event, where)
            case WorkflowSubmitted():
                self._flow(event, where)
            case TaskCancelRequested() | WorkflowCancelRequested():
                for life in self._asked(event.id):
                    life.cancel = True
            case TaskStop():
                self.must(self.lives[event.id].state == "running", Check.STOPS, event.id)
            case LeaderElected():
                self.must(event.epoch == self.epoch + 1, Check.ONE_LEADER, event)
                self.epoch = event.epoch
                self.seen["levels_raised"] += event.level > self._level and event.epoch > 1
                self._level = max(event.level, self._level)
                self.seen["elections"] += 1
            case WorkerDrainRequested():
                self.seen["drains_requested"] += 1
            case LockAcquired():
                self.must(event.token > self._tokens.get(event.name, 0), Check.GRANTS, event, where.seq)
                self._tokens[event.name] = event.token
                self.seen["locks_acquired"] += 1
            case LockReleased() | LockLost():
                self.seen["lock_holders_lost"] += isinstance(event, LockLost)
                self.seen["locks_released"] += isinstance(event, LockReleased)
            case _:
                pass

    # Submissions.

    def _submitted(self, event: TaskSubmitted, where: Where) -> None:
        self.must(event.id not in self.lives, Check.ONE_TASK, event.id, where.seq)
        self.lives[event.id] = _life(event.id, event, where)

    def _flow(self, event: WorkflowSubmitted, where: Where) -> None:
        self.must(event.id not in self.flows, Check.ONE_TASK, event.id, where.seq)
        self.flows[event.id] = [f"{event.id}/{task.task_id}" for task in event.tasks]
        for task in event.tasks:
            life = _life(f"{event.id}/{task.task_id}", task, where)
            life.waits_for = {f"{event.id}/{name}" for name in task.dependencies}
            life.state = "waiting" if life.waits_for else "ready"
            self.lives[life.id] = life
        for name in self.flows[event.id]:
            for needed in sorted(self.lives[name].waits_for):
                self.lives[needed].dependents.append(name)

    def _asked(self, wanted: str) -> Iterator[Life]:
        for name in self.flows.get(wanted, [wanted]):
            if self.lives[name].state not in FINAL:
                yield self.lives[name]

    # Attempts.

    def _assigned(self, event: TaskAssigned, where: Where) -> None:
        life = self.lives[event.id]
        self.must(life.state == "ready", Check.IN_ORDER, life.id, life.state, where.seq)
        self.must(not life.waits_for, Check.DEPENDENCIES, life.id, where.seq)
        self.must(event.attempt == len(life.attempts) + 1, Check.ATTEMPTS, life.id, event.attempt)
        self.must(event.suspect == life.suspect, Check.SUSPECTS, life.id, event.attempt)
        self.must(self._current.get(where.actor) == event.incarnation, Check.LIVING, life.id)
        attempt = Attempt(event.attempt, event.incarnation, where.actor, where.seq, event.suspect)
        life.attempts.append(attempt)
        life.state = "running"
        holder = self.incarnations[event.incarnation]
        holder.held[life.id] = life
        self.must(_has_room(holder), Check.ROOM, where.actor, where.seq)

    def _held(self, event: Any, where: Where) -> Attempt:
        """The attempt an applied report speaks of: the current one, and its worker's."""
        life = self.lives[event.id]
        self.must(life.state == "running", Check.RUNNING, life.id, event.kind, life.state, where.seq)
        attempt = life.attempts[-1]
        said = (event.attempt, event.incarnation, where.actor)
        holds = said == (attempt.number, attempt.incarnation, attempt.worker)
        self.must(holds, Check.CURRENT, life.id, said, attempt, where.seq)
        return attempt

    def _unassign(self, life: Life, where: Where, state: str) -> None:
        self.must(life.state == "running", Check.TAKEN_BACK, life.id, where.seq)
        attempt = life.attempts[-1]
        attempt.ended_seq = min(attempt.ended_seq, where.seq)
        self.incarnations[attempt.incarnation].held.pop(life.id, None)
        life.state = state

    def _started(self, event: TaskStarted, where: Where) -> None:
        attempt, life = self._held(event, where), self.lives[event.id]
        attempt.started_seq = min(attempt.started_seq, where.seq)
        life.suspect = life.suspect and self._is_at_stake(life)

    def _completed(self, event: TaskCompleted, where: Where) -> None:
        self._held(event, where)
        life = self.lives[event.id]
        self._unassign(life, where, "running")
        self._end(life, "completed", where)

    def _failed(self, event: TaskFailed, where: Where) -> None:
        self._held(event, where)
        life = self.lives[event.id]
        self._unassign(life, where, "ready")
        life.suspect = False
        if event.error == "stopped":
            return
        life.failures += 1
        life.failed_ms = where.clock_ms
        if self._may_retry(life, event):
            life.state = "backoff"
        else:
            self._end(life, "failed", where)

    def _may_retry(self, life: Life, event: TaskFailed) -> bool:
        retry = life.retry
        if retry is None or life.cancel or not event.retryable or event.error in retry.non_retryable:
            return False
        return life.failures + life.losses < retry.max_attempts

    def _retried(self, event: TaskRetried, where: Where) -> None:
        life = self.lives[event.id]
        self.must(life.state == "backoff", Check.BACKS_OFF, life.id, where.seq)
        if life.retry is None:
            return
        waited_ms = where.decided_ms - life.failed_ms
        shortest_ms = _shortest_wait_ms(life.retry, life.failures) - _MS_TOLERANCE
        self.must(waited_ms >= shortest_ms, Check.BACKOFF, life.id, waited_ms, shortest_ms)
        life.state = "ready"
        self.seen["retries"] += 1

    def _given_up(self, event: Any, where: Where) -> None:
        life = self.lives[event.id]
        allowed = ("ready",) if not isinstance(event, TaskCancelled) else ("ready", "waiting", "backoff")
        self.must(life.state in allowed, Check.WAITING, event.kind, life.id, life.state, where.seq)
        if isinstance(event, TaskCancelled):
            self.must(life.cancel, Check.ASKED, life.id, where.seq)
        if isinstance(event, TaskQuarantined):
            self.must(life.losses >= LOSSES_MAX, Check.LOSSES, life.id, life.losses)
        self.seen[event.kind.partition(".")[2]] += 1
        self._end(life, "cancelled" if isinstance(event, TaskCancelled) else "failed", where)

    def _end(self, life: Life, state: str, where: Where) -> None:
        self.must(life.state not in FINAL, Check.ONE_OUTCOME, life.id, life.state, where.seq)
        life.state = state
        life.ended_seq = where.seq
        for name in life.dependents:
            dependent = self.lives[name]
            if state == "completed":
                dependent.waits_for.discard(life.id)
                if not dependent.waits_for and dependent.state == "waiting":
                    dependent.state = "ready"
            elif dependent.state == "waiting" and not dependent.cancel:
                self.seen["skipped"] += 1
                self._end(dependent, "skipped", where)

    # Workers.

    def _joined(self, event: WorkerJoined, where: Where) -> None:
        before = self._current.get(where.actor)
        if before is not None:
            self._lost(before, where)
        self._current[where.actor] = where.seq
        self.incarnations[where.seq] = Incarnation(where.actor, event)

    def _gone(self, incarnation: int, where: Where) -> Sequence[Life]:
        gone = self.incarnations[incarnation]
        self.must(gone.ended_seq == _NEVER, Check.ONE_END, gone.worker, where.seq)
        gone.ended_seq = where.seq
        self._current.pop(gone.worker, None)
        return list(gone.held.values())

    def _lost(self, incarnation: int, where: Where) -> None:
        self.seen["workers_lost"] += 1
        for life in self._gone(incarnation, where):
            self._unassign(life, where, "ready")
            started = life.attempts[-1].started_seq != _NEVER
            life.losses += started
            life.suspect = not started or self._is_at_stake(life)
            self.seen["attempts_lost"] += 1

    def _left(self, incarnation: int, where: Where) -> None:
        self.seen["workers_left"] += 1
        for life in self._gone(incarnation, where):
            self._unassign(life, where, "ready")

    def _is_at_stake(self, life: Life) -> bool:
        """Whether the next loss would be its last; at level 1 that was asked of nobody."""
        return self._level == LEVEL_FIRST or life.losses >= LOSSES_MAX - 1


def _life(name: str, work: Work, where: Where) -> Life:
    return Life(name, work.needs or Needs(), work.retry, where.seq)


def _has_room(holder: Incarnation) -> bool:
    lives, has = holder.held.values(), holder.joined
    suspects = sum(life.suspect for life in lives)
    return (
        len(lives) <= has.slots + has.ahead
        and suspects <= 1
        and sum(life.needs.cpu for life in lives) <= has.cpu + _CPU_TOLERANCE
        and sum(life.needs.memory_mb for life in lives) <= has.memory_mb
        and sum(life.needs.gpus for life in lives) <= has.gpus
    )


def _shortest_wait_ms(retry: Retry, failures: int) -> int:
    """The backoff with the most favourable jitter."""
    grown = min(retry.backoff_s * retry.backoff_factor ** (failures - 1), retry.backoff_s_max)
    return int(grown * (1 - retry.jitter) * 1000)
