"""`agentflow export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats
from agentflow_nodes.cli.output import console, plain, print_json
from agentflow_nodes.cli.past import Archive, Begin, End, NoFile, Source, open_past, parse_until
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import client_logs, run, target
from agentflow_projections.export import export
from agentflow_projections.past import Until


def export_command(  # noqa: PLR0913, PLR0917 - options
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="The Parquet file to write.", show_default=False)
    ],
    begin: Begin = None,
    until: End = None,
    file: NoFile = None,
    archive: Archive = None,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a stretch of history to one file, to be read without a server.

    The file holds the messages of the stretch and the state before it. Arguments, results and
    outputs of tasks are in it as they are in the log: look whom you give it to.

    For example:

        agentflow export incident.parquet --from -2h --to -1h
        agentflow replay --file incident.parquet
        agentflow why release-7/build --file incident.parquet
        agentflow query --file incident.parquet 'FROM tasks'
    """
    stretch = (parse_until("--from", begin), parse_until("--to", until))
    if path.is_dir():
        raise usage(f"FILE: expected a file to write, found the folder {path}")
    source = Source(target(nats, namespace), file, archive)
    main = _export(source, path, stretch, as_json=as_json)
    run(main, logs=client_logs(debug=debug))


async def _export(source: Source, path: Path, stretch: tuple[Until, Until], *, as_json: bool) -> None:
    begin, until = stretch
    async with open_past(source, quiet=as_json) as past:
        with bar("Exporting") as tell:
            extent = await export(past, path, begin=begin, until=until, progress=tell)
    size = path.stat().st_size  # noqa: ASYNC240 - nothing else is going on
    if as_json:
        print_json(msgspec.to_builtins(extent) | {"file": str(path), "bytes": size})
        return
    text = f"{path}: the state at position {extent.basis} and the messages up to {extent.last_seq}, {size:,} bytes"
    console().print(plain(text))
