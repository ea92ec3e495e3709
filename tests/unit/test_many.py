"""Frames folded at one go come to what folding their events one after the other comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from agentflow import events, wire
from agentflow.domain import asked, fold, many, state, steps
from agentflow.domain.digest import digest
from agentflow.domain.fold import fold as fold_one
from agentflow.domain.snapshot import snapshot
from agentflow.domain.state import Namespace, Verdict
from agentflow.events import Event
from agentflow.frames import encode, judge
from agentflow.limits import ID_AHEAD_MS_MAX, LEVEL
from tests.unit.dump import dump
from tests.unit.given import (
    BEGIN_MS,
    FUNCTION,
    NAMESPACE,
    Logged,
    Scene,
    Step,
    assigned,
    cancel_requested,
    completed,
    elected,
    failed,
    flow,
    joined,
    lost,
    policy,
    raised,
    reprioritized,
    started,
    stop,
    submitted,
)
from tests.unit.histories import History, uuid_at

SEEDS = st.integers(0, 2**32)


def listening() -> Namespace:
    found = Namespace(NAMESPACE)
    found.steps = []
    return found


def seen(known: Namespace, verdicts: Sequence[Verdict]) -> Sequence[object]:
    """All there is to see after a message, step by step."""
    assert known.steps is not None
    taken = [(task.id, task.number, task.attempt, to) for task, to in known.steps]
    found = [verdicts, taken, list(known.ended), snapshot(known), digest(known)]
    known.steps.clear()
    known.ended.clear()
    return found


def compare(messages: Sequence[Logged]) -> None:
    """Fold a log both ways; whoever observes has each event folded by itself."""
    together, single = listening(), listening()
    for message in messages:
        judged = judge(message.subject, message.data, message.headers)
        at_once = fold_one(together, message.seq, message.time_ns, judged)
        one_by_one = fold_one(single, message.seq, message.time_ns, judged, lambda *_: None)
        assert seen(together, at_once) == seen(single, one_by_one), message
    assert dump(together) == dump(single)


class Crowd(History):
    """A cluster whose frames hold many events, some of which do not count."""

    def one_in(self, number: int) -> bool:
        return self.chance.random() * number < 1

    def name(self) -> str:
        made = super().name()
        ahead_ms = self.chance.choice((-(10**9), -9, 0, 0, 0, 7, 2 * ID_AHEAD_MS_MAX))
        if self.one_in(3):
            return uuid_at(self.scene.now_ms + (ahead_ms if self.one_in(9) else 0), self.names)
        return made

    def submit(self) -> None:
        terms = self.terms() if self.one_in(3) else {"args": [1], "notify": self.chance.choice(("", "n"))}
        said = [self.task(terms) for _ in range(self.chance.randint(1, 12))]
        if self.one_in(8):
            said.append(self.chance.choice(said))
        self.scene.say("cli", said)

    def task(self, terms: dict[str, Any]) -> events.TaskSubmitted:
        other = self.terms() if self.one_in(60) else {}
        known = [*self.scene.state.tasks, *self.scene.state.workflows, *self.scene.state.closed.current, ""]
        name = self.chance.choice(known) if self.one_in(60) else self.name()
        return events.TaskSubmitted(
            id=name, function=FUNCTION, title=self.chance.choice(("", "a")), **terms | other
        )

    def join(self) -> None:
        name, functions = f"w{self.chance.randint(1, 3)}", [FUNCTION]
        self.scene.given(
            joined(name, slots=8, ahead=20, cpu=4.0, group="g", functions=functions, level=LEVEL)
        )

    def lead(self) -> None:
        for (kind, actor), decided in self.scene.plan().decisions.items():
            epoch = max(1, self.scene.state.epoch - self.one_in(20))
            self.scene.say(actor, self.spoilt(decided) if kind in many._KNOWN else decided, epoch=epoch)
        self.scene.state.ended.clear()

    def work(self) -> None:
        """A worker completes all it holds; or they report some of it in other ways."""
        workers = [worker for worker in self.scene.state.workers.values() if worker.held]
        if not workers or self.one_in(4):
            super().work()
            return
        worker = self.chance.choice(workers)
        said = [
            events.TaskCompleted(
                id=task.id,
                attempt=task.attempt,
                incarnation=worker.incarnation,
                run_us=self.chance.choice((0, 9, 10**6)),
            )
            for task in worker.held.values()
        ]
        self.scene.say(self.chance.choice((*["w1"] * self.one_in(9), worker.name)), self.spoilt(said))

    def spoilt(self, said: Sequence[Any]) -> list[Any]:
        """What was to be said, now and then with something in it that does not count."""
        made = list(said)
        if self.one_in(4):
            made.append(self.chance.choice(made))
        if self.one_in(4):
            place = self.chance.randrange(len(made))
            known = [*self.scene.state.tasks, "nobody"]
            other = self.chance.choice(
                (
                    {"attempt": self.chance.randint(0, 3)},
                    {"incarnation": 1},
                    {"id": self.chance.choice(known)},
                )
            )
            made[place] = replace(made[place], **other)
        return made


@with_random(seed=SEEDS, ids_max=st.sampled_from((20, 500_000)))
@settings(max_examples=100, deadline=None)
def test_at_every_position_of_random_histories(seed: int, ids_max: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "CLOSED_IDS_MAX", ids_max)
        compare(Crowd(seed).run(80))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each frame of many events was folded at one go, from here on."""
    found: list[bool] = []

    def asked_of(*given: Any) -> bool:
        found.append(many.all_applied(*given))
        return found[-1]

    monkeypatch.setattr(fold, "all_applied", asked_of)
    return found


