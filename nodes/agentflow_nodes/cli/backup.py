"""`agentflow backup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentflow.bus import Bus
from agentflow_nodes.cli.amounts import size_text
from agentflow_nodes.cli.errors import not_found
from agentflow_nodes.cli.namespaces import Namespaces, named
from agentflow_nodes.cli.options import Debug, Json, Nats
from agentflow_nodes.cli.output import console, plain, print_json, table
from agentflow_nodes.cli.progress import bar
from agentflow_nodes.cli.session import CLIENT_NAME, Target, client_logs, require_server, run, target
from agentflow_projections.backup import Manifest, SavedNamespace, backup, namespaces_of


def backup_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty folder, or one to be made.")],
    nats: Nats = None,
    namespace: Namespaces = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write logs and objects into a folder, while the cluster works.

    All namespaces, unless some are named. Each log is as it was at one moment, with the sequence
    and time of every message; 'agentflow restore' brings it back. Interrupted, run it again.

    For example:

        agentflow backup /backup/2026-11-21
        agentflow backup /backup/shop --namespace shop
    """
    namespaces = named(namespace)
    where = target(nats, *namespaces)
    run(_backup(where, folder, namespaces, as_json=as_json), logs=client_logs(debug=debug))


async def _backup(where: Target, folder: Path, namespaces: tuple[str, ...], *, as_json: bool) -> None:
    await require_server(where)
    async with Bus(where.urls, name=f"agentflow {CLIENT_NAME}") as bus:
        there = await namespaces_of(bus)
        missing = [name for name in namespaces if name not in there]
        if missing or not there:
            wanted = f"namespace {missing[0]!r}" if missing else "namespace"
            raise not_found(f"there is no {wanted} at {where.url}: nothing was ever submitted to it")
        with bar("Backing up") as tell:
            made = await backup(
                bus, folder, namespaces or there, lambda _, done, total: tell(done, total or done)
            )
    _show(made, folder, as_json=as_json)


def _show(made: Manifest, folder: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"dir": str(folder), "namespaces": [_told(each) for each in made.namespaces]})
        return
    shown = table("namespace", "messages", "last", "size", right=("messages", "last", "size"))
    for each in made.namespaces:
        state = each.log.state
        shown.add_row(each.name, f"{state['messages']}", f"{state['last_seq']}", size_text(_size(each)))
    console().print(shown)
    console().print(plain(f"Bring it back with 'agentflow restore {folder}'."))


def _told(saved: SavedNamespace) -> dict[str, int | str]:
    state = saved.log.state
    return {
        "namespace": saved.name,
        "messages": state["messages"],
        "last_seq": state["last_seq"],
        "bytes": _size(saved),
    }


def _size(saved: SavedNamespace) -> int:
    return saved.log.size + (saved.objects.size if saved.objects is not None else 0)
