"""The plan: what the leader would do now, and what it leaves alone."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Final

import pytest
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from agentflow import events
from agentflow.checks import Bad
from agentflow.domain import plan as plans
from agentflow.domain import policies
from agentflow.domain.life import State, WorkflowState
from agentflow.domain.plan import DECISIONS_MAX, INPUTS_BYTES_MAX, Plan, Silence, plan
from agentflow.domain.queue import Demand
from agentflow.domain.state import Namespace, Worker
from agentflow.frames import encode, judge
from agentflow.limits import FOLD_BYTES_MAX, INPUT_DEPTH_MAX, LEVEL
from tests.unit.dump import dump
from tests.unit.given import (
    FUNCTION,
    MASTER,
    Scene,
    Step,
    assigned,
    assigned_in,
    cancel_requested,
    completed,
    decided_in,
    declined,
    draining,
    elected,
    failed,
    flow,
    fold_all,
    given,
    joined,
    left,
    lost,
    master_joined,
    policy,
    says,
    started,
    submitted,
    tasks_of,
)
from tests.unit.histories import STRATEGIES, History

RETRY: Final = events.Retry(max_attempts=3, backoff_s=2.0, jitter=0.0)


def at_work(*steps: Step, **worker: Any) -> Scene:
    """A leader, a worker, and what came next."""
    return given(elected(), joined("w1", **worker), *steps)


def silence(scene: Scene, name: str = "w1") -> Silence:
    return Silence(name, scene.worker(name).incarnation, "silent")


# Nothing to do -------------------------------------------------------------------------


def test_nothing_to_do() -> None:
    made = given(elected()).plan()
    assert made == Plan({}, None)
    assert not made


def test_tasks_wait_for_workers() -> None:
    assert not given(elected(), submitted("a")).plan()
    assert not given(elected(), submitted("a"), joined("w1"), draining("w1")).plan()
    assert not given(elected(), submitted("a"), joined("w1"), left("w1")).plan()


# Order ---------------------------------------------------------------------------------


def test_the_best_first() -> None:
    scene = at_work(
        submitted("low", priority="low"),
        submitted("first"),
        submitted("second"),
        submitted("high", priority="high"),
        slots=3,
    )
    assert assigned_in(scene.plan()) == {"w1": ["high", "first", "second"]}


def test_the_best_first_across_lines() -> None:
    scene = at_work(
        submitted("a1", priority=1),
        submitted("b5", priority=5, needs=events.Needs(cpu=0.1)),
        submitted("a3", priority=3),
        submitted("b2", priority=2, needs=events.Needs(cpu=0.1)),
        submitted("c4", priority=4, shell="true"),
        slots=9,
        cpu=1.0,
    )
    assert assigned_in(scene.plan()) == {"w1": ["b5", "c4", "a3", "b2", "a1"]}


@given_any(seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_what_is_assigned_ranks_before_what_is_not(seed: int) -> None:
    chance = random.Random(seed)
    scene = at_work(slots=5, cpu=9.0)
    for number in range(12):
        scene.after(chance.choice((0, 100_000)))
        needs = chance.choice((None, events.Needs(cpu=0.1), events.Needs(cpu=0.2)))
        scene.given(submitted(f"a{number}", priority=chance.choice((0, 100, 200)), needs=needs))
    best = [task.id for task in scene.state.queue.head(5, 1.0)]
    assert assigned_in(scene.plan()) == {"w1": best}


# Room ----------------------------------------------------------------------------------


def test_a_busy_worker_gets_nothing_more() -> None:
    scene = at_work(submitted("a"), submitted("b"))
    scene.lead()
    assert not scene.plan()
    scene.given(completed("a"))
    assert assigned_in(scene.plan()) == {"w1": ["b"]}


def ahead(run_us: int, slots: int = 2, room: int = 100, **changes: Any) -> int:
    """How many tasks of a known run time one worker gets at once."""
    scene = at_work(policy(**changes), slots=slots, ahead=room)
    scene.state.expectations[FUNCTION] = run_us
    scene.given(*(submitted(f"a{number}") for number in range(200)))
    return len(assigned_in(scene.plan())["w1"])


def test_quick_tasks_are_assigned_ahead() -> None:
    assert ahead(run_us=10) == 102


def test_how_many_is_bounded_in_expected_time() -> None:
    assert ahead(run_us=1_000) == 20
    assert ahead(run_us=1_000, ahead_ms=20) == 40
    assert ahead(run_us=10_000) == 2
    assert ahead(run_us=10_001) == 2


def test_how_many_is_bounded_by_the_worker() -> None:
    assert ahead(run_us=10, room=0) == 2
    assert ahead(run_us=10, room=7) == 9


def test_tasks_of_unknown_run_time_do_not_wait_at_a_worker() -> None:
    scene = at_work(*(submitted(f"a{number}") for number in range(9)), slots=2, ahead=100)
    assert len(assigned_in(scene.plan())["w1"]) == 2


def test_nor_do_quick_ones_behind_them() -> None:
    scene = at_work(submitted("slow", shell="sleep 100"), slots=1, ahead=100)
    scene.lead()
    scene.state.expectations[FUNCTION] = 10
    assert not scene.given(submitted("quick")).plan()


def test_quick_tasks_go_past_slow_ones_in_other_slots() -> None:
    scene = at_work(submitted("slow", shell="sleep 100"), slots=2, ahead=100)
    scene.lead()
    scene.state.expectations[FUNCTION] = 1_000
    scene.given(*(submitted(f"quick{number}") for number in range(50)))
    assert len(assigned_in(scene.plan())["w1"]) == 10


def test_an_unknown_script_does_not_pass_for_a_known_one() -> None:
    scene = at_work(submitted("known", shell="true"), slots=1, ahead=100)
    scene.lead()
    scene.given(completed("known", run_us=10))
    scene.given(
        submitted("again", shell="true"),
        submitted("new", shell="sleep 100"),
        submitted("again2", shell="true"),
    )
    assert assigned_in(scene.plan()) == {"w1": ["again"]}


# Lines that fit nowhere ----------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts looks at demands and at tasks."""
    counted: Counter[str] = Counter()
    looked, placed = policies.eligible, plans._Candidate._place

    def eligible(demand: Demand, worker: Worker) -> bool:
        counted["demands"] += 1
        return looked(demand, worker)

    def place(candidate: Any, draft: Any, task: Any) -> bool:
        counted["tasks"] += 1
        return placed(candidate, draft, task)

    monkeypatch.setattr(policies, "eligible", eligible)
    monkeypatch.setattr(plans._Candidate, "_place", place)
    return counted


