"""The faults of a run: a pure function of its options.

Targets are roles; who has a role is looked up when the fault strikes. `leader` and `standby`
are masters; `stream-leader` and `lease-leader` the servers that lead the log and the bucket of
leases. Each kind of fault comes once before any comes twice.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct

from tests.chaos.options import Options

LEAD_IN_S = 1.0
"""Quiet before the first fault."""
_MASTERS_AND_WORKERS = ("leader", "standby", "worker")
_EDGES = (*_MASTERS_AND_WORKERS, "client")


class Fault(Struct, frozen=True):
    """Something that goes wrong at a time, and is healed after a while."""

    number: int
    at_s: float
    family: str
    target: str
    """A role, or `worker-2`, `client-0`, `server-1`."""
    for_s: float
    amount: float = 0.0
    """Seconds: of delay, or of the clock's jump. Of one-way cuts 1 to the server, 2 to the client."""

    @property
    def kind(self) -> str:
        """What it is counted as."""
        return f"{self.family} {self.target.rstrip('0123456789').rstrip('-')}"

    def __str__(self) -> str:
        amount = f" {self.amount:g}" if self.amount else ""
        return f"{self.at_s:8.2f} s  {self.family} {self.target}{amount} for {self.for_s:.2f} s"


class _Family(NamedTuple):
    """Whom a kind of fault may hit, and for how long."""

    targets: tuple[str, ...]
    for_s: tuple[float, float]
    replicated: tuple[str, ...] = ()
    """Whom else, or instead of `server`, if the log has three replicas."""


_FAMILIES = {
    "kill": _Family((*_EDGES, "server"), (0.0, 3.0), ("stream-leader", "lease-leader")),
    "pause": _Family((*_EDGES, "server"), (2.0, 5.0), ("stream-leader",)),
    "cut": _Family(_EDGES, (0.5, 3.0)),
    "oneway": _Family(_EDGES, (1.0, 4.0)),
    "latency": _Family(_EDGES, (1.0, 4.0)),
    "acks": _Family(_EDGES, (1.0, 4.0)),
    "clock": _Family(_MASTERS_AND_WORKERS, (1.0, 4.0)),
    "disk": _Family(("server",), (0.5, 2.0)),
    "partition": _Family((), (1.5, 5.0), ("stream-leader", "server")),
}
_NOT_REPLICATED = ("partition",)
_NOT_IF_REPLICATED = ("disk",)


def plan(options: Options) -> tuple[Fault, ...]:
    """The faults of a run, by the time they strike."""
    chance = random.Random(options.seed)
    kinds = _kinds(options, chance)
    faults: list[Fault] = []
    at_s = LEAD_IN_S
    while at_s < options.seconds:
        family, role = next(kinds)
        faults.append(_fault(options, chance, (len(faults), at_s, family, role)))
        at_s += chance.uniform(*options.pace_s)
    return tuple(faults)


def possible(options: Options) -> list[tuple[str, str]]:
    """Every kind of fault that fits the options: family and role."""
    return [
        (name, role)
        for name, family in _FAMILIES.items()
        if name in options.families
        and name not in (_NOT_IF_REPLICATED if options.replicas > 1 else _NOT_REPLICATED)
        for role in family.targets + (family.replicated if options.replicas > 1 else ())
    ]


def _kinds(options: Options, chance: random.Random) -> Iterator[tuple[str, str]]:
    kinds = possible(options)
    if not kinds:
        raise ValueError(f"no fault of {options.families} fits {options.replicas} replicas")
    while True:
        chance.shuffle(kinds)
        yield from kinds


def _fault(options: Options, chance: random.Random, known: tuple[int, float, str, str]) -> Fault:
    number, at_s, family, role = known
    among = {"worker": options.workers, "client": options.clients, "server": options.replicas}.get(role)
    target = role if among is None else f"{role}-{chance.randrange(among)}"
    for_s = chance.uniform(*_FAMILIES[family].for_s)
    amount = 0.0
    match family:
        case "latency":
            amount = round(chance.choice((0.005, 0.02, 0.1, 0.4)), 3)
        case "oneway":
            amount = float(chance.choice((1, 2)))
        case "clock":
            amount = float(chance.choice((-3600, -60, -5, 5, 60, 3600)))
        case "kill":
            for_s = chance.choice((0.0, for_s))
        case _:
            pass
    return Fault(number, round(at_s, 3), family, target, round(for_s, 3), amount)
