"""`agentflow masters`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import typer
from msgspec import Struct
from rich.console import Group
from rich.table import Table
from rich.text import Text

from agentflow import wire
from agentflow.bus import Bus
from agentflow.domain.digest import Difference
from agentflow.errors import LogGone
from agentflow.events import LeaderElected
from agentflow.frames import judge
from agentflow.leases.jetstream import JetStreamLeases
from agentflow.leases.port import Entry
from agentflow.log.jetstream import JetStreamLog
from agentflow.log.port import Identity, Log
from agentflow.log.stream import stream_names
from agentflow.logs import get_logger
from agentflow_nodes.cli.errors import not_found
from agentflow_nodes.cli.namespaces import Namespaces, named
from agentflow_nodes.cli.options import Debug, Json, Nats
from agentflow_nodes.cli.output import DIM, console, duration, plain, print_json, say, table
from agentflow_nodes.cli.session import (
    CLIENT_NAME,
    REACH_TIMEOUT_S,
    Target,
    client_logs,
    require_server,
    run,
    target,
)
from agentflow_nodes.master.sharing import SeatReport, Session, Standing, leader_of

_TIMEOUT_S: Final = 10.0
_WATCH_S: Final = 1.0
_STYLES: Final = {
    Standing.LEADER: "green",
    Standing.CANDIDATE: "yellow",
    Standing.CATCHING_UP: "yellow",
    Standing.OUTDATED: "red",
}

_decode: Final = msgspec.json.Decoder(Session).decode
_log = get_logger(__name__)


class Living(Struct, frozen=True):
    """A master that lives, and when it last said so."""

    session: Session
    said_ms: int


class Election(Struct, frozen=True):
    """The last election of a namespace."""

    master: str
    epoch: int
    level: int
    seq: int
    time_ms: int


class Served(Struct, frozen=True):
    """A namespace: its log, its last election, and how long each master's oldest unread message had waited."""

    identity: Identity
    election: Election | None
    lag_ms: Mapping[str, int]


class Overview(Struct, frozen=True):
    """All masters, all namespaces."""

    masters: Sequence[Living]
    namespaces: Mapping[str, Served]

    def leader(self, namespace: str) -> str | None:
        """Who leads a namespace, as far as the sessions and the log say."""
        last = self.namespaces[namespace].election
        elected = (last.master, last.epoch) if last is not None else ("", 0)
        return leader_of(namespace, [living.session for living in self.masters], *elected)