def test_what_fits_nowhere_is_looked_at_once(looks: Counter[str]) -> None:
    scene = at_work(slots=1)
    scene.given(
        *(submitted(f"big{n}-{m}", needs=events.Needs(gpus=n + 1)) for n in range(20) for m in range(20))
    )
    scene.given(submitted("a"))
    assert assigned_in(scene.lead()) == {"w1": ["a"]}
    assert looks == {"demands": 21, "tasks": 1}
    looks.clear()
    for _ in range(5):
        scene.given(
            completed("a"), submitted("a"), says(events.TaskSubmitted(id="b", function=FUNCTION), "cli")
        )
        scene.lead()
    assert looks["demands"] == 1 or looks["demands"] == 0
    assert looks["tasks"] < 20


def test_it_is_looked_at_again_when_somebody_joins(looks: Counter[str]) -> None:
    scene = at_work(
        submitted("big", needs=events.Needs(gpus=4)), submitted("bigger", needs=events.Needs(gpus=8))
    )
    assert not scene.plan()
    looks.clear()
    assert assigned_in(scene.given(joined("w2", gpus=4)).plan()) == {"w2": ["big"]}
    assert [line.demand.gpus for line in scene.state.queue.parked.values()] == [8]


def test_a_full_cluster_is_noticed_at_the_first_task_of_each_line(looks: Counter[str]) -> None:
    scene = at_work(*(submitted(f"a{number}") for number in range(500)))
    scene.lead()
    looks.clear()
    assert not scene.plan()
    assert looks["tasks"] == 1