def test_random_histories_hold_frames_of_each_kind_of_either_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[tuple[str, bool]] = set()

    def noting(known: Namespace, kind: str, *given: Any) -> bool:
        answer = many.all_applied(known, kind, *given)
        found.add((kind, answer))
        return answer

    monkeypatch.setattr(fold, "all_applied", noting)
    for seed in range(5):
        Crowd(seed).run(100)
    assert {(kind, answer) for kind in many._KNOWN for answer in (True, False)} <= found


# One among many ----------------------------------------------------------------------


def crowd() -> Scene:
    """Two workers with much room."""
    room: dict[str, Any] = {"slots": 9, "ahead": 99, "cpu": 9.0, "level": LEVEL}
    return Scene().given(*raised(), joined("w1", **room), joined("w2", **room))


def work(name: str, **terms: Any) -> events.TaskSubmitted:
    if not terms.keys() & {"function", "shell", "argv"}:
        terms["function"] = FUNCTION
    return events.TaskSubmitted(id=name, **terms)


def some(begin: int = 0, **terms: Any) -> list[events.TaskSubmitted]:
    return [work(f"t{number}", **terms) for number in range(begin, begin + 5)]


def assign(scene: Scene, *names: str, to: str = "w1") -> list[events.TaskAssigned]:
    incarnation, tasks = scene.worker(to).incarnation, scene.state.tasks
    return [
        events.TaskAssigned(
            id=name, attempt=tasks[name].attempt + 1 if name in tasks else 1, incarnation=incarnation
        )
        for name in names
    ]


def complete(scene: Scene, *names: str, to: str = "w1", run_us: int = 7) -> list[events.TaskCompleted]:
    incarnation, tasks = scene.worker(to).incarnation, scene.state.tasks
    return [
        events.TaskCompleted(
            id=name,
            attempt=tasks[name].attempt if name in tasks else 1,
            incarnation=incarnation,
            run_us=run_us,
            result=Raw(b"1"),
        )
        for name in names
    ]


FIVE: Final = [f"t{number}" for number in range(5)]


def require_at_one_go(scene: Scene, answers: list[bool], actor: str, said: Sequence[Event]) -> None:
    answers.clear()
    scene.say(actor, said)
    assert answers == [True]
    compare(scene.messages)


