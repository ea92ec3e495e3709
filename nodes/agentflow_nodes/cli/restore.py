"""`agentflow restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentflow.bus import Bus
from agentflow_nodes.cli.namespaces import Namespaces, named
from agentflow_nodes.cli.options import Debug, Json, Nats
from agentflow_nodes.cli.output import console, plain, print_json
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import CLIENT_NAME, Target, client_logs, require_server, run, target
from agentflow_projections.backup import read_manifest, restore


def restore_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'agentflow backup' wrote.")],
    replicas: Annotated[
        int,
        typer.Option(
            "--replicas", min=0, max=5, help="On how many servers each stream is kept; 0: as it was."
        ),
    ] = 0,
    nats: Nats = None,
    namespace: Namespaces = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring logs and objects back into a cluster that has none.

    The NATS server has to run, and no node of AgentFlow yet: masters would begin an empty log. All
    namespaces of the backup, unless some are named. What is there already and is not what was
    backed up is never touched. Interrupted, run it again.

    For example:

        agentflow restore /backup/2026-11-21
        agentflow restore /backup/2026-11-21 --nats nats://n1:4222,nats://n2:4222 --replicas 3
    """
    namespaces = named(namespace)
    where = target(nats, *namespaces)
    run(_restore(where, folder, namespaces, replicas or None, as_json=as_json), logs=client_logs(debug=debug))


async def _restore(
    where: Target, folder: Path, namespaces: tuple[str, ...], replicas: int | None, *, as_json: bool
) -> None:
    wanted = namespaces or [each.name for each in read_manifest(folder).namespaces]
    await require_server(where)
    async with Bus(where.urls, name=f"agentflow {CLIENT_NAME}") as bus:
        with bar("Restoring") as tell:
            restored = await restore(
                bus, folder, namespaces, replicas=replicas, progress=lambda _, done, total: tell(done, total)
            )
    already = [name for name in wanted if name not in restored]
    if as_json:
        print_json({"restored": restored, "already": already})
        return
    if restored:
        console().print(plain(f"Restored: {', '.join(restored)}. Start the nodes now."))
    if already:
        console().print(plain(f"There already, as it was backed up: {', '.join(already)}."))