def test_lines_of_draining_workers_are_set_aside() -> None:
    scene = at_work(
        joined("w2"), submitted("a", needs=events.Needs(gpus=1)), joined("w3", gpus=1), draining("w3")
    )
    assert not scene.plan()
    assert len(scene.state.queue.parked) == 1


# Suspects ------------------------------------------------------------------------------


def lost_with(count: int, *begun: str) -> Scene:
    """A worker that was lost with tasks a0, a1 ... of which some had begun."""
    names = [f"a{number}" for number in range(count)]
    scene = at_work(*map(submitted, names), slots=count)
    scene.lead()
    return scene.given(*map(started, begun), lost("w1"))


def test_suspects_go_one_at_a_time_to_a_worker() -> None:
    scene = lost_with(5).given(joined("w1", slots=9), joined("w2", slots=9), submitted("b"), submitted("c"))
    made = scene.lead()
    assert assigned_in(made) == {"w1": ["a0", "b"], "w2": ["a1", "c"]}
    assert [event.id for event in decided_in(made, events.TaskAssigned) if event.suspect] == ["a0", "a1"]
    assert not scene.plan()
    scene.given(completed("a0"))
    assert assigned_in(scene.plan()) == {"w1": ["a2"]}


def test_a_suspect_does_not_wait_at_a_worker() -> None:
    scene = lost_with(1).given(joined("w1", slots=1, ahead=9), submitted("b"))
    scene.state.expectations[FUNCTION] = 1
    scene.given(assigned("b"))
    assert not scene.plan()


def test_one_killer_does_not_condemn_those_queued_beside_it() -> None:
    scene = lost_with(20, "a7")
    for _ in range(40):
        scene.given(joined("w1", slots=20))
        scene.lead()
        while scene.state.workers:
            for name in list(scene.worker().held):
                scene.given(started(name))
                if name == "a7":
                    scene.given(lost("w1"))
                    break
                scene.given(completed(name))
            else:
                if not scene.lead():
                    break
    assert Counter(scene.status(f"a{number}") for number in range(20)) == {"completed": 19, "failed": 1}
    assert scene.status("a7") == "failed"


def test_a_task_that_cost_too_many_workers_is_quarantined() -> None:
    scene = lost_with(1, "a0")
    for _ in range(2):
        assert not decided_in(scene.plan(), events.TaskQuarantined)
        scene.given(joined("w1"), assigned("a0"), started("a0"), lost("w1"))
    made = scene.given(joined("w1")).plan()
    assert decided_in(made, events.TaskQuarantined) == [
        events.TaskQuarantined(id="a0", reason="losses", detail="3 workers were lost while they ran it")
    ]
    assert not assigned_in(made)
    scene.carry_out(made)
    assert scene.status("a0") == "failed"
    assert not scene.state.struck


def test_losses_before_it_began_do_not_count() -> None:
    scene = lost_with(1)
    for _ in range(9):
        scene.given(joined("w1"), assigned("a0"), lost("w1"))
    assert not decided_in(scene.plan(), events.TaskQuarantined)


# Workers given up ----------------------------------------------------------------------


def test_a_silent_worker_is_given_up_and_gets_nothing_more() -> None:
    scene = at_work(submitted("a"), joined("w2"))
    made = scene.plan(silence(scene))
    assert decided_in(made, events.WorkerLost) == [
        events.WorkerLost(worker="w1", incarnation=2, reason="silent")
    ]
    assert assigned_in(made) == {"w2": ["a"]}
    scene.carry_out(made)
    assert list(scene.state.workers) == ["w2"]


def test_silences_of_others_do_not_count() -> None:
    scene = at_work()
    assert not scene.plan(Silence("w1", 1, "silent"), Silence("nobody", 2, "silent"))


def test_a_worker_is_given_up_once() -> None:
    scene = at_work()
    assert len(decided_in(scene.plan(silence(scene), silence(scene)), events.WorkerLost)) == 1


# Declines ------------------------------------------------------------------------------


def test_who_declined_is_not_asked_again_for_a_while() -> None:
    scene = at_work(submitted("a"), assigned("a"), declined("a"))
    made = scene.plan()
    assert not made
    assert made.wake_ms == scene.now_ms + 5_000
    assert not scene.after(4_999).plan()
    assert assigned_in(scene.after(1).plan()) == {"w1": ["a"]}


