"""Given these events, when this event, then this verdict, state or plan.

    scene = given(elected(), joined("w1"), submitted("a"))
    verdict = scene.when(assigned("a", to="w1"))
    assert verdict == APPLIED

Every event is written as bytes to a subject and judged before it is folded, as in a cluster.
A step is a function of the state, so that it can name the current attempt and incarnation
unless it is told another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from msgspec import Raw

from agentflow import events, wire
from agentflow.domain.fold import fold
from agentflow.domain.life import State
from agentflow.domain.plan import Plan, Silence, plan
from agentflow.domain.state import Namespace, Task, Verdict, Worker
from agentflow.events import Event, Role
from agentflow.frames import Decision, compose, encode, judge, level_headers
from agentflow.limits import LEVEL

NAMESPACE: Final = "test"
BEGIN_MS: Final = 1_700_000_000_000
MASTER: Final = "m1"
FUNCTION: Final = "app.work"


class Logged(NamedTuple):
    """One message of a log."""

    seq: int
    time_ns: int
    subject: str
    headers: dict[str, str] | None
    data: bytes


class Said(NamedTuple):
    """An event and the actor in its subject."""

    actor: str
    event: Event
    epoch: int | None = None
    """Of the leader that decides; None: the one in office."""


Step: TypeAlias = Callable[[Namespace], Said]


class Scene:
    """A log in the writing, and the state it folds to."""

    def __init__(self, *, knows: int = LEVEL) -> None:
        self.state = Namespace(NAMESPACE, knows=knows)
        self.messages: list[Logged] = []
        self.now_ms = BEGIN_MS

    def given(self, *steps: Step) -> Scene:
        """Write what happened before; nothing is asserted about it."""
        for step in steps:
            self.when(step)
        return self

    def when(self, step: Step) -> Verdict:
        """Write one event; the fold's verdict on it."""
        said = step(self.state)
        (verdict,) = self.say(said.actor, [said.event], epoch=said.epoch)
        return verdict

    def say(self, actor: str, said: Sequence[Event], *, epoch: int | None = None) -> list[Verdict]:
        """Write events of one kind, in as few frames as hold them."""
        kind = said[0].kind
        subject = wire.event(NAMESPACE, kind, actor)
        headers = self.decision(epoch) if events.ROLES[kind] is Role.LEADER else {}
        headers |= level_headers(said) or {}
        return [verdict for data, _ in compose(said) for verdict in self.write(subject, data, headers)]

    def write(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None) -> list[Verdict]:
        """Write a message, whatever it is."""
        kept = dict(headers) if headers else None
        message = Logged(self.state.seq + 1, self.now_ms * 1_000_000, subject, kept, data)
        self.messages.append(message)
        return fold_message(self.state, message)

    def decision(self, epoch: int | None = None) -> dict[str, str]:
        """The header of a decision."""
        state = self.state
        known = Decision(epoch or state.epoch, state.seq, self.now_ms, state.policy.version)
        return {wire.DECISION: known.header()}

    def after(self, ms: int) -> Scene:
        """Let time pass."""
        self.now_ms += ms
        return self

    def plan(self, *silences: Silence) -> Plan:
        """What the leader would do now."""
        return plan(self.state, self.now_ms, silences)

    def carry_out(self, made: Plan) -> list[Verdict]:
        """Write a plan's decisions; what is read back must be what was meant."""
        verdicts: list[Verdict] = []
        decision = self.decision()
        for (kind, actor), decided in made.decisions.items():
            subject = wire.event(NAMESPACE, kind, actor)
            headers = decision | (level_headers(decided) or {})
            for data, _ in compose(decided):
                judged = judge(subject, data, headers)
                assert judged.whole is None
                assert encode(judged.items) == data
                verdicts += self.write(subject, data, headers)
            assert encode(decided) == b"[" + b",".join(encode(event) for event in decided) + b"]"
        return verdicts

    def lead(self) -> Plan:
        """Plan, and carry the plan out."""
        made = self.plan()
        self.carry_out(made)
        return made

    def task(self, task_id: str) -> Task:
        return self.state.tasks[task_id]

    def worker(self, name: str = "w1") -> Worker:
        return self.state.workers[name]

    def status(self, task_id: str) -> str:
        return str(self.state.status(task_id)[0])

    def running_at(self, name: str) -> list[str]:
        return list(self.worker(name).held)


