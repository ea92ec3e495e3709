"""What the history keeps of a log."""

from __future__ import annotations

import msgspec
import pytest

from agentflow.domain.life import State, WorkflowState
from agentflow.events import (
    Retry,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskDeclined,
    TaskFailed,
    TaskReprioritized,
    TaskRetried,
    TaskStarted,
    TaskSubmitted,
    WorkerDraining,
    WorkerLeft,
    WorkerLost,
    WorkflowPart,
    WorkflowSubmitted,
)
from agentflow.frames import encode
from agentflow.log.memory import MemoryLog, MemoryServer
from agentflow.log.port import Frame, Message
from agentflow_nodes.cli.tasks import Wanted, task_document
from agentflow_projections import history
from agentflow_projections.history import History, Latest, read_history
from agentflow_projections.history_rows import WorkerState
from agentflow_projections.past import LoggedPast, Until
from tests.story import BEGIN_NS, Story, chain
from tests.unit import histories
from tests.unit.given import NAMESPACE
from tests.unit.told import messages_of


def test_a_task_from_submission_to_result() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", function="app.add", args=[1, 2], title="Add", priority="high"))
    story.assign(worker, "t1")
    result = msgspec.Raw(b"3")
    done = TaskCompleted(id="t1", attempt=1, incarnation=worker, run_us=2500, result=result, stdout="hi\n")
    seq = story.say("w1", done)
    row = story.task("t1")
    assert (row.state, row.priority, row.client, row.runs_kind, row.runs) == (
        State.COMPLETED,
        750,
        "cli",
        "function",
        "app.add",
    )
    assert row.result == result
    assert row.live is None
    attempt = row.attempts[0]
    assert (attempt.worker, attempt.outcome, attempt.stdout, attempt.seq) == ("w1", "completed", "hi\n", seq)
    assert row.wait_ms(story.history.now_ms) == 100
    assert row.run_ms(story.history.now_ms) == 2.5


def test_a_task_without_an_id_is_called_after_its_position() -> None:
    story = Story()
    story.say("cli", TaskSubmitted(shell="true"), TaskSubmitted(shell="true"))
    assert list(story.history.tasks) == ["at-2-0", "at-2-1"]


def test_a_large_result_is_left_in_the_log() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="true"))
    story.assign(worker, "t1")
    big = msgspec.Raw(encode("x" * 2000))
    seq = story.say("w1", TaskCompleted(id="t1", attempt=1, incarnation=worker, result=big))
    row = story.task("t1")
    assert row.result is None
    assert (row.attempts[-1].seq, row.attempts[-1].index) == (seq, 0)


def test_a_failure_is_tried_again_and_each_attempt_is_kept() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="flaky", retry=Retry(max_attempts=2)))
    story.assign(worker, "t1")
    story.say("w1", TaskFailed(id="t1", attempt=1, incarnation=worker, error="exit", message="status 1"))
    row = story.task("t1")
    assert row.state is State.PENDING
    assert row.due_ms > story.history.now_ms
    story.say("m1", TaskRetried(id="t1", attempt=1))
    assert (row.state, row.due_ms) == (State.READY, 0)
    story.assign(worker, "t1", attempt=2)
    story.say("w1", TaskFailed(id="t1", attempt=2, incarnation=worker, error="exit", message="status 2"))
    assert (row.state, row.error) == (State.FAILED, "exit: status 2")
    assert [(each.number, each.outcome, each.message) for each in row.attempts] == [
        (1, "failed", "status 1"),
        (2, "failed", "status 2"),
    ]


def test_a_late_outcome_changes_nothing() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="true"))
    story.assign(worker, "t1")
    done = TaskCompleted(id="t1", attempt=1, incarnation=worker)
    story.say("w1", done)
    story.say("w1", TaskFailed(id="t1", attempt=1, incarnation=worker, error="exit"))
    assert story.task("t1").state is State.COMPLETED
    assert story.history.state.superseded == 1


