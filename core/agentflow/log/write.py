"""A write to JetStream under way, and what the server's answers mean for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from agentflow.log.port import Appended, Fence, Frame, Reason, Refused, Unknown
from agentflow.log.publisher import NO_RESPONDERS, NOT_PERMITTED, ApiError
from agentflow.log.stored import DUPLICATE_WINDOW_S

KNOWN_ID_IN_BATCH: Final = 10201

# Repeating must end while the server surely remembers the message ids.
_REPEAT_S_MAX: Final = DUPLICATE_WINDOW_S - 20.0
_TOO_MANY_REQUESTS: Final = 429
_NO_QUORUM: Final = (
    "the server is too busy, its disk is full or broken, or it cannot reach a majority of the servers"
)
_REASONS: Final = {
    10071: Reason.FENCED,
    10164: Reason.BUSY,  # another write under this fence is in flight (replicated streams)
    10158: Reason.BUSY,  # the message id is in process
    10210: Reason.BUSY,  # too many batches in flight
    10176: Reason.BUSY,  # the batch was given up before its end
    10077: Reason.FULL,  # max_bytes
    10023: Reason.FULL,  # insufficient resources
    10047: Reason.FULL,  # insufficient storage
    10054: Reason.TOO_LARGE,
    10059: Reason.GONE,
}


class Write:
    """One append under way: what is to be stored, and what is known of its fate."""

    def __init__(
        self,
        frames: Sequence[Frame],
        fence: Fence | None,
        last_known: int,
        timeout_s: float,
        in_doubt_after: int | None,
    ) -> None:
        self.frames: Final = frames
        self.fence: Final = fence
        self.last_known: Final = max(last_known, 0 if fence is None else fence.seq)
        """What this call stores comes after this sequence."""
        self.after: Final = self.last_known if in_doubt_after is None else in_doubt_after
        """Our messages, if they are stored by this call or an earlier one, come after this sequence."""
        self.repeatable: Final = all(frame.msg_id is not None for frame in frames)
        self.in_doubt = in_doubt_after is not None
        """Whether an earlier attempt may have been stored."""
        self.detail = "no attempt was made"
        self.code = 0
        self._began = asyncio.get_running_loop().time()
        self._deadline = self._began + min(timeout_s, _REPEAT_S_MAX)

    @property
    def left_s(self) -> float:
        """Time left."""
        return self._deadline - asyncio.get_running_loop().time()

    @property
    def tried_s(self) -> float:
        """Time spent so far."""
        return asyncio.get_running_loop().time() - self._began

    def note(self, detail: str, code: int = 0) -> None:
        """Remember why the last attempt did not settle it."""
        self.detail = detail
        self.code = code

    def given_up(self) -> Appended:
        """The result when time has run out."""
        if self.in_doubt:
            return Unknown(f"{self.detail}; {_NO_QUORUM}")
        return Refused(Reason.BUSY, self.code, self.detail)


def reason_of(error: ApiError) -> Reason:
    """Why the server refused."""
    if error.err_code in _REASONS:
        return _REASONS[error.err_code]
    if error.code == NOT_PERMITTED:
        return Reason.DENIED
    busy = error.code in (_TOO_MANY_REQUESTS, NO_RESPONDERS)
    return Reason.BUSY if busy else Reason.OTHER
