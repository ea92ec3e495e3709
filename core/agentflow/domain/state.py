"""What a fold knows of a namespace.

Memory is bounded by open work and by the ids remembered: a task is forgotten when it ends
(tasks of a workflow when the workflow ends), save for its id, so that a repeated
submission is recognised.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from operator import or_
from typing import Any, Final, TypeAlias

from msgspec import Struct, field

from agentflow import ids
from agentflow.domain.life import State, WorkflowState
from agentflow.domain.queue import Demand, Line, Queue
from agentflow.events import EventRejected, ObjectRef, Policy, Reason, Retry, WorkflowPart
from agentflow.limits import CLOSED_IDS_MAX, LEVEL, LEVEL_FIRST


class Terms(Struct, gc=False):
    """What many tasks have in common; kept once for all of them."""

    key: tuple[Any, ...]
    function: str
    shell: str
    cwd: str
    priority: int
    demand: Demand
    line: Line
    """Where tasks with these terms wait."""
    retry: Retry | None
    timeout_s: float
    queue_timeout_ms: int
    client: str
    notify: str
    run_key: str
    """Under which name run times are learnt."""
    digest: int
    """CRC-32 of the terms, who submitted and who is told left out."""
    only_function: bool
    """Whether a worker needs to know nothing of them but the function."""
    users: int = 0
    """Open tasks with these terms."""


class Payload(Struct, frozen=True, gc=False):
    """Arguments beyond `args`, as JSON text (empty: not given)."""

    kwargs: bytes = b""
    argv: bytes = b""
    env: bytes = b""
    object: ObjectRef | None = None
    fetch: bool = False
    """Too large for the fold: the worker reads them from the submission."""


class Result(Struct, frozen=True, gc=False):
    """A completed task's result, for those that depend on it."""

    seq: int
    index: int
    value: bytes = b""
    """JSON text; empty if it has to be read at its position."""


class Node(Struct):
    """A task's place in its workflow."""

    workflow: Workflow
    task_id: str
    waiting: int
    """Dependencies not completed yet."""
    dependents: list[Task]
    uses: tuple[str, ...] = ()
    """Task ids whose results it wants."""
    result: Result | None = None
    end_seq: int = 0
    """Position of the event that ended the task; 0 while it is open."""
    end_index: int = 0


class Task(Struct, gc=False):
    """An open task, or a task of an open workflow."""

    id: str
    terms: Terms
    seq: int
    """Position of its submission."""
    index: int
    digest: int
    args: bytes
    """JSON text of the argument list; empty: none, or to be fetched."""
    priority: int
    payload: Payload | None = None
    node: Node | None = None
    state: State = State.PENDING
    attempt: int = 0
    """Assignments so far."""
    failures: int = 0
    losses: int = 0
    ready_ms: int = 0
    """Log time at which it began to wait for a worker."""
    ticket: int = 0
    """Its valid entry in the queue; 0: it is in none."""
    worker: Worker | None = None
    quick_us: int = 0
    """Expected run time of the current attempt, if it is known and short; 0 otherwise."""
    started: bool = False
    """`task.started` of the last attempt is in the log."""
    suspect: bool = False
    """Its last worker died before saying whether it had started."""
    stopping: bool = False
    cancel: str | None = None
    """Why a client wants it cancelled."""
    due_ms: int = 0
    """End of its backoff."""
    declined: dict[int, int] | None = None
    """Incarnations that declined it, and until when they are not asked again."""
    error: str = ""
    """What the last failed attempt said."""
    order: int = 0
    """Its place among tasks whose timers are due at the same time."""
    number: int = 0
    """Tasks accepted up to this one, itself included: its name for ever, in eight bytes."""

    @property
    def awaits_first_start(self) -> bool:
        """Whether its queue timeout runs: it waits for a worker, and no attempt is known to have begun."""
        begun = self.started or self.failures or self.losses
        return self.state is State.READY and not begun and self.cancel is None

    def backs_off_until(self, due_ms: int) -> bool:
        """Whether it waits for another attempt until then, and nobody wants it cancelled."""
        return self.state is State.PENDING and self.due_ms == due_ms and self.cancel is None


Timer: TypeAlias = tuple[int, int, Task]
"""When it is due, the order and the task."""


class Workflow(Struct):
    """An open workflow."""

    id: str
    seq: int
    index: int
    digest: int
    client: str
    notify: str
    tasks: dict[str, Task]
    """By task_id."""
    open: int
    counts: dict[State, int]
    """Ended tasks by final state."""


class Worker(Struct):
    """A worker's current incarnation."""

    name: str
    incarnation: int
    slots: int
    ahead: int
    group: str
    labels: Mapping[str, str]
    cpu: float
    memory_mb: int
    gpus: int
    functions: frozenset[str]
    host: str
    joined_ms: int
    level: int = LEVEL_FIRST
    draining: bool = False
    held: dict[str, Task] = field(default_factory=dict)
    """What is assigned to it, by task id."""
    quick_us: int = 0
    """Expected run time of all it holds that is known to be short."""
    slow: int = 0
    """How much it holds of which that is not known."""
    used_cpu: float = 0.0
    used_memory_mb: int = 0
    used_gpus: int = 0
    suspects: int = 0
    assigned_seq: int = 0
    """Sequence of the last message that assigned it something."""
    completed: int = 0
    failed: int = 0