def test_what_depends_on_a_failure_is_skipped_and_says_why() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", chain())
    assert story.states() == {"a": "ready", "b": "pending", "c": "pending", "d": "ready"}
    story.assign(worker, "flow/a", "flow/d")
    story.say("w1", TaskFailed(id="flow/a", attempt=1, incarnation=worker, error="exit"))
    assert story.states() == {"a": "failed", "b": "skipped", "c": "skipped", "d": "running"}
    assert story.task("flow/c").error == "flow/a ended failed"
    workflow = story.history.workflows["flow"]
    assert str(workflow.state) == "running"
    story.say("w1", TaskCompleted(id="flow/d", attempt=1, incarnation=worker))
    assert str(workflow.state) == "failed"
    assert workflow.counts() == {"completed": 1, "failed": 1, "skipped": 2}


def test_what_depends_on_a_completed_task_becomes_ready() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", chain())
    for task in ("a", "b", "c", "d"):
        story.assign(worker, f"flow/{task}")
        story.say("w1", TaskCompleted(id=f"flow/{task}", attempt=1, incarnation=worker))
    assert set(story.states().values()) == {"completed"}
    workflow = story.history.workflows["flow"]
    assert (workflow.state, workflow.name) == (WorkflowState.COMPLETED, "Release")
    assert workflow.ended_ms > workflow.submitted_ms
    assert story.task("flow/b").ready_ms > story.task("flow/a").ready_ms


def test_a_workflow_in_parts() -> None:
    story = Story()
    tasks = chain().tasks
    story.say("cli", WorkflowPart(workflow="flow", part=0, tasks=tasks[:3]))
    story.say("cli", WorkflowSubmitted(id="flow", parts=1, tasks=tasks[3:]))
    assert list(story.history.workflows["flow"].tasks) == ["a", "b", "c", "d"]
    assert story.task("flow/a").seq == 2
    assert story.task("flow/d").seq == 3


def test_parts_that_nothing_followed_are_forgotten() -> None:
    story = Story()
    tasks = chain().tasks
    story.say("cli", WorkflowPart(workflow="other", part=0, tasks=tasks))
    story.join()
    story.say("cli", WorkflowPart(workflow="flow", part=0, tasks=tasks))
    story.say("cli", WorkflowSubmitted(id="flow", parts=1))
    assert list(story.history.workflows) == ["flow"]
    assert len(story.history.workflows["flow"].tasks) == 4


def test_a_cancel_is_a_wish_first_and_a_fact_later() -> None:
    story = Story()
    story.say("cli", TaskSubmitted(id="t1", shell="true"))
    story.say("cli", TaskCancelRequested(id="t1", reason="not needed"))
    row = story.task("t1")
    assert (row.state, row.cancel_requested, row.cancel_reason) == (State.READY, True, "not needed")
    story.say("m1", TaskCancelled(id="t1", reason="not needed"))
    assert row.state is State.CANCELLED


def test_reprioritizing_shows() -> None:
    story = Story()
    story.say("cli", TaskSubmitted(id="t1", shell="true"))
    story.say("cli", TaskReprioritized(id="t1", priority="urgent"))
    assert story.task("t1").priority == 1000


def test_what_a_lost_worker_held_waits_again() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="true"), TaskSubmitted(id="t2", shell="true"))
    story.assign(worker, "t1", "t2")
    story.say("w1", TaskStarted(id="t1", attempt=1, incarnation=worker, started_at_ms=5))
    story.say("m1", WorkerLost(worker="w1", incarnation=worker, reason="silent"))
    assert story.states() == {"t1": "ready", "t2": "ready"}
    assert [story.task(each).attempts[0].outcome for each in ("t1", "t2")] == ["lost", "lost"]
    row = story.history.workers["w1"]
    assert (row.state, row.reason) == (WorkerState.LOST, "silent")


def test_a_worker_that_starts_anew_was_lost_before() -> None:
    story = Story()
    first = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="true"))
    story.assign(first, "t1")
    second = story.join()
    assert story.task("t1").attempts[0].outcome == "lost"
    assert story.history.workers["w1"].incarnation == second
    assert story.history.workers["w1"].state is WorkerState.ACTIVE