def given(*steps: Step) -> Scene:
    """A scene after these steps."""
    return Scene().given(*steps)


def fold_message(state: Namespace, message: Logged) -> list[Verdict]:
    """Judge and fold one message."""
    judged = judge(message.subject, message.data, message.headers)
    return fold(state, message.seq, message.time_ns, judged)


def fold_all(messages: Sequence[Logged], state: Namespace | None = None) -> Namespace:
    """What a log folds to, from the beginning or going on from a state."""
    state = Namespace(NAMESPACE) if state is None else state
    for message in messages:
        fold_message(state, message)
        state.ended.clear()
    return state


def assigned_in(made: Plan) -> dict[str, list[str]]:
    """The tasks a plan assigns, by worker."""
    return {
        actor: [event.id for event in decided if isinstance(event, events.TaskAssigned)]
        for (kind, actor), decided in made.decisions.items()
        if kind == events.TaskAssigned.kind
    }


def decided_in(made: Plan, kind: type[Event]) -> list[Any]:
    """A plan's decisions of one kind."""
    return [event for said in made.decisions.values() for event in said if isinstance(event, kind)]


# What clients say --------------------------------------------------------------------


def says(event: Event, by: str = "cli", epoch: int | None = None) -> Step:
    """Any event, as it is."""
    return lambda _: Said(by, event, epoch)


def submitted(task: str = "", by: str = "cli", **terms: Any) -> Step:
    if not terms.keys() & {"function", "shell", "argv"}:
        terms["function"] = FUNCTION
    return says(events.TaskSubmitted(id=task, **terms), by)


def flow(workflow: str, graph: Mapping[str, Sequence[str]], by: str = "cli", **terms: Any) -> Step:
    """A workflow whose tasks all have the same terms."""
    return says(events.WorkflowSubmitted(id=workflow, tasks=tasks_of(graph, **terms), notify="token"), by)


def tasks_of(graph: Mapping[str, Sequence[str]], **terms: Any) -> list[events.WorkflowTask]:
    work: dict[str, Any] = {"function": FUNCTION, **terms}
    return [
        events.WorkflowTask(task_id=task, dependencies=list(before), **work) for task, before in graph.items()
    ]


def cancel_requested(task: str, reason: str = "") -> Step:
    return says(events.TaskCancelRequested(id=task, reason=reason))


def flow_cancel_requested(workflow: str, reason: str = "") -> Step:
    return says(events.WorkflowCancelRequested(id=workflow, reason=reason))


def reprioritized(task: str, priority: int | str) -> Step:
    return says(events.TaskReprioritized(id=task, priority=priority))


def drain_requested(worker: str = "w1", reason: str = "", by: str = "cli") -> Step:
    return says(events.WorkerDrainRequested(worker=worker, reason=reason), by)


# What holders of locks say -----------------------------------------------------------


def opened(generation: int = 1, by: str = wire.LOCKS_ACTOR) -> Step:
    return says(events.LockOpened(generation=generation), by)


def acquired(lock: str, token: int, by: str = "cli", **other: Any) -> Step:
    known: dict[str, Any] = {"holder": by}
    return says(events.LockAcquired(name=lock, token=token, **(known | other)), by)


def released(lock: str, token: int, by: str = "cli") -> Step:
    return says(events.LockReleased(name=lock, token=token, holder=by), by)


def lock_lost(lock: str, token: int, by: str = "cli") -> Step:
    return says(events.LockLost(name=lock, token=token, reason="silent"), by)


# What masters say --------------------------------------------------------------------


def master_joined(master: str = MASTER, level: int = LEVEL, instance: str = "unguessable") -> Step:
    return says(events.MasterJoined(instance=instance, level=level, host="host", pid=7), master)


def master_left(master: str = MASTER, instance: str = "unguessable") -> Step:
    return says(events.MasterLeft(instance=instance), master)


# What the leader decides -------------------------------------------------------------


def elected(epoch: int | None = None, master: str = MASTER, level: int | None = None) -> Step:
    """An election, of the level in force unless told another."""
    return lambda state: Said(
        wire.ELECTED_ACTOR,
        events.LeaderElected(epoch=epoch or state.epoch + 1, master=master, level=level or state.level),
    )


