"""What both adapters agree on: how a frame lies in the log, and which frames cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agentflow import wire
from agentflow.limits import FRAME_BYTES_MAX
from agentflow.log.port import BATCH_FRAMES_MAX, Fence, Frame, Message, Reason, Refused

DUPLICATE_WINDOW_S: Final = 120
"""Within it a repeated write is recognised by its message id; repeating must end before it does."""


def headers_of(frame: Frame, fence: Fence | None) -> dict[str, str]:
    """The headers a frame is written with."""
    headers = dict(frame.headers) if frame.headers is not None else {}
    if frame.msg_id is not None:
        headers[wire.MSG_ID] = frame.msg_id
    if fence is not None:
        headers[wire.EXPECTED_SUBJECT_SEQ] = str(fence.seq)
        headers[wire.EXPECTED_SUBJECT] = fence.subject
    return headers


def msg_id_of(message: Message) -> str | None:
    """The message id a message was stored under."""
    return None if message.headers is None else message.headers.get(wire.MSG_ID)


def is_stored_as(frame: Frame, message: Message) -> bool:
    """Whether this message is that frame, and not another one under the same id."""
    stored = (message.subject, message.data, msg_id_of(message))
    return stored == (frame.subject, frame.data, frame.msg_id)


def oversize(frames: Sequence[Frame]) -> Refused | None:
    """The refusal of what no log takes, or None."""
    if len(frames) > BATCH_FRAMES_MAX:
        return Refused(Reason.TOO_LARGE, 0, f"{len(frames)} frames, at most {BATCH_FRAMES_MAX} fit a batch")
    largest = max(len(frame.data) for frame in frames)
    if largest > FRAME_BYTES_MAX:
        return Refused(Reason.TOO_LARGE, 0, f"{largest} bytes, at most {FRAME_BYTES_MAX} fit a frame")
    return None