def test_a_worker_counts_drains_and_leaves() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="true"), TaskSubmitted(id="t2", shell="true"))
    story.assign(worker, "t1", "t2")
    story.say("w1", TaskCompleted(id="t1", attempt=1, incarnation=worker))
    row = story.history.worker_rows()[0]
    assert (row.held, row.completed) == (1, 1)
    story.say("w1", WorkerDraining(incarnation=worker))
    assert row.state is WorkerState.DRAINING
    story.say("w1", WorkerLeft(incarnation=worker))
    assert (story.history.worker_rows()[0].state, row.held, row.completed) == (WorkerState.LEFT, 0, 1)
    assert story.task("t2").attempts[0].outcome == "left"


def test_a_declined_attempt_is_kept() -> None:
    story = Story()
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", function="nope"))
    story.assign(worker, "t1")
    story.say("w1", TaskDeclined(id="t1", attempt=1, incarnation=worker, reason="no such function"))
    attempt = story.task("t1").attempts[0]
    assert (attempt.outcome, attempt.message) == ("declined", "no such function")
    assert story.task("t1").state is State.READY


def test_what_is_not_accepted_is_kept_with_position_and_reason() -> None:
    story = Story()
    seq = story.publish("af.default.task.submitted.cli", b'[{"shell":"true"},{"shell":5}]')
    story.publish("af.default.task.submitted.cli", b"no json")
    story.say("w9", TaskCompleted(id="nobody", attempt=1, incarnation=1))
    found = [(each.seq, each.index, each.verdict, each.reason) for each in story.history.refused]
    assert found == [
        (seq, 1, "rejected", "bad_type"),
        (seq + 1, -1, "rejected", "not_json"),
        (seq + 2, 0, "quarantined", "unknown_id"),
    ]
    assert len(story.history.tasks) == 1


def test_only_what_is_wanted_is_kept() -> None:
    story = Story(keep=lambda key: key == "flow")
    worker = story.join()
    story.say("cli", TaskSubmitted(id="t1", shell="true"))
    story.say("cli", chain(), chain("other"))
    story.assign(worker, "t1", "flow/a", "other/a")
    story.say("w1", TaskFailed(id="other/a", attempt=1, incarnation=worker, error="exit"))
    assert list(story.history.workflows) == ["flow"]
    assert {row.workflow for row in story.history.tasks.values()} == {"flow"}


@pytest.mark.parametrize(
    "states", [frozenset[str](), frozenset({"failed"}), frozenset({"ready", "completed"})]
)
@pytest.mark.parametrize("limit", [1, 7])
def test_who_wants_the_latest_only_gets_them_and_no_more_are_kept(
    states: frozenset[str], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_LOOK_AT_MIN", 10)
    for seed in range(4):
        whole, latest = History(NAMESPACE), History(NAMESPACE, latest=Latest(states, limit))
        for message in messages_of(histories.History(seed).run(500)):
            whole.apply(message)
            latest.apply(message)
        wanted = Wanted(states, "", limit)
        expected, found = wanted.among(whole), wanted.among(latest)
        assert [task_document(row, 0) for row in found[-limit:]] == [
            task_document(row, 0) for row in expected[-limit:]
        ]
        assert len(found) + latest.forgotten == len(expected)
        assert len(latest.tasks) < len(whole.tasks)


def test_a_message_seen_twice_changes_nothing() -> None:
    history = History("default")
    data = encode([TaskSubmitted(id="t1", shell="true")])
    message = Message(1, BEGIN_NS, "af.default.task.submitted.cli", data)
    assert history.apply(message)
    assert not history.apply(message)
    assert len(history.tasks) == 1


async def test_reading_a_log_to_its_end() -> None:
    async with MemoryLog(MemoryServer(), "default") as log:
        for number in range(5):
            data = encode([TaskSubmitted(id=f"t{number}", shell="true")])
            await log.append(Frame("af.default.task.submitted.cli", data))
        told: list[tuple[int, int]] = []
        past = await LoggedPast.of(log)
        history = await read_history(past, progress=lambda seq, last: told.append((seq, last)))
        assert len(history.tasks) == 5
        assert told[-1] == (5, 5)
        part = await read_history(past, until=Until(seq=2))
        assert list(part.tasks) == ["t0", "t1"]


async def test_reading_an_empty_log() -> None:
    async with MemoryLog(MemoryServer(), "default") as log:
        assert not (await read_history(await LoggedPast.of(log))).tasks
