"""Waiting for ends: told by notices, asked for when they do not come.

A notice names a task that ended and carries its result if that is small. Notices are kept
nowhere, so whoever waits also asks the leader, ever less often, and reads the outcome at the
position it names. What the leader has forgotten is searched for in the log, once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from agentflow import frames, ids, wire
from agentflow.bus import Bus
from agentflow.client.outcome import FINAL, Outcome, from_event, from_notice, rejected
from agentflow.client.watching import events
from agentflow.ending import end_tasks
from agentflow.errors import AgentFlowError, Disconnected, LogGone, OperatingError
from agentflow.events import (
    EventRejected,
    Reason,
    TaskCancelled,
    TaskCompleted,
    TaskFailed,
    TaskQuarantined,
    TaskTimedOut,
    WorkflowCompleted,
)
from agentflow.log.port import Log
from agentflow.log.stream import cut_off, trimmed_off
from agentflow.logs import get_logger
from agentflow.notices import (
    DUPLICATE,
    REJECTED,
    Notice,
    Status,
    StatusReply,
    StatusRequest,
    decode_notices,
    decode_status_reply,
)

if TYPE_CHECKING:
    from agentflow.client.handle import Handle

ASK_AFTER_S: Final = 0.5
"""Waiting this long without a notice, the client asks."""
ASK_IDS_MAX: Final = 1_000
"""Most ids in one question."""
_ASK_FIRST_S: Final = 0.05
_ASK_EVERY_S_MAX: Final = 10.0
_ASK_UNTOLD_EVERY_S_MAX: Final = 2.0
"""For ends of which nobody sends us notices."""
_ASK_TIMEOUT_S: Final = 3.0
_UNKNOWN_MAX: Final = 3
"""Times the leader may not know an id before the whole log is searched for it."""

_SLOW_S_FIRST: Final = 0.1
_SLOW_S_MAX: Final = 5.0
"""How long to submit nothing after a rejection as overloaded: the first time, and at most."""
_ENDS: Final[dict[str, str]] = {
    TaskCompleted.kind: "completed",
    TaskFailed.kind: "failed",
    TaskCancelled.kind: "cancelled",
    TaskTimedOut.kind: "failed",
    TaskQuarantined.kind: "failed",
    WorkflowCompleted.kind: "",
}
"""Events that may end a task or workflow, and the state it is in then ("": the event says)."""

_log = get_logger(__name__)


class _Wait(Struct):
    """Somebody waits for this end."""

    ask_at: float
    pause_s: float
    pause_s_max: float
    waiters: int = 0
    unknown: int = 0


class Waiting:
    """The open handles of a client, and those somebody waits for."""

    def __init__(self, bus: Bus, log: Log, client: str) -> None:
        self._bus = bus
        self._log = log
        self._client = client
        self._open: dict[str, Handle[Any]] = {}
        self._waits: dict[Handle[Any], _Wait] = {}
        self._asker: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closed = False
        self._slow_s = _SLOW_S_FIRST
        self._slow_until = 0.0

    async def close(self) -> None:
        """Whoever waits gets Disconnected."""
        self._closed = True
        if self._asker is not None:
            await end_tasks(self._asker)
        self._fail_all(Disconnected("the client was closed"))

    def enter(self, handles: Iterable[Handle[Any]]) -> None:
        """Expect notices for what is about to be submitted."""
        opened = self._open
        for handle in handles:
            handle.older = opened.get(handle.id)
            opened[handle.id] = handle

    def leave(self, handles: Iterable[Handle[Any]]) -> None:
        """Expect none: it was not submitted."""
        for handle in handles:
            self._unchain(handle)

    def find(self, wanted: str) -> Handle[Any] | None:
        """The newest open handle of ours on an id."""
        return self._open.get(wanted)

    async def status(self, wanted: Sequence[str]) -> StatusReply:
        """What the leader knows of these ids. Raises Disconnected if there is no leader."""
        subject = wire.service(self._log.namespace, "status")
        replies = []
        for start in range(0, max(len(wanted), 1), ASK_IDS_MAX):
            request = frames.encode(StatusRequest(list(wanted[start : start + ASK_IDS_MAX])))
            replies.append(decode_status_reply(await self._bus.request(subject, request, _ASK_TIMEOUT_S)))
        if len(replies) == 1:
            return replies[0]
        statuses = [status for reply in replies for status in reply.statuses]
        return StatusReply(replies[-1].leader, replies[0].seq, statuses)

    async def wait(self, handle: Handle[Any]) -> Outcome:
        """The end of a task or workflow. Raises Disconnected if the client is closed meanwhile."""
        if self._closed:
            raise Disconnected("the client is closed")
        wait = self._waits.get(handle)
        if wait is None:
            wait = self._waits[handle] = self._new_wait(handle)
        wait.waiters += 1
        try:
            return await asyncio.shield(handle.future())
        finally:
            wait.waiters -= 1
            if not wait.waiters:
                self._waits.pop(handle, None)

    def _new_wait(self, handle: Handle[Any]) -> _Wait:
        if self._asker is None:
            self._asker = asyncio.create_task(self._ask_for_ever(), name="agentflow asker")
        now = asyncio.get_running_loop().time()
        if self._is_open(handle):
            return _Wait(now + ASK_AFTER_S, ASK_AFTER_S, _ASK_EVERY_S_MAX)
        self._wake.set()
        return _Wait(now, _ASK_FIRST_S, _ASK_UNTOLD_EVERY_S_MAX)

    def _is_open(self, handle: Handle[Any]) -> bool:
        return any(each is handle for each in _chain(self._open.get(handle.id)))

    def _unchain(self, handle: Handle[Any]) -> None:
        kept = [each for each in _chain(self._open.pop(handle.id, None)) if each is not handle]
        self.enter(reversed(kept))

    def _fail_all(self, error: AgentFlowError) -> None:
        for handle in self._waits:
            handle.fail(error)

    # Notices ---------------------------------------------------------------------------

    def on_notices(self, _subject: str, data: bytes, _reply: str, _headers: object) -> None:
        """What the leader tells us."""
        try:
            notices = decode_notices(data)
        except msgspec.MsgspecError as error:
            _log.warning("a notice could not be read", error=str(error))
            return
        for notice in notices:
            handle = self._open.get(notice.id)
            if handle is not None:
                self._on_notice(notice, handle)

    def _on_notice(self, notice: Notice, newest: Handle[Any]) -> None:
        if notice.state == REJECTED:
            if notice.error == Reason.OVERLOADED:
                self._slow_down()
            self._reject(newest, rejected(notice.id, notice.error, notice.message, notice.seq, notice.index))
            return
        if notice.state == DUPLICATE and newest.older is not None:
            return  # submitted twice by us: the first one's notice is still to come
        self._slow_s = _SLOW_S_FIRST
        outcome = None if notice.state == DUPLICATE else from_notice(notice)
        del self._open[notice.id]
        for handle in _chain(newest):
            if outcome is None:
                self._ask_now(handle)
            else:
                handle.settle(outcome)

    def _slow_down(self) -> None:
        """The namespace is overloaded: submit nothing for a while, for longer each time."""
        now = asyncio.get_running_loop().time()
        if now >= self._slow_until:
            self._slow_until = now + self._slow_s
            self._slow_s = min(2 * self._slow_s, _SLOW_S_MAX)

    async def room(self) -> None:
        """Wait until submitting makes sense again."""
        if self._slow_until:
            await asyncio.sleep(max(0.0, self._slow_until - asyncio.get_running_loop().time()))
            self._slow_until = 0.0

    def _reject(self, newest: Handle[Any], outcome: Outcome) -> None:
        """One of our submissions under this id was not accepted; others may have been."""
        chain = list(_chain(newest))
        mine = [handle for handle in chain if handle.seq == outcome.seq]
        # Where a handle's submission lies is not known while it is written, nor of many at once.
        mine += [handle for handle in chain if not handle.seq]
        if not mine:
            return  # of a submission that nobody waits for any more
        handle = mine[0]
        self._unchain(handle)
        handle.settle(outcome)

    def _ask_now(self, handle: Handle[Any]) -> None:
        wait = self._waits.get(handle)
        if wait is not None:
            wait.ask_at = 0.0
            wait.pause_s, wait.pause_s_max = _ASK_FIRST_S, _ASK_UNTOLD_EVERY_S_MAX
            self._wake.set()

    # Asking ----------------------------------------------------------------------------

    async def _ask_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                now = loop.time()
                due = [
                    handle for handle, wait in self._waits.items() if wait.ask_at <= now and not handle.done
                ]
                for start in range(0, len(due), ASK_IDS_MAX):
                    await self._ask(due[start : start + ASK_IDS_MAX])
                next_at = min((wait.ask_at for wait in self._waits.values()), default=now + ASK_AFTER_S)
                await self._sleep(min(max(next_at - loop.time(), 0.02), ASK_AFTER_S))
        except Exception as error:
            self._fail_all(OperatingError(f"waiting failed: {error!r}"))
            self._asker = None
            raise

    async def _sleep(self, pause_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(pause_s, self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        timer.cancel()

    async def _ask(self, due: Sequence[Handle[Any]]) -> None:
        """Ask about those somebody waits for, and in passing about others still open."""
        now = asyncio.get_running_loop().time()
        wanted: dict[str, list[Handle[Any]]] = {}
        for handle in due:
            wait = self._waits.get(handle)
            if wait is not None:
                wait.ask_at = now + wait.pause_s
                wait.pause_s = min(wait.pause_s * 2, wait.pause_s_max)
            wanted.setdefault(handle.id, []).append(handle)
        for task_id, handle in islice(self._open.items(), ASK_IDS_MAX - len(wanted)):
            known = wanted.setdefault(task_id, [])
            known += [each for each in _chain(handle) if each not in known]
        try:
            reply = await self.status(list(wanted))
            await self._settle_ended(wanted, reply.statuses)
            for status in reply.statuses:
                if status.state == "unknown":
                    await self._search_unknown(wanted[status.id])
        except (OperatingError, msgspec.MsgspecError) as error:
            _log.debug("status not known", error=str(error))
            await self._check_log()

    async def _check_log(self) -> None:
        """Nobody answers: perhaps because the log is gone, and then nobody ever will."""
        try:
            found = await self._log.identity()
            for handle in self._waits:
                # What was trimmed with our knowledge is part of the state: the task goes on.
                if handle.seq > 0 and max(handle.seq, found.trimmed_seq + 1) < found.first_seq:
                    handle.fail(cut_off(found, handle.seq))
        except LogGone as gone:
            self._fail_all(gone)
        except OperatingError as error:
            _log.debug("the log is not known", error=str(error))

    async def _settle_ended(self, wanted: dict[str, list[Handle[Any]]], statuses: Sequence[Status]) -> None:
        ended = [status for status in statuses if status.state in FINAL and status.seq]
        outcomes = await self._read_outcomes(ended)
        for outcome in outcomes:
            for handle in wanted[outcome.id]:
                rejection = await self._rejection(handle) if handle.chosen and handle.seq else None
                self._settle(handle, rejection or outcome)
        if len(outcomes) < len(ended):
            known = {outcome.id for outcome in outcomes}
            await self._fail_trimmed(wanted, [status for status in ended if status.id not in known])

    async def _fail_trimmed(self, wanted: dict[str, list[Handle[Any]]], ended: Sequence[Status]) -> None:
        """The end of a task lies in the archive: nobody who waits for it would ever be told."""
        found = await self._log.identity()
        for status in ended:
            if status.seq <= found.trimmed_seq:
                for handle in wanted[status.id]:
                    self._unchain(handle)
                    handle.fail(trimmed_off(found, status.seq))

    def _settle(self, handle: Handle[Any], outcome: Outcome) -> None:
        self._unchain(handle)
        handle.settle(outcome)

    async def _read_outcomes(self, ended: Sequence[Status]) -> list[Outcome]:
        """The outcomes behind statuses, as far as they can be read; each message is read once."""
        items: dict[int, Sequence[Any]] = {}
        for seq in {status.seq for status in ended}:
            message = await self._log.read(seq)
            if message is None:
                _log.warning("the log no longer holds the end of a task", seq=seq)
            else:
                items[seq] = frames.judge(message.subject, message.data, message.headers).items
        return [
            from_event(
                status.id, status.state, _at(items[status.seq], status.index), status.seq, status.index
            )
            for status in ended
            if status.seq in items
        ]

    # Searching the log -----------------------------------------------------------------

    async def _search_unknown(self, handles: Sequence[Handle[Any]]) -> None:
        for handle in handles:
            wait = self._waits.get(handle)
            if wait is None:
                continue
            wait.unknown += 1
            if wait.unknown == _UNKNOWN_MAX:
                outcome = await self._search(handle)
                if outcome is not None:
                    self._settle(handle, outcome)

    async def _search(self, handle: Handle[Any]) -> Outcome | None:
        """Read the whole log for the end of what the leader has forgotten, or did not accept."""
        last_seq = (await self._log.identity()).last_seq
        found: Outcome | None = None
        async for logged in events(self._log, after=0, until=last_seq):
            event = logged.event
            if isinstance(event, EventRejected) and self._is_about(event, handle):
                found = found or rejected(handle.id, event.reason, event.detail, event.seq, event.index)
            elif logged.kind in _ENDS and getattr(event, "id", None) == handle.id:
                state = _ENDS[logged.kind] or getattr(event, "state", "")
                found = from_event(handle.id, state, event, logged.seq, logged.index)
        return found

    async def _rejection(self, handle: Handle[Any]) -> Outcome | None:
        """Whether this submission, under an id that others may use too, was not accepted."""
        subject = wire.event(self._log.namespace, EventRejected.kind, "*")
        last_seq = (await self._log.identity()).last_seq
        async for logged in events(self._log, after=handle.seq, until=last_seq, subjects=[subject]):
            event = logged.event
            if isinstance(event, EventRejected) and self._is_about(event, handle):
                return rejected(handle.id, event.reason, event.detail, event.seq, event.index)
        return None

    def _is_about(self, event: EventRejected, handle: Handle[Any]) -> bool:
        if not event.id:
            return handle.id == ids.derived(event.seq, event.index)
        return event.id == handle.id and event.client == self._client and handle.seq in {0, event.seq}


def _chain(handle: Handle[Any] | None) -> Iterator[Handle[Any]]:
    """A handle, and the older ones on the same id."""
    while handle is not None:
        following = handle.older
        yield handle
        handle = following


def _at(items: Sequence[Any], index: int) -> Any:
    return items[index] if 0 <= index < len(items) else None
