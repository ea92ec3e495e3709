"""`--replicas`: how many servers hold the log."""

from __future__ import annotations

from typing import Annotated

import typer

from agentflow_nodes.cli.errors import usage
from agentflow_nodes.embedded.replicated import SIZES

_SIZES = f"{', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}"

Replicas = Annotated[
    int,
    typer.Option(
        "--replicas",
        metavar="N",
        help=f"On how many servers the log is kept: {_SIZES}. As many must be in the cluster.",
    ),
]


def check_replicas(replicas: int) -> int:
    """The number, if a log can have so many replicas. Raises CliError."""
    if replicas not in SIZES:
        raise usage(f"--replicas: expected {_SIZES}, found {replicas}")
    return replicas
