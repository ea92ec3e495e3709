"""Record logs that every later version must still read, and what they fold to.

    python -m tests.golden.record             the logs that are not there yet
    python -m tests.golden.record --expect    what all of them fold to, anew

A log once recorded is never recorded again: it stands for what lies in people's streams. What it
folds to, said in words, may change with a reason; the digest changes with every field of the state.
"""

from __future__ import annotations

import base64
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType

from agentflow import events, wire
from agentflow.domain.plan import Silence
from agentflow.domain.state import Namespace, Verdict
from agentflow.frames import encode
from agentflow.limits import FRAME_EVENTS_MAX
from tests.unit.dump import digest
from tests.unit.given import (
    NAMESPACE,
    Logged,
    Scene,
    acquired,
    assigned,
    cancel_requested,
    completed,
    decides,
    declined,
    drain_requested,
    draining,
    elected,
    failed,
    flow,
    flow_cancel_requested,
    fold_message,
    given,
    joined,
    left,
    lock_lost,
    master_joined,
    master_left,
    opened,
    policy,
    released,
    reprioritized,
    says,
    started,
    stop,
    submitted,
    tasks_of,
)

FOLDER: Final = Path(__file__).parent
_RETRY: Final = events.Retry(max_attempts=3, backoff_s=1.0, jitter=0.5, non_retryable=["exit"])


class Line(Struct, frozen=True, omit_defaults=True):
    """One message, as a line of a file: data as text, or in base64 if it is none."""

    seq: int
    time_ns: int
    subject: str
    headers: dict[str, str] | None = None
    data: str | UnsetType = UNSET
    base64: str | UnsetType = UNSET


class Expected(Struct, frozen=True):
    """What a log folds to."""

    digest: str
    """SHA-256 of the state's dump."""
    messages: int
    verdicts: dict[str, int]
    """How many events of each kind were judged how."""
    level: int
    epoch: int
    leader: str
    masters: dict[str, int]
    """The level each knows."""
    open: dict[str, str]
    """State of open tasks."""
    closed: dict[str, str]
    """State in which tasks and workflows ended."""
    workers: dict[str, list[str]]
    """What each holds."""
    locks: dict[str, list[int]]
    """Tokens under which each is held."""
    locked: dict[str, str]
    """The task that runs under each lock."""
    answers: dict[str, str]
    """Rejections not answered yet, by position."""


# The logs --------------------------------------------------------------------------------


def plain_tasks() -> Scene:
    """Tasks from submission to result, from our client and from a bare publish."""
    scene = given(elected(), joined("w1", slots=2, ahead=10, cpu=4.0, functions=["app.add"]))
    scene.say(
        "app",
        [
            events.TaskSubmitted(id=f"add-{n}", function="app.add", args=[n, 1], notify="tok")
            for n in range(5)
        ],
    )
    scene.write(
        wire.event(NAMESPACE, "task.submitted", "nats-cli"), b'{"shell": "echo hi", "priority": "high"}'
    )
    scene.after(5).lead()
    scene.after(3).given(started("at-4-0"), completed("at-4-0", result=b"null", stdout="hi\n", run_us=1_500))
    while scene.state.tasks:
        scene.after(2).lead()
        for task in list(scene.worker().held):
            scene.given(completed(task, result=b"%d" % (int(task[-1]) + 1), run_us=40))
    scene.given(submitted("add-0", "app", function="app.add", args=[0, 1], notify="tok"))
    return scene.given(
        submitted("waits", function="app.unknown", args=["x" * 2_000]), draining("w1"), left("w1")
    )


def workflow() -> Scene:
    """A workflow with a retry, a failure that skips, a cancel of a running and of a waiting task."""
    graph = {
        "fetch": [],
        "build": ["fetch"],
        "test": ["build"],
        "lint": ["fetch"],
        "ship": ["test", "lint"],
        "docs": [],
    }
    scene = given(elected(), joined("w1", slots=4), flow("release", graph, retry=_RETRY, title="A step"))
    scene.after(10).lead()
    scene.after(10).given(failed("release/fetch", "error", message="no network"))
    scene.after(1_000).lead()
    scene.lead()
    scene.after(10).given(completed("release/fetch", result=b'{"path":"/src"}', run_us=9_000)).lead()
    scene.given(started("release/docs"), cancel_requested("release/docs", "no docs today")).lead()
    scene.after(5).given(failed("release/docs", "stopped")).lead()
    scene.given(failed("release/lint", "exit", message="exit code 1", stderr="E501")).lead()
    scene.given(completed("release/build", result=b'["a.whl"]'))
    scene.given(cancel_requested("release/test")).lead()
    scene.given(says(events.WorkflowPart(workflow="large", part=0, tasks=tasks_of({"a": [], "b": ["a"]}))))
    scene.given(
        says(events.WorkflowSubmitted(id="large", parts=1, tasks=tasks_of({"c": ["b"]}), notify="tok"))
    ).lead()
    scene.given(completed("large/a")).lead()
    scene.given(flow_cancel_requested("large")).lead()
    return scene.given(failed("large/b", "stopped"))


