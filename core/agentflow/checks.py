"""What the contract asks of an event beyond its types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, Final

from msgspec import Struct

from agentflow import ids, wire
from agentflow.events import (
    Event,
    EventRejected,
    LeaderElected,
    LockAcquired,
    LockLost,
    LockOpened,
    LockReleased,
    MasterJoined,
    MasterLeft,
    Needs,
    ObjectRef,
    PolicyChanged,
    Reason,
    Retry,
    TaskAssigned,
    TaskCancelRequested,
    TaskCompleted,
    TaskFailed,
    TaskReprioritized,
    TaskSubmitted,
    Work,
    WorkerDrainRequested,
    WorkerJoined,
    WorkflowCancelRequested,
    WorkflowPart,
    WorkflowSubmitted,
    WorkflowTask,
)
from agentflow.limits import (
    ATTEMPTS_MAX,
    DEPTH_MAX,
    FUNCTIONS_MAX,
    INTEGER_MAX,
    LABELS_MAX,
    LOCK_NAME_LENGTH_MAX,
    NON_RETRYABLE_MAX,
    PERMITS_MAX,
    PRIORITIES,
    PRIORITY_MAX,
    SCRIPT_LENGTH_MAX,
    SECONDS_MAX,
    TAIL_LENGTH_MAX,
    TEXT_LENGTH_MAX,
    WORKFLOW_PARTS_MAX,
)

STRATEGIES: Final = ("least_loaded", "round_robin", "random", "bin_packing")
LOCK_MODES: Final = ("exclusive", "shared", "semaphore")
_TTL_S_MAX: Final = 86_400
_RESOURCE_MAX: Final = 1_000_000_000
_FACTOR_MAX: Final = 1_000.0
_DIGEST_LENGTH: Final = 64
_POLICY_VERSION_MAX: Final = 10**9 - 1


class Bad(Struct, frozen=True, gc=False):
    """What is wrong with an event or a message."""

    reason: Reason
    detail: str
    id: str = ""
    """The id it gave, as far as it could be read."""


def unsound(value: Any, room: int, *, duplicated: type | None = None) -> Reason | None:
    """Why a decoded JSON value breaks the limits on nesting, numbers and text; None if it does not.

    `room` is how many levels of arrays and objects may still open. `duplicated` marks
    objects that had a key twice.
    """
    kind = type(value)
    if kind is str:
        return None if "\0" not in value and _is_utf8(value) else Reason.BAD_TEXT
    if kind is int:
        return None if -INTEGER_MAX <= value <= INTEGER_MAX else Reason.BAD_NUMBER
    if kind is float:
        return None if value - value == 0.0 else Reason.BAD_NUMBER  # not for inf and nan
    if kind is bool or value is None:
        return None
    if room == 0:
        return Reason.TOO_DEEP
    if kind is duplicated:
        return Reason.DUPLICATE_KEY
    if kind is list:
        return _first_unsound(value, room - 1, duplicated)
    return _first_unsound(value, room - 1, duplicated) or _first_unsound(value.values(), room - 1, duplicated)


def _first_unsound(values: Any, room: int, duplicated: type | None) -> Reason | None:
    for value in values:
        reason = unsound(value, room, duplicated=duplicated)
        if reason is not None:
            return reason
    return None


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def priority_of(priority: int | str) -> int:
    """A priority by number or name as a number. Raises KeyError for an unknown name."""
    return priority if isinstance(priority, int) else PRIORITIES[priority]


@singledispatch
def _check(event: Any) -> Bad | None:  # noqa: ARG001 - kinds without a check of their own
    return None


def check(event: Event) -> Bad | None:
    """What is wrong with a decoded event; None if nothing is."""
    # The three kinds that most events are of, without looking for the function that checks them.
    kind = type(event)
    if kind is TaskSubmitted:
        return _check_submitted(event)  # type: ignore[arg-type] # mypy does not narrow by `kind is`
    if kind is TaskAssigned:
        return _check_assigned(event)  # type: ignore[arg-type]
    if kind is TaskCompleted:
        return _check_completed(event)  # type: ignore[arg-type]
    return _check(event)


def _bad_value(field: str, expected: str, found: object) -> Bad:
    return Bad(Reason.BAD_VALUE, f"{field}: expected {expected}, found {str(found)[:80]!r}")


def _bad_id(field: str, found: str) -> Bad:
    expected = "1 to 128 of A-Z a-z 0-9 _ -, not beginning with 'at-'"
    return Bad(Reason.BAD_ID, f"{field}: expected {expected}, found {found[:80]!r}")


def _check_submitted(event: TaskSubmitted) -> Bad | None:
    if event.id and not ids.is_id(event.id):
        return _bad_id("id", event.id)
    if event.notify and not wire.is_name(event.notify):
        return _bad_value("notify", "1 to 64 of A-Z a-z 0-9 _ -", event.notify)
    return _check_work(event, DEPTH_MAX - 1)


def _check_work(work: Work, room: int) -> Bad | None:
    if (work.function != "") + (work.shell != "") + bool(work.argv) != 1:
        found = [name for name in ("function", "shell", "argv") if getattr(work, name)]
        return _bad_value("what to run", "exactly one of function, shell and argv", found or "none")
    for value in (work.args, work.kwargs, work.argv, work.env):
        if value:
            reason = unsound(value, room)
            if reason is not None:
                return Bad(reason, "in args, kwargs, argv or env")
    if len(work.title) > TEXT_LENGTH_MAX or len(work.function) > TEXT_LENGTH_MAX:
        return _bad_value("title and function", f"at most {TEXT_LENGTH_MAX} characters", "more")
    if work.shell or work.argv or work.env or work.cwd:
        bad = _check_process(work)
        if bad is not None:
            return bad
    return _check_terms(work)


def _check_process(work: Work) -> Bad | None:
    if len(work.shell) > SCRIPT_LENGTH_MAX or len(work.cwd) > TEXT_LENGTH_MAX:
        return _bad_value(
            "shell and cwd", f"at most {SCRIPT_LENGTH_MAX} and {TEXT_LENGTH_MAX} characters", "more"
        )
    for name in work.env:
        if not name or "=" in name:
            return _bad_value("env", "names without '='", name)
    if work.shell and (work.args or work.kwargs):
        return _bad_value("args and kwargs", "none with a shell script: pass values in env", "some")
    return None


def _check_terms(work: Work) -> Bad | None:
    priority = work.priority
    if isinstance(priority, str):
        if priority not in PRIORITIES:
            return _bad_value("priority", f"0 to {PRIORITY_MAX} or one of {', '.join(PRIORITIES)}", priority)
    elif not 0 <= priority <= PRIORITY_MAX:
        return _bad_value("priority", f"0 to {PRIORITY_MAX}", priority)
    if not (0.0 <= work.timeout_s <= SECONDS_MAX and 0.0 <= work.queue_timeout_s <= SECONDS_MAX):
        return _bad_value("timeouts", f"0 to {SECONDS_MAX:.0f} s", (work.timeout_s, work.queue_timeout_s))
    if len(work.lock) > LOCK_NAME_LENGTH_MAX:
        return _bad_value("lock", f"at most {LOCK_NAME_LENGTH_MAX} characters", "more")
    if work.needs is None and work.retry is None and work.object is None:
        return None
    return _check_needs(work.needs) or _check_retry(work.retry) or _check_object(work.object)


def _check_needs(needs: Needs | None) -> Bad | None:
    if needs is None:
        return None
    if not _are_amounts(needs.cpu, needs.memory_mb, needs.gpus):
        return _bad_value("needs", f"amounts from 0 to {_RESOURCE_MAX}", needs)
    return _check_labels(needs.group, needs.labels)


def _are_amounts(*amounts: float) -> bool:
    return all(0 <= amount <= _RESOURCE_MAX for amount in amounts)


def _check_labels(group: str, labels: Mapping[str, str]) -> Bad | None:
    if len(labels) > LABELS_MAX or len(group) > TEXT_LENGTH_MAX:
        return _bad_value("group and labels", f"at most {LABELS_MAX} labels", len(labels))
    for name, value in labels.items():
        if len(name) > TEXT_LENGTH_MAX or len(value) > TEXT_LENGTH_MAX:
            return _bad_value("labels", f"at most {TEXT_LENGTH_MAX} characters", name)
    return None


def _check_retry(retry: Retry | None) -> Bad | None:
    if retry is None:
        return None
    if not 1 <= retry.max_attempts <= ATTEMPTS_MAX:
        return _bad_value("retry.max_attempts", f"1 to {ATTEMPTS_MAX}", retry.max_attempts)
    if not (0 <= retry.backoff_s <= SECONDS_MAX and 0 <= retry.backoff_s_max <= SECONDS_MAX):
        return _bad_value(
            "retry.backoff_s", f"0 to {SECONDS_MAX:.0f}", (retry.backoff_s, retry.backoff_s_max)
        )
    if not (1 <= retry.backoff_factor <= _FACTOR_MAX and 0 <= retry.jitter <= 1):
        return _bad_value(
            "retry", f"factor 1 to {_FACTOR_MAX:.0f}, jitter 0 to 1", (retry.backoff_factor, retry.jitter)
        )
    if len(retry.non_retryable) > NON_RETRYABLE_MAX:
        return _bad_value("retry.non_retryable", f"at most {NON_RETRYABLE_MAX}", len(retry.non_retryable))
    return None


def _check_object(ref: ObjectRef | None) -> Bad | None:
    if ref is None or (ids.is_id(ref.name) and ref.size >= 0 and len(ref.sha256) == _DIGEST_LENGTH):
        return None
    return _bad_value("object", "a name, a size and the hex sha256", ref)


def _check_tasks(tasks: Sequence[WorkflowTask]) -> Bad | None:
    for task in tasks:
        if not ids.is_id(task.task_id):
            return _bad_id("task_id", task.task_id)
        bad = _check_work(task, DEPTH_MAX - 3)
        if bad is not None:
            return Bad(bad.reason, f"task {task.task_id}: {bad.detail}")
    return None


@_check.register
def _(event: WorkflowSubmitted) -> Bad | None:
    if event.id and not ids.is_id(event.id):
        return _bad_id("id", event.id)
    if event.notify and not wire.is_name(event.notify):
        return _bad_value("notify", "1 to 64 of A-Z a-z 0-9 _ -", event.notify)
    if not 0 <= event.parts <= WORKFLOW_PARTS_MAX:
        return _bad_value("parts", f"0 to {WORKFLOW_PARTS_MAX}", event.parts)
    if len(event.name) > TEXT_LENGTH_MAX or len(event.description) > TEXT_LENGTH_MAX:
        return _bad_value("name and description", f"at most {TEXT_LENGTH_MAX} characters", "more")
    return _check_tasks(event.tasks)


@_check.register
def _(event: WorkflowPart) -> Bad | None:
    if not ids.is_id(event.workflow):
        return _bad_id("workflow", event.workflow)
    if not 0 <= event.part < WORKFLOW_PARTS_MAX:
        return _bad_value("part", f"0 to {WORKFLOW_PARTS_MAX - 1}", event.part)
    return _check_tasks(event.tasks)


@_check.register(TaskCancelRequested)
@_check.register(WorkflowCancelRequested)
def _(event: TaskCancelRequested | WorkflowCancelRequested) -> Bad | None:
    if len(event.reason) > TEXT_LENGTH_MAX:
        return _bad_value("reason", f"at most {TEXT_LENGTH_MAX} characters", "more")
    return _check_target(event.id)


@_check.register
def _(event: TaskReprioritized) -> Bad | None:
    if isinstance(event.priority, str) and event.priority not in PRIORITIES:
        return _bad_value("priority", f"one of {', '.join(PRIORITIES)}", event.priority)
    if isinstance(event.priority, int) and not 0 <= event.priority <= PRIORITY_MAX:
        return _bad_value("priority", f"0 to {PRIORITY_MAX}", event.priority)
    return _check_target(event.id)


def _check_target(target: str) -> Bad | None:
    parts = target.split(ids.TASK_SEPARATOR)
    if len(parts) <= 2 and all(map(_is_existing_id, parts)):  # noqa: PLR2004 - workflow and task
        return None
    return _bad_id("id", target)


def _is_existing_id(text: str) -> bool:
    return ids.is_id(text.removeprefix(ids.DERIVED_PREFIX))


@_check.register
def _(event: WorkerJoined) -> Bad | None:
    if not 1 <= event.slots <= _RESOURCE_MAX or not 0 <= event.ahead <= _RESOURCE_MAX:
        return _bad_value("slots and ahead", "slots from 1, ahead from 0", (event.slots, event.ahead))
    if not _are_amounts(event.cpu, event.memory_mb, event.gpus):
        found = (event.cpu, event.memory_mb, event.gpus)
        return _bad_value("resources", f"amounts from 0 to {_RESOURCE_MAX}", found)
    if len(event.functions) > FUNCTIONS_MAX:
        return _bad_value("functions", f"at most {FUNCTIONS_MAX}", len(event.functions))
    if any(len(text) > TEXT_LENGTH_MAX for text in (event.instance, event.host, *event.functions)):
        return _bad_value("instance, host and functions", f"at most {TEXT_LENGTH_MAX} characters", "more")
    return _check_labels(event.group, event.labels)


def _check_completed(event: TaskCompleted) -> Bad | None:
    if len(event.stdout) > TAIL_LENGTH_MAX or len(event.stderr) > TAIL_LENGTH_MAX:
        return _bad_value("stdout and stderr", f"at most {TAIL_LENGTH_MAX} characters", "more")
    return _check_object(event.object)


@_check.register
def _(event: TaskFailed) -> Bad | None:
    if max(len(event.stdout), len(event.stderr), len(event.traceback)) > TAIL_LENGTH_MAX:
        return _bad_value("stdout, stderr, traceback", f"at most {TAIL_LENGTH_MAX} characters", "more")
    if len(event.message) > TEXT_LENGTH_MAX or len(event.error) > TEXT_LENGTH_MAX:
        return _bad_value("message and error", f"at most {TEXT_LENGTH_MAX} characters", "more")
    return None


def _check_assigned(event: TaskAssigned) -> Bad | None:
    return _check_object(event.object)


@_check.register
def _(event: LeaderElected) -> Bad | None:
    if not wire.is_name(event.master) or event.epoch < 1 or event.level < 1:
        return _bad_value("leader.elected", "a master's name, epoch and level from 1", event)
    return None


@_check.register
def _(event: PolicyChanged) -> Bad | None:
    if event.policy.strategy not in STRATEGIES:
        return _bad_value("strategy", f"one of {', '.join(STRATEGIES)}", event.policy.strategy)
    policy = event.policy
    if policy.ageing_per_s < 0 or policy.ahead_ms < 0 or policy.decline_ms < 0 or policy.losses_max < 1:
        return _bad_value("policy", "ageing, ahead and decline from 0, losses from 1", policy)
    if not 1 <= policy.version <= _POLICY_VERSION_MAX:
        return _bad_value("policy.version", f"1 to {_POLICY_VERSION_MAX}", policy.version)
    return None


@_check.register
def _(event: EventRejected) -> Bad | None:
    if event.seq < 1:
        return _bad_value("seq", "1 or more", event.seq)
    return None


@_check.register
def _(event: WorkerDrainRequested) -> Bad | None:
    if not wire.is_name(event.worker):
        return _bad_value("worker", "a worker's name", event.worker)
    if len(event.reason) > TEXT_LENGTH_MAX:
        return _bad_value("reason", f"at most {TEXT_LENGTH_MAX} characters", "more")
    return None


@_check.register
def _(event: LockOpened) -> Bad | None:
    return None if event.generation >= 1 else _bad_value("generation", "1 or more", event.generation)


@_check.register
def _(event: LockAcquired) -> Bad | None:
    if event.mode not in LOCK_MODES:
        return _bad_value("mode", f"one of {', '.join(LOCK_MODES)}", event.mode)
    if not (1 <= event.permits <= PERMITS_MAX and 1 <= event.ttl_s <= _TTL_S_MAX):
        expected = f"permits 1 to {PERMITS_MAX}, ttl_s 1 to {_TTL_S_MAX}"
        return _bad_value("lock", expected, (event.permits, event.ttl_s))
    if sum(len(name) + len(value) for name, value in event.metadata.items()) > TEXT_LENGTH_MAX:
        return _bad_value("metadata", f"at most {TEXT_LENGTH_MAX} characters in all", "more")
    return _check_holder(event) or _check_labels("", event.metadata)


@_check.register
def _(event: LockReleased) -> Bad | None:
    return _check_holder(event)


@_check.register
def _(event: LockLost) -> Bad | None:
    if len(event.reason) > TEXT_LENGTH_MAX:
        return _bad_value("reason", f"at most {TEXT_LENGTH_MAX} characters", "more")
    return _check_holder(event)


def _check_holder(event: LockAcquired | LockReleased | LockLost) -> Bad | None:
    if not 1 <= len(event.name) <= LOCK_NAME_LENGTH_MAX:
        return _bad_value("name", f"1 to {LOCK_NAME_LENGTH_MAX} characters", event.name)
    if event.token < 1 or len(event.holder) > TEXT_LENGTH_MAX:
        return _bad_value("token and holder", f"a token from 1, at most {TEXT_LENGTH_MAX} characters", event)
    return None


@_check.register
def _(event: MasterJoined) -> Bad | None:
    if (
        event.level < 1
        or not 1 <= len(event.instance) <= TEXT_LENGTH_MAX
        or len(event.host) > TEXT_LENGTH_MAX
    ):
        return _bad_value(
            "master", f"an instance, a level from 1, at most {TEXT_LENGTH_MAX} characters", event
        )
    return None


@_check.register
def _(event: MasterLeft) -> Bad | None:
    if not 1 <= len(event.instance) <= TEXT_LENGTH_MAX:
        return _bad_value("instance", f"1 to {TEXT_LENGTH_MAX} characters", event.instance)
    return None
