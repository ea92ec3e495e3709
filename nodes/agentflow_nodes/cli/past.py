"""What commands about the past have in common: where it is read from, moments, and how far back it goes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from msgspec import Struct

import agentflow
from agentflow.errors import InvalidRequest
from agentflow.log.port import Log
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.output import DIM, say
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import Target, open_client, open_stores
from agentflow_nodes.namespaces import collect_garbage_seldom
from agentflow_projections.history import History, Keep, Latest, read_history
from agentflow_projections.past import LoggedPast, Past, Until

MOMENT: Final = "POSITION|TIME"
MOMENT_HELP: Final = "a position, a time like 2026-11-21T17:00 (UTC), or -10m"


def _checked_archive(archive: str | None) -> str | None:
    """Raises CliError if it is said to be in a folder that is not there."""
    if archive is not None and "://" not in archive and not Path(archive).is_dir():
        raise usage(f"--archive: there is no folder {archive}")
    return archive


NoFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="Read an exported incident instead of the log; that needs no server.",
        show_default=False,
    ),
]
Archive = Annotated[
    str | None,
    typer.Option(
        "--archive",
        metavar="DIR|S3",
        envvar="AGENTFLOW_ARCHIVE",
        callback=_checked_archive,
        help="Where 'agentflow archive' keeps what was trimmed from the log.",
        show_default=False,
    ),
]
Begin = Annotated[
    str | None,
    typer.Option("--from", metavar=MOMENT, help=f"Begin with {MOMENT_HELP}.", show_default="the beginning"),
]
End = Annotated[
    str | None,
    typer.Option("--to", metavar=MOMENT, help=f"Up to {MOMENT_HELP}.", show_default="the end"),
]


def parse_until(option: str, text: str | None) -> Until:
    """A position or a time as people write it; None: to the end. Raises CliError."""
    if text is None:
        return Until()
    if text.isdecimal():
        return Until(seq=int(text))
    from agentflow_projections.query import parse_when  # noqa: PLC0415 - it loads DuckDB

    try:
        found = parse_when(text, datetime.now(UTC))
    except InvalidRequest as error:
        raise usage(f"{option}: {error}") from error
    return Until(seq=found) if isinstance(found, int) else Until(ms=int(found.timestamp() * 1000))


class Source(Struct, frozen=True):
    """Where a history is read from: a namespace's log, an archive before it, or a file instead."""

    where: Target
    file: Path | None = None
    archive: str | None = None


@asynccontextmanager
async def open_past(source: Source, *, quiet: bool = False) -> AsyncGenerator[Past]:
    """The namespace's history: out of a file if one is named, else as archive and log have it now.

    Unless `quiet`, people are told if its beginning is missing.
    """
    collect_garbage_seldom()
    file = source.file
    if file is not None:
        if file.is_dir():
            raise usage(
                f"--file: expected a file, found the folder {file}; an archive is named with --archive"
            )
        from agentflow_projections.export import ExportedPast  # noqa: PLC0415 - it loads pyarrow

        yield ExportedPast.read(file)
        return
    async with open_logged(source.where, source.archive, quiet=quiet) as past:
        yield past


@asynccontextmanager
async def open_logged(
    where: Target, archive: str | None = None, *, quiet: bool = False
) -> AsyncGenerator[LoggedPast]:
    """The namespace's history as archive and log have it now."""
    async with open_stores(where) as (log, objects):
        past = await LoggedPast.of(await with_archive(log, archive), objects)
        if not quiet:
            tell_beginning(past.known_from)
        yield past


@asynccontextmanager
async def open_both(
    where: Target, archive: str | None = None, *, quiet: bool = False
) -> AsyncGenerator[tuple[agentflow.Client, LoggedPast]]:
    """A client, and the history as archive and log have it now."""
    async with open_client(where) as client:
        past = await LoggedPast.of(await with_archive(client.log, archive), client.objects)
        if not quiet:
            tell_beginning(past.known_from)
        yield client, past


async def with_archive(log: Log, archive: str | None) -> Log:
    """The log, and before it the archive, if there is one. Raises LogGone, ArchiveDamaged."""
    if archive is None:
        return log
    from agentflow_projections.archived_log import ArchivedLog  # noqa: PLC0415 - it loads pyarrow

    return await ArchivedLog(log, archive).__aenter__()  # nothing to release: the log is not its own


def tell_beginning(known_from: int) -> None:
    """Tell people from where on a history is known, if that is not its beginning."""
    if known_from > 1:
        say(
            f"The log was trimmed: told is what happened from position {known_from} on, and what was open then;"
            " --archive DIR has what came before.",
            DIM,
        )


async def load(past: Past, *, keep: Keep | None = None, latest: Latest | None = None) -> History:
    """Fold a history to its end, showing how far it is if that takes a while."""
    collect_garbage_seldom()
    with bar("Reading the log") as tell:
        return await read_history(past, progress=tell, keep=keep, latest=latest)
