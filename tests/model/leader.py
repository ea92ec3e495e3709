"""Model 1: a lease that says who should try, and a log whose fence says who may.

Holders acquire and renew one key of a bucket by compare-and-set, elect themselves in the log
by compare-and-set, and write decisions fenced by their election. Whatever is sent may be
stored at once, later or never; an answer may be lost, or be read only after any pause. The
server lets a silent key go from `ttl - skew` on (its clock may be ahead of that of the server
that stored it), or never. Another holder may take it away. The bucket may be lost.

Time is relative: each timer counts ticks and stops at the time to live, so that histories may
last for ever; what is bounded is the number of writes, elections and losses. All clocks tick alike.

Must never be:

- two holders before their deadlines at once (unless the bucket was lost between them: then
  the fence alone protects);
- a holder before its deadline with a token below one of the same bucket that was in effect before;
- a decision of an earlier term stored after a later election.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

GENERATION: Final = 100
"""Revisions of one life of the bucket lie between multiples of this."""


class Rules(Struct, frozen=True):
    """The defences, each of which can be left out."""

    margin: int = 1
    """Ticks by which a holder gives up early."""
    deadline_from_send: bool = True
    """Or from the acknowledgement."""
    renew_by_cas: bool = True
    read_back: bool = True
    """Or silence is taken for a yes."""
    adopt_by_epoch: bool = True
    """A write of our own found in place of the last one counts only if it renews what we hold."""
    evict_after_ttl: bool = True
    rising_revisions: bool = True
    """A bucket created again begins above all its earlier revisions."""
    elect_by_cas: bool = True
    fence: bool = True


class Bounds(Struct, frozen=True):
    """How far to look."""

    writes: tuple[int, ...] = (2, 2)
    """Writes to the bucket by each holder."""
    ttl: int = 2
    skew: int = 1
    """Ticks by which the server may let a key go early."""
    elections: int = 0
    """Elections in the log, of all holders."""
    decisions: int = 0
    """Decisions sent by each holder."""
    losses: int = 0
    """How often the bucket may be lost."""
    evictions: bool = True
    pauses: bool = True
    """Whether a holder may be held up between reading back and acting upon it."""


class Key(NamedTuple):
    """What lies in the bucket."""

    revision: int
    holder: int
    session: int
    """Stands for the nonce: the number of the holder's first write under it."""
    write: int
    epoch: int
    """The revision at which it was acquired, as the write says; 0 in the acquisition itself."""
    age: int


class Put(NamedTuple):
    """A write to the bucket under way. Write 0 deletes."""

    holder: int
    session: int
    write: int
    epoch: int
    expected: int


class Entry(NamedTuple):
    """A write to the log under way."""

    elects: bool
    holder: int
    epoch: int
    """What is expected to be the last election."""


class Holder(NamedTuple):
    """What a holder knows."""

    session: int = 0
    token: int = 0
    revision: int = 0
    left: int = 0
    """Ticks until its deadline."""
    pending: int = 0
    """The write it waits to hear of."""
    elapsed: int = 0
    """Ticks since before that was sent."""
    answer: tuple[str, int] | None = None
    """What has come back, and is not looked at yet."""
    writes: int = 0
    seen: int = 0
    """Revision of another's key that it watches."""
    silent: int = 0
    """Ticks since that reached it."""
    term: int = 0
    asked: int = -1
    """The election after which it has asked to be elected."""
    decisions: int = 0


class World(NamedTuple):
    """The state of everything."""

    key: Key | None
    revision: int
    """The last one given out."""
    holders: tuple[Holder, ...]
    under_way: frozenset[Put] = frozenset()
    log_under_way: frozenset[Entry] = frozenset()
    epoch: int = 0
    leader: int = -1
    highest: int = 0
    """The highest token that was in effect."""
    fault: str | None = None


Step = tuple[str, World]