class Master(Struct, frozen=True):
    """A registered master."""

    name: str
    instance: str
    level: int
    """The highest contract level it knows."""
    host: str
    pid: int
    seq: int
    joined_ms: int


class Holding(Struct, frozen=True):
    """A lock somebody holds, as far as the log says."""

    token: int
    holder: str
    client: str
    mode: str
    permits: int
    ttl_s: int
    since_ms: int
    metadata: Mapping[str, str]


class Kind(enum.StrEnum):
    """What a fold made of an event."""

    APPLIED = "applied"
    DUPLICATE = "duplicate"
    """Known already: nothing changed."""
    SUPERSEDED = "superseded"
    """It came too late to count: recorded, nothing changed."""
    REJECTED = "rejected"
    """A client's event that was not accepted; it gets an answer."""
    QUARANTINED = "quarantined"
    """An event nobody may have said, or that makes no sense."""


class Verdict(Struct, frozen=True, gc=False):
    """What a fold made of one event."""

    kind: Kind
    reason: Reason | None = None
    detail: str = ""


APPLIED: Final = Verdict(Kind.APPLIED)
DUPLICATE: Final = Verdict(Kind.DUPLICATE)
SUPERSEDED: Final = Verdict(Kind.SUPERSEDED)


class At(Struct, gc=False):
    """Where and when an event stands in the log, and who said it."""

    seq: int
    index: int
    server_ms: int
    actor: str
    epoch: int = 0
    """Of the deciding leader; 0 for everybody else."""


class Ended(Struct, frozen=True, gc=False):
    """A task or workflow that reached a final state or was not accepted, for whoever has to be told."""

    id: str
    state: State | WorkflowState | Kind
    """A final state, or what the fold made of a submission that was not accepted."""
    client: str
    notify: str
    seq: int
    """Position of the event that ended it, or of the submission."""
    index: int
    event: Any
    """That event."""


class Closed(Struct, frozen=True, gc=False):
    """What is remembered of an ended task or workflow."""

    state: State | WorkflowState
    seq: int
    index: int
    digest: int


_CODES: Final[tuple[State | WorkflowState, ...]] = (
    State.COMPLETED,
    State.FAILED,
    State.SKIPPED,
    State.CANCELLED,
    WorkflowState.COMPLETED,
    WorkflowState.FAILED,
    WorkflowState.CANCELLED,
)
_CODE: Final[dict[tuple[type, str], int]] = {(type(state), state): code for code, state in enumerate(_CODES)}


class Memory:
    """Ids of what ended, in two generations; packed, since there may be a million.

    Its horizon is the time the older generation was begun. A UUIDv7 from before it is not
    known any more whether it was used or not; one that claims a later time is remembered
    until the horizon has passed that time too, so that none is ever taken for new again.
    """

    __slots__ = ("ahead_ms", "current", "early", "horizon_ms", "oldest", "previous", "started_ms")

    def __init__(self) -> None:
        self.current: dict[str, int] = {}
        self.previous: dict[str, int] = {}
        self.early: dict[str, int] = {}
        """UUIDv7 of generations forgotten that claim a time after the horizon."""
        self.ahead_ms = 0
        """The latest time claimed by a UUIDv7 that was ahead of the log when it was accepted."""
        self.started_ms = 0
        self.horizon_ms = 0
        self.oldest = ids.uuid7_prefix(0)
        """Beginning of a UUIDv7 made at the horizon."""

    def add(
        self, key: str, state: State | WorkflowState, at: tuple[int, int], digest: int, *, now_ms: int
    ) -> None:
        """Remember an ended id, and the position of its end. `now_ms` never goes backwards."""
        if len(self.current) >= CLOSED_IDS_MAX:
            self._begin_generation(now_ms)
        seq, index = at
        self.current[key] = ((seq << 13 | index) << 3 | _CODE[type(state), state]) << 32 | digest

    def add_all(
        self, keys: Sequence[str], state: State, seq: int, digests: Sequence[int], *, now_ms: int
    ) -> None:
        """Remember ids that ended at the indexes of one message, from 0 on."""
        if len(self.current) + len(keys) > CLOSED_IDS_MAX:
            for index, (key, digest) in enumerate(zip(keys, digests, strict=True)):
                self.add(key, state, (seq, index), digest, now_ms=now_ms)
            return
        first = (seq << 16 | _CODE[type(state), state]) << 32
        positions = range(first, first + (len(keys) << 35), 1 << 35)
        self.current.update(zip(keys, map(or_, positions, digests), strict=True))

    def _begin_generation(self, now_ms: int) -> None:
        # What ended in the same millisecond as the older generation began may be forgotten.
        self.horizon_ms = self.started_ms + 1
        self.oldest = ids.uuid7_prefix(self.horizon_ms)
        forgotten = {**self.early, **self.previous} if self.ahead_ms >= self.horizon_ms else {}
        self.early = {key: packed for key, packed in forgotten.items() if self._is_early(key)}
        self.started_ms = now_ms
        self.previous, self.current = self.current, {}

    def _is_early(self, key: str) -> bool:
        made_ms = ids.uuid7_time_ms(key)
        return made_ms is not None and made_ms >= self.horizon_ms

    def get(self, key: str) -> Closed | None:
        """What is remembered of an id."""
        packed = self.current.get(key) or self.previous.get(key) or self.early.get(key)
        if packed is None:
            return None
        rest = packed >> 32
        position = rest >> 3
        return Closed(_CODES[rest & 7], position >> 13, position & 8191, packed & 0xFFFFFFFF)

    def __len__(self) -> int:
        return len(self.current) + len(self.previous) + len(self.early)


