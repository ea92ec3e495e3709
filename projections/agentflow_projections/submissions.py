"""What was submitted, out of the messages it came in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from agentflow.checks import Bad
from agentflow.events import Event, TaskSubmitted, Work, WorkflowPart, WorkflowSubmitted
from agentflow.frames import judge
from agentflow.log.port import Message


class Submissions:
    """Some messages by position, as far as they could be had. Each is judged once."""

    def __init__(self, messages: Mapping[int, Message]) -> None:
        self._messages = messages
        self._items = {
            seq: judge(each.subject, each.data, each.headers).items for seq, each in messages.items()
        }

    def event(self, seq: int, index: int) -> Event | Bad | None:
        """The event at a position."""
        items = self._items.get(seq, ())
        return items[index] if index < len(items) else None

    def time_ms(self, seq: int) -> int:
        """When the message at a position was stored; 0: it is not there."""
        message = self._messages.get(seq)
        return 0 if message is None else message.time_ns // 1_000_000

    def work(self, seq: int, index: int, name: str) -> Work | None:
        """What was submitted at a position; `name` is the task's inside its workflow, if it has one."""
        event = self.event(seq, index)
        if isinstance(event, TaskSubmitted):
            return event
        tasks = event.tasks if isinstance(event, WorkflowSubmitted | WorkflowPart) else []
        return next((task for task in tasks if task.task_id == name), None)


NONE: Final = Submissions({})
