"""`--namespace` where several may be named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import typer

from agentflow_nodes.cli.options import SHARED

DEFAULT: Final = "default"

Namespaces = Annotated[
    list[str] | None,
    typer.Option(
        "--namespace",
        metavar="NAME",
        envvar="AGENTFLOW_NAMESPACE",
        help="A namespace: one log, one queue. May be given several times, or several with commas.",
        show_default=False,
        rich_help_panel=SHARED,
    ),
]


def named(given: Sequence[str] | None) -> tuple[str, ...]:
    """All that were named, each once, in order."""
    names = [name.strip() for each in given or () for name in each.split(",")]
    return tuple(dict.fromkeys(names))
