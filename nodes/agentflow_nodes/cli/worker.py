"""`agentflow worker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

import psutil
import typer

from agentflow.limits import LEVEL, LEVEL_FIRST
from agentflow_nodes.apps import load_app
from agentflow_nodes.cli.daemon import Supervised, default_name, node_logs, serve
from agentflow_nodes.cli.options import Debug, Json, Namespace, Nats, default_slots, parse_labels
from agentflow_nodes.cli.replicas import Replicas, check_replicas
from agentflow_nodes.cli.session import run, target
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.node import Worker

_MB: Final = 1 << 20


def worker_command(  # noqa: PLR0913, PLR0917 - options
    app: Annotated[
        list[str] | None,
        typer.Option(
            "--app",
            metavar="MODULE|FILE",
            help="Where its functions are: a module or a Python file. May be given several times.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="Its name; by default one with host and process id.")
    ] = "",
    slots: Annotated[
        int | None,
        typer.Option(
            "--slots", min=1, help="Tasks it runs at once.", show_default="twice the cores, 4 or more"
        ),
    ] = None,
    ahead: Annotated[
        int, typer.Option("--ahead", min=0, help="Short tasks it is willing to hold beyond its slots.")
    ] = 1024,
    group: Annotated[str, typer.Option("--group", help="A group that tasks can ask for.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="KEY=VALUE",
            help="A label that tasks can ask for; repeatable.",
            show_default=False,
        ),
    ] = None,
    cpu: Annotated[
        float | None, typer.Option("--cpu", min=0.0, help="Cores it offers.", show_default="all")
    ] = None,
    memory_mb: Annotated[
        int | None, typer.Option("--memory-mb", min=0, help="Memory it offers, MiB.", show_default="all")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs it offers.")] = 0,
    drain_s: Annotated[
        float,
        typer.Option("--drain-s", min=0.0, help="How long running tasks may go on when it stops, seconds."),
    ] = 30.0,
    level: Annotated[
        int,
        typer.Option(
            "--level",
            min=LEVEL_FIRST,
            max=LEVEL,
            help="The highest contract level it lets be used; lower it while a cluster is changed over.",
        ),
    ] = LEVEL,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Keep what it was assigned and what it reported in a DuckDB file there: started again under"
            " the same --name, it says what it had.",
            show_default=False,
        ),
    ] = None,
    replicas: Replicas = 1,
    nats: Nats = None,
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
    supervised: Supervised = False,
) -> None:
    """Start a worker: it runs tasks.

    Shell scripts and programs run anywhere; functions where their app is loaded. Ctrl-C or
    SIGTERM lets running tasks end and hands the rest back; a second one stops at once.

    For example:

        agentflow worker --app shop.tasks
        agentflow worker --app tasks.py --slots 16 --group gpu --gpus 2 --label zone=eu
    """
    where = target(nats, namespace)
    labels = parse_labels(label or [])
    for spec in app or []:
        load_app(spec, Path.cwd())
    config = WorkerConfig(
        url=where.url,
        namespace=namespace,
        name=name or default_name("worker"),
        slots=slots or default_slots(),
        ahead=ahead,
        group=group,
        labels=labels,
        cpu=float(os.cpu_count() or 1) if cpu is None else cpu,
        memory_mb=psutil.virtual_memory().total // _MB if memory_mb is None else memory_mb,
        gpus=gpus,
        drain_s=drain_s,
        level=level,
        replicas=check_replicas(replicas),
        data=data,
    )
    worker = Worker(config)
    told = {
        "node": "worker",
        "name": config.name,
        "url": where.url,
        "namespace": namespace,
        "slots": config.slots,
    }
    functions = ", ".join(sorted(worker.functions)) or "none"
    text = f"Worker {config.name} is ready on {where.url}: {config.slots} slots, functions: {functions}."
    run(serve(worker, told, text, as_json=as_json, supervised=supervised), logs=node_logs(debug=debug))
