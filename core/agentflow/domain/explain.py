"""Why a task waits, and why it goes where it goes.

Nothing is decided here. A plan is made again, on the state and the log time it was made on
once, with somebody looking on: what is told is what the strategy saw when it came to the task.
So an explanation cannot come to another result than the plan.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Final

from msgspec import Struct

from agentflow.domain.life import FINAL, State
from agentflow.domain.plan import Silence, plan
from agentflow.domain.policies import LOCKS_SINCE, Room, Strategy, eligible
from agentflow.domain.queue import Demand, Line
from agentflow.domain.state import Namespace, Task, Worker
from agentflow.events import Policy, TaskAssigned

NAMED_MAX: Final = 20
"""Most tasks named where many wait for the same."""


class Cause(enum.StrEnum):
    """Why a task does not run now."""

    NONE = "none"
    """It runs, or has ended."""
    DUE = "due"
    """Nothing keeps it: the leader's next plan assigns it."""
    NO_LEADER = "no leader"
    DEPENDENCIES = "dependencies"
    BACKOFF = "backoff"
    CANCEL = "cancel"
    """It is to be cancelled; the leader has not confirmed that yet."""
    UNFIT = "no worker fits"
    """No worker could run it, were it idle."""
    LOCK = "lock"
    BUSY = "workers busy"
    QUEUE = "queue"
    """Others of its kind come first, and for those there is no room either."""


class Candidate(Struct, frozen=True, kw_only=True):
    """A worker, as the plan saw it when it came to the task."""

    worker: str
    incarnation: int
    slots: int
    held: int
    """Tasks it held, those included that the same plan had given it before."""
    load: float
    """Tasks held for each slot."""
    refused: list[str] = []
    """Why it could not take the task; empty: it could."""


class Ahead(Struct, frozen=True, kw_only=True):
    """How many come before a task in the queue, and why."""

    priority: int = 0
    """Of a higher priority."""
    ageing: int = 0
    """Of a lower priority, but waiting so long that they come first."""
    earlier: int = 0
    """Of the same priority, and there before."""
    alike: int = 0
    """How many of all these ask for the same as the task does."""

    @property
    def count(self) -> int:
        """All of them."""
        return self.priority + self.ageing + self.earlier


class Waiting(Struct, frozen=True, kw_only=True):
    """Why a task does not run now."""

    cause: Cause
    text: str
    """The cause in a sentence."""
    state: str
    since_ms: int = 0
    """Log time from which on it has been ready; 0: it is not."""
    until_ms: int = 0
    """Log time at which the cause ends by itself; 0: not known."""
    dependencies: list[str] = []
    """Those not completed yet, with their states."""
    ahead: Ahead | None = None
    candidates: list[Candidate] = []


class Placement(Struct, frozen=True, kw_only=True):
    """Why an attempt went to a worker."""

    worker: str
    """Where the plan made again sends it; empty: nowhere."""
    strategy: str
    text: str
    ahead: Ahead
    candidates: list[Candidate]


def lacks(demand: Demand, worker: Worker) -> list[str]:
    """What a worker lacks to run such tasks, were it idle; empty exactly if it is `eligible`."""
    found = []
    if demand.function and demand.function not in worker.functions:
        found.append(f"does not know {demand.function}")
    if demand.group and demand.group != worker.group:
        found.append(f"is of group {worker.group or '(none)'}, not {demand.group}")
    for name, value in demand.labels:
        if worker.labels.get(name) != value:
            found.append(f"has {name}={worker.labels.get(name, '(nothing)')}, not {value}")
    amounts = (
        ("cpu", demand.cpu, worker.cpu),
        ("MiB of memory", demand.memory_mb, worker.memory_mb),
        ("gpus", demand.gpus, worker.gpus),
    )
    found += [f"has {has:g} {unit}, not {wanted:g}" for unit, wanted, has in amounts if wanted > has]
    if demand.lock and worker.level < LOCKS_SINCE:
        found.append(f"knows level {worker.level}; locks are of level {LOCKS_SINCE}")
    return [] if eligible(demand, worker) else found


def why_waits(state: Namespace, task: Task, now_ms: int) -> Waiting:
    """Why a task does not run at log time `now_ms`, on this state."""
    if task.state in FINAL or task.state is State.RUNNING:
        return Waiting(cause=Cause.NONE, text=f"it is {task.state}", state=task.state)
    if task.cancel is not None:
        text = f"it is to be cancelled ({task.cancel}); the leader confirms that next"
        return Waiting(cause=Cause.CANCEL, text=text, state=task.state)
    if task.state is State.PENDING:
        return _why_pending(task)
    if not state.epoch:
        return Waiting(
            cause=Cause.NO_LEADER,
            text="no leader was ever elected: start a master",
            state=task.state,
            since_ms=task.ready_ms,
        )
    return _why_ready(state, task, now_ms)


