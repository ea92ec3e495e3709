"""Logs: events with fields, through the standard library.

A library leaves it to the program where its logs go: silent below warnings unless configured.
Nodes render the same records as JSON or for people, with the fields apart.
"""

from __future__ import annotations

import logging
from typing import Any


class Logger:
    """Logs an event with its fields, if its level is enabled."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: Any) -> None:
        """For those who look for a fault."""
        self._say(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Something happened that should."""
        self._say(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Something happened that should not, and was dealt with."""
        self._say(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something was lost or could not be done."""
        self._say(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error nobody expected; with the traceback of the exception being handled."""
        self._say(logging.ERROR, event, fields, trace=True)

    def _say(self, level: int, event: str, fields: dict[str, Any], *, trace: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            shown = " ".join(f"{name}={value!r}" for name, value in fields.items())
            message = f"{event} {shown}" if shown else event
            self._logger.log(level, "%s", message, exc_info=trace, extra={"event": event, "fields": fields})


def get_logger(name: str) -> Logger:
    """The logger of a module."""
    return Logger(name)
