"""Programs that behave badly, and a runner that leaves nothing of them behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import uvloop

from agentflow_nodes.worker import processes
from agentflow_nodes.worker.processes import ProcessExit, ProcessRunner, shell_argv
from agentflow_nodes.worker.reaper import MARK_VARIABLE, TOKEN_VARIABLE, census

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

ENV = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}
WAIT_S = 15.0
MIB = 1024 * 1024


async def until(condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
    """Wait for a condition, and fail if it does not come."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


def of_token(token: str) -> list[int]:
    return [seen.pid for seen in census() if seen.token == token.encode()]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reapers_of(pid: int) -> set[int]:
    """The helper processes of the worker `pid`."""
    found = set[int]()
    for process in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if any("reaper.py" in part for part in process.cmdline()):
                found.add(process.pid)
    return found


@pytest.fixture
async def runner() -> AsyncIterator[ProcessRunner]:
    async with ProcessRunner(grace_s=0.3) as entered:
        yield entered
    assert not [seen for seen in census() if seen.mark == entered.mark.encode()]


@pytest.fixture
def token() -> str:
    return secrets.token_hex(8)


def start(
    runner: ProcessRunner, script: str, token: str, **options: Any
) -> Coroutine[None, None, ProcessExit]:
    return runner.run(shell_argv(script), env=ENV, token=token, **options)


async def python(runner: ProcessRunner, code: str, token: str, **options: Any) -> ProcessExit:
    return await runner.run([sys.executable, "-c", code], env=ENV, token=token, **options)


async def test_a_script_that_works(runner: ProcessRunner, token: str, tmp_path: Path) -> None:
    before_ms = time.time_ns() // 1_000_000
    ended = await start(runner, "pwd; echo oops >&2; echo $A", token, cwd=str(tmp_path))
    assert (ended.exit_code, ended.signal, ended.error, ended.timed_out) == (0, None, None, False)
    assert ended.stdout_tail == f"{tmp_path}\n\n"
    assert (ended.stderr_tail, ended.stderr_bytes) == ("oops\n", 5)
    assert before_ms <= ended.started_at_ms <= time.time_ns() // 1_000_000
    assert 0 < ended.duration_us < WAIT_S * 1e6


async def test_the_environment_is_exactly_what_was_given(runner: ProcessRunner, token: str) -> None:
    ended = await runner.run(["/usr/bin/env"], env={"A": "ü"}, token=token)
    assert set(ended.stdout_tail.splitlines()) == {
        "A=ü",
        f"{TOKEN_VARIABLE}={token}",
        f"{MARK_VARIABLE}={runner.mark}",
    }


async def test_a_script_ends_at_the_first_failure(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "false; echo never", token)
    assert (ended.exit_code, ended.stdout_tail) == (1, "")


@pytest.mark.parametrize("status", [0, 1, 77, 255])
async def test_exit_statuses(runner: ProcessRunner, token: str, status: int) -> None:
    assert (await start(runner, f"exit {status}", token)).exit_code == status