class Leader:
    """The transition system; see the module."""

    def __init__(self, bounds: Bounds, rules: Rules | None = None, name: str = "lease and fence") -> None:
        self._bounds = bounds
        self._rules = rules or Rules()
        self.name = f"{name} {_said(bounds)}"

    def initial(self) -> World:
        return World(None, 0, (Holder(),) * len(self._bounds.writes))

    def fault(self, state: World) -> str | None:
        if state.fault is not None:
            return state.fault
        held = [holder for holder in state.holders if holder.token and holder.left]
        for first in held:
            for second in held:
                if first is not second and self._generation(first) == self._generation(second):
                    return "two holders are before their deadlines"
        return None

    @staticmethod
    def _generation(holder: Holder) -> int:
        return holder.revision // GENERATION

    def steps(self, state: World) -> Iterator[Step]:
        for name, after in self._all_steps(state):
            yield name, self._forget(after)

    def _forget(self, state: World) -> World:
        """Without what can have no effect any more: states that differ in nothing else are equal.

        Revisions and epochs only rise, so a write that expects one that is past is refused
        whenever it arrives.
        """
        rules, there = self._rules, state.key.revision if state.key is not None else 0
        if not (rules.rising_revisions and rules.renew_by_cas and rules.fence and rules.elect_by_cas):
            return state
        under_way, said = state.under_way, state.log_under_way
        if under_way and any(put.expected not in {0, there} for put in under_way):
            under_way = frozenset(put for put in under_way if put.expected in {0, there})
        if said and any(entry.epoch < state.epoch for entry in said):
            said = frozenset(entry for entry in said if entry.epoch >= state.epoch)
        holders = state.holders
        if any(holder.seen not in {0, there} for holder in holders):
            holders = tuple(_unless_past(holder, there) for holder in holders)
        return state._replace(under_way=under_way, log_under_way=said, holders=holders)

    def _all_steps(self, state: World) -> Iterator[Step]:
        yield "tick", self._tick(state)
        yield from self._bucket(state)
        yield from self._log(state)
        for number, holder in enumerate(state.holders):
            for name, after in self._lease_steps(state, number, holder):
                yield f"{name} {number}", after
            if self._bounds.elections:
                for name, after in self._term_steps(state, number, holder):
                    yield f"{name} {number}", after

    def _tick(self, state: World) -> World:
        ttl, key = self._bounds.ttl, state.key
        if key is not None and key.age < ttl:
            key = key._replace(age=key.age + 1)
        return state._replace(key=key, holders=tuple(_older(holder, ttl) for holder in state.holders))

    # The bucket.

    def _bucket(self, state: World) -> Iterator[Step]:
        key = state.key
        if key is not None and key.age >= self._bounds.ttl - self._bounds.skew:
            yield f"the server lets go of the key of {key.holder}", state._replace(key=None)
        if state.revision // GENERATION < self._bounds.losses:
            lost = (state.revision // GENERATION + 1) * GENERATION
            yield "the bucket is lost and made again", state._replace(key=None, revision=lost)
        for put in state.under_way:
            what = f"write {put.write}" if put.write else "eviction"
            after = self._arrive(state._replace(under_way=state.under_way - {put}), put)
            yield f"{what} of {put.holder} arrives", after

    def _arrive(self, state: World, put: Put) -> World:
        """Stored if nothing else is there than expected. A refusal tells no more than silence: both are read back."""
        last = state.key.revision if state.key is not None else 0
        conditional = self._rules.renew_by_cas or not put.expected or not put.write
        if conditional and not self._same(last, put.expected):
            return state
        if not put.write:
            return state._replace(key=None)
        revision = state.revision + 1
        key = Key(revision, put.holder, put.session, put.write, put.epoch, 0)
        state = state._replace(key=key, revision=revision)
        holder = state.holders[put.holder]
        if holder.pending == put.write and holder.answer is None:
            state = _with(state, put.holder, holder._replace(answer=("stored", revision)))
        return state

    def _same(self, first: int, second: int) -> bool:
        if self._rules.rising_revisions:
            return first == second
        return first % GENERATION == second % GENERATION

    # A holder and its lease.

    def _lease_steps(self, state: World, number: int, holder: Holder) -> Iterator[Step]:
        if holder.pending:
            if holder.answer is None:
                after = _with(state, number, self._read_back(state, number, holder))
                if not self._bounds.pauses:
                    after = self._judge(after, number, after.holders[number])
                yield "reads back", after
            else:
                yield "looks at its answer", self._judge(state, number, holder)
        elif holder.writes < self._bounds.writes[number]:
            yield ("renews" if holder.token else "tries to acquire"), self._send(state, number, holder)
        if self._bounds.evictions:
            yield from self._watch_steps(state, number, holder)

    def _send(self, state: World, number: int, holder: Holder) -> World:
        write = holder.writes + 1
        session = holder.session or write
        put = Put(number, session, write, holder.token, holder.revision)
        holder = holder._replace(session=session, pending=write, elapsed=0, writes=write)
        return _with(state._replace(under_way=state.under_way | {put}), number, holder)

    def _read_back(self, state: World, number: int, holder: Holder) -> Holder:
        """No answer, or a refusal: what lies there tells, from the leader of the bucket."""
        key = state.key
        if not self._rules.read_back:
            return holder._replace(answer=("stored", key.revision if key else state.revision))
        if key is None:
            return holder._replace(answer=("lost", 0) if holder.token else ("base", 0))
        if key.holder != number or key.session != holder.session:
            return holder._replace(answer=("lost", 0))
        if key.write == holder.pending:
            return holder._replace(answer=("stored", key.revision))
        renews = holder.token in {key.revision, key.epoch}
        if holder.token and self._rules.adopt_by_epoch and not renews:
            return holder._replace(answer=("lost", 0))
        return holder._replace(answer=("base", key.revision))

    def _judge(self, state: World, number: int, holder: Holder) -> World:
        assert holder.answer is not None
        what, revision = holder.answer
        known = holder._replace(pending=0, elapsed=0, answer=None)
        if what == "lost":
            gone = known._replace(session=0, token=0, revision=0, left=0)
            return _with(state, number, gone)
        if what == "base":
            return _with(state, number, known._replace(revision=revision))
        spent = holder.elapsed if self._rules.deadline_from_send else 0
        left = max(self._bounds.ttl - self._rules.margin - spent, 0)
        held = known._replace(revision=revision, token=holder.token or revision, left=left)
        return _with(self._in_effect(state, held), number, held)

    def _in_effect(self, state: World, holder: Holder) -> World:
        if not holder.left:
            return state
        token, highest = holder.token, state.highest
        if token < highest and token // GENERATION == highest // GENERATION:
            return state._replace(fault=f"token {token} is in effect after {highest}")
        return state._replace(highest=max(token, highest))

    def _watch_steps(self, state: World, number: int, holder: Holder) -> Iterator[Step]:
        key = state.key
        if key is not None and key.holder != number and key.revision != holder.seen:
            yield "hears of the key", _with(state, number, holder._replace(seen=key.revision, silent=0))
        waited = holder.silent >= self._bounds.ttl or not self._rules.evict_after_ttl
        if holder.seen and waited:
            put = Put(number, 0, 0, 0, holder.seen)
            after = state._replace(under_way=state.under_way | {put})
            yield "evicts", _with(after, number, holder._replace(seen=0, silent=0))

    # Terms in the log.

    def _log(self, state: World) -> Iterator[Step]:
        for entry in state.log_under_way:
            after = state._replace(log_under_way=state.log_under_way - {entry})
            if entry.elects:
                yield f"the election of {entry.holder} arrives", self._elected(after, entry)
            else:
                yield f"the decision of {entry.holder} arrives", self._decided(after, entry)

    def _elected(self, state: World, entry: Entry) -> World:
        if self._rules.elect_by_cas and entry.epoch != state.epoch:
            return state
        if entry.epoch < state.epoch:
            return state._replace(fault=f"epoch {entry.epoch + 1} is elected after {state.epoch}")
        return state._replace(epoch=entry.epoch + 1, leader=entry.holder)

    def _decided(self, state: World, entry: Entry) -> World:
        if entry.epoch == state.epoch:
            return state
        if self._rules.fence:
            return state
        return state._replace(fault=f"a decision of epoch {entry.epoch} is stored after {state.epoch}")

    def _term_steps(self, state: World, number: int, holder: Holder) -> Iterator[Step]:
        if holder.asked >= 0:
            if state.epoch > holder.asked:
                won = state.leader == number and state.epoch == holder.asked + 1
                term = state.epoch if won else 0
                yield "reads the election", _with(state, number, holder._replace(asked=-1, term=term))
        elif holder.token and holder.left and not holder.term and state.epoch < self._bounds.elections:
            entry = Entry(elects=True, holder=number, epoch=state.epoch)
            asked = holder._replace(asked=state.epoch)
            yield "asks to be elected", _with(_say(state, entry), number, asked)
        if holder.term and holder.decisions < self._bounds.decisions:
            # Not only before its deadline: it may be late without knowing, and the log decides.
            entry = Entry(elects=False, holder=number, epoch=holder.term)
            more = holder._replace(decisions=holder.decisions + 1)
            yield "decides", _with(_say(state, entry), number, more)
        if holder.term and state.epoch > holder.term:
            yield "learns that it is deposed", _with(state, number, holder._replace(term=0))


def _older(holder: Holder, ttl: int) -> Holder:
    """The same a tick later. Timers nobody looks at stand still, so that equal situations are equal states."""
    return holder._replace(
        left=max(holder.left - 1, 0),
        elapsed=min(holder.elapsed + 1, ttl) if holder.pending else 0,
        silent=min(holder.silent + 1, ttl) if holder.seen else 0,
    )


def _unless_past(holder: Holder, there: int) -> Holder:
    return holder if holder.seen in {0, there} else holder._replace(seen=0, silent=0)


def _with(state: World, number: int, holder: Holder) -> World:
    holders = state.holders
    return state._replace(holders=(*holders[:number], holder, *holders[number + 1 :]))


def _say(state: World, entry: Entry) -> World:
    return state._replace(log_under_way=state.log_under_way | {entry})


def _said(bounds: Bounds) -> str:
    return " ".join(f"{name}={getattr(bounds, name)}" for name in bounds.__struct_fields__)


MUTANTS: Final = {
    "no margin": replace(Rules(), margin=0),
    "deadline counted after the acknowledgement": replace(Rules(), deadline_from_send=False),
    "renewal without compare-and-set": replace(Rules(), renew_by_cas=False),
    "silence taken for a yes": replace(Rules(), read_back=False),
    "any write of our own adopted": replace(Rules(), adopt_by_epoch=False),
    "eviction without waiting": replace(Rules(), evict_after_ttl=False),
    "revisions of a new bucket begin at 1": replace(Rules(), rising_revisions=False),
    "election without compare-and-set": replace(Rules(), elect_by_cas=False),
    "no fence": replace(Rules(), fence=False),
}
