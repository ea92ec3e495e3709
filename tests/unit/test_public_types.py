"""What the type checkers make of the public face; `just types` proves the assertions below."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, assert_type

import agentflow


@agentflow.task
async def add(a: int, b: int) -> int:
    return a + b


@agentflow.task
def shout(text: str) -> str:
    return text.upper()


@agentflow.task(name="types.share", process=True, timeout_s=5, retry=agentflow.Retry(max_attempts=2))
def share(parts: list[float]) -> dict[str, float]:
    return {"total": sum(parts)}


@agentflow.task(name="types.wait")
async def wait() -> None:
    return None


async def check_submitting(client: agentflow.Client) -> None:
    """Never run: what it says of types is checked."""
    assert_type(await client.submit(add, 1, 2), agentflow.Handle[int])
    assert_type(await (await client.submit(add, 1, b=2)).result(), int)
    assert_type(await (await client.submit(shout, "x")), str)
    assert_type(await (await client.submit(share, [1.0])).result(), dict[str, float])
    assert_type(await client.submit(wait), agentflow.Handle[None])
    assert_type(await client.submit_many(add, [(1, 2)]), list[agentflow.Handle[int]])
    assert_type(await client.submit(add.options(priority="high"), 1, 2), agentflow.Handle[int])
    assert_type(await client.shell("true"), agentflow.Handle[Any])
    assert_type((await (await client.submit(add, 1, 2)).outcome()).state, str)


async def check_workflows(client: agentflow.Client) -> None:
    """Never run: what it says of types is checked."""
    flow = agentflow.Workflow("types")
    three = flow.add(add, 1, 2)
    assert_type(three, agentflow.Step[int])
    assert_type(flow.shell("say", "echo $N", env={"N": three}), agentflow.Step[Any])
    handle = await client.submit_workflow(flow)
    assert_type(handle, agentflow.WorkflowHandle)
    assert_type(await handle.result(), dict[str, Any])


def test_a_task_is_called_as_the_function_it_is() -> None:
    assert_type(shout("a"), str)
    assert_type(share([1.0, 2.0]), dict[str, float])
    coroutine = assert_type(add(1, 2), Coroutine[Any, Any, int])
    coroutine.close()
    assert shout("a") == "A"
    assert share([1.0, 2.0]) == {"total": 3.0}


def test_a_task_keeps_its_name_and_documentation() -> None:
    assert share.name == "types.share"
    assert share.mode == "process"
    assert add.name.endswith("test_public_types.add")
    assert agentflow.registered()["types.wait"] is wait


def test_everything_public_is_there() -> None:
    missing = [name for name in agentflow.__all__ if not hasattr(agentflow, name)]
    assert missing == []
