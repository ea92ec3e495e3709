"""Every event of the contract.

An event is a JSON object. Its kind and its speaker are in the subject it was published
to (`agentflow.wire`), not in the body. Absent fields have their defaults; unknown fields
are ignored. `agentflow schema` prints the JSON Schema of each.

Kinds and fields that a later level added count only in messages whose header `Af-Version`
names that level, and only while a leader of that level leads (`SINCE`).

Units are in the names: `_s` seconds, `_ms` milliseconds (since 1970 UTC where it is a
time), `_us` microseconds, `_mb` mebibytes.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, ClassVar, TypeAlias

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from agentflow.limits import INTEGER_MAX, LEVEL_FIRST

Integer: TypeAlias = Annotated[int, Meta(ge=-INTEGER_MAX, le=INTEGER_MAX)]
"""An integer that every client's language can hold."""


class _Event(Struct, frozen=True, omit_defaults=True, gc=False, kw_only=True):
    """Base of all: immutable, and written without what has its default."""


class ObjectRef(_Event, frozen=True, kw_only=True):
    """Bytes in the object store: an argument list or a result too large for the log."""

    name: str
    size: Integer
    sha256: str
    """Hex digest of the bytes."""


# What is asked for -------------------------------------------------------------------


class Needs(_Event, frozen=True, kw_only=True):
    """What a task asks of the worker it runs on."""

    cpu: float = 0.0
    """Cores, fractions allowed."""
    memory_mb: Integer = 0
    gpus: Integer = 0
    group: str = ""
    labels: dict[str, str] = {}


class Retry(_Event, frozen=True, kw_only=True):
    """What happens after a failed attempt.

    The wait before attempt n + 1 is backoff_s * backoff_factor ** (n - 1), at most
    backoff_s_max, times a factor between 1 - jitter and 1 that follows from the task's
    id and attempt.
    """

    max_attempts: Integer = 3
    backoff_s: float = 1.0
    backoff_factor: float = 2.0
    backoff_s_max: float = 300.0
    jitter: float = 0.1
    non_retryable: list[str] = []
    """Names of exception types, or error kinds, that end the task at once."""


class Work(_Event, frozen=True, kw_only=True):
    """What to run: exactly one of `function`, `shell` and `argv`.

    In the tasks of a workflow any value inside args, kwargs, env and argv may be
    {"$result": "<task_id>"} or {"$result": "<task_id>", "at": "<JSON pointer>"}: the
    worker puts the named dependency's result in its place.
    """

    function: str = ""
    """Name of a function registered at a worker."""
    shell: str = ""
    """A script for /bin/sh -e."""
    argv: list[Any] = []
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    env: dict[str, Any] = {}
    cwd: str = ""
    object: ObjectRef | None = None
    """Where {"args": [...], "kwargs": {...}} is, if it is too large for the log."""
    title: str = ""
    priority: Integer | str = 500
    """0 to 1000, or urgent, high, medium, low."""
    needs: Needs | None = None
    retry: Retry | None = None
    """None: one attempt."""
    timeout_s: float = 0.0
    """Longest one attempt may run; 0: no limit."""
    queue_timeout_s: float = 0.0
    """Longest the task may wait for its first start once it is ready; 0: no limit."""
    lock: str = ""
    """Name of a lock that is held, exclusively, while the task runs. Level 2."""


class TaskSubmitted(Work, frozen=True, kw_only=True):
    """A client hands over a task."""

    kind: ClassVar[str] = "task.submitted"
    id: str = ""
    notify: str = ""
    """Token under which the client wants to be told of the outcome."""


class WorkflowTask(Work, frozen=True, kw_only=True):
    """One task of a workflow."""

    task_id: str
    dependencies: list[str] = []


class WorkflowPart(_Event, frozen=True, kw_only=True):
    """Tasks of a workflow too large for one frame; directly before its `workflow.submitted`."""

    kind: ClassVar[str] = "workflow.part"
    workflow: str
    part: Integer
    """0, 1, 2 …"""
    tasks: list[WorkflowTask]


class WorkflowSubmitted(_Event, frozen=True, kw_only=True):
    """A client hands over a DAG of tasks."""

    kind: ClassVar[str] = "workflow.submitted"
    id: str = ""
    name: str = ""
    description: str = ""
    tasks: list[WorkflowTask] = []
    parts: Integer = 0
    """How many `workflow.part` events came directly before; their tasks come first."""
    notify: str = ""


