"""`agentflow schema`: the contract, for who writes a client in another language."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
import typer

from agentflow import limits
from agentflow.events import KINDS, ROLES, SINCE, Event, Role
from agentflow.wire import ELECTED_ACTOR, LOCKS_ACTOR
from agentflow_nodes.cli.errors import usage
from agentflow_nodes.cli.options import Debug, Json
from agentflow_nodes.cli.output import console, encode_json

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_REF: Final = "#/$defs/{name}"
_ADDRESSED: Final = frozenset({"task.assigned", "task.stop"})


def schema_command(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="KIND", help="One event, for example task.submitted.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the contract: every event as JSON Schema.

    Each event has the subject it is published to, who says it, and its schema. A message
    holds one event, or an array of events of one kind. Limits are part of the contract.

    For example:

        agentflow schema | jq '.events | keys'
        agentflow schema task.submitted
    """
    del as_json, debug
    document = contract() if kind is None else contract_of(kind)
    if console().is_terminal:
        console().print_json(encode_json(document))
    else:
        console().file.write(encode_json(document) + "\n")


def contract() -> dict[str, Any]:
    """The whole contract as one document."""
    kinds = list(KINDS)
    schemas, definitions = msgspec.json.schema_components([KINDS[kind] for kind in kinds], ref_template=_REF)
    return {
        "$schema": DIALECT,
        "title": "AgentFlow",
        "level": limits.LEVEL,
        "subject": "af.<namespace>.<entity>.<event>.<actor>",
        "stream": "AF_<namespace>",
        "events": {kind: _described(kind, schema) for kind, schema in zip(kinds, schemas, strict=True)},
        "limits": _limits(),
        "$defs": definitions,
    }


def contract_of(kind: str) -> dict[str, Any]:
    """One event, with all its schema refers to. Raises CliError for an unknown kind."""
    event: type[Event] | None = KINDS.get(kind)
    if event is None:
        raise usage(f"expected one of {', '.join(KINDS)}; found {kind!r}")
    (schema,), definitions = msgspec.json.schema_components([event], ref_template=_REF)
    return {"$schema": DIALECT, "title": kind, **_described(kind, schema), "$defs": definitions}


def _described(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "subject": f"af.<namespace>.{kind}.{_actor(kind)}",
        "said_by": str(ROLES[kind]),
        "since_level": SINCE[kind],
        "schema": schema,
    }


_FIXED: Final = {"leader.elected": ELECTED_ACTOR, "lock.opened": LOCKS_ACTOR}
"""Kinds that are written to one exact subject, by compare-and-set."""


def _actor(kind: str) -> str:
    """What stands last in the subject."""
    if kind in _FIXED:
        return _FIXED[kind]
    if kind in _ADDRESSED:
        return "<worker spoken to>"
    return {
        Role.CLIENT: "<client>",
        Role.LEADER: "<master>",
        Role.MASTER: "<master>",
        Role.WORKER: "<worker>",
    }[ROLES[kind]]


def _limits() -> dict[str, Any]:
    return {name.lower(): getattr(limits, name) for name in dir(limits) if name.isupper() and name != "LEVEL"}
