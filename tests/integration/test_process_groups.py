"""A process that hides its marks but stays in its group: only the signal to the group finds it."""

from __future__ import annotations

import os
import secrets

import psutil

from agentflow_nodes.worker.processes import ProcessRunner, shell_argv
from tests.eventually import eventually

ENV = {"PATH": os.environ.get("PATH", "/usr/bin:/bin")}


async def test_one_in_the_background_without_an_environment_goes_when_the_first_exits() -> None:
    script = "env -i sleep 100 </dev/null >/dev/null 2>&1 & echo $!"
    async with ProcessRunner(grace_s=0.3) as runner:
        ended = await runner.run(shell_argv(script), env=ENV, token=secrets.token_hex(8))
        left = int(ended.stdout_tail)
        try:
            await eventually(lambda: not _is_alive(left), within_s=5)
        finally:
            if _is_alive(left):
                psutil.Process(left).kill()


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