class TaskCancelRequested(_Event, frozen=True, kw_only=True):
    """A client wants a task not to run, or to be stopped."""

    kind: ClassVar[str] = "task.cancel_requested"
    id: str
    reason: str = ""


class WorkflowCancelRequested(_Event, frozen=True, kw_only=True):
    """A client wants all open tasks of a workflow cancelled."""

    kind: ClassVar[str] = "workflow.cancel_requested"
    id: str
    reason: str = ""


class TaskReprioritized(_Event, frozen=True, kw_only=True):
    """A client gives a waiting task another priority."""

    kind: ClassVar[str] = "task.reprioritized"
    id: str
    priority: Integer | str


class WorkerDrainRequested(_Event, frozen=True, kw_only=True):
    """A client wants a worker to take nothing new, finish what it runs, and end."""

    kind: ClassVar[str] = "worker.drain_requested"
    worker: str
    reason: str = ""


# Locks: what the holders say -----------------------------------------------------------


class LockOpened(_Event, frozen=True, kw_only=True):
    """The bucket of locks is about to be created. The actor is "bucket".

    Tokens of generation g lie above g * 2**32, so they rise even if the bucket is lost.
    """

    kind: ClassVar[str] = "lock.opened"
    generation: Integer


class LockAcquired(_Event, frozen=True, kw_only=True):
    """A lock is held from here on. Said by its holder, before it does anything under it."""

    kind: ClassVar[str] = "lock.acquired"
    name: str
    token: Integer
    """Fencing token: later holders of the lock have a higher one."""
    holder: str
    mode: str = "exclusive"
    """exclusive, shared or semaphore."""
    permits: Integer = 1
    """Holders a semaphore has room for."""
    ttl_s: Integer = 10
    metadata: dict[str, str] = {}


class LockReleased(_Event, frozen=True, kw_only=True):
    """A lock is given back. Said by its holder, before it lets go."""

    kind: ClassVar[str] = "lock.released"
    name: str
    token: Integer
    holder: str = ""


class LockLost(_Event, frozen=True, kw_only=True):
    """A holder lost its lock: it fell silent, or noticed that it had been. Said by whoever noticed."""

    kind: ClassVar[str] = "lock.lost"
    name: str
    token: Integer
    holder: str = ""
    reason: str = ""


# Masters -----------------------------------------------------------------------------


class MasterJoined(_Event, frozen=True, kw_only=True):
    """A master is there and may be elected."""

    kind: ClassVar[str] = "master.joined"
    instance: str
    """Unguessable, chosen anew at each start."""
    level: Integer = LEVEL_FIRST
    host: str = ""
    pid: Integer = 0


class MasterLeft(_Event, frozen=True, kw_only=True):
    """A master ended in good order."""

    kind: ClassVar[str] = "master.left"
    instance: str


# What the leader decides -------------------------------------------------------------


class Policy(_Event, frozen=True, kw_only=True):
    """How the leader plans. Part of the fold's state."""

    version: Integer = 1
    strategy: str = "least_loaded"
    """least_loaded, round_robin, random or bin_packing."""
    ageing_per_s: float = 1.0
    """Priority a waiting task gains each second."""
    ahead_ms: Integer = 10
    """How much expected run time may wait at a worker beyond its slots, per slot."""
    losses_max: Integer = 3
    """Lost workers a task may cost before it is quarantined."""
    decline_ms: Integer = 5_000
    """How long a worker that declined a task is not offered it again."""
    accepting: bool = True
    """False while the log is nearly full: submissions are rejected as overloaded."""


class LeaderElected(_Event, frozen=True, kw_only=True):
    """A master leads from here on."""

    kind: ClassVar[str] = "leader.elected"
    epoch: Integer
    master: str
    level: Integer = LEVEL_FIRST


class PolicyChanged(_Event, frozen=True, kw_only=True):
    """Another policy holds from here on."""

    kind: ClassVar[str] = "policy.changed"
    policy: Policy


class Input(_Event, frozen=True, kw_only=True):
    """A dependency's result handed to a task: the value, or where it lies."""

    value: Raw | UnsetType = UNSET
    seq: Integer = 0
    index: Integer = 0


