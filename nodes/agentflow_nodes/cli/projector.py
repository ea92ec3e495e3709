"""`agentflow projector`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentflow_nodes.cli.daemon import Supervised, default_name, node_logs, serve
from agentflow_nodes.cli.namespaces import DEFAULT, Namespaces, named
from agentflow_nodes.cli.options import Debug, Json, Nats
from agentflow_nodes.cli.replicas import Replicas, check_replicas
from agentflow_nodes.cli.session import run, target
from agentflow_nodes.projector.config import ProjectorConfig
from agentflow_nodes.projector.node import ProjectorNode


def projector_command(  # noqa: PLR0913, PLR0917 - options
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Where the DuckDB files are: <namespace>.duckdb, and what belongs to it.",
        ),
    ] = Path(".agentflow/history"),
    archive: Annotated[
        str | None,
        typer.Option(
            "--archive",
            metavar="DIR|S3",
            help="Where 'agentflow archive' keeps what was trimmed from the log.",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Its name; by default one with host and process id.")
    ] = "",
    all_namespaces: Annotated[
        bool,
        typer.Option("--all-namespaces", help="Follow every namespace that has a log, as they come."),
    ] = False,
    memory_mb: Annotated[
        int, typer.Option("--memory-mb", min=128, help="What DuckDB may take for one file, MiB.")
    ] = 1_024,
    keep_events: Annotated[
        int,
        typer.Option(
            "--keep-events", min=1, help="After so many events keep the state anew, for who starts next."
        ),
    ] = 200_000,
    replicas: Replicas = 1,
    nats: Nats = None,
    namespace: Namespaces = None,
    as_json: Json = False,
    debug: Debug = False,
    supervised: Supervised = False,
) -> None:
    """Start a projector: it keeps the history in a DuckDB file.

    The file is made of the log and can be deleted at any time: it is made again then. While a
    projector runs no other process can open its file. A master on the same machine that is given
    the same folder starts from what is kept there. Stop it with Ctrl-C or SIGTERM.

    For example:

        agentflow projector
        agentflow projector --data /var/lib/agentflow/history --namespace shop,mail
        agentflow projector --all-namespaces
        agentflow projector --archive /var/lib/agentflow/archive
    """
    namespaces = named(namespace)
    if not (namespaces or all_namespaces):
        namespaces = (DEFAULT,)
    where = target(nats, *namespaces)
    config = ProjectorConfig(
        url=where.url,
        namespaces=namespaces,
        discover=all_namespaces,
        name=name or default_name("projector"),
        data=data,
        archive=archive,
        replicas=check_replicas(replicas),
        memory_mb=memory_mb,
        keep_events=keep_events,
    )
    told = {
        "node": "projector",
        "name": config.name,
        "url": where.url,
        "namespaces": namespaces,
        "all_namespaces": all_namespaces,
        "data": str(data),
    }
    text = f"Projector {config.name} is ready on {where.url}: histories in {data}."
    node = ProjectorNode(config)
    run(serve(node, told, text, as_json=as_json, supervised=supervised), logs=node_logs(debug=debug))
