"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from agentflow.bus import Bus
from tests.cluster import Cluster
from tests.servers import NatsServer


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command that ran in this process has said where its logs go: not those of the tests after it."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


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


@pytest.fixture
async def cluster(nats_server: NatsServer) -> AsyncIterator[Cluster]:
    """A cluster of the test's own, with nothing in it but the server."""
    async with Cluster(nats_server) as empty:
        yield empty