class TaskAssigned(_Event, frozen=True, kw_only=True):
    """A worker is to run an attempt of a task. The actor is the worker."""

    kind: ClassVar[str] = "task.assigned"
    id: str
    attempt: Integer
    incarnation: Integer
    function: str = ""
    shell: str = ""
    argv: Raw | UnsetType = UNSET
    args: Raw | UnsetType = UNSET
    kwargs: Raw | UnsetType = UNSET
    env: Raw | UnsetType = UNSET
    cwd: str = ""
    object: ObjectRef | None = None
    seq: Integer = 0
    """Where the submission lies, if its arguments have to be read there."""
    index: Integer = 0
    inputs: dict[str, Input] = {}
    timeout_s: float = 0.0
    non_retryable: list[str] = []
    suspect: bool = False
    """`task.started` must be acknowledged before the run."""
    lock: str = ""
    """Name of the lock to hold meanwhile. Level 2."""


class TaskStop(_Event, frozen=True, kw_only=True):
    """A worker is to stop an attempt. The actor is the worker."""

    kind: ClassVar[str] = "task.stop"
    id: str
    attempt: Integer
    incarnation: Integer
    reason: str = ""


class TaskRetried(_Event, frozen=True, kw_only=True):
    """The wait after a failed attempt is over: the task is ready again."""

    kind: ClassVar[str] = "task.retried"
    id: str
    attempt: Integer
    """The attempt that failed."""


class TaskTimedOut(_Event, frozen=True, kw_only=True):
    """The task waited longer than its queue timeout."""

    kind: ClassVar[str] = "task.timed_out"
    id: str


class TaskCancelled(_Event, frozen=True, kw_only=True):
    """The task is cancelled: it does not run, and no outcome of it counts any more."""

    kind: ClassVar[str] = "task.cancelled"
    id: str
    reason: str = ""


class TaskQuarantined(_Event, frozen=True, kw_only=True):
    """The leader gives the task up."""

    kind: ClassVar[str] = "task.quarantined"
    id: str
    reason: str
    detail: str = ""


class WorkerLost(_Event, frozen=True, kw_only=True):
    """A worker's incarnation is considered dead; what it held runs elsewhere."""

    kind: ClassVar[str] = "worker.lost"
    worker: str
    incarnation: Integer
    reason: str = ""


class EventRejected(_Event, frozen=True, kw_only=True):
    """The answer to a client's event that was not accepted."""

    kind: ClassVar[str] = "event.rejected"
    seq: Integer
    index: Integer
    """-1: the whole message."""
    client: str
    reason: str
    detail: str = ""
    id: str = ""
    """The id the client gave, as far as it could be read."""


class WorkflowCompleted(_Event, frozen=True, kw_only=True):
    """Announcement: a workflow reached a final state. Changes nothing."""

    kind: ClassVar[str] = "workflow.completed"
    id: str
    state: str
    completed: Integer = 0
    failed: Integer = 0
    skipped: Integer = 0
    cancelled: Integer = 0


# What workers say --------------------------------------------------------------------


class WorkerJoined(_Event, frozen=True, kw_only=True):
    """A worker is there. Its sequence in the log is the worker's incarnation."""

    kind: ClassVar[str] = "worker.joined"
    instance: str
    """Unguessable, chosen anew at each start."""
    slots: Integer
    ahead: Integer = 0
    """Assignments it is willing to hold beyond its slots."""
    group: str = ""
    labels: dict[str, str] = {}
    cpu: float = 0.0
    memory_mb: Integer = 0
    gpus: Integer = 0
    functions: list[str] = []
    host: str = ""
    pid: Integer = 0
    level: Integer = LEVEL_FIRST


class WorkerDraining(_Event, frozen=True, kw_only=True):
    """The worker takes nothing new."""

    kind: ClassVar[str] = "worker.draining"
    incarnation: Integer


class WorkerLeft(_Event, frozen=True, kw_only=True):
    """The worker ended in good order; what it still held goes back to the queue."""

    kind: ClassVar[str] = "worker.left"
    incarnation: Integer


class TaskStarted(_Event, frozen=True, kw_only=True):
    """An attempt runs. Written for suspects and for attempts that take a while."""

    kind: ClassVar[str] = "task.started"
    id: str
    attempt: Integer
    incarnation: Integer
    started_at_ms: Integer


class TaskCompleted(_Event, frozen=True, kw_only=True):
    """An attempt succeeded."""

    kind: ClassVar[str] = "task.completed"
    id: str
    attempt: Integer
    incarnation: Integer
    started_at_ms: Integer = 0
    run_us: Integer = 0
    result: Raw | UnsetType = UNSET
    """Any JSON; absent: null."""
    object: ObjectRef | None = None
    """Where the result is, if it is too large for the log."""
    stdout: str = ""
    stderr: str = ""
    """Tails."""