def raised(*masters: str, level: int = LEVEL) -> list[Step]:
    """An election that raises the level, and masters that register then; the first of them leads."""
    known = masters or (MASTER,)
    return [elected(master=known[0], level=level), *(master_joined(master, level) for master in known)]


def policy(**changes: Any) -> Step:
    known: dict[str, Any] = {"version": 2}
    return says(events.PolicyChanged(policy=events.Policy(**(known | changes))), MASTER)


def assigned(task: str, to: str = "w1", epoch: int | None = None, **other: Any) -> Step:
    def step(state: Namespace) -> Said:
        known = state.tasks.get(task)
        worker = state.workers.get(to)
        named: dict[str, Any] = {
            "attempt": known.attempt + 1 if known else 1,
            "incarnation": worker.incarnation if worker else 1,
        }
        return Said(to, events.TaskAssigned(id=task, **(named | other)), epoch)

    return step


def decides(kind: Any, task: str, epoch: int | None = None, **other: Any) -> Step:
    """A decision that names a task and nothing that has to be looked up."""
    return says(kind(id=task, **other), MASTER, epoch)


def stop(task: str, at: str = "w1", **other: Any) -> Step:
    return lambda state: Said(at, events.TaskStop(id=task, **(_current(state, task) | other)))


def retried(task: str, **other: Any) -> Step:
    def step(state: Namespace) -> Said:
        named: dict[str, Any] = {"attempt": state.tasks[task].attempt}
        return Said(MASTER, events.TaskRetried(id=task, **(named | other)))

    return step


def timed_out(task: str) -> Step:
    return decides(events.TaskTimedOut, task)


def cancelled(task: str) -> Step:
    return decides(events.TaskCancelled, task)


def quarantined(task: str) -> Step:
    return decides(events.TaskQuarantined, task, reason="losses")


def lost(worker: str = "w1", incarnation: int | None = None) -> Step:
    def step(state: Namespace) -> Said:
        known = incarnation if incarnation is not None else state.workers[worker].incarnation
        return Said(MASTER, events.WorkerLost(worker=worker, incarnation=known))

    return step


# What workers say --------------------------------------------------------------------


def joined(worker: str = "w1", slots: int = 1, **other: Any) -> Step:
    known: dict[str, Any] = {"instance": "unguessable", "functions": [FUNCTION]}
    return says(events.WorkerJoined(slots=slots, **(known | other)), worker)


def draining(worker: str = "w1", incarnation: int | None = None) -> Step:
    return _of_worker(events.WorkerDraining, worker, incarnation)


def left(worker: str = "w1", incarnation: int | None = None) -> Step:
    return _of_worker(events.WorkerLeft, worker, incarnation)


def _of_worker(kind: Any, worker: str, incarnation: int | None) -> Step:
    def step(state: Namespace) -> Said:
        known = incarnation if incarnation is not None else state.workers[worker].incarnation
        return Said(worker, kind(incarnation=known))

    return step


def started(task: str, by: str | None = None, **other: Any) -> Step:
    return _outcome(events.TaskStarted, task, by, {"started_at_ms": BEGIN_MS} | other)


def completed(task: str, by: str | None = None, result: bytes = b"1", **other: Any) -> Step:
    return _outcome(events.TaskCompleted, task, by, {"result": Raw(result)} | other)


def failed(task: str, error: str = "error", by: str | None = None, **other: Any) -> Step:
    return _outcome(events.TaskFailed, task, by, {"error": error} | other)


def declined(task: str, by: str | None = None, **other: Any) -> Step:
    return _outcome(events.TaskDeclined, task, by, other)


def _outcome(kind: Any, task: str, by: str | None, other: Mapping[str, Any]) -> Step:
    def step(state: Namespace) -> Said:
        known = state.tasks.get(task)
        actor = by or (known.worker.name if known is not None and known.worker is not None else "w1")
        return Said(actor, kind(id=task, **(_current(state, task) | dict(other))))

    return step


def _current(state: Namespace, task: str) -> dict[str, Any]:
    """The current attempt of a task, and the incarnation that holds it."""
    known = state.tasks.get(task)
    if known is None or known.worker is None:
        return {"attempt": known.attempt if known else 1, "incarnation": 1}
    return {"attempt": known.attempt, "incarnation": known.worker.incarnation}


def is_open(scene: Scene, task: str, state: State) -> bool:
    return scene.state.tasks[task].state is state
