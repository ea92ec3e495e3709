"""`agentflow tables`: what there is to ask."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from agentflow_nodes.cli.errors import not_found
from agentflow_nodes.cli.options import Json
from agentflow_nodes.cli.output import console, plain, print_json, say, table
from agentflow_projections.query import Described, described_here


def tables_command(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show the columns of this one.")] = "",
    base: Annotated[bool, typer.Option("--base", help="List the tables beneath them too.")] = False,
    as_json: Json = False,
) -> None:
    """Show the tables one can ask, and what their columns mean.

    For example:

        agentflow tables
        agentflow tables attempts
    """
    known = described_here()
    if name:
        _show_one(_named(name, known), as_json=as_json)
        return
    shown = [each for each in known if base or not each.base]
    if as_json:
        print_json([msgspec.to_builtins(each) for each in shown])
        return
    made = table("table", "meaning")
    for each in shown:
        made.add_row(plain(each.name), plain(each.meaning))
    console().print(made)
    say("'agentflow tables NAME' shows the columns of one", "bright_black")


def _named(name: str, known: list[Described]) -> Described:
    for each in known:
        if each.name == name:
            return each
    people = ", ".join(each.name for each in known if not each.base)
    raise not_found(f"there is no table {name!r}; there are {people}, and those that --base lists")


def _show_one(found: Described, *, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    console().print(plain(found.meaning))
    made = table("column", "type", "meaning")
    for name, kind, meaning in found.columns:
        made.add_row(plain(name), plain(kind.replace("task_state", "").lower()), plain(meaning))
    console().print(made)
