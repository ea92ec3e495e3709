"""A history that begins with a state tells the same as one that read all, as far as it can know."""

from __future__ import annotations

from typing import Any

import pytest

from agentflow.domain.state import Namespace
from agentflow.events import Needs, Retry, TaskSubmitted, WorkflowSubmitted, WorkflowTask
from agentflow_nodes.cli.tasks import ended_before, task_document
from agentflow_nodes.cli.workers import worker_document
from agentflow_nodes.cli.workflows import workflow_document
from agentflow_projections.history import History, read_history
from agentflow_projections.history_begun import fill, fill_workers, fill_workflow, work_of
from agentflow_projections.past import LoggedPast
from tests.unit import histories
from tests.unit.given import (
    NAMESPACE,
    Scene,
    assigned,
    completed,
    elected,
    failed,
    fold_all,
    given,
    joined,
    says,
    submitted,
)
from tests.unit.told import messages_of, trimmed_log

KNOWN_OF_ALL = ("id", "task_id", "workflow", "state", "priority", "client", "position", "tries")
KNOWN_OF_OPEN = ("error", "cancel_requested", "cancel_reason")
LARGE = "x" * 3_000


def whole_of(messages: Any) -> History:
    history = History(NAMESPACE)
    for each in messages_of(messages):
        history.apply(each)
    return history


def parts(document: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: document[name] for name in names}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cut", [40, 150])
async def test_what_it_tells_is_what_a_whole_history_tells(seed: int, cut: int) -> None:
    messages = histories.History(seed).run(300)
    whole, before = whole_of(messages), fold_all(messages[:cut])
    was_open = {task.id for task in before.tasks.values() if not (task.node and task.node.end_seq)}
    async with trimmed_log(messages, cut) as (log, objects):
        late = await read_history(await LoggedPast.of(log, objects))
    assert late.state.seq == whole.state.seq
    begun_late = {row.id for row in whole.tasks.values() if row.seq > cut}
    assert set(late.tasks) == set(before.tasks) | begun_late
    assert list(late.tasks) == [key for key in whole.tasks if key in late.tasks]
    for key, row in late.tasks.items():
        ours, theirs = (task_document(each, whole.now_ms) for each in (row, whole.tasks[key]))
        if key in begun_late:
            assert ours == theirs
            continue
        assert parts(ours, KNOWN_OF_ALL) == parts(theirs, KNOWN_OF_ALL)
        assert sorted(ours["dependencies"]) == sorted(theirs["dependencies"])
        assert row.runs_kind == whole.tasks[key].runs_kind
        if key in was_open:
            assert parts(ours, KNOWN_OF_OPEN) == parts(theirs, KNOWN_OF_OPEN)
    for key, workflow in late.workflows.items():
        assert (workflow.state, workflow.counts()) == (
            whole.workflows[key].state,
            whole.workflows[key].counts(),
        )
    alive = {row.name for row in whole.workers.values() if row.live is not None}
    assert alive <= set(late.workers)
    for name in alive:
        ours, theirs = (worker_document(each.workers[name], {}) for each in (late, whole))
        assert ours["incarnation"] == theirs["incarnation"]
        assert [ours[each] for each in ("slots", "running", "completed", "state")] == [
            theirs[each] for each in ("slots", "running", "completed", "state")
        ]


def at_work() -> Scene:
    tasks = [
        WorkflowTask(task_id="a", shell="make"),
        WorkflowTask(task_id="b", argv=["x"], dependencies=["a"]),
    ]
    scene = given(elected(), joined("w1"), says(WorkflowSubmitted(id="f", name="Release", tasks=tasks)))
    scene.given(submitted("t", title="Count", args=[1]), submitted("gone"), assigned("gone"))
    scene.given(assigned("f/a"), completed("f/a", result=b"3"), assigned("f/b"), completed("gone"))
    return scene


async def test_what_is_still_in_the_log_completes_the_rows() -> None:
    scene = at_work()
    cut = len(scene.messages)
    scene.after(50).given(submitted("late"))
    async with trimmed_log(scene.messages, 1, snapshot_seq=cut) as (log, objects):
        past = await LoggedPast.of(log, objects)
        history = await read_history(past)
        assert (past.first_seq, past.known_from) == (2, cut + 1)
        assert history.tasks["t"].title == ""
        await fill(past, history.tasks.values())
        await fill_workflow(past, history.workflows["f"])
        await fill_workers(past, history.workers.values())
    whole = whole_of(scene.messages)
    now_ms = scene.now_ms
    assert task_document(history.tasks["t"], now_ms) == task_document(whole.tasks["t"], now_ms)
    assert history.workflows["f"].name == "Release"
    told, known = (workflow_document(each.workflows["f"], now_ms) for each in (history, whole))
    assert parts(told, ("state", "counts", "submitted_ms", "position")) == parts(
        known, ("state", "counts", "submitted_ms", "position")
    )
    assert worker_document(history.workers["w1"], {}) == worker_document(whole.workers["w1"], {})
    assert "gone" not in history.tasks
    gone = ended_before(history, "gone")
    assert gone is not None
    assert gone.startswith("'gone' is completed since position 10.0, which was trimmed")
    assert ended_before(history, "nobody") is None


async def test_what_open_work_needs_is_kept_and_read() -> None:
    scene = given(
        elected(), submitted("large", title="Large", args=[LARGE]), submitted("small", title="Small")
    )
    async with trimmed_log(scene.messages, 3, kept=[2]) as (log, objects):
        past = await LoggedPast.of(log, objects)
        history = await read_history(past)
        await fill(past, history.tasks.values())
    assert {row.id: row.title for row in history.tasks.values()} == {"large": "Large", "small": ""}
    assert [row.is_lacking for row in history.tasks.values()] == [False, True]


async def test_times_that_are_not_known_are_not_made_up() -> None:
    scene = given(
        elected(), joined("w1", slots=2), submitted("t", retry=Retry(max_attempts=2)), assigned("t")
    )
    cut = len(scene.messages)
    scene.after(500).given(failed("t", "exit"))
    async with trimmed_log(scene.messages, cut) as (log, objects):
        row = (await read_history(await LoggedPast.of(log, objects))).tasks["t"]
    assert (row.tries, row.attempts[0].worker, row.attempts[0].outcome) == (1, "w1", "failed")
    document = task_document(row, scene.now_ms)
    assert (document["wait_ms"], document["run_ms"], document["submitted_ms"]) == (None, None, None)


def test_a_task_is_submitted_again_as_it_was() -> None:
    work: dict[str, Any] = {
        "function": "app.work",
        "args": [1, "two"],
        "kwargs": {"a": [None]},
        "priority": 700,
        "needs": Needs(cpu=1.5, memory_mb=10, labels={"zone": "a"}),
        "retry": Retry(max_attempts=3, backoff_s=2.0),
        "timeout_s": 4.5,
        "queue_timeout_s": 60.0,
    }
    shell: dict[str, Any] = {"shell": "make\n", "env": {"A": "b"}, "cwd": "/tmp", "lock": "stock"}
    scene = given(elected(level=2))
    program: dict[str, Any] = {"argv": ["a", "b c"]}
    for name, asked in (("f", work), ("s", shell), ("p", program)):
        again = TaskSubmitted(**asked)
        scene.given(says(TaskSubmitted(id=name, **asked)))
        state: Namespace = fold_all(scene.messages)
        assert work_of(state.tasks[name]) == again