def test_others_are_asked() -> None:
    scene = at_work(submitted("a"), assigned("a"), declined("a"), joined("w2"))
    assert assigned_in(scene.plan()) == {"w2": ["a"]}


def test_the_same_worker_anew_is_another() -> None:
    scene = at_work(submitted("a"), assigned("a"), declined("a"), joined("w1"))
    assert assigned_in(scene.plan()) == {"w1": ["a"]}


def test_tasks_behind_a_declined_one_go_past_it() -> None:
    scene = at_work(submitted("a"), submitted("b"), assigned("a"), declined("a"))
    assert assigned_in(scene.plan()) == {"w1": ["b"]}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_respects_declines(strategy: str) -> None:
    scene = at_work(
        policy(strategy=strategy), submitted("a"), assigned("a"), declined("a"), joined("w2"), joined("w3")
    )
    assert "w1" not in assigned_in(scene.plan())


# Timers --------------------------------------------------------------------------------


def test_a_retry_is_due_after_its_backoff() -> None:
    scene = at_work(submitted("a", retry=RETRY), assigned("a"), failed("a"))
    assert scene.plan() == Plan({}, scene.now_ms + 2_000)
    made = scene.after(2_000).plan()
    assert decided_in(made, events.TaskRetried) == [events.TaskRetried(id="a", attempt=1)]
    scene.carry_out(made)
    assert assigned_in(scene.plan()) == {"w1": ["a"]}


def test_a_task_that_waited_too_long_for_its_start_times_out() -> None:
    scene = given(elected(), submitted("a", queue_timeout_s=3.0))
    assert scene.plan() == Plan({}, scene.now_ms + 3_000)
    made = scene.after(3_000).plan()
    assert decided_in(made, events.TaskTimedOut) == [events.TaskTimedOut(id="a")]
    scene.carry_out(made)
    assert scene.status("a") == "failed"


def test_a_task_that_timed_out_is_not_assigned_in_the_same_breath() -> None:
    scene = given(elected(), submitted("a", queue_timeout_s=3.0)).after(3_000).given(joined("w1"))
    assert not assigned_in(scene.plan())


@pytest.mark.parametrize("steps", [[declined("a")], [lost("w1")], [left("w1")]])
def test_the_timeout_runs_until_the_task_has_begun(steps: list[Step]) -> None:
    scene = at_work(submitted("a", queue_timeout_s=3.0), assigned("a"))
    assert scene.after(10_000).plan() == Plan({}, None)
    scene.given(*steps)
    assert decided_in(scene.plan(), events.TaskTimedOut)


@pytest.mark.parametrize(
    "steps", [[started("a"), lost("w1")], [started("a"), left("w1")], [started("a"), declined("a")]]
)
def test_and_not_once_it_has(steps: list[Step]) -> None:
    scene = at_work(submitted("a", queue_timeout_s=3.0), assigned("a"), *steps).after(10_000)
    assert not decided_in(scene.plan(), events.TaskTimedOut)


def test_a_retried_task_does_not_time_out() -> None:
    scene = at_work(submitted("a", queue_timeout_s=1.0, retry=RETRY), assigned("a"), failed("a")).after(9_000)
    scene.carry_out(scene.plan())
    scene.given(left("w1"))
    assert not scene.after(9_000).plan()


def test_the_wait_begins_when_the_task_is_ready() -> None:
    scene = at_work(flow("f", {"a": [], "b": ["a"]}, queue_timeout_s=2.0), assigned("f/a")).after(60_000)
    scene.given(completed("f/a"), left("w1"))
    assert scene.plan() == Plan({}, scene.now_ms + 2_000)


def test_what_is_due_comes_in_order_and_in_portions() -> None:
    scene = given(elected())
    times = list(range(1, 6_001))
    random.Random(1).shuffle(times)
    scene.given(*(submitted(f"a{time}", queue_timeout_s=float(time)) for time in times)).after(10_000_000)
    first = [event.id for event in decided_in(scene.lead(), events.TaskTimedOut)]
    rest = [event.id for event in decided_in(scene.lead(), events.TaskTimedOut)]
    assert first + rest == [f"a{time}" for time in range(1, 6_001)]
    assert len(first) == DECISIONS_MAX
    assert scene.plan() == Plan({}, None)