def _why_pending(task: Task) -> Waiting:
    missing = list(_not_completed(task))
    if missing:
        named = ", ".join(missing[:NAMED_MAX])
        text = f"{len(missing)} of its dependencies are not completed: {named}"
        return Waiting(cause=Cause.DEPENDENCIES, text=text, state=task.state, dependencies=missing)
    text = f"failure {task.failures} ({task.error}); it backs off before the next attempt"
    return Waiting(cause=Cause.BACKOFF, text=text, state=task.state, until_ms=task.due_ms)


def _not_completed(task: Task) -> Iterator[str]:
    if task.node is None:
        return
    for other in task.node.workflow.tasks.values():
        node = other.node
        if node is not None and other.state is not State.COMPLETED and task in node.dependents:
            yield f"{node.task_id} ({other.state})"


def _why_ready(state: Namespace, task: Task, now_ms: int) -> Waiting:
    seen = _look_on(state, task, now_ms)
    demand = task.terms.demand
    ahead = ahead_of(state, task)
    if seen.chosen:
        cause, text = Cause.DUE, f"nothing keeps it: the next plan sends it to {seen.chosen}"
    elif not any(eligible(demand, worker) and not worker.draining for worker in state.workers.values()):
        cause = Cause.UNFIT
        text = "no worker could run it, even idle" if state.workers else "there is no worker"
    elif demand.lock in state.lock_users:
        cause = Cause.LOCK
        text = f"{state.lock_users[demand.lock]} runs under the lock {demand.lock}"
    elif seen.reached:
        cause, text = Cause.BUSY, "no worker that could run it has room"
    elif demand.lock in seen.locks_taken:
        cause = Cause.LOCK
        text = f"{seen.locks_taken[demand.lock]} comes before it under the lock {demand.lock}"
    else:
        cause = Cause.QUEUE
        text = f"{ahead.alike} tasks that ask for the same come before it, and no worker has room"
    return Waiting(
        cause=cause,
        text=text,
        state=task.state,
        since_ms=task.ready_ms,
        until_ms=_deadline_ms(task),
        ahead=ahead,
        candidates=_candidates(state, task, seen.rooms, ()),
    )


def _deadline_ms(task: Task) -> int:
    """When its queue timeout ends it; 0: never."""
    wait_ms = task.terms.queue_timeout_ms
    return task.ready_ms + wait_ms if wait_ms and task.awaits_first_start else 0


def why_there(state: Namespace, task: Task, now_ms: int, silences: Sequence[Silence] = ()) -> Placement:
    """Where the plan at log time `now_ms` sends a ready task, and why there, on the state it was made on."""
    seen = _look_on(state, task, now_ms, silences)
    candidates = _candidates(state, task, seen.rooms, silences)
    return Placement(
        worker=seen.chosen,
        strategy=state.policy.strategy,
        text=_choice(state, seen.chosen, candidates),
        ahead=ahead_of(state, task),
        candidates=candidates,
    )


def _choice(state: Namespace, chosen: str, candidates: Sequence[Candidate]) -> str:
    able = [each for each in candidates if not each.refused]
    if not chosen:
        return "the plan sends it nowhere"
    if len(able) == 1:
        return f"{chosen} was the only one that could take it"
    load = next(each.load for each in able if each.worker == chosen)
    match state.policy.strategy:
        case "round_robin":
            return f"round robin: {chosen} comes next by name"
        case "random":
            return f"random: a hash of the task's id and attempt chose {chosen} out of {len(able)}"
        case "bin_packing":
            return f"bin packing: {chosen} was the fullest, {load:.2f} tasks for each slot"
        case _:
            equals = sum(each.load == load for each in able)
            first = "; it joined first among equals" if equals > 1 else ""
            return f"least loaded: {chosen} had {load:.2f} tasks for each slot{first}"


def ahead_of(state: Namespace, task: Task) -> Ahead:
    """How many come before a task in the queue, whether or not they fit any worker."""
    order = state.queue.head(state.queue.size, state.policy.ageing_per_s)
    before = list(takewhile(lambda other: other is not task, order))
    priority = sum(other.priority > task.priority for other in before)
    ageing = sum(other.priority < task.priority for other in before)
    return Ahead(
        priority=priority,
        ageing=ageing,
        earlier=len(before) - priority - ageing,
        alike=sum(other.terms.demand == task.terms.demand for other in before),
    )


