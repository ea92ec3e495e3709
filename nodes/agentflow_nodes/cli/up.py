"""`agentflow up`: everything on one machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from agentflow_nodes.cli.amounts import parse_age, parse_size
from agentflow_nodes.cli.archiving import KeepAge, KeepBytes, SealAfter
from agentflow_nodes.cli.cluster import ArchiveConfig, Cluster, ClusterConfig
from agentflow_nodes.cli.daemon import Stop
from agentflow_nodes.cli.errors import CliError, Exit, usage
from agentflow_nodes.cli.options import Debug, Json, Namespace, default_slots
from agentflow_nodes.cli.output import console, plain, print_json, say
from agentflow_nodes.cli.replicas import check_replicas
from agentflow_nodes.cli.session import run, target

_PORT: Final = 4222


def up_command(  # noqa: PLR0913, PLR0917 - options
    data_dir: Annotated[
        Path, typer.Option("--data-dir", help="Where the log is kept. It survives a restart.")
    ] = Path(".agentflow"),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port of the NATS server; 0: any that is free.")
    ] = _PORT,
    replicas: Annotated[
        int | None,
        typer.Option(
            "--replicas",
            metavar="N",
            help="NATS servers to run, each with a copy of the log: 1, 3 or 5.",
            show_default="as many as the folder holds; 1 in a new one",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="How many workers, one process each.")] = 1,
    slots: Annotated[
        int | None,
        typer.Option(
            "--slots", min=1, help="Tasks each runs at once.", show_default="twice the cores, 4 or more"
        ),
    ] = None,
    app: Annotated[
        list[str] | None,
        typer.Option(
            "--app",
            metavar="MODULE|FILE",
            help="Where functions are: a module or a Python file. May be given several times.",
            show_default=False,
        ),
    ] = None,
    drain_s: Annotated[
        float,
        typer.Option("--drain-s", min=0.0, help="How long running tasks may go on at the end, seconds."),
    ] = 30.0,
    projector: Annotated[
        bool,
        typer.Option(
            "--projector/--no-projector", help="Keep the history in a DuckDB file, in the folder history."
        ),
    ] = True,
    archive: Annotated[
        str,
        typer.Option(
            "--archive",
            metavar="DIR|S3",
            help="Archive the log there: a folder, or s3://bucket/prefix. Not archived by default.",
        ),
    ] = "",
    keep_age: KeepAge = "",
    keep_bytes: KeepBytes = "",
    seal_after: SealAfter = "1h",
    namespace: Namespace = "default",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Start NATS, a master, workers and a history on this machine.

    Ctrl-C or SIGTERM ends all in order: workers finish what they run, then the master with the
    history, the archiver if there is one, and the server. A second Ctrl-C ends everything at once.
    What was acknowledged is on disk and there again at the next start. With --replicas 3 three NATS servers run on the ports from
    --port on, and the work goes on while one of them is dead; they share this machine's disk.

    For example:

        agentflow up
        agentflow up --workers 4 --app tasks.py
        agentflow up --replicas 3
        agentflow up --archive .agentflow/archive --keep-age 7d
        agentflow up --port 0 --data-dir /var/lib/agentflow --json
    """
    where = target(None, namespace)
    config = ClusterConfig(
        data_dir=data_dir,
        port=port,
        replicas=None if replicas is None else check_replicas(replicas),
        namespace=where.namespace,
        workers=workers,
        slots=slots or default_slots(),
        apps=tuple(app or ()),
        drain_s=drain_s,
        projector=projector,
        archive=_archive(archive, keep_age, keep_bytes, seal_after),
    )
    run(_up(config, as_json=as_json), logs="debug" if debug else "error")


def _archive(where: str, keep_age: str, keep_bytes: str, seal_after: str) -> ArchiveConfig | None:
    """What the archiver is told; what is wrong with it is told here, where people look. Raises CliError."""
    if not where:
        if keep_age or keep_bytes:
            raise usage("--keep-age, --keep-bytes: expected --archive, too: only what is archived is trimmed")
        return None
    for option, text in (("--keep-age", keep_age), ("--seal-after", seal_after)):
        if text:
            parse_age(option, text)
    if keep_bytes:
        parse_size("--keep-bytes", keep_bytes)
    return ArchiveConfig(where=where, keep_age=keep_age, keep_bytes=keep_bytes, seal_after=seal_after)


async def _up(config: ClusterConfig, *, as_json: bool) -> None:
    begun = time.monotonic()
    cluster = Cluster(config, say)
    async with Stop(cluster.kill) as stop:
        async with cluster:
            stop.ready()
            _say_ready(cluster, time.monotonic() - begun, as_json=as_json)
            await cluster.gone_or(stop.asked)
            say("Stopping: workers finish what they run. Ctrl-C again ends it at once.", "bright_black")
        if stop.forced:
            raise CliError("ended at once, as asked", Exit.INTERRUPTED)
    say("Stopped.", "bright_black")


def _say_ready(cluster: Cluster, seconds: float, *, as_json: bool) -> None:
    config = cluster.config
    if as_json:
        told = {"ready": True, "url": cluster.url, "namespace": config.namespace, "workers": config.workers}
        print_json(
            {
                **told,
                "slots": config.slots,
                "replicas": len(cluster.urls),
                "data_dir": str(config.data_dir),
                "pid": os.getpid(),
                "seconds": round(seconds, 3),
            }
        )
        return
    workers = f"{config.workers} worker{'' if config.workers == 1 else 's'} of {config.slots} slots"
    out = console()
    out.print(plain(f"AgentFlow is ready at {', '.join(cluster.urls)}", "bold green"), end="")
    out.print(plain(f"  after {seconds:.1f} s: {workers}, data in {config.data_dir}", "bright_black"))
    for line in _hints(cluster.url, config.namespace):
        out.print(plain(f"  {line}", "cyan"), soft_wrap=True)


def _hints(url: str, namespace: str) -> list[str]:
    """What to try, in a terminal that knows nothing yet."""
    lines = ["agentflow submit --shell 'echo hello' --wait", "agentflow workers"]
    if namespace != "default":
        lines.insert(0, f"export AGENTFLOW_NAMESPACE={namespace}")
    if not url.endswith(f"127.0.0.1:{_PORT}"):
        lines.insert(0, f"export AGENTFLOW_NATS_URL={url}")
    return lines