# Cancels -------------------------------------------------------------------------------


def test_a_cancelled_task_is_neither_assigned_nor_timed_out_nor_retried() -> None:
    scene = at_work(
        submitted("a", queue_timeout_s=1.0), submitted("b", retry=RETRY), assigned("b"), failed("b")
    )
    scene.given(cancel_requested("a"), cancel_requested("b")).after(10_000)
    made = scene.plan()
    assert set(made.decisions) == {("task.cancelled", MASTER)}
    scene.carry_out(made)
    assert scene.plan() == Plan({}, None)


def test_many_cancelled_tasks_do_not_slow_others(looks: Counter[str]) -> None:
    scene = at_work(*(submitted(f"a{number}") for number in range(300)), submitted("b"))
    scene.given(*(cancel_requested(f"a{number}") for number in range(300)))
    assert assigned_in(scene.plan()) == {"w1": ["b"]}
    assert looks["tasks"] == 1


# Portions ------------------------------------------------------------------------------


def test_a_plan_is_bounded() -> None:
    scene = at_work(slots=100_000)
    scene.say("cli", [events.TaskSubmitted(id=f"a{number}", function=FUNCTION) for number in range(9_000)])
    counts = [len(assigned_in(scene.lead())["w1"]) for _ in range(3)]
    assert counts == [DECISIONS_MAX, DECISIONS_MAX, 1_000]


def test_a_plan_of_many_lines_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "DECISIONS_MAX", 10)
    scene = at_work(slots=100, functions=[f"f{number}" for number in range(30)])
    scene.given(*(submitted(f"a{number}", function=f"f{number}") for number in range(30)))
    assert [len(assigned_in(scene.lead())["w1"]) for _ in range(3)] == [10, 10, 10]


# Assignments ---------------------------------------------------------------------------


def assignment(scene: Scene) -> events.TaskAssigned:
    (event,) = decided_in(scene.plan(), events.TaskAssigned)
    assert isinstance(event, events.TaskAssigned)
    return event


def test_an_assignment_says_what_to_run() -> None:
    scene = at_work(
        submitted("a", args=[1, "x"], kwargs={"k": None}, timeout_s=5.0, env={"A": 1}, cwd="/srv")
    )
    assert assignment(scene) == events.TaskAssigned(
        id="a",
        attempt=1,
        incarnation=2,
        function=FUNCTION,
        args=Raw(b'[1,"x"]'),
        kwargs=Raw(b'{"k":null}'),
        env=Raw(b'{"A":1}'),
        cwd="/srv",
        timeout_s=5.0,
    )


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({}, {}),
        ({"args": [1]}, {"args": Raw(b"[1]")}),
        ({"cwd": "/srv"}, {"cwd": "/srv"}),
        ({"timeout_s": 1.0}, {"timeout_s": 1.0}),
        ({"retry": RETRY}, {}),
        ({"retry": events.Retry(non_retryable=["ValueError"])}, {"non_retryable": ["ValueError"]}),
    ],
)
def test_an_assignment_of_a_function_leaves_nothing_out(terms: dict[str, Any], said: dict[str, Any]) -> None:
    expected = events.TaskAssigned(id="a", attempt=1, incarnation=2, function=FUNCTION, **said)
    assert assignment(at_work(submitted("a", **terms))) == expected


def test_scripts_and_programs() -> None:
    assert assignment(at_work(submitted("a", shell="echo"))).shell == "echo"
    assert assignment(at_work(submitted("a", argv=["echo", 1]))).argv == Raw(b'["echo",1]')


def test_large_arguments_are_fetched_where_they_were_submitted() -> None:
    event = assignment(at_work(submitted("a", args=["x" * FOLD_BYTES_MAX], kwargs={"k": 1})))
    assert (event.args, event.kwargs, event.seq, event.index) == (UNSET, UNSET, 3, 0)


def test_an_object_travels_by_reference() -> None:
    ref = events.ObjectRef(name="blob", size=10**9, sha256="0" * 64)
    assert assignment(at_work(submitted("a", object=ref))).object == ref