def losses() -> Scene:
    """Lost workers, suspects, two elections, decisions and outcomes that come too late."""
    scene = given(elected(), policy(losses_max=2), joined("w1", slots=3), joined("w2"))
    scene.say("cli", [events.TaskSubmitted(id=name, function="app.work") for name in "abcdef"])
    scene.lead()
    scene.given(started("a")).after(4_000)
    late = completed("c")(scene.state)
    scene.carry_out(scene.plan(Silence("w1", scene.worker("w1").incarnation, "silent")))
    scene.when(lambda _: late)
    scene.given(elected(master="m2"), assigned("a", to="w2", epoch=1), joined("w1", slots=3))
    scene.after(10).lead()
    scene.given(started("a"), declined("b")).after(10)
    scene.given(joined("w1", slots=3), elected(7, "m3"), elected(master="m1")).lead()
    scene.given(decides(events.TaskCancelled, "b", epoch=2), stop("b", "w1")).after(6_000).lead()
    for task in list(scene.worker("w1").held):
        scene.given(started(task), completed(task))
    return scene.after(1).given(left("w2"))


def waiting() -> Scene:
    """Priorities, ageing, demands that fit and do not fit, timeouts, declines, overload."""
    needs = events.Needs(cpu=0.5, memory_mb=512, gpus=1, group="gpu", labels={"zone": "a"})
    scene = given(elected(), policy(strategy="bin_packing", ageing_per_s=2.0))
    scene.given(
        submitted("train", needs=needs, timeout_s=60.0), submitted("late", queue_timeout_s=2.0, priority=0)
    )
    scene.given(*(submitted(f"p{priority}", priority=priority) for priority in (0, 250, 500, 1000)))
    scene.given(reprioritized("p0", "urgent"), reprioritized("p1000", 1), reprioritized("nobody", 1))
    scene.after(2_500).lead()
    scene.given(
        joined("w1", slots=2, cpu=1.0, memory_mb=1_024, gpus=1, group="gpu", labels={"zone": "a"})
    ).lead()
    scene.given(declined("p0", reason="not now")).after(100).lead()
    scene.given(policy(version=3, accepting=False), submitted("refused"), policy(version=4, ahead_ms=20))
    return scene.given(completed("train", result=b"0.97"))


def bad_input() -> Scene:
    """Whatever people and programs send: each is quarantined or rejected, and nothing stops."""
    scene = given(elected(), joined("w1"), submitted("good"))
    submit = wire.event(NAMESPACE, "task.submitted", "fuzz")
    for data in _NO_FRAMES + _NO_EVENTS:
        scene.write(submit, data)
    scene.write(
        submit,
        b"[" + b",".join([b'{"id":"x%d","function":"f"}' % n for n in range(9)] + [b'{"id":5}']) + b"]",
    )
    for subject in (
        "af.test.x",
        "af.test.task.unheard_of.w1",
        "af.test.task.submitted.a$b",
        "af.test.task.submitted." + "y" * 70,
    ):
        scene.write(subject, b'{"shell":"true"}')
    for headers in ({wire.VERSION: "2"}, {wire.VERSION: ""}, {wire.VERSION: "1", "Other": "header"}):
        scene.write(submit, b'{"id":"versioned","shell":"true"}', headers)
    scene.write(wire.elected(NAMESPACE), b'{"stream":"AF_test","seq":12,"domain":"hub"}')
    scene.write(wire.elected(NAMESPACE), b'[{"epoch":9,"master":"intruder"}]')
    scene.write(wire.event(NAMESPACE, "task.cancelled", "w1"), b'{"id":"good"}')
    scene.write(wire.event(NAMESPACE, "task.cancelled", "w1"), b'{"id":"good"}', {wire.DECISION: "99 1 1 1"})
    scene.given(flow("cycle", {"a": ["b"], "b": ["a"]}), flow("unknown", {"a": ["z"]}), flow("none", {}))
    scene.given(
        completed("nobody"), completed("good", attempt=7), submitted("good", args=[1]), submitted("good")
    )
    scene.given(cancel_requested("nobody"), submitted("0fffffff-ffff-7000-8000-000000000000"))
    scene.lead()
    return scene.given(completed("good"))