def masters_command(
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew each second, until Ctrl-C.")] = False,
    nats: Nats = None,
    namespace: Namespaces = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the masters: who leads what, and how far each has read.

    For example:

        agentflow masters
        agentflow masters --namespace shop --watch
        agentflow masters --json
    """
    namespaces = named(namespace)
    where = target(nats, *namespaces)
    run(_masters(where, namespaces, watch=watch, as_json=as_json), logs=client_logs(debug=debug))


async def _masters(where: Target, namespaces: Sequence[str], *, watch: bool, as_json: bool) -> None:
    await require_server(where)
    async with Bus(where.urls, name=f"agentflow {CLIENT_NAME}", connect_timeout_s=REACH_TIMEOUT_S) as bus:
        if watch and not as_json:
            await _watch(bus, namespaces)
            return
        found = await look(bus, namespaces)
        _show(found, as_json=as_json)
        while watch:
            await asyncio.sleep(_WATCH_S)
            _show(await look(bus, namespaces), as_json=as_json)


async def _watch(bus: Bus, namespaces: Sequence[str]) -> None:
    from rich.live import Live  # noqa: PLC0415 - few look for long

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            found = await look(bus, namespaces)
            live.update(tables(found, _now_ms()), refresh=True)
            await asyncio.sleep(_WATCH_S)


def _show(found: Overview, *, as_json: bool) -> None:
    if as_json:
        print_json(document(found))
        return
    if not found.masters:
        say("No master lives: start one with 'agentflow master'.", DIM)
    if found.masters or found.namespaces:
        console().print(tables(found, _now_ms()))


# Looking ---------------------------------------------------------------------------------


async def look(bus: Bus, wanted: Sequence[str]) -> Overview:
    """Read sessions and logs; of the namespaces wanted, or of all. Raises CliError if one is not there."""
    masters = await _living(bus)
    names = set(wanted)
    if not wanted:
        streams = map(wire.parse_stream, await stream_names(bus, _TIMEOUT_S))
        names = {name for name in streams if name is not None}
    shown = [living for living in masters if not wanted or names.intersection(living.session.seats)]
    found = await asyncio.gather(*(_served(bus, name, shown) for name in sorted(names)))
    missing = [name for name in wanted if name not in {served.identity.name for served in found if served}]
    if missing:
        raise not_found(f"there is no namespace {missing[0]!r}: nothing was ever submitted to it")
    return Overview(shown, {served.identity.name: served for served in found if served is not None})


async def _living(bus: Bus) -> list[Living]:
    try:
        async with JetStreamLeases(bus, wire.LEASE_BUCKET, create=False) as leases:
            snapshot = await leases.entries(wire.master_session("*"))
    except LogGone:  # there never was a master
        return []
    living = [_session(entry) for entry in snapshot.entries]
    return sorted((each for each in living if each is not None), key=lambda each: each.session.name)


def _session(entry: Entry) -> Living | None:
    try:
        session = _decode(entry.value)
    except msgspec.MsgspecError as error:
        _log.debug("a session could not be read", key=entry.key, error=str(error))
        return None
    return Living(session, entry.written_ms) if wire.master_session(session.name) == entry.key else None


async def _served(bus: Bus, namespace: str, masters: Sequence[Living]) -> Served | None:
    """What the log of a namespace says; None if there is none."""
    try:
        async with JetStreamLog(bus, namespace, create=False) as log:
            identity = await log.identity()
            seated = [living for living in masters if namespace in living.session.seats]
            lags = await asyncio.gather(*(_lag_ms(log, living, identity.last_seq) for living in seated))
            by_name = {living.session.name: lag for living, lag in zip(seated, lags, strict=True)}
            return Served(msgspec.structs.replace(identity, name=namespace), await _election(log), by_name)
    except LogGone:
        return None


async def _election(log: Log) -> Election | None:
    """The last message on the subject of elections, if it is one."""
    message = await log.last(wire.elected(log.namespace))
    if message is None:
        return None
    items = judge(message.subject, message.data, message.headers).items
    elected = items[-1] if items else None
    if not isinstance(elected, LeaderElected):
        return None
    return Election(elected.master, elected.epoch, elected.level, message.seq, message.time_ns // 1_000_000)


async def _lag_ms(log: Log, living: Living, last_seq: int) -> int:
    """How long the first message that the master had not read had waited when the master said so."""
    seq = living.session.seats[log.namespace].seq
    if seq >= last_seq:
        return 0
    unread = await log.read(seq + 1)
    return 0 if unread is None else max(0, living.said_ms - unread.time_ns // 1_000_000)


def _now_ms() -> int:
    return int(time.time() * 1000)


# Showing ---------------------------------------------------------------------------------


def tables(found: Overview, now_ms: int) -> Group:
    """Two tables: the masters, and what each is in which namespace."""
    shown: list[Table | Text] = [_masters_table(found, now_ms), Text()] if found.masters else []
    return Group(*shown, _seats_table(found, now_ms))


def _masters_table(found: Overview, now_ms: int) -> Table:
    made = table("master", "level", "leads", "of", "host", "for", right=("level", "leads", "of"))
    for living in found.masters:
        session = living.session
        made.add_row(
            plain(session.name),
            str(session.level),
            str(len(session.led)),
            str(len(session.seats)),
            plain(f"{session.host}:{session.pid}", DIM),
            duration(max(0, now_ms - session.started_ms)),
        )
    return made


def _seats_table(found: Overview, now_ms: int) -> Table:
    numbers = ("epoch", "level", "position", "lag")
    made = table("namespace", "master", "standing", *numbers, "elected", "hands over to", right=numbers)
    for namespace, served in found.namespaces.items():
        election = served.election
        if found.leader(namespace) is None:
            made.add_row(
                plain(namespace),
                Text("nobody leads", style="red"),
                "",
                str(election.epoch) if election else "",
                str(election.level) if election else "",
                str(served.identity.last_seq),
                "",
                plain(f"last {election.master}, {_ago(election, now_ms)}", DIM) if election else "never",
                "",
            )
        seated = [living.session for living in found.masters if namespace in living.session.seats]
        for session in sorted(seated, key=lambda each: (namespace not in each.led, each.name)):
            _add_seat(made, namespace, session, served, now_ms)
    return made


def _add_seat(made: Table, namespace: str, session: Session, served: Served, now_ms: int) -> None:
    seat = session.seats[namespace]
    election = served.election
    elected = election is not None and election.master == session.name and seat.standing is Standing.LEADER
    made.add_row(
        plain(namespace),
        plain(session.name),
        Text(seat.standing.replace("_", " "), style=_STYLES.get(seat.standing, "")),
        str(seat.epoch),
        str(election.level) if election is not None and elected else "",
        str(seat.seq),
        _lag(seat, session.name, served),
        _ago(election, now_ms) if election is not None and elected else "",
        plain(seat.successor),
    )
    if seat.differs is not None:
        made.add_row("", "", Text(_differs(seat.differs), style="red"))


def _differs(difference: Difference) -> str:
    agreed = f", the same at {difference.agreed_seq}" if difference.agreed_seq else ""
    return f"its fold differs from {difference.other}'s at {difference.seq}{agreed}"


def _lag(seat: SeatReport, name: str, served: Served) -> str:
    behind = max(0, served.identity.last_seq - seat.seq)
    waited_ms = served.lag_ms.get(name, 0)
    return f"{behind} ({duration(waited_ms)})" if waited_ms else str(behind)


def _ago(election: Election, now_ms: int) -> str:
    return f"{duration(max(0, now_ms - election.time_ms))} ago"


def document(found: Overview) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "masters": [_master_document(living, found) for living in found.masters],
        "namespaces": [
            {
                "namespace": namespace,
                "leader": found.leader(namespace),
                "election": msgspec.to_builtins(served.election),
                "first_seq": served.identity.first_seq,
                "last_seq": served.identity.last_seq,
                "bytes": served.identity.bytes,
                "replicas": served.identity.replicas,
            }
            for namespace, served in found.namespaces.items()
        ],
    }


def _master_document(living: Living, found: Overview) -> dict[str, Any]:
    session = living.session
    return {
        "name": session.name,
        "instance": session.instance,
        "host": session.host,
        "pid": session.pid,
        "level": session.level,
        "started_ms": session.started_ms,
        "said_ms": living.said_ms,
        "seats": [
            {
                "namespace": namespace,
                "standing": str(seat.standing),
                "epoch": seat.epoch,
                "seq": seat.seq,
                "lag": max(0, found.namespaces[namespace].identity.last_seq - seat.seq),
                "lag_ms": found.namespaces[namespace].lag_ms.get(session.name, 0),
                "successor": seat.successor or None,
                "differs": msgspec.to_builtins(seat.differs),
            }
            for namespace, seat in sorted(session.seats.items())
            if namespace in found.namespaces
        ],
    }
