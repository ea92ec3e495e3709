"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from agentflow.bus import Bus
from tests.cluster import Cluster
from tests.s3 import S3Server
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


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def s3() -> AsyncIterator[S3Server]:
    """A store that speaks S3, with a bucket; one for all tests."""
    async with S3Server() as server:
        yield server


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where an archive may be, of the test's own: a folder, or a bucket that is spoken to over HTTP."""
    if request.param == "folder":
        return str(tmp_path / "archive")
    s3: S3Server = request.getfixturevalue("s3")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3.bucket}/{tmp_path.name}-{secrets.token_hex(4)}"
