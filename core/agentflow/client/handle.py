"""Handles: what a client holds of what it submitted."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from agentflow import ids
from agentflow.client.outcome import Outcome
from agentflow.errors import AgentFlowError

if TYPE_CHECKING:
    from agentflow.client.client import Client

R_co = TypeVar("R_co", covariant=True)


class Handle(Generic[R_co]):
    """A submitted task. Awaiting it gives its result."""

    __slots__ = ("_client", "_future", "_known", "_wanted", "chosen", "id", "older", "seq")

    def __init__(self, client: Client, task_id: str, wanted: Any = Any) -> None:
        self.id = task_id
        self._client = client
        self._wanted = wanted
        self._known: Outcome | None = None
        self._future: asyncio.Future[Outcome] | None = None
        # For the client:
        self.chosen = False  # whether somebody else may have used the id
        self.seq = 0  # of the submission, if we made it
        self.older: Handle[Any] | None = None  # another open handle on the same id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self._known.state if self._known else 'open'}>"

    def __await__(self) -> Generator[Any, None, R_co]:
        return self.result().__await__()

    @property
    def done(self) -> bool:
        """Whether its end is known here."""
        return self._known is not None

    async def result(self, timeout_s: float | None = None) -> R_co:
        """The task's result, once it has completed.

        Raises TaskFailed, TaskCancelled, TaskSkipped or SubmissionRejected if it did not, and
        TimeoutError after `timeout_s`.
        """
        outcome = await self.outcome(timeout_s)
        outcome.raise_for_state()
        value: R_co = outcome.value(self._wanted)
        return value

    async def outcome(self, timeout_s: float | None = None) -> Outcome:
        """How it ended, whatever way. Raises TimeoutError after `timeout_s`."""
        if self._known is None or self._known.object is not None:
            self._known = await asyncio.wait_for(self._client.outcome_of(self), timeout_s)
        return self._known

    async def status(self) -> str:
        """Its state as the leader knows it now; "unknown" if it does not."""
        return (await self._client.status([self.id])).statuses[0].state

    async def cancel(self, reason: str = "") -> None:
        """Ask for it not to run, or to be stopped. Its outcome tells what came of it."""
        await self._client.cancel(self.id, reason)

    def settle(self, outcome: Outcome) -> None:
        """Its end became known; for the client."""
        self._known = outcome
        if self._future is not None and not self._future.done():
            self._future.set_result(outcome)

    def fail(self, error: AgentFlowError) -> None:
        """Nobody will tell its end here; for the client."""
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)
            self._future.exception()  # whoever waits hears of it; if nobody does, that is no fault
            self._future = None

    def known(self) -> Outcome | None:
        """Its end, as far as it is known; for the client."""
        return self._known

    def future(self) -> asyncio.Future[Outcome]:
        """Done once its end is known; for the client."""
        if self._future is None:
            self._future = asyncio.get_running_loop().create_future()
        return self._future


class WorkflowHandle(Handle[dict[str, Any]]):
    """A submitted workflow. Its result is a dict of the results of its tasks, by task_id."""

    __slots__ = ("task_ids",)

    def __init__(self, client: Client, workflow_id: str, task_ids: list[str]) -> None:
        super().__init__(client, workflow_id)
        self.task_ids = task_ids

    def task(self, task_id: str) -> Handle[Any]:
        """One of its tasks."""
        return Handle(self._client, ids.in_workflow(self.id, task_id))

    async def result(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The results of all tasks, once the workflow has completed.

        Raises TaskFailed or TaskCancelled if it did not, and TimeoutError after `timeout_s`.
        """
        outcome = await self.outcome(timeout_s)
        outcome.raise_for_state()
        outcomes = await self._client.outcomes(
            [ids.in_workflow(self.id, task_id) for task_id in self.task_ids]
        )
        return {task_id: ended.value() for task_id, ended in zip(self.task_ids, outcomes, strict=True)}