def given_result(result: bytes = b"1", **outcome: Any) -> events.Input:
    """What the task after one with a result is handed."""
    tasks = tasks_of({"a": []}) + tasks_of({"b": ["a"]}, args=[{"$result": "a"}])
    scene = at_work(says(events.WorkflowSubmitted(id="f", tasks=tasks), "cli"), assigned("f/a"))
    scene.given(completed("f/a", result=result, **outcome))
    return assignment(scene).inputs["a"]


def arrays(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "result",
    [b"1", b"null", b'{"a":[2.5]}', b'"%s"' % (b"x" * (FOLD_BYTES_MAX - 2)), arrays(INPUT_DEPTH_MAX)],
)
def test_a_small_result_is_handed_over(result: bytes) -> None:
    assert given_result(result) == events.Input(value=Raw(result))


@pytest.mark.parametrize(
    "result", [b'"%s"' % (b"x" * FOLD_BYTES_MAX), arrays(INPUT_DEPTH_MAX + 1), arrays(31)]
)
def test_others_go_as_positions(result: bytes) -> None:
    assert given_result(result) == events.Input(seq=5, index=0)


def test_a_result_in_the_object_store_goes_as_a_position() -> None:
    ref = events.ObjectRef(name="blob", size=10**9, sha256="0" * 64)
    assert given_result(object=ref) == events.Input(seq=5, index=0)


def test_a_result_left_out_is_null() -> None:
    tasks = tasks_of({"a": []}) + tasks_of({"b": ["a"]}, args=[{"$result": "a"}])
    scene = at_work(says(events.WorkflowSubmitted(id="f", tasks=tasks), "cli"), assigned("f/a"))
    scene.given(says(events.TaskCompleted(id="f/a", attempt=1, incarnation=2), "w1"))
    assert assignment(scene).inputs["a"] == events.Input(value=Raw(b"null"))


def test_many_results_are_handed_over_up_to_a_limit() -> None:
    names = [f"a{number}" for number in range(40)]
    tasks = tasks_of({name: [] for name in names})
    tasks += tasks_of({"z": names}, args=[{"$result": name} for name in names])
    scene = at_work(says(events.WorkflowSubmitted(id="f", tasks=tasks), "cli"), slots=40)
    scene.lead()
    scene.given(*(completed(f"f/{name}", result=b'"%s"' % (b"x" * 1_000)) for name in names))
    inputs = assignment(scene).inputs
    handed = [given.value for given in inputs.values() if isinstance(given.value, Raw)]
    assert len(inputs) == 40
    assert INPUTS_BYTES_MAX - 1_002 < sum(len(bytes(value)) for value in handed) <= INPUTS_BYTES_MAX


# Properties ----------------------------------------------------------------------------

SEEDS: Final = st.integers(0, 2**32)


def waits(history: History) -> Namespace:
    """A state in the middle of things, as a follower has it."""
    return fold_all(history.run(120))