class Namespace:
    """The state of one namespace: what `fold` changes and `plan` reads."""

    def __init__(self, name: str, *, knows: int = LEVEL) -> None:  # noqa: PLR0915 - a line for each part
        self.name = name
        self.knows = knows
        """The highest contract level this fold may follow; what is above it, it does not understand."""
        self.level = LEVEL_FIRST
        """The contract level in force: that of the last election that counts."""
        self.seq = 0
        """Everything up to this sequence is folded."""
        self.server_ms = 0
        """Server time of the last message."""
        self.clock_ms = 0
        """Log time: server time, never going backwards."""
        self.latest_ms = 0
        """The highest server time seen."""
        self.newest = ""
        """Beginning of a UUIDv7 that is ahead of the log, or was lately: an index, not part of the state."""
        self.epoch = 0
        self.leader = ""
        self.elected_seq = 0
        self.policy = Policy()
        self.masters: dict[str, Master] = {}
        self.locks: dict[str, dict[int, Holding]] = {}
        """Who holds what, by name of the lock and token."""
        self.lock_tokens: dict[str, int] = {}
        """The highest token seen of each lock, of those used last."""
        self.lock_generation = 0
        self.lock_users: dict[str, str] = {}
        """The task that runs under a lock, by its name."""
        self.accepted = 0
        """Tasks ever accepted."""
        self.tasks: dict[str, Task] = {}
        self.workflows: dict[str, Workflow] = {}
        self.workers: dict[str, Worker] = {}
        self.workers_version = 0
        """Counts changes of who is there."""
        self.last_worker = ""
        """The worker of the last assignment, for round robin."""
        self.queue = Queue()
        self.running = 0
        self.terms: dict[tuple[Any, ...], Terms] = {}
        self.unused_terms: dict[tuple[Any, ...], Terms] = {}
        """Those of `terms` that no open task has, the longest unused first."""
        self.expectations: dict[str, int] = {}
        """Learnt run time in microseconds, by function or script."""
        self.backoffs: list[Timer] = []
        """Heap of ends of backoffs."""
        self.deadlines: list[Timer] = []
        """Heap of ends of queue timeouts."""
        self.order = 0
        """Tasks that ever had a timer."""
        self.cancels: dict[str, Task] = {}
        """Tasks a client wants cancelled and the leader has not acted on."""
        self.answers: dict[tuple[int, int], EventRejected] = {}
        """Rejections not in the log yet, by position of what they answer."""
        self.struck: dict[str, Task] = {}
        """Tasks whose attempts, certainly begun, ended with their worker."""
        self.announcements: dict[str, Ended] = {}
        """Ended workflows not announced yet."""
        self.parts: list[tuple[At, WorkflowPart]] = []
        """Parts of a workflow that came directly before here."""
        self.parts_seq = 0
        self.closed = Memory()
        self.quarantined = 0
        self.rejected = 0
        self.superseded = 0
        self.ended: list[Ended] = []
        """What ended since the caller last cleared this; not part of the state."""
        self.steps: list[tuple[Task, State]] | None = None
        """Tasks that came into another state since the caller last cleared this; None: nobody asks."""

    def quick_us(self, task: Task) -> int:
        """Expected run time of a task if it is known and so short that others may wait behind it; else 0."""
        expected_us = self.expectations.get(task.terms.run_key, 0)
        return expected_us if expected_us <= self.policy.ahead_ms * 1000 else 0

    def status(self, task: str) -> tuple[str, Sequence[int]]:
        """State of a task or workflow and, once it ended, the position of its end; "unknown" otherwise."""
        known = self.tasks.get(task)
        if known is not None:
            node = known.node
            return known.state, (node.end_seq, node.end_index) if node is not None and node.end_seq else ()
        if task in self.workflows:
            return WorkflowState.RUNNING, ()
        closed = self.closed.get(task)
        return (closed.state, (closed.seq, closed.index)) if closed is not None else ("unknown", ())
