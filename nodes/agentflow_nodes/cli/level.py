"""`--level`: how far a node goes along with the contract."""

from __future__ import annotations

from typing import Annotated

import typer

from agentflow.limits import LEVEL, LEVEL_FIRST

Level = Annotated[
    int,
    typer.Option(
        "--level",
        min=LEVEL_FIRST,
        max=LEVEL,
        help="The highest contract level it lets be used; lower while a cluster is changed over.",
    ),
]
