"""The client against a real server, a master and a worker: what users see."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import agentflow
from agentflow import frames, wire
from agentflow.client.client import PATIENCE_S
from agentflow.events import TaskSubmitted, WorkflowSubmitted, WorkflowTask
from agentflow.limits import FRAME_BYTES_MAX, INLINE_BYTES_MAX
from agentflow.log.port import Done, Frame
from agentflow.log.stored import DUPLICATE_WINDOW_S
from tests.app import (
    Point,
    add,
    add_in_process,
    add_in_thread,
    attempts,
    broken,
    cancels_itself,
    chosen,
    day_after,
    mark,
    moved,
    moved_in_process,
    size_of,
    sleep_async,
    sleep_in_process,
    sleep_in_thread,
    stubborn,
    text_of,
    wait_for_file,
    whoami,
)
from tests.cluster import Cluster, audit
from tests.eventually import eventually

SOON_S = 15.0
LARGE = INLINE_BYTES_MAX + 1_000
QUICKLY = agentflow.Retry(max_attempts=4, backoff_s=0.01, jitter=0.0)


@pytest.fixture
async def client(cluster: Cluster) -> agentflow.Client:
    """A client of a cluster of one master and one worker with four slots."""
    await cluster.leader()
    await cluster.worker(name="w1")
    return await cluster.client()


async def _running(client: agentflow.Client, *tasks: agentflow.Handle[Any]) -> None:
    """Wait until these run."""

    async def run() -> bool:
        reply = await client.status([task.id for task in tasks])
        return all(status.state == "running" for status in reply.statuses)

    await eventually(run)


async def _rejections(client: agentflow.Client) -> list[Any]:
    return [logged.event for logged in (await audit(client)).of_kind("event.rejected")]


class TestFunctions:
    async def test_coroutines_threads_and_processes_give_results(self, client: agentflow.Client) -> None:
        handles = [await client.submit(function, 1, b=2) for function in (add, add_in_thread, add_in_process)]
        assert [await handle.result(SOON_S) for handle in handles] == [3, 3, 3]
        assert handles[0].done
        assert await handles[0] == 3

    async def test_arguments_and_results_have_the_annotated_types(self, client: agentflow.Client) -> None:
        assert await (await client.submit(moved, Point(1, 2), (10, 20), scale=2)).result(SOON_S) == Point(
            22, 44
        )
        assert await (await client.submit(moved_in_process, Point(1), (1, 1))).result(SOON_S) == Point(2, 1)
        noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
        assert await (await client.submit(day_after, noon)).result(SOON_S) == datetime(
            2026, 1, 2, 12, tzinfo=UTC
        )

    async def test_sets_tuples_and_deep_values_arrive_as_json(self, client: agentflow.Client) -> None:
        value: Any
        for value in ((1, 2, 3), {4, 5}, {"a": (Point(1, 1),), 7: "seven"}):
            assert await (await client.submit(size_of, value)).result(SOON_S) == len(value)

    async def test_arguments_of_the_wrong_type_fail_without_a_retry(self, client: agentflow.Client) -> None:
        given: Any = {"x": "not a number"}
        handle = await client.submit(moved.options(retry=QUICKLY), given, (1, 1))
        with pytest.raises(agentflow.TaskFailed, match="arguments of moved"):
            await handle.result(SOON_S)
        assert (await audit(client)).about(handle.id).count("task.failed") == 1

    async def test_a_function_knows_its_task(self, client: agentflow.Client) -> None:
        handle = await client.submit(whoami)
        known = await handle.result(SOON_S)
        assert (known["task"], known["attempt"], known["worker"]) == (handle.id, 1, "w1")

    async def test_an_exception_fails_the_task_with_kind_and_message(self, client: agentflow.Client) -> None:
        handle = await client.submit(broken, "out of paper")
        with pytest.raises(agentflow.TaskFailed, match="out of paper") as raised:
            await handle.result(SOON_S)
        assert raised.value.kind == "error"
        assert raised.value.message == "ValueError: out of paper"
        assert raised.value.task_id == handle.id
        failed: Any = (await audit(client)).of_kind("task.failed")[0].event
        assert "raise ValueError(message)" in failed.traceback

    async def test_a_function_that_cancels_itself_fails_and_the_slot_goes_on(
        self, client: agentflow.Client
    ) -> None:
        for _ in range(6):
            with pytest.raises(agentflow.TaskFailed):
                await (await client.submit(cancels_itself)).result(SOON_S)
        assert await (await client.submit(add, 1, 1)).result(SOON_S) == 2

    async def test_what_is_no_json_is_refused_before_anything_is_sent(self, client: agentflow.Client) -> None:
        bad: Any
        for bad in (object(), math.nan, [math.inf], 2**70, "\0", "\ud800", _nested(40), {"a": _nested(40)}):
            with pytest.raises(agentflow.InvalidRequest):
                await client.submit(size_of, bad)
            with pytest.raises(agentflow.InvalidRequest):
                await client.shell("true", env={"X": bad})
        assert not (await audit(client)).of_kind("task.submitted")

    async def test_a_bad_submission_does_not_harm_those_submitted_beside_it(
        self, client: agentflow.Client
    ) -> None:
        """Concurrent submissions share frames."""
        too_large = TaskSubmitted(argv=["true", "x" * 600_000])
        given = [
            *(client.submit(add, n, 1) for n in range(20)),
            client.submit_task(too_large),
            *(client.submit(add, n, 1) for n in range(20)),
        ]
        handles = await asyncio.gather(*given, return_exceptions=True)
        refused = handles.pop(20)
        assert isinstance(refused, agentflow.InvalidRequest)
        results = [await handle.result(SOON_S) for handle in handles if not isinstance(handle, BaseException)]
        assert results == [n + 1 for n in range(20)] * 2


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class TestPrograms:
    async def test_the_output_is_the_result_unless_a_file_says_it(self, client: agentflow.Client) -> None:
        assert await (await client.shell("echo hello")).result(SOON_S) == "hello"
        script = 'echo noise; echo "{\\"n\\": $N}" > $AGENTFLOW_RESULT'
        handle = await client.shell(script, env={"N": 7})
        assert await handle.result(SOON_S) == {"n": 7}
        completed: Any = (await audit(client)).of_kind("task.completed")[-1].event
        assert completed.stdout == "noise\n"
        assert await (await client.argv(["printf", "%s-%s", "a b", 5])).result(SOON_S) == "a b-5"

    async def test_only_the_end_of_the_output_is_kept(self, client: agentflow.Client) -> None:
        script = "seq 1 100000; seq 1 100000 >&2; exit 3"
        handle = await client.shell(script)
        with pytest.raises(agentflow.TaskFailed) as raised:
            await handle.result(SOON_S)
        assert raised.value.kind == "exit"
        assert raised.value.message.startswith("exit status 3")
        failed: Any = (await audit(client)).of_kind("task.failed")[0].event
        for tail in (failed.stdout, failed.stderr):
            assert tail.endswith("99999\n100000\n")
            assert len(tail) < 20_000

    @pytest.mark.parametrize(
        ("script", "kind"),
        [
            ("exit 9", "exit"),
            ("kill -KILL $$", "signal"),
            ("echo not json > $AGENTFLOW_RESULT", "result"),
            ("echo '[NaN]' > $AGENTFLOW_RESULT", "result"),
        ],
    )
    async def test_how_a_program_fails(self, client: agentflow.Client, script: str, kind: str) -> None:
        with pytest.raises(agentflow.TaskFailed) as raised:
            await (await client.shell(script)).result(SOON_S)
        assert raised.value.kind == kind

    async def test_a_program_that_does_not_exist(self, client: agentflow.Client) -> None:
        with pytest.raises(agentflow.TaskFailed) as raised:
            await (await client.argv(["/does/not/exist"])).result(SOON_S)
        assert raised.value.kind == "spawn"

    async def test_our_own_settings_are_not_in_its_environment(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NATS_PASSWORD", "secret")
        monkeypatch.setenv("AGENTFLOW_NATS_URL", "nats://user:secret@somewhere")
        monkeypatch.setenv("ORDINARY", "kept")
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        seen = await (await client.shell("env")).result(SOON_S)
        assert "secret" not in seen
        assert "ORDINARY=kept" in seen
        assert "AGENTFLOW_TASK_ID=" in seen


class TestRetries:
    async def test_a_task_is_tried_again_after_a_growing_pause(
        self, client: agentflow.Client, tmp_path: Path
    ) -> None:
        retry = agentflow.Retry(max_attempts=4, backoff_s=0.05, jitter=0.0)
        handle = await client.submit(attempts.options(retry=retry), str(tmp_path), 4)
        assert await handle.result(SOON_S) == 4
        found = await audit(client)
        at = {
            (logged.kind, getattr(logged.event, "attempt", 0)): logged.time_ms
            for logged in found.of_kind("task.failed", "task.retried")
        }
        pauses = [at["task.retried", n] - at["task.failed", n] for n in (1, 2, 3)]
        assert [pause >= wanted for pause, wanted in zip(pauses, (50, 100, 200), strict=True)] == [True] * 3

    async def test_the_last_attempt_decides(self, client: agentflow.Client, tmp_path: Path) -> None:
        handle = await client.submit(attempts.options(retry=QUICKLY), str(tmp_path), 99)
        with pytest.raises(agentflow.TaskFailed):
            await handle.result(SOON_S)
        assert len(list(tmp_path.iterdir())) == 4

    @pytest.mark.parametrize("names", [["Refused"], ["tests.app.Refused"], ["error"]])
    async def test_named_errors_are_not_retried(
        self, client: agentflow.Client, tmp_path: Path, names: list[str]
    ) -> None:
        retry = agentflow.Retry(max_attempts=4, backoff_s=0.01, non_retryable=names)
        handle = await client.submit(attempts.options(retry=retry), str(tmp_path), 99, "Refused")
        with pytest.raises(agentflow.TaskFailed):
            await handle.result(SOON_S)
        assert len(list(tmp_path.iterdir())) == 1

    async def test_non_retryable_is_not_retried(self, client: agentflow.Client, tmp_path: Path) -> None:
        handle = await client.submit(attempts.options(retry=QUICKLY), str(tmp_path), 99, "NonRetryable")
        with pytest.raises(agentflow.TaskFailed):
            await handle.result(SOON_S)
        assert len(list(tmp_path.iterdir())) == 1

    async def test_programs_are_retried_too(self, client: agentflow.Client, tmp_path: Path) -> None:
        script = f"test $AGENTFLOW_ATTEMPT -ge 3 || exit 1; touch {tmp_path}/done"
        handle = await client.shell(script, retry=QUICKLY)
        assert await handle.result(SOON_S) is None
        handle = await client.shell("exit 1", retry=agentflow.Retry(max_attempts=5, non_retryable=["exit"]))
        with pytest.raises(agentflow.TaskFailed):
            await handle.result(SOON_S)
        assert (await audit(client)).about(handle.id).count("task.failed") == 1


class TestTimeLimits:
    @pytest.mark.parametrize("function", [sleep_async, sleep_in_thread, sleep_in_process])
    async def test_a_function_that_takes_too_long_fails(
        self, client: agentflow.Client, function: agentflow.Function[[float], str]
    ) -> None:
        handle = await client.submit(function.options(timeout_s=0.2), 2.0)
        with pytest.raises(agentflow.TaskFailed) as raised:
            await handle.result(SOON_S)
        assert raised.value.kind == "timeout"
        assert await (await client.submit(add, 1, 1)).result(SOON_S) == 2

    async def test_a_script_that_takes_too_long_dies_with_its_children(
        self, client: agentflow.Client, tmp_path: Path
    ) -> None:
        script = f"sleep 300 & echo $! > {tmp_path}/child; wait"
        handle = await client.shell(script, timeout_s=0.3)
        with pytest.raises(agentflow.TaskFailed) as raised:
            await handle.result(SOON_S)
        assert raised.value.kind == "timeout"
        await _gone(tmp_path / "child")

    async def test_a_timeout_is_retried(self, client: agentflow.Client) -> None:
        script = "test $AGENTFLOW_ATTEMPT -ge 2 || sleep 60"
        handle = await client.shell(script, timeout_s=0.3, retry=QUICKLY)
        assert await handle.result(SOON_S) is None

    async def test_a_task_that_waits_too_long_fails(self, client: agentflow.Client, tmp_path: Path) -> None:
        go = tmp_path / "go"
        blockers = await client.submit_many(wait_for_file, [(str(go),)] * 4)
        await _running(client, *blockers)
        waiting = await client.submit(add.options(queue_timeout_s=0.2), 1, 2)
        nowhere = await client.shell("true", queue_timeout_s=0.2, needs=agentflow.Needs(gpus=99))
        for handle in (waiting, nowhere):
            with pytest.raises(agentflow.TaskFailed) as raised:
                await handle.result(SOON_S)
            assert raised.value.kind == "queue_timeout"
        go.touch()
        assert await blockers[0].result(SOON_S) == "seen"


async def _gone(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    await eventually(lambda: not Path(f"/proc/{pid}").exists())


class TestCancelling:
    async def test_a_queued_task_never_runs(self, client: agentflow.Client, tmp_path: Path) -> None:
        handle = await client.submit(mark.options(needs=agentflow.Needs(gpus=1)), str(tmp_path), "x")
        await handle.cancel("no longer wanted")
        with pytest.raises(agentflow.TaskCancelled, match="no longer wanted"):
            await handle.result(SOON_S)
        found = await audit(client)
        assert found.about(handle.id) == ["task.submitted", "task.cancel_requested", "task.cancelled"]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("function", [sleep_async, sleep_in_thread, sleep_in_process, stubborn])
    async def test_a_running_function_is_stopped(
        self, client: agentflow.Client, function: agentflow.Function[[float], str]
    ) -> None:
        handles = await client.submit_many(function, [(6.0,)] * 4)
        await _running(client, *handles)
        for handle in handles:
            await handle.cancel()
        for handle in handles:
            with pytest.raises(agentflow.TaskCancelled):
                await handle.result(SOON_S)
        # All slots are there again, also of what does not heed its cancellation.
        others = await client.submit_many(add, [(n, n) for n in range(8)])
        assert [await other.result(SOON_S) for other in others] == [2 * n for n in range(8)]

    async def test_a_running_script_dies_with_its_children(
        self, client: agentflow.Client, tmp_path: Path
    ) -> None:
        script = (
            f"sleep 300 & echo $! > {tmp_path}/child; setsid sleep 300 & echo $! > {tmp_path}/other; wait"
        )
        handle = await client.shell(script)
        await eventually(lambda: (tmp_path / "other").exists() and (tmp_path / "other").read_text().strip())
        await handle.cancel()
        with pytest.raises(agentflow.TaskCancelled):
            await handle.result(SOON_S)
        kinds = (await audit(client)).about(handle.id)
        assert kinds.index("task.stop") < kinds.index("task.cancelled")
        await _gone(tmp_path / "child")
        await _gone(tmp_path / "other")

    async def test_a_task_waiting_for_its_next_attempt(self, client: agentflow.Client) -> None:
        retry = agentflow.Retry(max_attempts=3, backoff_s=60.0)
        handle = await client.submit(broken.options(retry=retry), "no")

        async def failed() -> bool:
            return await handle.status() == "pending"

        await eventually(failed)
        await handle.cancel()
        with pytest.raises(agentflow.TaskCancelled):
            await handle.result(SOON_S)

    async def test_twice_is_as_good_as_once(self, client: agentflow.Client) -> None:
        handle = await client.submit(sleep_async, 10.0)
        await _running(client, handle)
        await asyncio.gather(*(handle.cancel() for _ in range(5)))
        with pytest.raises(agentflow.TaskCancelled):
            await handle.result(SOON_S)
        assert (await audit(client)).outcomes()[handle.id] == ["task.cancelled"]

    async def test_an_id_nobody_knows_is_rejected(self, client: agentflow.Client) -> None:
        await client.cancel("nobody-knows-it")
        handle = await client.submit(add, 1, 2)
        await handle.result(SOON_S)
        await client.cancel(handle.id)

        async def answered() -> bool:
            return len(await _rejections(client)) == 2

        await eventually(answered)
        unknown, closed = await _rejections(client)
        assert (unknown.id, unknown.reason, unknown.client) == ("nobody-knows-it", "unknown_id", "client")
        assert (closed.id, closed.reason) == (handle.id, "closed")
        with pytest.raises(agentflow.InvalidRequest):
            await client.cancel("no such id!")

    async def test_it_needs_no_leader(self, cluster: Cluster) -> None:
        client = await cluster.client()
        task = await client.submit(add, 1, 2)
        flow = agentflow.Workflow()
        flow.add(add, 1, 2)
        workflow = await client.submit_workflow(flow)
        await task.cancel()
        await workflow.cancel()
        other = await cluster.client(name="other")
        third = await client.submit(add, 3, 4)
        await other.cancel(third.id)
        await cluster.leader()
        await cluster.worker()
        for handle in (task, workflow, third):
            with pytest.raises(agentflow.TaskCancelled):
                await handle.result(SOON_S)


class TestPriorities:
    async def test_a_reprioritized_task_overtakes(self, cluster: Cluster, tmp_path: Path) -> None:
        await cluster.leader()
        await cluster.worker(slots=1, ahead=0)
        client = await cluster.client()
        go = tmp_path / "go"
        await _running(client, await client.submit(wait_for_file, str(go)))
        waiting = [await client.shell(f"echo {n} >> {tmp_path}/order") for n in range(5)]
        await client.reprioritize(waiting[3].id, "urgent")
        await client.reprioritize(waiting[0].id, 0)
        go.touch()
        for handle in waiting:
            await handle.result(SOON_S)
        assert (tmp_path / "order").read_text().split() == ["3", "1", "2", "4", "0"]

    async def test_a_running_task_cannot_be_reprioritized(self, client: agentflow.Client) -> None:
        handle = await client.submit(sleep_async, 10.0)
        await _running(client, handle)
        await client.reprioritize(handle.id, "low")

        async def answered() -> bool:
            return bool(await _rejections(client))

        await eventually(answered)
        assert (await _rejections(client))[0].reason == "closed"
        with pytest.raises(agentflow.InvalidRequest):
            await client.reprioritize(handle.id, 1001)


class TestWorkflows:
    async def test_results_go_by_reference(self, client: agentflow.Client) -> None:
        flow = agentflow.Workflow("sums")
        plan = flow.add(chosen)
        total = flow.add(add, plan["shards"][0]["n"], plan["shards"][1]["n"])
        also = flow.add(add_in_thread, total, plan["a/b"])
        flow.shell("write", 'echo "[$A, $B]" > $AGENTFLOW_RESULT', env={"A": also, "B": plan["shards"]})
        flow.argv("argv", ["echo", also, "x"])
        handle = await client.submit_workflow(flow)
        results = await handle.result(SOON_S)
        assert results["add"] == 7
        assert results["add_in_thread"] == 12
        assert results["write"] == [12, [{"n": 3}, {"n": 4}]]
        assert results["argv"] == "12 x"
        assert await handle.task("add").result(SOON_S) == 7

    async def test_a_reference_to_nothing_fails_the_task(self, client: agentflow.Client) -> None:
        flow = agentflow.Workflow()
        plan = flow.add(chosen)
        flow.add(add, plan["shards"][9], 1)
        handle = await client.submit_workflow(flow)
        with pytest.raises(agentflow.TaskFailed):
            await handle.result(SOON_S)
        with pytest.raises(agentflow.TaskFailed, match="shards/9"):
            await handle.task("add").result(SOON_S)

    async def test_a_failure_skips_what_depends_on_it_and_the_rest_goes_on(
        self, client: agentflow.Client
    ) -> None:
        flow = agentflow.Workflow()
        bad = flow.shell("bad", "echo why >&2; exit 4")
        after = flow.shell("after", "true")
        flow.after(after, bad)
        last = flow.shell("last", "true")
        flow.after(last, after)
        good = flow.add(add, 1, 1)
        flow.add(add, good, 1)
        handle = await client.submit_workflow(flow)
        with pytest.raises(agentflow.TaskFailed, match="1 failed"):
            await handle.result(SOON_S)
        with pytest.raises(agentflow.TaskFailed, match="exit status 4: why"):
            await handle.task("bad").result(SOON_S)
        for name in ("after", "last"):
            with pytest.raises(agentflow.TaskSkipped, match="bad did not complete"):
                await handle.task(name).result(SOON_S)
        assert await handle.task("add-2").result(SOON_S) == 3

    async def test_results_are_there_before_the_workflow_ends(
        self, client: agentflow.Client, tmp_path: Path
    ) -> None:
        flow = agentflow.Workflow()
        flow.add(add, 1, 1)
        flow.shell("bad", "exit 4")
        flow.add(wait_for_file, str(tmp_path / "go"))
        handle = await client.submit_workflow(flow)
        assert await handle.task("add").result(SOON_S) == 2
        with pytest.raises(agentflow.TaskFailed, match="exit status 4"):
            await handle.task("bad").result(SOON_S)
        assert await handle.status() == "running"
        (tmp_path / "go").touch()
        assert (await handle.outcome(SOON_S)).state == "failed"

    async def test_cancelling_stops_what_runs_and_what_waits(self, client: agentflow.Client) -> None:
        flow = agentflow.Workflow()
        first = flow.add(sleep_async, 30.0)
        done = flow.add(add, 1, 1)
        flow.add(size_of, first)
        handle = await client.submit_workflow(flow)
        await handle.task(done.task_id).result(SOON_S)
        await _running(client, handle.task(first.task_id))
        await handle.cancel("enough")
        with pytest.raises(agentflow.TaskCancelled):
            await handle.result(SOON_S)
        states = [(await handle.task(name).outcome(SOON_S)).state for name in handle.task_ids]
        assert states[:2] == ["cancelled", "completed"]
        assert states[2] in {"cancelled", "skipped"}
        completed: Any = (await audit(client)).of_kind("workflow.completed")[0].event
        assert (completed.id, completed.state) == (handle.id, "cancelled")

    async def test_fan_out_and_in(self, client: agentflow.Client) -> None:
        flow = agentflow.Workflow()
        start = flow.add(add, 1, 1)
        middle = [flow.add(add, start, n) for n in range(1_000)]
        flow.add(size_of, middle)
        results = await (await client.submit_workflow(flow)).result(SOON_S)
        assert results["size_of"] == 1_000
        assert results[middle[999].task_id] == 1_001

    async def test_a_large_workflow_goes_in_parts(self, client: agentflow.Client) -> None:
        tasks = [
            WorkflowTask(
                task_id=f"t{n}",
                function="add",
                args=[n, 1],
                title="a title that takes some room in the frame",
                dependencies=[f"t{n // 2}"] if n else [],
            )
            for n in range(20_000)
        ]
        event = WorkflowSubmitted(id="large", tasks=tasks)
        assert len(frames.encode([event])) > FRAME_BYTES_MAX

        class Given(agentflow.Workflow):
            def event(self, workflow_id: str, notify: str) -> WorkflowSubmitted:
                return WorkflowSubmitted(id=workflow_id, tasks=tasks, notify=notify)

        handle = await client.submit_workflow(Given(id="large"))
        outcome = await handle.outcome(40.0)
        assert outcome.state == "completed"
        found = await audit(client)
        assert len(found.of_kind("workflow.part")) > 1
        assert len(found.outcomes()) == 20_000
        assert await handle.task("t19999").result(SOON_S) == 20_000

    async def test_a_cycle_is_refused_here_and_rejected_there(self, client: agentflow.Client) -> None:
        tasks = [
            WorkflowTask(task_id="a", shell="true", dependencies=["b"]),
            WorkflowTask(task_id="b", shell="true", dependencies=["a"]),
        ]

        class Given(agentflow.Workflow):
            def event(self, workflow_id: str, notify: str) -> WorkflowSubmitted:
                return WorkflowSubmitted(id=workflow_id, tasks=tasks, notify=notify)

        with pytest.raises(agentflow.InvalidRequest, match="bad_dag"):
            await client.submit_workflow(Given())
        subject = wire.event("default", "workflow.submitted", "stranger")
        data = frames.encode([WorkflowSubmitted(id="round", tasks=tasks)])
        assert isinstance(await client.log.append(Frame(subject, data, "stranger.1")), Done)

        async def answered() -> bool:
            return bool(await _rejections(client))

        await eventually(answered)
        rejected = (await _rejections(client))[0]
        assert (rejected.id, rejected.reason, rejected.client) == ("round", "bad_dag", "stranger")


class TestSizes:
    @pytest.mark.parametrize("size", [900, 1_500, 200_000, LARGE, 3_000_000])
    async def test_arguments_and_results(self, client: agentflow.Client, size: int) -> None:
        text = "é" * (size // 2)
        assert await (await client.submit(size_of, text)).result(SOON_S) == len(text)
        assert await (await client.submit(size_of, value=[text])).result(SOON_S) == 1
        result = await (await client.submit(text_of, size)).result(SOON_S)
        assert result == "x" * size

    async def test_large_values_stay_out_of_the_log(self, client: agentflow.Client) -> None:
        text = "x" * 3_000_000
        handle = await client.submit(size_of, text)
        assert await handle.result(SOON_S) == len(text)
        again = await client.submit_task(TaskSubmitted(function="size_of", args=[text]))
        assert await again.result(SOON_S) == len(text)
        assert (await client.log.identity()).bytes < 100_000

    @pytest.mark.parametrize("size", [1_500, 200_000, LARGE])
    async def test_as_inputs_of_other_tasks(self, client: agentflow.Client, size: int) -> None:
        flow = agentflow.Workflow()
        text = flow.add(text_of, size)
        flow.add(size_of, text)
        flow.shell("shell", 'printf %s "$TEXT" | wc -c', env={"TEXT": flow.add(text_of, 100_000)})
        flow.add(size_of, "y" * size)
        results = await (await client.submit_workflow(flow)).result(SOON_S)
        assert results["size_of"] == size
        assert results["size_of-2"] == size
        assert results["shell"] == "100000"

    async def test_a_script_with_a_large_result(self, client: agentflow.Client) -> None:
        script = "{ printf '\"'; head -c 400000 /dev/zero | tr '\\0' x; printf '\"'; } > $AGENTFLOW_RESULT"
        assert len(await (await client.shell(script)).result(SOON_S)) == 400_000


class TestNotices:
    async def test_lost_notices_cost_only_time(self, cluster: Cluster) -> None:
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        _deafen(client)
        handles = await client.submit_many(add, [(n, 1) for n in range(300)])
        assert [await handle.result(SOON_S) for handle in handles] == [n + 1 for n in range(300)]
        failing = await client.submit(broken, "so what")
        with pytest.raises(agentflow.TaskFailed, match="so what"):
            await failing.result(SOON_S)
        large = await client.submit(text_of, LARGE)
        assert len(await large.result(SOON_S)) == LARGE
        flow = agentflow.Workflow()
        flow.add(add, 1, 1)
        assert await (await client.submit_workflow(flow)).result(SOON_S) == {"add": 2}

    async def test_a_lost_rejection_is_found_in_the_log(self, cluster: Cluster) -> None:
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        _deafen(client)
        first = await client.submit_task(TaskSubmitted(id="one", function="add", args=[1, 2]))
        other = await client.submit_task(TaskSubmitted(id="one", function="add", args=[3, 4]))
        assert await first.result(SOON_S) == 3
        with pytest.raises(agentflow.SubmissionRejected, match="conflict"):
            await other.result(SOON_S)
        late = "03a35294-4000-7000-8000-000000000000"
        with pytest.raises(agentflow.SubmissionRejected, match="from_the_future"):
            await (await client.submit_task(TaskSubmitted(id=late, shell="true"))).result(SOON_S)

    async def test_many_long_messages_do_not_break_the_connection(self, client: agentflow.Client) -> None:
        """Notices go in groups, and a server cuts off who sends more than a megabyte at once."""
        handles = await client.submit_many(broken, [("\u0001" * 4_000,)] * 1_000)
        for handle in handles:
            assert (await handle.outcome(SOON_S)).state == "failed"
        assert await (await client.submit(add, 1, 1)).result(SOON_S) == 2

    async def test_somebody_elses_task(self, cluster: Cluster) -> None:
        await cluster.leader()
        await cluster.worker()
        mine, theirs = await cluster.client(), await cluster.client(name="theirs")
        handle = await theirs.submit(add, 1, 2)
        assert await mine.task(handle.id).result(SOON_S) == 3
        assert await mine.task(handle.id).status() == "completed"
        with pytest.raises(TimeoutError):
            await mine.task("not-there").result(0.3)
        outcomes = await mine.outcomes([handle.id, handle.id])
        assert [outcome.state for outcome in outcomes] == ["completed"] * 2

    async def test_several_wait_for_one_task(self, client: agentflow.Client, tmp_path: Path) -> None:
        handle = await client.submit(wait_for_file, str(tmp_path / "go"))
        with pytest.raises(TimeoutError):
            await handle.result(0.05)
        waiting = [asyncio.create_task(handle.result(SOON_S)) for _ in range(5)]
        waiting.append(asyncio.create_task(client.task(handle.id).result(SOON_S)))
        impatient = asyncio.create_task(handle.result(0.01))
        with pytest.raises(TimeoutError):
            await impatient
        (tmp_path / "go").touch()
        assert await asyncio.gather(*waiting) == ["seen"] * 6

    async def test_who_waits_on_a_client_that_closes_hears_of_it(self, cluster: Cluster) -> None:
        client = agentflow.Client(cluster.url)
        async with client:
            handle = await client.submit(add, 1, 2)
            waiting = asyncio.create_task(handle.result(SOON_S))
            await asyncio.sleep(0)
        with pytest.raises(agentflow.Disconnected):
            await waiting
        with pytest.raises(agentflow.Disconnected):
            await handle.result(SOON_S)
        with pytest.raises(agentflow.OperatingError):
            await client.submit(add, 1, 2)


def _deafen(client: agentflow.Client) -> None:
    """Let no notice reach the client."""
    for subscription in list(client.bus._subscriptions.values()):
        if subscription.subject.startswith("afn."):
            subscription.end()


class TestIds:
    async def test_the_same_task_twice_is_one(self, client: agentflow.Client, tmp_path: Path) -> None:
        event = TaskSubmitted(id="order-7", function="mark", args=[str(tmp_path), "x"])
        handles = [await client.submit_task(event) for _ in range(3)]
        handles += await asyncio.gather(*(client.submit_task(event) for _ in range(3)))
        assert [await handle.result(SOON_S) for handle in handles] == ["x"] * 6
        assert await (await client.submit_task(event)).result(SOON_S) == "x"
        assert len(list(tmp_path.iterdir())) == 1

    async def test_another_body_under_the_same_id_is_rejected(self, client: agentflow.Client) -> None:
        first = await client.submit_task(TaskSubmitted(id="order-7", function="add", args=[1, 2]))
        second = await client.submit_task(TaskSubmitted(id="order-7", function="add", args=[1, 3]))
        with pytest.raises(agentflow.SubmissionRejected) as raised:
            await second.result(SOON_S)
        assert raised.value.reason == "conflict"
        assert await first.result(SOON_S) == 3

    async def test_a_workflow_under_a_taken_id(self, client: agentflow.Client) -> None:
        def flow(a: int) -> agentflow.Workflow:
            made = agentflow.Workflow(id="nightly")
            made.add(add, a, 1)
            return made

        assert await (await client.submit_workflow(flow(1))).result(SOON_S) == {"add": 2}
        assert await (await client.submit_workflow(flow(1))).result(SOON_S) == {"add": 2}
        with pytest.raises(agentflow.SubmissionRejected):
            await (await client.submit_workflow(flow(2))).result(SOON_S)

    async def test_a_client_that_starts_anew_submits_again(self, cluster: Cluster, tmp_path: Path) -> None:
        event = TaskSubmitted(id="order-7", function="wait_for_file", args=[str(tmp_path / "go")])
        done = TaskSubmitted(id="order-8", function="mark", args=[str(tmp_path), "x"])
        await cluster.leader()
        await cluster.worker()
        async with agentflow.Client(cluster.url, name="shop") as shop:
            await shop.submit_task(event)
            await (await shop.submit_task(done)).result(SOON_S)
        async with agentflow.Client(cluster.url, name="shop") as shop:
            handle = await shop.submit_task(event)
            assert await (await shop.submit_task(done)).result(SOON_S) == "x"
            (tmp_path / "go").touch()
            assert await handle.result(SOON_S) == "seen"
        assert len(list(tmp_path.glob("x.*"))) == 1

    @pytest.mark.parametrize("bad", ["at-1-0", "a.b", "a b", "*", "x" * 300, "ü"])
    async def test_ids_that_no_client_may_choose(self, client: agentflow.Client, bad: str) -> None:
        with pytest.raises(agentflow.InvalidRequest):
            await client.submit_task(TaskSubmitted(id=bad, shell="true"))
        flow = agentflow.Workflow(id=bad)
        flow.add(add, 1, 1)
        with pytest.raises(agentflow.InvalidRequest):
            await client.submit_workflow(flow)


class TestLog:
    async def test_bulk_submissions_travel_in_dense_frames(self, client: agentflow.Client) -> None:
        handles = await client.submit_many(add, [(n, n) for n in range(10_000)])
        assert len({handle.id for handle in handles}) == 10_000
        assert [await handle.result(SOON_S) for handle in handles[-10:]] == [
            2 * n for n in range(9_990, 10_000)
        ]
        found = await audit(client)
        submissions = {logged.seq for logged in found.of_kind("task.submitted")}
        assert len(submissions) == 10
        assert found.messages < 600

    async def test_single_submissions_at_the_same_time_share_frames(self, client: agentflow.Client) -> None:
        await asyncio.gather(*(client.submit(add, n, n) for n in range(2_000)))
        found = await audit(client)
        assert len({logged.seq for logged in found.of_kind("task.submitted")}) < 20

    async def test_what_is_submitted_without_any_master_waits(self, cluster: Cluster) -> None:
        client = await cluster.client()
        handle = await client.submit(add, 1, 2)
        with pytest.raises(TimeoutError):
            await handle.result(0.7)
        with pytest.raises(agentflow.Disconnected):
            await handle.status()
        await cluster.leader()
        await cluster.worker()
        assert await handle.result(SOON_S) == 3

    async def test_events_can_be_watched(self, client: agentflow.Client) -> None:
        seen: list[str] = []

        async def watch(stop: Callable[[], bool]) -> None:
            async for logged in client.events(after=0, subjects=["af.default.task.*.*"]):
                seen.append(logged.kind)
                if stop():
                    return

        watching = asyncio.create_task(watch(lambda: "task.completed" in seen))
        await (await client.submit(add, 1, 2)).result(SOON_S)
        await asyncio.wait_for(watching, SOON_S)
        assert seen == ["task.submitted", "task.assigned", "task.completed"]

    async def test_a_bounded_filtered_reading_ends(self, client: agentflow.Client) -> None:
        await (await client.submit(add, 1, 2)).result(SOON_S)
        last_seq = (await client.log.identity()).last_seq

        async def read(*subjects: str) -> list[str]:
            events = client.events(after=0, until=last_seq, subjects=subjects)
            return [logged.kind async for logged in events]

        async with asyncio.timeout(SOON_S):
            assert await read("af.default.task.submitted.*") == ["task.submitted"]
            assert await read("af.default.task.cancelled.*") == []
            assert len(await read()) == last_seq

    async def test_a_full_log_refuses_submissions_and_goes_on_once_there_is_room(
        self, cluster: Cluster
    ) -> None:
        await cluster.leader()
        await cluster.worker()
        client = await cluster.client()
        before = await client.submit(add, 1, 2)
        assert await before.result(SOON_S) == 3
        used = (await client.log.identity()).bytes
        await _limit(client, used + 20_000)
        submissions = [client.shell("true", title="x" * 2_000) for _ in range(50)]
        found = await asyncio.gather(*submissions, return_exceptions=True)
        assert any(isinstance(each, agentflow.AppendRefused) for each in found)
        await _limit(client, -1)
        assert await (await client.submit(add, 3, 4)).result(SOON_S) == 7


async def _limit(client: agentflow.Client, bytes_max: int) -> None:
    name = wire.stream("default")
    info = frames.decode_any(await client.bus.js_api(f"STREAM.INFO.{name}", b"", 5.0))
    config = info["config"] | {"max_bytes": bytes_max}
    answer = frames.decode_any(await client.bus.js_api(f"STREAM.UPDATE.{name}", frames.encode(config), 5.0))
    assert "error" not in answer, answer


def test_repeating_ends_before_the_server_forgets() -> None:
    assert PATIENCE_S < DUPLICATE_WINDOW_S
