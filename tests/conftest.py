"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from agentflow.bus import Bus
from tests.cluster import Cluster
from tests.servers import NatsServer

UNTIMED: Final = tuple(Path(__file__).parent / name for name in ("unit", "sim"))


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Tests with real servers and processes measure time: they run one after the other."""
    for item in items:
        untimed = item.get_closest_marker("untimed") is not None
        if not untimed and not any(item.path.is_relative_to(folder) for folder in UNTIMED):
            item.add_marker(pytest.mark.xdist_group("one at a time"))


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
