"""The state of the model of locks by tickets (see `tickets`), and the rules and bounds it is walked under."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

GENERATION: Final = 100
"""Revisions of one life of the bucket lie between multiples of this."""

Mode = Literal["exclusive", "shared"]
What = Literal["created", "renewed", "gone"]


class Rules(Struct, frozen=True):
    """The defences, each of which can be left out."""

    margin: int = 1
    deadline_from_send: bool = True
    renew_by_cas: bool = True
    read_back: bool = True
    """Or silence is taken for a yes."""
    read_back_exactly: bool = True
    """Or an earlier creation of our own that is found counts from the send of the last one."""
    evict_after_ttl: bool = True
    evict_by_cas: bool = True
    expiry: Literal["markers", "silent", "local"] = "markers"
    token_of_creation: bool = True
    """Or of the last renewal."""
    reads_own_ticket: bool = True
    """The prefix read must hold the own ticket."""
    quiet_after_loss: bool = True
    """In a bucket made again nobody is granted before a full time to live by its own timer."""
    rising_revisions: bool = True
    checked_resource: bool = True


class Bounds(Struct, frozen=True):
    """How far to look."""

    modes: tuple[Mode, ...] = ("exclusive", "exclusive")
    slots: int = 1
    """How many may hold it together, if it is a semaphore (all of them exclusive)."""
    ttl: int = 2
    skew: int = 1
    creations: int = 1
    """Attempts of each contender to create its ticket."""
    renewals: tuple[int, ...] = (1, 1)
    """By each contender."""
    uses: int = 0
    """Writes to the resource by each contender."""
    losses: int = 0
    """How often the bucket may be lost."""
    evictions: bool = True
    expires: bool = True
    """Whether the server ever lets go of a silent ticket."""


class Said(NamedTuple):
    """A message of the bucket's stream."""

    owner: int
    what: What
    revision: int


class Put(NamedTuple):
    """A write under way to the key of `owner`. `writer` is another contender if it evicts."""

    writer: int
    owner: int
    what: What
    expected: int
    attempt: int = 0


class Key(NamedTuple):
    """What the server has of a ticket. Revision 0: nothing; below 0: a mark that it is gone."""

    revision: int = 0
    age: int = 0
    place: int = 0
    """The revision of its creation."""
    attempt: int = 0
    """Which attempt created it; 0 in a renewal."""


class Other(NamedTuple):
    """A ticket of somebody else, before ours, as it was read."""

    owner: int
    place: int
    revision: int
    silent: int = 0
    """Ticks since the last we heard of it."""


class Contender(NamedTuple):
    """What a contender knows."""

    phase: Literal["idle", "waiting", "holding", "over"] = "idle"
    token: int = 0
    revision: int = 0
    left: int = 0
    pending: Literal["", "created", "renewed"] = ""
    elapsed: int = 0
    answer: int = 0
    """The revision it was told, and has not looked at yet; -1 if it is lost."""
    creations: int = 0
    renewals: int = 0
    reading: bool = False
    others: tuple[Other, ...] = ()
    """The conflicting tickets before its own, as far as it has read."""
    unheard: tuple[Said, ...] = ()
    """What the stream says of them after that."""
    quiet: int = 0
    """Ticks since it read its own ticket."""
    uses: int = 0


class World(NamedTuple):
    """The state of everything."""

    keys: tuple[Key, ...]
    contenders: tuple[Contender, ...]
    revision: int = 0
    """The last one given out."""
    under_way: frozenset[Put] = frozenset()
    uses_under_way: frozenset[tuple[int, int]] = frozenset()
    """Contender and token."""
    highest_used: int = 0
    granted: tuple[int, ...] = ()
    """By contender: the token of its grant, or 0."""
    fault: str | None = None


def older(contender: Contender, ttl: int) -> Contender:
    """The same a tick later. Timers nobody looks at stand still."""
    others = contender.others
    if contender.reading and others:
        others = tuple([other._replace(silent=min(other.silent + 1, ttl)) for other in others])
    again = contender.reading and contender.token >= GENERATION
    return contender._replace(
        left=max(contender.left - 1, 0),
        elapsed=min(contender.elapsed + 1, ttl) if contender.pending else 0,
        others=others,
        quiet=min(contender.quiet + 1, ttl) if again else 0,
    )


def told(contender: Contender, said: Said) -> Contender:
    """The stream goes on. Whoever does not wait for that ticket may skip it."""
    if any(other.owner == said.owner for other in contender.others):
        return contender._replace(unheard=(*contender.unheard, said))
    return contender


def with_contender(state: World, number: int, contender: Contender) -> World:
    """With another contender."""
    contenders = state.contenders
    return state._replace(contenders=(*contenders[:number], contender, *contenders[number + 1 :]))


def with_key(state: World, owner: int, key: Key) -> World:
    """With another key."""
    return state._replace(keys=(*state.keys[:owner], key, *state.keys[owner + 1 :]))


MUTANTS: Final = {
    "no margin": replace(Rules(), margin=0),
    "deadline counted after the acknowledgement": replace(Rules(), deadline_from_send=False),
    "renewal without compare-and-set": replace(Rules(), renew_by_cas=False),
    "silence taken for a yes": replace(Rules(), read_back=False),
    "any creation of our own counts from the last send": replace(Rules(), read_back_exactly=False),
    "eviction without waiting": replace(Rules(), evict_after_ttl=False),
    "eviction without compare-and-set": replace(Rules(), evict_by_cas=False),
    "replicas forget by their own clocks": replace(Rules(), expiry="local"),
    "token of the last renewal": replace(Rules(), token_of_creation=False),
    "a reading without the own ticket": replace(Rules(), reads_own_ticket=False),
    "grants at once after a loss": replace(Rules(), quiet_after_loss=False),
    "revisions of a new bucket begin at 1": replace(Rules(), rising_revisions=False),
    "a resource that does not look": replace(Rules(), checked_resource=False),
}