def _candidates(
    state: Namespace, task: Task, seen: Sequence[Candidate], silences: Sequence[Silence]
) -> list[Candidate]:
    """Every worker: as the strategy saw it, or why it was not among those it saw."""
    known = {each.worker: each for each in seen}
    silent = {each.incarnation for each in silences}
    return [known.get(worker.name) or _left_out(task, worker, silent) for worker in state.workers.values()]


def _left_out(task: Task, worker: Worker, silent: set[int]) -> Candidate:
    refused = lacks(task.terms.demand, worker)
    if worker.draining:
        refused.append("is draining")
    if worker.incarnation in silent:
        refused.append("was given up by the same plan")
    return _seen(Room(worker, 0), refused or ["was not looked at"])


def _seen(room: Room, refused: list[str]) -> Candidate:
    worker = room.worker
    return Candidate(
        worker=worker.name,
        incarnation=worker.incarnation,
        slots=worker.slots,
        held=room.held,
        load=round(room.load, 3),
        refused=refused,
    )


class _Seen:
    """What a plan saw of the workers when it came to one task."""

    def __init__(self) -> None:
        self.rooms: list[Candidate] = []
        self.reached = False
        """Whether the plan came to the task, and not only to others of its line."""
        self.chosen = ""
        self.locks_taken: dict[str, str] = {}
        """Locks that tasks got in this plan, with the task."""


def _look_on(state: Namespace, task: Task, now_ms: int, silences: Sequence[Silence] = ()) -> _Seen:
    """Make the plan, and keep what it saw when it came to the task, or to the last before it."""
    seen = _Seen()

    def watch(line: Line, rooms: Sequence[Room], strategy: Strategy) -> Strategy:
        if line.demand != task.terms.demand or line.suspect != task.suspect:
            return strategy
        return _Watching(line, rooms, strategy, task, state.policy, seen)

    made = plan(state, now_ms, silences, watch=watch)
    for (kind, actor), decided in made.decisions.items():
        if kind == TaskAssigned.kind and any(_is_for(event, task) for event in decided):
            seen.chosen = actor
    return seen


def _is_for(event: object, task: Task) -> bool:
    return isinstance(event, TaskAssigned) and event.id == task.id


class _Watching:
    """A strategy, with somebody looking on."""

    def __init__(
        self,
        line: Line,
        rooms: Sequence[Room],
        strategy: Strategy,
        task: Task,
        policy: Policy,
        seen: _Seen,
    ) -> None:
        self._line, self._rooms, self._strategy = line, rooms, strategy
        self._task, self._policy, self._seen = task, policy, seen

    def pick(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        """What the strategy picks; kept is what it saw, if it is about our task or finds nothing."""
        seen = self._seen
        if not seen.reached and task is self._task:
            seen.reached = True
            self._keep(task, quick_us, now_ms)
        room = self._strategy.pick(task, quick_us, now_ms)
        if room is None and not seen.reached:
            self._keep(task, quick_us, now_ms)
        if room is not None and self._line.demand.lock:
            seen.locks_taken[self._line.demand.lock] = task.id
        return room

    def _keep(self, task: Task, quick_us: int, now_ms: int) -> None:
        self._seen.rooms = [
            _seen(room, list(_refusals(room, self._line, task, quick_us, now_ms, self._policy)))
            for room in self._rooms
        ]


def _refusals(
    room: Room, line: Line, task: Task, quick_us: int, now_ms: int, policy: Policy
) -> Iterator[str]:
    """Why a worker that could run the task has no room for it now."""
    declined = (task.declined or {}).get(room.worker.incarnation, now_ms)
    if declined > now_ms:
        yield f"declined it and is not asked again for {(declined - now_ms) / 1000:.1f} s"
    if room.admits(line, quick_us, policy):
        return
    demand = line.demand
    if line.suspect and room.suspects:
        yield "runs a suspect already: tasks whose worker died go one at a time"
    if room.held >= room.worker.slots:
        yield _full(room, line, quick_us)
    free = (
        ("cpu", demand.cpu, room.cpu),
        ("MiB of memory", demand.memory_mb, room.memory_mb),
        ("gpus", demand.gpus, room.gpus),
    )
    for unit, wanted, has in free:
        if wanted > has:
            yield f"has {max(has, 0):.3g} {unit} free, not {wanted:g}"


def _full(room: Room, line: Line, quick_us: int) -> str:
    full = f"all {room.worker.slots} slots are taken"
    if not room.worker.ahead:
        return full
    if line.suspect or not quick_us:
        return f"{full}, and only tasks known to be short may wait there"
    return f"{full}, and what waits there ({room.held - room.worker.slots}) is as much as may"
