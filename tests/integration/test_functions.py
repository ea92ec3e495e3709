"""Functions that behave badly, in every place a worker may run them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest
import uvloop

from agentflow.context import TaskContext, current
from agentflow.errors import NonRetryable
from agentflow_nodes.worker import functions
from agentflow_nodes.worker.functions import FunctionRunner, Mode
from agentflow_nodes.worker.outcome import Completed, Failed, Outcome
from agentflow_nodes.worker.processes import ProcessRunner
from agentflow_nodes.worker.reaper import census

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

WAIT_S = 20.0
TASK = TaskContext(task_id="t1", attempt=2, namespace="default", worker="w1")
EVERYWHERE: list[Mode] = ["async", "thread", "process"]


async def until(condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
    """Wait for a condition, and fail if it does not come."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def value_of(outcome: Outcome) -> Any:
    assert isinstance(outcome, Completed), outcome
    return msgspec.json.decode(outcome.value)


def failure_of(outcome: Outcome) -> Failed:
    assert isinstance(outcome, Failed), outcome
    return outcome


def add(a: int, b: int = 1) -> int:
    return a + b


async def add_async(a: int, b: int = 1) -> int:
    await asyncio.sleep(0)
    return a + b


def who() -> list[Any]:
    return [current().task_id, current().attempt, os.getpid()]


def refuse() -> None:
    raise ValueError("no such order")


def refuse_for_good() -> None:
    raise NonRetryable("never")


def leave(status: int) -> None:
    sys.exit(status)


def cancel_itself() -> None:
    raise asyncio.CancelledError


def nothing_json() -> object:
    return object()


def hang(path: str = "") -> None:
    if path:
        Path(path).write_text(str(os.getpid()))
    time.sleep(60)


def hang_with_children(path: str) -> None:
    plain = subprocess.Popen(["sleep", "100"])
    escaped = subprocess.Popen(["sleep", "100"], start_new_session=True)
    Path(path).write_text(f"{plain.pid} {escaped.pid}\n")
    time.sleep(100)


