"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agentflow.bus import Bus
from tests.servers import NatsServer


@pytest.fixture
async def nats_server() -> AsyncIterator[NatsServer]:
    """A running nats-server of the test's own."""
    async with NatsServer() as server:
        yield server


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """A bus connected to the test's server."""
    async with Bus(nats_server.url, name="test") as connected:
        yield connected
