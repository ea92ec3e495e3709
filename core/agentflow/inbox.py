"""Answers that are awaited on a connection."""

from __future__ import annotations

import asyncio
import itertools
from typing import Final

from msgspec import Struct

from agentflow.connection import DESCRIPTION, STATUS, Headers

NOT_PERMITTED: Final = "403"


class Reply(Struct, frozen=True, gc=False):
    """The answer to a request."""

    data: bytes
    headers: Headers | None = None

    @property
    def status(self) -> str:
        """The inline status: "" for an ordinary answer, "503" if nobody listens there.

        "403" is ours: the server told us that we may not publish there.
        """
        return "" if self.headers is None else self.headers.get(STATUS, "")

    @property
    def description(self) -> str:
        """What the server says beside the status."""
        return "" if self.headers is None else self.headers.get(DESCRIPTION, "")


class _Expected(Struct, gc=False):
    """A question whose answer is awaited."""

    subject: str
    deadline: float
    future: asyncio.Future[Reply | None]


class Inbox:
    """All awaited answers: one subscription and one timer for any number of them.

    A timer and a task per question (what `asyncio.wait_for` costs) would take longer than
    the question itself.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix: Final = prefix
        self._expected: dict[str, _Expected] = {}
        self._tokens = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._due = 0.0

    def expect(self, subject: str, timeout_s: float) -> tuple[str, asyncio.Future[Reply | None]]:
        """A fresh reply subject, and the future of what arrives there."""
        loop = asyncio.get_running_loop()
        token = str(next(self._tokens))
        future: asyncio.Future[Reply | None] = loop.create_future()
        deadline = loop.time() + timeout_s
        self._expected[token] = _Expected(subject, deadline, future)
        if self._timer is None or deadline < self._due:
            self._set_timer(loop, deadline)
        return self.prefix + token, future

    def on_message(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> None:
        """Hand an answer to who waits for it."""
        del reply
        expected = self._expected.pop(subject[len(self.prefix) :], None)
        if expected is not None:
            _resolve(expected.future, Reply(data, headers))

    def forget(self) -> None:
        """The connection is lost: nothing that is awaited will come."""
        expected, self._expected = self._expected, {}
        for each in expected.values():
            _resolve(each.future, None)

    def deny(self, subject: str, text: str) -> None:
        """The server refused a publish; it names the subject only, and nats-py only in lower case."""
        denied = [token for token, each in self._expected.items() if each.subject.lower() == subject]
        refusal = Reply(b"", {STATUS: NOT_PERMITTED, DESCRIPTION: text})
        for token in denied:
            _resolve(self._expected.pop(token).future, refusal)

    def _set_timer(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        # uvloop's timer does not know when it is due if that is now.
        self._due = when
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        """Give up what is overdue, and look again when the next is due."""
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        expected = self._expected.items()
        for token in [token for token, each in expected if each.deadline <= now or each.future.done()]:
            _resolve(self._expected.pop(token).future, None)
        if self._expected:
            self._set_timer(loop, min(each.deadline for each in self._expected.values()))


def _resolve(future: asyncio.Future[Reply | None], reply: Reply | None) -> None:
    if not future.done():
        future.set_result(reply)