def ignore_term(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang(path)


def die_by(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(60)


def vanish(status: int) -> None:
    os._exit(status)


def segfault() -> None:
    ctypes.string_at(0)


def own_pid() -> int:
    return os.getpid()


def wait_for(event: threading.Event) -> None:
    event.wait(60)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
async def runner() -> AsyncIterator[FunctionRunner]:
    async with FunctionRunner(threads=2, processes=1) as entered:
        yield entered


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("mode", EVERYWHERE)
async def test_a_function_runs(runner: FunctionRunner, mode: Mode) -> None:
    assert value_of(await runner.run(add, [2], {"b": 3}, mode=mode, timeout_s=WAIT_S)) == 5
    assert value_of(await runner.run(add_async, (2,), {}, mode=mode)) == 3


@pytest.mark.parametrize("mode", EVERYWHERE)
async def test_it_knows_its_task(runner: FunctionRunner, mode: Mode) -> None:
    task_id, attempt, pid = value_of(await runner.run(who, (), {}, mode=mode, task=TASK))
    assert (task_id, attempt) == ("t1", 2)
    assert (pid == os.getpid()) is (mode != "process")
    outside = failure_of(await runner.run(who, (), {}, mode=mode))
    assert "outside of a task" in outside.message


@pytest.mark.parametrize("mode", EVERYWHERE)
async def test_errors_are_told(runner: FunctionRunner, mode: Mode) -> None:
    failed = failure_of(await runner.run(refuse, (), {}, mode=mode))
    assert (failed.kind, failed.message, failed.retryable) == ("error", "ValueError: no such order", True)
    assert "in refuse" in failed.traceback_tail
    assert "agentflow_nodes" not in failed.traceback_tail
    assert not failure_of(await runner.run(refuse_for_good, (), {}, mode=mode)).retryable
    named = await runner.run(refuse, (), {}, mode=mode, non_retryable=["ValueError"])
    assert not failure_of(named).retryable
    assert failure_of(await runner.run(add, ("a",), {"c": 1}, mode=mode)).message.startswith(
        "TypeError: add()"
    )


@pytest.mark.parametrize("mode", EVERYWHERE)
async def test_neither_exit_nor_cancellation_from_inside_harms_the_worker(
    runner: FunctionRunner, mode: Mode
) -> None:
    assert failure_of(await runner.run(leave, (3,), {}, mode=mode)).kind == "exit"
    assert failure_of(await runner.run(cancel_itself, (), {}, mode=mode)).kind == "error"
    assert failure_of(await runner.run(nothing_json, (), {}, mode=mode)).kind == "result"
    assert value_of(await runner.run(add, (1,), {}, mode=mode)) == 2


async def test_a_coroutine_that_cancels_its_own_task_fails(runner: FunctionRunner) -> None:
    async def cancel_own_task() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(60)

    assert failure_of(await runner.run(cancel_own_task, (), {}, mode="async")).kind == "error"


async def test_an_async_function_is_cancelled_at_its_limit(runner: FunctionRunner) -> None:
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    failed = failure_of(await runner.run(wait, (), {}, mode="async", timeout_s=0.05))
    assert (failed.kind, failed.retryable, failed.message) == ("timeout", True, "not finished within 0.05 s")
    assert ended.is_set()


async def test_one_that_ignores_its_cancellation_is_abandoned(
    runner: FunctionRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "CANCEL_GRACE_S", 0.05)
    give_in = asyncio.Event()

    async def ignore() -> None:
        while not give_in.is_set():
            try:
                await give_in.wait()
            except asyncio.CancelledError:
                continue

    failed = failure_of(await runner.run(ignore, (), {}, mode="async", timeout_s=0.05))
    assert (failed.kind, runner.abandoned) == ("timeout", 1)
    give_in.set()
    await until(lambda: runner.abandoned == 0)


async def test_a_thread_that_hangs_is_abandoned_and_replaced(
    runner: FunctionRunner, released: threading.Event
) -> None:
    for _ in range(3):
        failed = failure_of(await runner.run(wait_for, (released,), {}, mode="thread", timeout_s=0.05))
        assert failed.kind == "timeout"
    assert runner.abandoned == 3
    assert value_of(await runner.run(add, (1,), {}, mode="thread")) == 2
    released.set()
    await until(lambda: runner.abandoned == 0)


async def test_abandoned_threads_are_limited(
    runner: FunctionRunner, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functions, "ABANDONED_MAX", 1)
    await runner.run(wait_for, (released,), {}, mode="thread", timeout_s=0.05)
    assert failure_of(await runner.run(add, (1,), {}, mode="thread")).kind == "spawn"


async def test_threads_are_limited(runner: FunctionRunner, released: threading.Event) -> None:
    runs = [asyncio.create_task(runner.run(wait_for, (released,), {}, mode="thread")) for _ in range(2)]
    third = asyncio.create_task(runner.run(add, (1,), {}, mode="thread", timeout_s=0.05))
    done, _ = await asyncio.wait({third}, timeout=0.2)
    assert not done  # it waits for a thread, and its time does not run
    released.set()
    assert value_of(await third) == 2
    await asyncio.gather(*runs)


@pytest.mark.parametrize("mode", ["async", "thread"])
async def test_cancelling_is_passed_on(runner: FunctionRunner, released: threading.Event, mode: Mode) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.sleep(60)

    def block() -> None:
        loop.call_soon_threadsafe(begun.set)
        released.wait(60)

    loop = asyncio.get_running_loop()
    task = asyncio.create_task(runner.run(wait if mode == "async" else block, (), {}, mode=mode))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("function", [hang, ignore_term])
@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_a_child_process_is_killed(
    runner: FunctionRunner, tmp_path: Path, function: Callable[[str], None], how: str
) -> None:
    path = tmp_path / "pid"
    limit_s = 0.5 if how == "timeout" else None
    await runner.run(add, (1,), {}, mode="process")
    task = asyncio.create_task(runner.run(function, (str(path),), {}, mode="process", timeout_s=limit_s))
    await until(lambda: path.exists() and path.read_text() != "")
    pid = int(path.read_text())
    if how == "timeout":
        assert failure_of(await task).kind == "timeout"
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not alive(pid)
    assert value_of(await runner.run(add, (1,), {}, mode="process")) == 2


async def test_what_a_child_process_started_dies_with_it(runner: FunctionRunner, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    task = asyncio.create_task(runner.run(hang_with_children, (str(path),), {}, mode="process"))
    await until(lambda: path.exists() and path.read_text().endswith("\n"))
    pids = [int(pid) for pid in path.read_text().split()]
    assert all(alive(pid) for pid in pids)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("function", "args", "said"),
    [
        (die_by, (signal.SIGKILL,), "SIGKILL"),
        (die_by, (signal.SIGABRT,), "SIGABRT"),
        (segfault, (), "SIGSEGV"),
        (vanish, (3,), "status 3"),
        (vanish, (0,), "status 0"),
    ],
)
async def test_a_child_that_dies_is_a_crash(
    runner: FunctionRunner, function: Callable[..., None], args: tuple[int, ...], said: str
) -> None:
    failed = failure_of(await runner.run(function, args, {}, mode="process", timeout_s=WAIT_S))
    assert (failed.kind, failed.retryable) == ("crash", True)
    assert said in failed.message
    assert value_of(await runner.run(add, (1,), {}, mode="process")) == 2


async def test_a_child_that_dies_idle_is_replaced(runner: FunctionRunner) -> None:
    pid = value_of(await runner.run(own_pid, (), {}, mode="process"))
    assert value_of(await runner.run(own_pid, (), {}, mode="process")) == pid
    os.kill(pid, signal.SIGKILL)
    while alive(pid):  # the loop, kept busy here, has no chance to notice first
        time.sleep(0.001)  # noqa: ASYNC251 - that is the point
    assert value_of(await runner.run(own_pid, (), {}, mode="process")) != pid


async def test_what_cannot_be_sent_to_a_child_is_an_answer(runner: FunctionRunner) -> None:
    assert failure_of(await runner.run(lambda: 1, (), {}, mode="process")).kind == "spawn"
    assert failure_of(await runner.run(add, (threading.Lock(),), {}, mode="process")).kind == "spawn"


async def test_leaving_the_runner_ends_what_runs(tmp_path: Path, released: threading.Event) -> None:
    path = tmp_path / "pid"
    async with FunctionRunner(threads=1, processes=1) as runner:
        calls: list[tuple[Callable[..., Any], tuple[Any, ...], Mode]] = [
            (asyncio.sleep, (60,), "async"),
            (wait_for, (released,), "thread"),
            (hang, (str(path),), "process"),
        ]
        runs = [asyncio.create_task(runner.run(f, args, {}, mode=mode)) for f, args, mode in calls]
        await until(path.exists)
    assert [failure_of(await run).kind for run in runs] == ["stopped"] * 3
    assert not alive(int(path.read_text()))
    assert failure_of(await runner.run(add, (1,), {}, mode="async")).kind == "stopped"
    await runner.__aexit__(None, None, None)


HOST = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
import test_functions
from agentflow_nodes.worker.functions import FunctionRunner
from agentflow_nodes.worker.processes import ProcessRunner

async def main():
    async with ProcessRunner() as own, FunctionRunner(threads=1, processes=1, mark=own.mark) as runner:
        await runner.run(test_functions.hang_with_children, (sys.argv[1],), {}, mode="process")

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_a_killed_worker_leaves_nothing(tmp_path: Path) -> None:
    path, script = tmp_path / "pids", tmp_path / "host.py"
    script.write_text(HOST)
    host = subprocess.Popen([sys.executable, str(script), str(path), str(Path(__file__).parent)])
    try:
        await until(lambda: path.exists() and path.read_text().endswith("\n"))
        family = psutil.Process(host.pid).children(recursive=True)
        assert len(family) >= 4  # the reaper, the child process, and its two
    finally:
        host.kill()
        host.wait()
    await until(lambda: not any(alive(process.pid) for process in family))


def test_a_hanging_thread_does_not_keep_the_worker_from_ending() -> None:
    code = (
        "import asyncio, time\n"
        "from agentflow_nodes.worker.functions import FunctionRunner\n"
        "async def main():\n"
        "    async with FunctionRunner(threads=1, processes=0) as runner:\n"
        "        print((await runner.run(time.sleep, (60,), {}, mode='thread', timeout_s=0.05)).kind)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True
    )
    assert ended.stdout.splitlines()[-1] == "timeout"


def test_it_runs_under_uvloop() -> None:
    async def main() -> list[Any]:
        async with FunctionRunner(threads=2, processes=1) as runner:
            return [
                value_of(await runner.run(add, (1,), {}, mode=mode, timeout_s=WAIT_S)) for mode in EVERYWHERE
            ]

    assert uvloop.run(main()) == [2, 2, 2]


async def test_the_sweep_of_processes_spares_the_children_of_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentflow_nodes.worker.processes.SWEEP_EVERY_S", 0.01)
    path = tmp_path / "pids"
    async with (
        ProcessRunner() as programs,
        FunctionRunner(threads=1, processes=1, mark=programs.mark) as runner,
    ):
        task = asyncio.create_task(runner.run(hang_with_children, (str(path),), {}, mode="process"))
        await until(lambda: path.exists() and path.read_text().endswith("\n"))
        for _ in range(10):
            await programs.run(["sleep", "0.02"], env={}, token=secrets.token_hex(4))
        assert all(alive(int(pid)) for pid in path.read_text().split())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not [seen for seen in census() if seen.mark == programs.mark.encode()]
