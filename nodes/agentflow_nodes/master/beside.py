"""A projector beside a master: a process of its own, started again whenever it ends."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Final

from agentflow.ending import end_process
from agentflow.logs import get_logger

_PAUSE_S_FIRST: Final = 0.5
_PAUSE_S_MAX: Final = 30.0
_STABLE_S: Final = 60.0
"""One that lived so long is started again with the first pause."""
_END_S_MAX: Final = 8.0
_LOG_GONE: Final = 6
"""The status of one whose file is of another log: nothing changes that but people."""

_log = get_logger(__name__)


class Beside:
    """The process, once `run` has begun."""

    def __init__(self, url: str, arguments: Sequence[str]) -> None:
        self._env = {**os.environ, "AGENTFLOW_NATS_URL": url}
        self._argv = [sys.executable, "-m", "agentflow_nodes", "projector", *arguments, "--supervised"]

    async def run(self) -> None:
        """Have it run, until cancelled: then it ends in good order."""
        loop, pause_s = asyncio.get_running_loop(), _PAUSE_S_FIRST
        while True:
            begun = loop.time()
            status = await self._run_once()
            if status == _LOG_GONE:
                _log.error("the history is not kept: its file is of another log", arguments=self._argv[4:])
                return
            _log.warning("the projector beside ended", status=status, again_in_s=pause_s)
            if loop.time() - begun > _STABLE_S:
                pause_s = _PAUSE_S_FIRST
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)

    async def _run_once(self) -> int:
        # It ends with us: once nobody holds the other end of its stdin.
        process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, env=self._env
        )
        try:
            return await process.wait()
        finally:
            await asyncio.shield(end_process(process, _END_S_MAX))
