"""Telling clients: notices of what ended, and the services they ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec import UNSET, Struct

from agentflow import wire
from agentflow.bus import Bus, Subscription
from agentflow.domain.life import WorkflowState
from agentflow.domain.state import Ended, Namespace
from agentflow.errors import AgentFlowError
from agentflow.events import TaskCancelled, TaskCompleted, TaskFailed, TaskQuarantined, TaskTimedOut
from agentflow.frames import encode
from agentflow.logs import get_logger
from agentflow.notices import (
    NOTICE_RESULT_MAX,
    NOTICES_MAX,
    Notice,
    Status,
    StatusReply,
    decode_status_request,
)

MESSAGE_BYTES_MAX: Final = 256 * 1024
"""Notices for one client that go in one message."""
_ESCAPED_MAX: Final = 6
"""Bytes that one character may take in JSON."""
IDS_MAX: Final = 2_000
"""Most ids in one question to the status service."""

_log = get_logger(__name__)


def tell(bus: Bus, namespace: str, ended: Sequence[Ended]) -> None:
    """Send each client the notices of what ended. A lost notice costs only latency."""
    groups: dict[tuple[str, str], list[Notice]] = {}
    for end in ended:
        if not end.notify:
            continue
        key = (end.client, end.notify)
        group = groups.get(key)
        if group is None:
            groups[key] = [_notice(end)]
        else:
            group.append(_notice(end))
    try:
        for (client, token), notices in groups.items():
            subject = wire.notice(namespace, client, token)
            for data in _messages(notices):
                bus.publish(subject, data)
    except AgentFlowError as error:
        _log.debug("notices lost", error=str(error))


def _messages(notices: list[Notice]) -> Iterator[bytes]:
    """The notices in messages of bounded size."""
    start = 0
    used = 0
    for place, notice in enumerate(notices):
        size = _size_max(notice)
        if used + size > MESSAGE_BYTES_MAX or place - start >= NOTICES_MAX:
            yield encode(notices[start:place])
            start, used = place, 0
        used += size
    yield encode(notices[start:])


def _size_max(notice: Notice) -> int:
    """More than a notice can take as JSON."""
    result = notice.result
    text = len(notice.error) + len(notice.message)
    return 512 + (0 if result is UNSET else len(bytes(result))) + _ESCAPED_MAX * text


def _notice(end: Ended) -> Notice:
    event = end.event
    if type(event) is TaskCompleted:
        result = event.result
        if result is not UNSET and len(bytes(result)) > NOTICE_RESULT_MAX:
            return Notice(end.id, end.state, end.seq, end.index, fetch=True)
        return Notice(end.id, end.state, end.seq, end.index, result, event.object)
    error, message = _why(event)
    return Notice(end.id, str(end.state), end.seq, end.index, error=error, message=message)


def _why(event: object) -> tuple[str, str]:
    match event:
        case TaskFailed():
            return event.error, event.message
        case TaskCancelled():
            return "cancelled", event.reason
        case TaskTimedOut():
            return "queue_timeout", "it waited longer than its queue timeout"
        case TaskQuarantined():
            return f"quarantined: {event.reason}", event.detail
        case (str() as reason, str() as detail):
            return reason, detail
        case dict():  # the tasks of a workflow, by final state
            return "", ", ".join(f"{count} {state}" for state, count in event.items())
        case _:
            return "", ""


class QueueReply(Struct, frozen=True):
    """The queue service's answer."""

    leader: str
    seq: int
    open: int
    ready: int
    running: int
    parked: int
    """Ready tasks that fit no worker there is."""
    by_priority: dict[int, int]
    oldest_ready_ms: int
    """How long the next task has waited; 0 if none waits."""


class Services:
    """Answers requests while this master leads."""

    def __init__(
        self, bus: Bus, state: Namespace, leading: Callable[[], bool], now_ms: Callable[[], int]
    ) -> None:
        self._bus = bus
        self._state = state
        self._leading = leading
        self._now_ms = now_ms
        self._offered: list[Subscription] = []

    async def listen(self) -> None:
        """Offer the services."""
        namespace = self._state.name
        for name, answer in (("status", self._on_status), ("queue", self._on_queue)):
            self._offered.append(await self._bus.subscribe(wire.service(namespace, name), answer))

    def close(self) -> None:
        """Withdraw them."""
        for subscription in self._offered:
            subscription.end()

    def _answer(self, reply: str, data: bytes) -> None:
        try:
            self._bus.publish(reply, data)
        except AgentFlowError as error:
            _log.debug("an answer was lost", error=str(error))

    def _on_status(self, _subject: str, data: bytes, reply: str, _headers: object) -> None:
        if not reply or not self._leading():
            return
        try:
            wanted = decode_status_request(data).ids
        except (msgspec.MsgspecError, RecursionError) as error:
            self._answer(reply, encode({"error": f'expected {{"ids": [...]}}: {error}'}))
            return
        state = self._state
        statuses = [self._status(task) for task in wanted[:IDS_MAX]]
        self._answer(reply, encode(StatusReply(state.leader, state.seq, statuses)))

    def _status(self, wanted: str) -> Status:
        state = self._state
        status, position = state.status(wanted)
        closed = state.closed.get(wanted) if position else None
        workflow = wanted in state.workflows or (
            closed is not None and isinstance(closed.state, WorkflowState)
        )
        if not position:
            return Status(wanted, str(status), workflow=workflow)
        return Status(wanted, str(status), position[0], position[1], workflow=workflow)

    def _on_queue(self, _subject: str, _data: bytes, reply: str, _headers: object) -> None:
        if not reply or not self._leading():
            return
        state = self._state
        queue = state.queue
        head = queue.head(1, state.policy.ageing_per_s)
        answer = QueueReply(
            leader=state.leader,
            seq=state.seq,
            open=len(state.tasks),
            ready=queue.size,
            running=state.running,
            parked=sum(line.size for line in queue.parked.values()),
            by_priority=queue.depth_by_priority(),
            oldest_ready_ms=max(0, self._now_ms() - head[0].ready_ms) if head else 0,
        )
        self._answer(reply, encode(answer))
