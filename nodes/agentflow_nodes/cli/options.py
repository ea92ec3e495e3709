"""Options that all commands share."""

from __future__ import annotations

import os
from typing import Annotated, Final

import typer

from agentflow_nodes.cli.errors import usage

SHARED: Final = "For all commands"

Nats = Annotated[
    str | None,
    typer.Option(
        "--nats",
        metavar="URL",
        envvar="AGENTFLOW_NATS_URL",
        help="The NATS server; several, separated by commas, for a cluster.",
        show_default="nats://127.0.0.1:4222",
        rich_help_panel=SHARED,
    ),
]
Namespace = Annotated[
    str,
    typer.Option(
        "--namespace",
        metavar="NAME",
        envvar="AGENTFLOW_NAMESPACE",
        help="The namespace: one log, one queue.",
        rich_help_panel=SHARED,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON for programs.", rich_help_panel=SHARED),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show logs and, if something breaks, the traceback.", rich_help_panel=SHARED
    ),
]

_SLOTS_MIN: Final = 4
_SLOTS_PER_CORE: Final = 2


def default_slots() -> int:
    """How many tasks a worker runs at the same time, if nobody says."""
    return max(_SLOTS_MIN, _SLOTS_PER_CORE * (os.cpu_count() or 1))


def parse_labels(given: list[str]) -> dict[str, str]:
    """KEY=VALUE, several times, as a dict. Raises CliError."""
    labels = {}
    for each in given:
        key, separator, value = each.partition("=")
        if not key or not separator:
            raise usage(f"--label: expected KEY=VALUE, found {each!r}")
        labels[key] = value
    return labels
