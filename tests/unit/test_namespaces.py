"""What a node does for several namespaces: what ends it, what does not, and how it ends."""

from __future__ import annotations

import asyncio

import pytest

from agentflow.ending import end_tasks
from agentflow.errors import LogGone
from agentflow_nodes.namespaces import Tasks
from tests.eventually import eventually


class Node:
    """Serves namespaces; `left` are those it lost."""

    def __init__(self, *namespaces: str) -> None:
        self.served = dict.fromkeys(namespaces)
        self.left: list[str] = []
        self.tasks = Tasks(self.served, self._leave)

    def _leave(self, namespace: str) -> None:
        del self.served[namespace]
        self.left.append(namespace)


async def _fail(error: Exception) -> None:
    raise error


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def test_of_several_logs_one_that_is_gone_ends_only_its_own() -> None:
    node = Node("a", "b")
    node.tasks.start(_for_ever(), "b")
    node.tasks.start(_fail(LogGone("a is gone")), "a")
    failed = asyncio.ensure_future(node.tasks.failed())
    await eventually(lambda: node.left == ["a"])
    assert not failed.done()
    node.tasks.start(_fail(LogGone("b is gone")), "b")
    with pytest.raises(LogGone, match="b is gone"):
        await failed
    await node.tasks.end()


@pytest.mark.parametrize(("name", "error"), [("a", ValueError("a bug")), ("beside", LogGone("of nobody"))])
async def test_anything_else_that_fails_ends_the_node(name: str, error: Exception) -> None:
    node = Node("a", "b")
    node.tasks.start(_fail(error), name)
    with pytest.raises(type(error), match=str(error)):
        await node.tasks.failed()
    assert node.left == []


async def test_what_ends_well_or_is_cancelled_ends_nothing() -> None:
    node = Node("a", "b")
    node.tasks.start(asyncio.sleep(0), "a")
    await end_tasks(node.tasks.start(_for_ever(), "b"))
    failed = asyncio.ensure_future(node.tasks.failed())
    await eventually(lambda: not node.tasks.running)
    assert not failed.done()
    await end_tasks(failed)


@pytest.mark.parametrize("patience_s", [0.0, 5.0])
async def test_what_is_ended_may_clean_up(patience_s: float) -> None:
    cleaned = asyncio.Event()

    async def careful() -> None:
        try:
            await _for_ever()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            cleaned.set()

    node = Node("a")
    node.tasks.start(careful(), "a")
    await asyncio.sleep(0)
    await node.tasks.end(patience_s=patience_s)
    assert cleaned.is_set()