@given_any(seed=SEEDS, later_ms=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_a_plan_follows_from_state_and_time(seed: int, later_ms: int) -> None:
    state = waits(History(seed))
    before = dump(state)
    now_ms = state.clock_ms + later_ms
    silences = [Silence(worker.name, worker.incarnation, "silent") for worker in state.workers.values()][:1]
    first = plan(state, now_ms, silences)
    assert dump(state) == before
    assert plan(state, now_ms, silences) == first
    assert encode(list(plan(state, now_ms, silences).decisions.values())) == encode(
        list(first.decisions.values())
    )


@given_any(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_follower_would_plan_what_the_leader_plans(seed: int) -> None:
    history = History(seed)
    follower = waits(history)
    leader = history.scene.state
    for later_ms in (0, 3_000, 100_000):
        assert plan(follower, follower.clock_ms + later_ms) == plan(leader, leader.clock_ms + later_ms)


@given_any(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_every_decision_is_accepted(seed: int) -> None:
    """What a plan says is said of every task once, is sound, and takes effect."""
    history = History(seed)
    history.run(120)
    scene = history.scene.after(5_000)
    made = scene.plan()
    said = [event for decided in made.decisions.values() for event in decided]
    about: list[Any] = [
        getattr(event, "id", event)
        for event in said
        if not isinstance(event, events.EventRejected | events.WorkerLost)
    ]
    assert len(about) == len(set(map(str, about)))
    assert {verdict.kind for verdict in scene.carry_out(made)} <= {"applied"}
    judged = [judge(f"af.n.{event.kind}.x", encode(event), scene.decision()) for event in said]
    assert not [item for one in judged for item in (one.whole, *one.items) if isinstance(item, Bad)]


@given_any(seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_everything_ends_once_the_cluster_works(seed: int) -> None:
    """After any history, with workers that fit and do their work, nothing is left over."""
    history = History(seed)
    history.garble = False  # or tasks may need what no worker has
    history.run(120)
    scene = history.scene
    scene.given(
        master_joined(),
        elected(),
        policy(losses_max=2, ahead_ms=10),
        joined("w1", slots=3, group="g", cpu=1.0, memory_mb=250, level=LEVEL),
    )
    for _ in range(400):
        made = scene.after(60_000).lead()
        history.lose_others("w1")
        for task in history.held():
            scene.given(started(task.id), failed(task.id, "stopped") if task.stopping else completed(task.id))
        if not made and not scene.state.tasks:
            break
    assert not scene.state.tasks
    assert not scene.state.workflows
    assert scene.state.terms == scene.state.unused_terms
    assert not scene.state.cancels
    assert not scene.state.struck
    assert not scene.state.answers
    assert not scene.state.lock_users
    assert scene.state.queue.size == scene.state.running == 0


class Cluster:
    """A simulated cluster: workers that answer in any order, die and come back."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.scene = given(elected(), policy(strategy=self.chance.choice(STRATEGIES), losses_max=1_000))
        self.outcomes: Counter[str] = Counter()
        self.starts: Counter[str] = Counter()

    def submit(self) -> set[str]:
        retry = events.Retry(max_attempts=1_000, backoff_s=1.0, backoff_s_max=2.0)
        for number in range(25):
            self.scene.given(
                submitted(f"a{number}", retry=retry, priority=self.chance.choice((0, 500, 1000)))
            )
        graph: dict[str, list[str]] = {}
        for number in range(15):
            before = list(graph)
            graph[f"s{number}"] = self.chance.sample(before, self.chance.randint(0, min(3, len(before))))
        self.scene.given(flow("f", graph, retry=retry))
        return {*self.scene.state.tasks}

    def run(self) -> int:
        for turn in range(1_000):
            self.scene.after(500)
            self.scene.lead()
            if not self.scene.state.tasks:
                return turn
            for name in ("w1", "w2", "w3"):
                self.live(name)
        return 1_000

    def live(self, name: str) -> None:
        """A worker joins, dies, or reports some of what it holds."""
        scene, chance = self.scene, self.chance
        if name not in scene.state.workers:
            scene.given(joined(name, slots=chance.randint(1, 4), ahead=5))
        elif chance.random() < 0.1:
            scene.carry_out(scene.plan(Silence(name, scene.worker(name).incarnation, "silent")))
        else:
            held = list(scene.worker(name).held)
            for task in chance.sample(held, chance.randint(0, len(held))):
                self.report(task)

    def report(self, task: str) -> None:
        step = self.chance.choice((completed, completed, started, failed, declined))(task)
        said = step(self.scene.state)
        verdict = self.scene.when(lambda _: said)
        if isinstance(said.event, events.TaskCompleted):
            self.outcomes[task] += verdict.kind == "applied"
        if self.chance.random() < 0.3:
            again = self.scene.when(lambda _: said)
            self.outcomes[task] += again.kind == "applied" and isinstance(said.event, events.TaskCompleted)


@pytest.mark.parametrize("seed", range(12))
def test_every_task_completes_exactly_once_whatever_the_order_of_outcomes(seed: int) -> None:
    cluster = Cluster(seed)
    submitted_ids = cluster.submit()
    assert cluster.run() < 1_000
    assert cluster.outcomes == dict.fromkeys(submitted_ids, 1)
    assert cluster.scene.status("f") == WorkflowState.COMPLETED
    assert {cluster.scene.status(task) for task in submitted_ids} == {State.COMPLETED}