def masters() -> Scene:
    """A log that rises to level 2: what counts before and after, who may lead, and a drain."""
    scene = given(elected(), joined("w1", slots=2), submitted("before"))
    scene.given(master_joined("m1"), drain_requested("w1"), submitted("locked", lock="l"))
    scene.write(wire.event(NAMESPACE, "task.submitted", "cli"), b'{"id":"unknown","shell":"true","lock":5}')
    scene.lead()
    scene.given(completed("before"), elected(master="m2", level=2))
    scene.given(elected(master="m2"), master_joined("m1"), master_joined("m2"), master_joined("m3", level=1))
    scene.write(wire.event(NAMESPACE, "master.joined", "m4"), b'{"instance":"of level 1","level":2}')
    scene.write(
        wire.event(NAMESPACE, "master.joined", "m5"), b'{"instance":"","level":2}', {wire.VERSION: "2"}
    )
    scene.after(3_000).given(elected(master="m3"), elected(master="m1", level=1), elected(master="m1"))
    scene.given(joined("w2", level=2), drain_requested("w1", "maintenance"), drain_requested("w1"))
    scene.given(drain_requested("w9")).after(5).lead()
    scene.given(master_left("m3"), master_left("m3"), master_joined("m2", instance="anew"), master_left("m2"))
    scene.given(draining("w1")).after(5).lead()
    return scene.given(elected(master="m2"), left("w1"), elected(master="m2", level=3))


def locks() -> Scene:
    """Locks as their holders tell of them, and tasks that run under one."""
    scene = given(elected(level=2), master_joined("m1"), opened(1), opened(1), opened(2, by="cli"))
    scene.given(acquired("db", 11, "app", holder="migration", metadata={"by": "release"}))
    scene.after(20).given(acquired("db", 12, "b"), released("db", 11, "app"), acquired("db", 11, "app"))
    scene.given(acquired("report", 5, mode="shared"), acquired("report", 7, mode="shared"))
    scene.given(lock_lost("report", 5, "b"), acquired("report", 6, mode="exclusive"))
    scene.given(*(acquired("gpu", token, mode="semaphore", permits=2) for token in (3, 4)))
    scene.given(lock_lost("gpu", 9), acquired("gpu", 9, mode="semaphore", permits=2))
    for data in _NO_LOCKS:
        scene.write(wire.event(NAMESPACE, "lock.acquired", "cli"), data, {wire.VERSION: "2"})
    scene.given(joined("w1", slots=4), joined("w2", slots=4, level=2, cpu=1.0))
    scene.given(submitted("a", lock="db"), submitted("b", lock="db", needs=events.Needs(cpu=0.5)))
    scene.given(flow("f", {"x": [], "y": ["x"]}, lock="db", retry=_RETRY), submitted("free"))
    scene.lead()
    scene.given(completed("a")).lead()
    scene.given(started("b"), assigned("f/x", to="w2"), failed("b")).lead()
    scene.given(failed("f/x"), submitted("c", lock="db", priority="urgent")).lead()
    scene.after(1_000).lead()
    scene.carry_out(scene.plan(Silence("w2", scene.worker("w2").incarnation, "silent")))
    scene.given(joined("w2", slots=4, level=2), opened(2)).lead()
    return scene