class TaskFailed(_Event, frozen=True, kw_only=True):
    """An attempt failed."""

    kind: ClassVar[str] = "task.failed"
    id: str
    attempt: Integer
    incarnation: Integer
    error: str
    """What kind of failure: error, timeout, stopped, exit, signal, spawn, result, crash, input, lock_lost."""
    message: str = ""
    retryable: bool = True
    started_at_ms: Integer = 0
    run_us: Integer = 0
    traceback: str = ""
    stdout: str = ""
    stderr: str = ""


class TaskDeclined(_Event, frozen=True, kw_only=True):
    """The worker cannot run an attempt it was given, or was asked not to."""

    kind: ClassVar[str] = "task.declined"
    id: str
    attempt: Integer
    incarnation: Integer
    reason: str = ""


Event = (
    TaskSubmitted
    | TaskAssigned
    | TaskCompleted
    | TaskFailed
    | TaskStarted
    | TaskDeclined
    | WorkflowSubmitted
    | WorkflowPart
    | TaskCancelRequested
    | WorkflowCancelRequested
    | TaskReprioritized
    | WorkerDrainRequested
    | LockOpened
    | LockAcquired
    | LockReleased
    | LockLost
    | MasterJoined
    | MasterLeft
    | TaskStop
    | TaskRetried
    | TaskTimedOut
    | TaskCancelled
    | TaskQuarantined
    | WorkerJoined
    | WorkerDraining
    | WorkerLeft
    | WorkerLost
    | LeaderElected
    | PolicyChanged
    | EventRejected
    | WorkflowCompleted
)


class Role(enum.StrEnum):
    """Who may say an event."""

    CLIENT = "client"
    LEADER = "leader"
    MASTER = "master"
    WORKER = "worker"


_SAID_BY: dict[Role, tuple[type[Event], ...]] = {
    Role.CLIENT: (
        TaskSubmitted,
        WorkflowPart,
        WorkflowSubmitted,
        TaskCancelRequested,
        WorkflowCancelRequested,
        TaskReprioritized,
        WorkerDrainRequested,
        LockOpened,
        LockAcquired,
        LockReleased,
        LockLost,
    ),
    Role.MASTER: (
        MasterJoined,
        MasterLeft,
    ),
    Role.LEADER: (
        LeaderElected,
        PolicyChanged,
        TaskAssigned,
        TaskStop,
        TaskRetried,
        TaskTimedOut,
        TaskCancelled,
        TaskQuarantined,
        WorkerLost,
        EventRejected,
        WorkflowCompleted,
    ),
    Role.WORKER: (
        WorkerJoined,
        WorkerDraining,
        WorkerLeft,
        TaskStarted,
        TaskCompleted,
        TaskFailed,
        TaskDeclined,
    ),
}

KINDS: dict[str, type[Event]] = {event.kind: event for events in _SAID_BY.values() for event in events}
"""Every kind of event, by its name in the subject."""

ROLES: dict[str, Role] = {event.kind: role for role, events in _SAID_BY.items() for event in events}
"""Who says each kind."""

SINCE: dict[str, int] = dict.fromkeys(KINDS, LEVEL_FIRST) | {
    event.kind: 2
    for event in (
        WorkerDrainRequested,
        LockOpened,
        LockAcquired,
        LockReleased,
        LockLost,
        MasterJoined,
        MasterLeft,
    )
}
"""The contract level that added each kind."""


class Reason(enum.StrEnum):
    """Why an event was not accepted."""

    NOT_JSON = "not_json"
    NOT_A_FRAME = "not_a_frame"
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    DUPLICATE_KEY = "duplicate_key"
    BAD_NUMBER = "bad_number"
    BAD_TEXT = "bad_text"
    BAD_TYPE = "bad_type"
    BAD_ID = "bad_id"
    BAD_VALUE = "bad_value"
    BAD_DAG = "bad_dag"
    BAD_SUBJECT = "bad_subject"
    UNKNOWN_KIND = "unknown_kind"
    UNKNOWN_VERSION = "unknown_version"
    UNFENCED = "unfenced"
    CONFLICT = "conflict"
    TOO_OLD = "too_old"
    FROM_THE_FUTURE = "from_the_future"
    UNKNOWN_ID = "unknown_id"
    CLOSED = "closed"
    OVERLOADED = "overloaded"