def require_one_by_one(
    scene: Scene, answers: list[bool], actor: str, said: Sequence[Event], epoch: int | None = None
) -> None:
    answers.clear()
    scene.say(actor, said, epoch=epoch)
    assert answers == [False]
    scene.after(5).lead()
    compare(scene.messages)


@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"args": [1, "é"], "notify": "n", "priority": "high", "timeout_s": 9.0, "lock": "l1"},
        {"shell": "true", "cwd": "/"},
        {"retry": events.Retry(max_attempts=2), "needs": events.Needs(labels={"b": "1", "a": "2"})},
    ],
)
def test_submissions_that_are_alike(terms: dict[str, Any], answers: list[bool]) -> None:
    scene = crowd()
    require_at_one_go(scene, answers, "cli", some(**terms))
    require_at_one_go(scene, answers, "cli", some(5, **terms))
    assert scene.when(submitted("t3", **terms)).kind == "duplicate"


def remembering(monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene that has forgotten what ended first, but for an id from the future."""
    monkeypatch.setattr(state, "CLOSED_IDS_MAX", 2)
    scene = crowd()
    for name in (EARLY, "a1", "b1", "b2", "c1"):
        scene.given(submitted(name)).lead()
        scene.given(completed(name))
    assert [*map(list, (scene.state.closed.early, scene.state.closed.previous))] == [[EARLY], ["b1", "b2"]]
    return scene


EARLY: Final = uuid_at(BEGIN_MS + 8)


@pytest.mark.parametrize(
    ("terms", "other"),
    [
        ({}, {"function": "other"}),
        ({"shell": "true"}, {"shell": "false"}),
        ({}, {"cwd": "/"}),
        ({}, {"priority": 700}),
        ({}, {"timeout_s": 9.0}),
        ({}, {"queue_timeout_s": 9.0}),
        ({"queue_timeout_s": 9.0}, {}),
        ({}, {"lock": "l1"}),
        ({}, {"notify": "n"}),
        ({}, {"kwargs": {"a": 1}}),
        ({}, {"env": {"a": "1"}}),
        ({"argv": ["true"]}, {"argv": ["false"]}),
        ({}, {"object": events.ObjectRef(name="o", size=1, sha256="0" * 64)}),
        ({}, {"args": ["x" * 2_000]}),
        ({}, {"retry": events.Retry()}),
        ({"retry": events.Retry()}, {"retry": None}),
        ({"retry": events.Retry(backoff_s=0.0)}, {"retry": events.Retry(backoff_s=-0.0)}),
        ({"needs": events.Needs(cpu=1.0)}, {"needs": events.Needs(cpu=2.0)}),
        ({}, {"id": ""}),
        ({}, {"id": "t0"}),
        ({}, {"id": "open"}),
        ({}, {"id": "flow"}),
        ({}, {"id": "c1"}),
        ({}, {"id": "b1"}),
        ({}, {"id": EARLY}),
        ({}, {"id": uuid_at(BEGIN_MS)}),
        ({}, {"id": uuid_at(BEGIN_MS + 99)}),
        ({}, {"id": uuid_at(BEGIN_MS + 2 * ID_AHEAD_MS_MAX)}),
    ],
)
def test_one_submission_unlike_the_others(
    terms: dict[str, Any], other: dict[str, Any], answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = remembering(monkeypatch)
    scene.after(20).given(submitted("open"), flow("flow", {"a": []}))
    said = some(**terms)
    named: dict[str, Any] = {"id": "odd"} | terms | other
    said[2] = work(named.pop("id"), **named)
    require_one_by_one(scene, answers, "cli", said)


def test_one_id_older_than_the_others(answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = remembering(monkeypatch).after(20)
    made = [work(uuid_at(scene.now_ms, number)) for number in range(10)]
    require_at_one_go(scene, answers, "cli", made[:5])
    require_one_by_one(scene, answers, "cli", [*made[5:], work(uuid_at(BEGIN_MS))])


def test_submissions_among_which_one_is_bad(answers: list[bool]) -> None:
    scene = crowd()
    data = encode(some()).replace(b'"t2"', b'"at-2"')
    scene.write(wire.event(NAMESPACE, events.TaskSubmitted.kind, "cli"), data)
    assert answers == [False]
    compare(scene.messages)


@pytest.mark.parametrize(("room", "answer"), [(5, True), (4, False)])
def test_submissions_for_which_there_is_not_room(
    room: int, answer: bool, answers: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = crowd().given(submitted("open"))
    for module in (asked, many):
        monkeypatch.setattr(module, "OPEN_TASKS_MAX", 1 + room)
    scene.say("cli", some())
    assert answers == [answer]
    compare(scene.messages)


def test_submissions_while_the_log_is_nearly_full(answers: list[bool]) -> None:
    require_one_by_one(crowd().given(policy(accepting=False)), answers, "cli", some())


def test_ids_made_in_the_meantime(answers: list[bool]) -> None:
    """The bound that spares reading the time of an id moves as it does one by one."""
    scene = crowd()
    require_at_one_go(scene, answers, "cli", some())
    for number in range(3):
        scene.after(number)
        made = [
            *some(5 * number + 5),
            work(uuid_at(scene.now_ms - 1, number)),
            work(uuid_at(scene.now_ms, number)),
        ]
        require_at_one_go(scene, answers, "cli", made)
    assert scene.state.newest


# Assignments ---------------------------------------------------------------------------


PLAIN: Final = [submitted(name) for name in FIVE]


def waiting() -> Scene:
    """Ten tasks wait: of two functions, of which one is known to be quick, and of two priorities."""
    scene = crowd().given(submitted("quick"), assigned("quick"), completed("quick", run_us=7))
    scene.say("cli", some())
    scene.say("cli", some(5, function="other", notify="n"))
    return scene.given(reprioritized("t4", 700))


@pytest.mark.parametrize(
    "names",
    [FIVE[:4], FIVE, ["t2", "t9", "t0", "t4", "t5"], ["t9", "t8", "t7", "t6"], ["t0", "t1", "t3", "t2"]],
)
def test_assignments_in_any_order(names: list[str], answers: list[bool]) -> None:
    scene = waiting()
    require_at_one_go(scene, answers, "w1", assign(scene, *names))
    scene.lead()
    compare(scene.messages)


@pytest.mark.parametrize("ended", [[started("t2"), lost("w2")], [stop("t2", "w2"), failed("t2", "stopped")]])
def test_tasks_assigned_again(ended: list[Step], answers: list[bool]) -> None:
    """What the last attempt left behind is gone."""
    scene = crowd().given(*PLAIN, assigned("t2", "w2"), *ended)
    require_at_one_go(scene, answers, "w1", assign(scene, *FIVE))


@pytest.mark.parametrize("other", ["t0", "nobody", "quick"])
def test_assignments_of_what_does_not_wait(other: str, answers: list[bool]) -> None:
    scene = waiting()
    said = assign(scene, "t0", "t1", "t2", "t3") + assign(scene, other)
    require_one_by_one(scene, answers, "w1", said)


RETRY: Final = events.Retry(max_attempts=2, backoff_s=60.0)


@pytest.mark.parametrize(
    "before",
    [
        [submitted("t2"), cancel_requested("t2")],
        [submitted("t2"), assigned("t2", "w2")],
        [submitted("t2"), assigned("t2", "w2"), lost("w2")],
        [submitted("t2", retry=RETRY), assigned("t2", "w2"), failed("t2")],
        [submitted("t2", lock="l1")],
        [submitted("t2", needs=events.Needs(cpu=0.3))],
    ],
)
def test_one_task_not_assigned_like_the_others(before: list[Step], answers: list[bool]) -> None:
    scene = crowd().given(*PLAIN[:2], *before, *PLAIN[3:])
    require_one_by_one(scene, answers, "w1", assign(scene, *FIVE))


@pytest.mark.parametrize("other", [{"attempt": 2}, {"attempt": 0}, {"incarnation": 1}])
def test_one_assignment_unlike_the_others(other: dict[str, int], answers: list[bool]) -> None:
    scene = waiting()
    said = assign(scene, *FIVE)
    said[2] = replace(said[2], **other)
    require_one_by_one(scene, answers, "w1", said)


def test_assignments_to_nobody_and_of_an_old_term(answers: list[bool]) -> None:
    scene = waiting().given(elected())
    said = assign(scene, *FIVE)
    require_one_by_one(scene, answers, "w9", said)
    scene = waiting().given(elected())
    require_one_by_one(scene, answers, "w1", said, epoch=1)


# Outcomes ------------------------------------------------------------------------------


def running() -> Scene:
    """Ten tasks, of two functions, run at a worker; and one that is known."""
    scene = waiting()
    scene.say("w1", assign(scene, *scene.state.tasks))
    return scene


@pytest.mark.parametrize(
    "names", [FIVE, ["t5", "t9", "t6", "t7", "t8"], ["t6", "t0", "t5", "t1"], FIVE[::-1]]
)
@pytest.mark.parametrize("run_us", [0, 9, 10**6])
def test_outcomes_in_any_order(names: list[str], run_us: int, answers: list[bool]) -> None:
    scene = running()
    require_at_one_go(scene, answers, "w1", complete(scene, *names, run_us=run_us))
    rest = [name for name in scene.running_at("w1") if name not in names]
    require_at_one_go(scene, answers, "w1", complete(scene, *rest))
    assert not scene.state.tasks


def test_outcomes_that_fill_what_is_remembered(answers: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "EXPECTATIONS_MAX", 1)
    for room in range(8):
        monkeypatch.setattr(state, "CLOSED_IDS_MAX", room + 1)
        scene = running()
        require_at_one_go(scene, answers, "w1", complete(scene, "t0", "t1", "t5", "t2", "t6"))


@pytest.mark.parametrize("other", ["t0", "nobody", "quick"])
def test_outcomes_of_what_does_not_run(other: str, answers: list[bool]) -> None:
    scene = running()
    said = complete(scene, "t0", "t1", "t2", "t3") + complete(scene, other)
    require_one_by_one(scene, answers, "w1", said)


@pytest.mark.parametrize(
    "before",
    [
        [submitted("t2"), assigned("t2"), cancel_requested("t2")],
        [submitted("t2"), assigned("t2", "w2")],
        [submitted("t2"), assigned("t2", "w2"), lost("w2"), assigned("t2")],
        [submitted("t2"), assigned("t2", "w2"), started("t2"), lost("w2"), assigned("t2")],
        [submitted("t2", lock="l1"), assigned("t2")],
        [submitted("t2", needs=events.Needs(cpu=0.3)), assigned("t2")],
        [submitted("t2")],
    ],
)
def test_one_task_not_completed_like_the_others(before: list[Step], answers: list[bool]) -> None:
    scene = crowd().given(*PLAIN[:2], *before, *PLAIN[3:])
    others = [name for name in FIVE if name != "t2"]
    scene.say("w1", assign(scene, *others))
    require_one_by_one(scene, answers, "w1", complete(scene, *FIVE))


def test_a_workflows_task_among_others_completes(answers: list[bool]) -> None:
    scene = crowd().given(*PLAIN, flow("f", {"a": [], "b": ["a"]}))
    scene.say("w1", assign(scene, *FIVE, "f/a"))
    require_one_by_one(scene, answers, "w1", complete(scene, *FIVE, "f/a"))
    assert scene.task("f/b").state == "running"


@pytest.mark.parametrize("other", [{"attempt": 2}, {"attempt": 0}, {"incarnation": 1}])
def test_one_outcome_unlike_the_others(other: dict[str, int], answers: list[bool]) -> None:
    scene = running()
    said = complete(scene, *FIVE)
    said[2] = replace(said[2], **other)
    require_one_by_one(scene, answers, "w1", said)


def test_outcomes_told_by_somebody_else(answers: list[bool]) -> None:
    for actor in ("w2", "w9"):
        scene = running()
        require_one_by_one(scene, answers, actor, complete(scene, *FIVE))
