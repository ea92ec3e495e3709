"""`agentflow master`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentflow.checks import STRATEGIES
from agentflow.events import Policy
from agentflow.limits import LEVEL
from agentflow_nodes.cli.daemon import Supervised, default_name, node_logs, serve
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.level import Level
from agentflow_nodes.cli.namespaces import DEFAULT, Namespaces, named
from agentflow_nodes.cli.options import Debug, Json, Nats
from agentflow_nodes.cli.replicas import Replicas, check_replicas
from agentflow_nodes.cli.session import run, target
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.node import Master


def master_command(  # noqa: PLR0913, PLR0917 - options
    name: Annotated[
        str, typer.Option("--name", help="Its name; by default one with host and process id.")
    ] = "",
    strategy: Annotated[
        str, typer.Option("--strategy", help=f"How it places tasks: {', '.join(STRATEGIES)}.")
    ] = STRATEGIES[0],
    lease_ttl_s: Annotated[
        int, typer.Option("--lease-ttl-s", min=1, help="How soon another master may take over, seconds.")
    ] = 3,
    worker_ttl_s: Annotated[
        float, typer.Option("--worker-ttl-s", min=1.0, help="A worker silent for so long is lost, seconds.")
    ] = 5.0,
    all_namespaces: Annotated[
        bool,
        typer.Option("--all-namespaces", help="Serve every namespace that has a log, as they come."),
    ] = False,
    level: Level = LEVEL,
    log_bytes_max: Annotated[
        int,
        typer.Option(
            "--log-bytes-max",
            min=0,
            help="Turn submissions away near this size of the log; 0: the stream's own limit.",
        ),
    ] = 0,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Where a projector on this machine keeps its files: it starts from the state there.",
            show_default=False,
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            "--history",
            metavar="DIR",
            help="Keep the history there itself, in DuckDB files, and answer 'agentflow query': no projector is needed.",
            show_default=False,
        ),
    ] = None,
    archive: Annotated[
        str | None,
        typer.Option(
            "--archive",
            metavar="DIR|S3",
            help="With --history: where 'agentflow archive' keeps what was trimmed from the log.",
            show_default=False,
        ),
    ] = None,
    replicas: Replicas = 1,
    nats: Nats = None,
    namespace: Namespaces = None,
    as_json: Json = False,
    debug: Debug = False,
    supervised: Supervised = False,
) -> None:
    """Start a master: it leads the namespace, or stands by.

    One master leads a namespace, any number stand by and take over when it ends; masters of
    several namespaces share them out. Stop it with Ctrl-C or SIGTERM.

    For example:

        agentflow master
        agentflow master --namespace shop,mail
        agentflow master --all-namespaces
        agentflow master --history /var/lib/agentflow/history
        agentflow master --nats nats://10.0.0.5:4222 --strategy bin_packing
        agentflow master --nats nats://n1:4222,nats://n2:4222,nats://n3:4222 --replicas 3
    """
    namespaces = named(namespace)
    if not (namespaces or all_namespaces):
        namespaces = (DEFAULT,)
    where = target(nats, *namespaces)
    if strategy not in STRATEGIES:
        raise usage(f"--strategy: expected one of {', '.join(STRATEGIES)}; found {strategy!r}")
    if history is not None and data is not None:
        raise usage(
            "--history, --data: expected one of them: it keeps the history itself, or a projector does"
        )
    if archive is not None and history is None:
        raise usage("--archive: expected --history, too: it is for building the history anew")
    config = MasterConfig(
        url=where.url,
        namespaces=namespaces,
        discover=all_namespaces,
        name=name or default_name("master"),
        lease_ttl_s=lease_ttl_s,
        worker_ttl_s=worker_ttl_s,
        policy=Policy(strategy=strategy),
        replicas=check_replicas(replicas),
        log_bytes_max=log_bytes_max,
        level=level,
        data=data,
        history=history,
        archive=archive,
    )
    told = {
        "node": "master",
        "name": config.name,
        "url": where.url,
        "namespace": namespaces[0] if namespaces else None,
        "namespaces": namespaces,
        "all_namespaces": all_namespaces,
        "level": level,
    }
    text = f"Master {config.name} is ready on {where.url}: {_served(config)}."
    run(
        serve(Master(config), told, text, as_json=as_json, supervised=supervised), logs=node_logs(debug=debug)
    )


def _served(config: MasterConfig) -> str:
    names = config.served
    text = f"namespace{'' if len(names) == 1 else 's'} {', '.join(names)}" if names else ""
    return " and ".join(part for part in (text, "all there are" if config.discover else "") if part)