DEADLY = sorted(
    signal.valid_signals()
    - {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    - {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
)


async def test_each_deadly_signal_is_named(runner: ProcessRunner, token: str) -> None:
    for signum in DEADLY:
        ended = await start(runner, f"kill -{int(signum)} $$", f"{token}-{int(signum)}")
        assert (ended.exit_code, ended.signal, ended.error) == (None, signum, None), signum


async def test_stdin_is_given_whole_and_need_not_be_read(runner: ProcessRunner, token: str) -> None:
    data = os.urandom(3 * MIB)
    ended = await start(runner, "wc -c", token, stdin=data)
    assert ended.stdout_tail.strip() == str(len(data))
    assert (await start(runner, "exit 0", token + "b", stdin=data)).exit_code == 0
    assert (await start(runner, "cat", token + "c", stdin=b"")).stdout_bytes == 0
    assert (await start(runner, "cat", token + "d")).stdout_bytes == 0


@pytest.mark.parametrize(
    ("argv", "options", "said"),
    [
        (["no-such-program"], {}, "no-such-program"),
        (["/etc/passwd"], {}, "PermissionError"),
        (["true"], {"cwd": "/no/such/folder"}, "/no/such/folder"),
        (["echo", "a\0b"], {}, "null byte"),
        (["echo", "x" * 3_000_000], {}, "Argument list too long"),
        (["echo", "\ud800"], {}, "UnicodeEncodeError"),
        ([], {}, "empty"),
        (["true"], {"env": {"A=B": "c"}}, "illegal environment"),
    ],
)
async def test_what_cannot_be_started_is_an_answer(
    runner: ProcessRunner, token: str, argv: list[str], options: dict[str, Any], said: str
) -> None:
    before = psutil.Process().num_fds()
    given: dict[str, Any] = {"env": ENV, "token": token, **options}
    ended = await runner.run(argv, **given)
    assert ended.error is not None
    assert said in ended.error
    assert len(ended.error.encode()) <= 4096
    assert (ended.exit_code, ended.signal) == (None, None)
    assert psutil.Process().num_fds() == before


async def test_no_descriptor_is_leaked(runner: ProcessRunner, token: str) -> None:
    await start(runner, "true", token)
    before = psutil.Process().num_fds()
    for number in range(20):
        await start(runner, "echo hi", f"{token}-{number}", stdin=b"x")
    assert psutil.Process().num_fds() == before


async def test_a_program_sees_no_descriptor_of_the_worker(runner: ProcessRunner, token: str) -> None:
    with Path(os.devnull).open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        ended = await python(
            runner, "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:3])", token
        )
        count = await python(runner, "import os; print(len(os.listdir('/proc/self/fd')))", token + "b")
    assert ended.stdout_tail == "[0, 1, 2]\n"
    assert int(count.stdout_tail) <= 4  # the three, and the one listdir reads


async def test_a_timeout_ends_it(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "echo before; sleep 100", token, timeout_s=0.2)
    assert (ended.timed_out, ended.signal, ended.stdout_tail) == (True, signal.SIGTERM, "before\n")
    assert ended.duration_us < WAIT_S * 1e6
    assert not of_token(token)


async def test_what_ends_in_its_grace_may_say_goodbye(token: str) -> None:
    async with ProcessRunner(grace_s=WAIT_S) as runner:
        ended = await start(
            runner, "trap 'echo bye; exit 7' TERM; echo up; sleep 100 & wait", token, timeout_s=0.5
        )
    assert (ended.timed_out, ended.exit_code, ended.stdout_tail) == (True, 7, "up\nbye\n")


async def test_what_ignores_term_is_killed(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "trap '' TERM INT HUP; while :; do :; done", token, timeout_s=0.3)
    assert (ended.timed_out, ended.signal) == (True, signal.SIGKILL)
    assert not of_token(token)


async def test_a_child_that_ignores_term_dies_with_its_parent(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "(trap '' TERM; sleep 101; sleep 101) & wait", token, timeout_s=0.3)
    assert ended.timed_out
    assert not of_token(token)


async def test_a_stopped_process_is_ended(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "kill -STOP $$", token, timeout_s=0.3)
    assert (ended.timed_out, ended.signal) == (True, signal.SIGTERM)


async def test_cancelling_ends_it(runner: ProcessRunner, token: str) -> None:
    task = asyncio.create_task(start(runner, "sleep 100 & sleep 100", token))
    await until(lambda: len(of_token(token)) >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not of_token(token)


async def test_cancelling_twice_ends_it_too(runner: ProcessRunner, token: str, tmp_path: Path) -> None:
    task = asyncio.create_task(
        start(runner, f"trap '' TERM; echo >{tmp_path}/up; sleep 100; sleep 100", token)
    )
    await until((tmp_path / "up").exists)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not of_token(token)


async def test_a_group_of_children_dies_whole(runner: ProcessRunner, token: str) -> None:
    bomb = (
        "spawn() { [ $1 -gt 0 ] || exec sleep 100; (spawn $(($1-1))) & (spawn $(($1-1))) & wait; }; spawn 4"
    )
    task = asyncio.create_task(start(runner, bomb, token))
    await until(lambda: len(of_token(token)) >= 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not of_token(token)


async def test_what_escaped_its_group_is_found(runner: ProcessRunner, token: str) -> None:
    escape = "setsid sh -c 'trap \"\" TERM; setsid sleep 100 & sleep 100; sleep 100' & sleep 100"
    task = asyncio.create_task(start(runner, escape, token))
    await until(lambda: len({os.getsid(pid) for pid in of_token(token)}) >= 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not of_token(token)


async def test_a_daemon_left_behind_is_swept(
    runner: ProcessRunner, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SWEEP_EVERY_S", 0.05)
    ended = await start(runner, "setsid sleep 100 </dev/null >/dev/null 2>&1 & exit 0", token)
    assert ended.exit_code == 0
    await until(lambda: not of_token(token))


async def test_a_sweep_spares_what_still_runs(
    runner: ProcessRunner, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SWEEP_EVERY_S", 0.01)
    running = asyncio.create_task(start(runner, "setsid sleep 0.5; echo done", token))
    for number in range(20):
        await start(runner, "sleep 0.01", f"{token}-{number}")
    assert (await running).stdout_tail == "done\n"


async def test_children_in_the_background_go_when_it_exits(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "sleep 100 </dev/null >/dev/null 2>&1 & echo $!", token)
    assert ended.exit_code == 0
    await until(lambda: not alive(int(ended.stdout_tail)))


async def test_pipes_held_open_do_not_hold_the_run(runner: ProcessRunner, token: str) -> None:
    began = time.monotonic()
    ended = await start(runner, "sleep 100 & setsid sleep 100 & echo out", token)
    assert (ended.exit_code, ended.stdout_tail) == (0, "out\n")
    assert time.monotonic() - began < WAIT_S / 3
    assert not of_token(token)


async def test_output_that_comes_just_after_the_exit_is_read(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "(sleep 0.05; echo late) & exit 0", token)
    assert (ended.exit_code, ended.stdout_tail) == (0, "late\n")


async def test_closing_its_descriptors_hides_nothing(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "echo a; exec <&- >&- 2>&-; sleep 0.1; exit 5", token)
    assert (ended.exit_code, ended.stdout_tail) == (5, "a\n")


async def test_closing_its_descriptors_does_not_evade_the_timeout(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "exec <&- >&- 2>&-; sleep 100", token, timeout_s=0.2)
    assert ended.timed_out


async def test_huge_output_without_a_newline_stays_flat(runner: ProcessRunner, token: str) -> None:
    process = psutil.Process()
    await start(runner, "head -c 1000000 /dev/zero", token + "warm")
    before = process.memory_info().rss
    ended = await start(runner, "head -c 150000000 /dev/zero; printf end", token)
    assert (ended.exit_code, ended.stdout_bytes) == (0, 150_000_003)
    assert ended.stdout_tail == "\ufffd" * 8189 + "end"
    assert process.memory_info().rss - before < 16 * MIB


async def test_endless_output_can_be_ended(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "yes & yes", token, timeout_s=0.3)
    assert ended.timed_out
    assert ended.stdout_bytes > MIB
    assert len(ended.stdout_tail) == 8192


async def test_both_outputs_are_read_together(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, "head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero", token)
    assert (ended.stdout_bytes, ended.stderr_bytes) == (3_000_000, 3_000_000)


async def test_binary_and_ansi_output(runner: ProcessRunner, token: str) -> None:
    ended = await start(runner, r"printf '\377\376\000\033[31mred\033[0m\303\251\303'", token)
    assert ended.stdout_tail == "\ufffd\ufffd\ufffd\x1b[31mred\x1b[0mé\ufffd"
    assert ended.stdout_bytes == 18


async def test_a_character_cut_by_the_tail_is_left_out(token: str) -> None:
    async with ProcessRunner(tail_bytes=5) as runner:
        ended = await start(runner, r"printf 'x\303\251\303\251\303\251'", token)
        none = await start(runner, "exit 0", token + "b")
    assert (ended.stdout_tail, ended.stdout_bytes) == ("éé", 7)
    assert (none.stdout_tail, none.stdout_bytes) == ("", 0)


async def test_leaving_the_runner_ends_what_runs(token: str) -> None:
    async with ProcessRunner(grace_s=0.3) as runner:
        task = asyncio.create_task(start(runner, "trap '' TERM; sleep 100 & sleep 100; sleep 100", token))
        await until(lambda: len(of_token(token)) >= 2)
    assert not of_token(token)
    ended = await task
    assert (ended.stopped, ended.signal, ended.error) == (True, signal.SIGKILL, "the runner was closed")
    late = await start(runner, "true", token)
    assert (late.stopped, late.error) == (True, "the runner is closed")
    await runner.__aexit__(None, None, None)


async def test_the_reaper_goes_with_the_runner_and_is_replaced_if_it_dies(token: str) -> None:
    before = reapers_of(os.getpid())
    async with ProcessRunner() as runner:
        (first,) = reapers_of(os.getpid()) - before
        os.kill(first, signal.SIGKILL)
        await until(lambda: bool(reapers_of(os.getpid()) - before - {first}))
        assert (await start(runner, "true", token)).exit_code == 0
    assert reapers_of(os.getpid()) == before


WORKER = """
import asyncio, os, sys, time
from agentflow_nodes.worker.processes import ProcessRunner, shell_argv

async def main():
    async with ProcessRunner() as runner:
        runs = [runner.run(shell_argv(script), env={"PATH": os.environ["PATH"]}, token=sys.argv[1])
                for script in sys.argv[2:]]
        if (fork := os.fork()) == 0:      # holds a copy of every descriptor, as a careless library would
            time.sleep(60)
            os._exit(0)
        print(fork, flush=True)
        await asyncio.gather(*runs)

asyncio.run(main())
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_killed_worker_leaves_nothing(token: str, signum: signal.Signals) -> None:
    plain = "trap '' TERM HUP; sleep 100 & sleep 100; sleep 100"
    scrubbed = f"{TOKEN_VARIABLE}= ; exec env -i sleep 100"
    escaped = "setsid sh -c 'trap \"\" TERM; sleep 100; sleep 100' & exec sleep 100"
    argv = [sys.executable, "-c", WORKER, token, plain, scrubbed, escaped]
    worker = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    fork = int(worker.stdout.readline())
    try:
        await until(lambda: len(of_token(token)) >= 5)
        sleepers = [p for p in psutil.Process(worker.pid).children(recursive=True) if "sleep" in p.name()]
        (helper,) = reapers_of(worker.pid)
        assert len(sleepers) >= 4
    finally:
        worker.send_signal(signum)
        worker.wait()
    try:
        await until(lambda: not of_token(token) and not any(alive(p.pid) for p in sleepers))
        await until(lambda: not alive(helper))
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        worker.stdout.close()


def test_it_runs_on_both_event_loops(token: str) -> None:
    async def main() -> ProcessExit:
        async with ProcessRunner() as runner:
            ended = await asyncio.gather(
                *(start(runner, "echo hi", f"{token}-{n}", timeout_s=5) for n in range(8))
            )
        return ended[0]

    assert asyncio.run(main()).stdout_tail == "hi\n"
    assert uvloop.run(main()).stdout_tail == "hi\n"


TORN_DOWN = """
import asyncio, os, sys
from agentflow_nodes.worker.processes import ProcessRunner, shell_argv

async def main():
    runner = await ProcessRunner().__aenter__()
    script = "trap '' TERM; echo up; sleep 100; sleep 100"
    env = {"PATH": os.environ["PATH"]}
    run = asyncio.create_task(runner.run(shell_argv(script), env=env, token=sys.argv[1]))
    await asyncio.sleep(0.2)
    assert not run.done()
    sys.exit(9)

asyncio.run(main())
"""


async def test_a_worker_that_ends_without_cleaning_up_leaves_nothing(token: str) -> None:
    ended = subprocess.run([sys.executable, "-c", TORN_DOWN, token], timeout=WAIT_S, check=False)
    assert ended.returncode == 9
    await until(lambda: not of_token(token))
