"""What `agentflow archive` and `agentflow up` are told of archiving; it loads nothing that archives."""

from __future__ import annotations

from typing import Annotated

import typer

KeepAge = Annotated[
    str,
    typer.Option(
        "--keep-age",
        metavar="AGE",
        help="Trim from the live log what is older: 12h, 7d. Never by default.",
    ),
]
KeepBytes = Annotated[
    str,
    typer.Option(
        "--keep-bytes", metavar="SIZE", help="Trim the oldest when the live log is larger: 500MB, 10GiB."
    ),
]
SealAfter = Annotated[
    str,
    typer.Option("--seal-after", metavar="AGE", help="How old what is not in the archive yet may get."),
]
