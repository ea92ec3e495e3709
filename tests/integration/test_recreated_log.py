"""A log that was deleted, made anew and is as long as before: only its birth tells."""

from __future__ import annotations

from contextlib import aclosing

import pytest

from agentflow import wire
from agentflow.bus import Bus
from agentflow.errors import LogGone
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Frame

NAMESPACE = "recreated"
SUBJECT = wire.event(NAMESPACE, "task.submitted", "cli")


async def test_it_is_gone_for_who_opened_the_one_before(bus: Bus) -> None:
    async with JetStreamLog(bus, NAMESPACE) as log:
        await _fill(log, "before")
        await bus.js_api(f"STREAM.DELETE.{wire.stream(NAMESPACE)}", b"", 5)
        async with JetStreamLog(bus, NAMESPACE) as anew:
            await _fill(anew, "anew")
        async with aclosing(log.follow(2)) as messages:
            with pytest.raises(LogGone, match="deleted and created again"):
                await anext(messages)


async def _fill(log: JetStreamLog, name: str) -> None:
    for number in range(4):
        await log.append(Frame(SUBJECT, b"{}", f"cli.{name}.{number}"))