_NO_LOCKS: Final = [
    b'{"name":"","token":1,"holder":"h"}',
    b'{"name":"db","token":0,"holder":"h"}',
    b'{"name":"db","token":1,"holder":"h","mode":"none"}',
    b'{"name":"db","token":1,"holder":"h","mode":"semaphore","permits":0}',
    b'{"name":"db","token":1,"holder":"h","ttl_s":0}',
    b'{"name":"db","token":9223372036854775808,"holder":"h"}',
    b'{"name":"db","token":1}',
]
_NO_FRAMES: Final = [
    b"",
    b"hello",
    b"{",
    b"[]",
    b"1",
    b'{"shell":"true",}',
    b'{"shell":"\xff\xfe"}',
    b"\xef\xbb\xbf{}",
    b'{"function":"f","args":[NaN]}',
    b"[" * 101 + b"]" * 101,
    b"[" + b"1," * FRAME_EVENTS_MAX + b"1]",
]
_NO_EVENTS: Final = [
    b"[1,null,[]]",
    b"{}",
    b'{"id":"a.b","shell":"true"}',
    b'{"id":"a b","shell":"true"}',
    b'{"id":">","shell":"true"}',
    b'{"id":"%s","shell":"true"}' % (b"z" * 300),
    b'{"id":"at-1-0","shell":"true"}',
    b'{"id":"d","id":"d","shell":"true"}',
    b'{"id":"n","function":"f","args":[1e400]}',
    b'{"id":"i","function":"f","args":[9223372036854775808]}',
    b'{"id":"s","function":"f","args":["\\ud800"]}',
    b'{"id":"u","function":"f","args":["\\u0000"]}',
    b'{"id":"deep","function":"f","args":' + b"[" * 32 + b"]" * 32 + b"}",
    b'{"id":"t","function":"f","timeout_s":"5"}',
    b'{"id":"p","function":"f","priority":5000}',
    b'{"id":"two","function":"f","shell":"true"}',
]

SCENES: Final[dict[str, Callable[[], Scene]]] = {
    "plain_tasks": plain_tasks,
    "workflow": workflow,
    "losses": losses,
    "waiting": waiting,
    "bad_input": bad_input,
    "masters": masters,
    "locks": locks,
}


# Files -----------------------------------------------------------------------------------


def write_log(name: str, messages: list[Logged]) -> None:
    """Write a log, a message a line."""
    lines = [encode(_line(message)) + b"\n" for message in messages]
    (FOLDER / f"{name}.jsonl").write_bytes(b"".join(lines))


def _line(message: Logged) -> Line:
    seq, time_ns, subject, headers, data = message
    try:
        return Line(seq, time_ns, subject, headers, data=data.decode())
    except UnicodeDecodeError:
        return Line(seq, time_ns, subject, headers, base64=base64.b64encode(data).decode())


def read_log(name: str) -> list[Logged]:
    """A recorded log."""
    with (FOLDER / f"{name}.jsonl").open("rb") as lines:
        return [_message(msgspec.json.decode(line, type=Line)) for line in lines]


def _message(line: Line) -> Logged:
    data = line.data.encode() if isinstance(line.data, str) else base64.b64decode(str(line.base64))
    return Logged(line.seq, line.time_ns, line.subject, line.headers, data)


def expectation(messages: list[Logged]) -> Expected:
    """What a log folds to now."""
    state = Namespace(NAMESPACE)
    verdicts: Counter[str] = Counter()
    for message in messages:
        kind = ".".join(message.subject.split(".")[2:4])
        verdicts.update(f"{kind} {_words(verdict)}" for verdict in fold_message(state, message))
    closed = {**state.closed.previous, **state.closed.current}
    return Expected(
        digest=digest(state),
        messages=len(messages),
        verdicts=dict(sorted(verdicts.items())),
        level=state.level,
        epoch=state.epoch,
        leader=state.leader,
        masters={master.name: master.level for master in state.masters.values()},
        open={task.id: _words_of(task) for task in state.tasks.values()},
        closed={name: str(state.status(name)[0]) for name in closed},
        workers={worker.name: list(worker.held) for worker in state.workers.values()},
        locks={name: list(holdings) for name, holdings in state.locks.items()},
        locked=dict(state.lock_users),
        answers={f"{seq}-{index}": answer.reason for (seq, index), answer in state.answers.items()},
    )


def _words(verdict: Verdict) -> str:
    return f"{verdict.kind} {verdict.reason}" if verdict.reason else str(verdict.kind)


def _words_of(task: Any) -> str:
    return f"{task.state}, attempt {task.attempt}" + (", suspect" if task.suspect else "")


def expected_of(name: str) -> Path:
    return FOLDER / f"{name}.expected.json"


def record(*, anew: bool) -> None:
    """Write what is missing; with `anew` also what logs fold to."""
    for name, scene in SCENES.items():
        if not (FOLDER / f"{name}.jsonl").exists():
            write_log(name, scene().messages)
        if anew or not expected_of(name).exists():
            expected_of(name).write_bytes(msgspec.json.format(encode(expectation(read_log(name)))) + b"\n")


if __name__ == "__main__":
    record(anew="--expect" in sys.argv[1:])
