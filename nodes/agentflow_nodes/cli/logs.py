"""Where logs go: stderr, as text for people at a terminal and as JSON otherwise."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal

Level = Literal["debug", "info", "warning", "error", "critical"]

QUIET: Final[Level] = "critical"
"""For commands that say themselves what went wrong."""


def configure_logs(level: Level) -> None:
    """Send logs of this level and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if level != QUIET:
        handler.setFormatter(_formatter(people=sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _formatter(*, people: bool) -> logging.Formatter:
    import structlog  # noqa: PLC0415 - it takes as long to import as the rest of a command

    renderer: Any = structlog.dev.ConsoleRenderer() if people else structlog.processors.JSONRenderer()
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            _fields,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if people else "iso", utc=not people),
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *([] if people else [structlog.processors.dict_tracebacks]),
            renderer,
        ],
    )


def _fields(_logger: object, _name: str, shown: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put a record's event and fields (`agentflow.logs`) in place of its text."""
    record = shown["_record"]
    shown["event"] = getattr(record, "event", shown["event"])
    shown.update(getattr(record, "fields", {}))
    return shown
