"""Model 2: locks by tickets.

Each contender creates a key of its own by compare-and-set (expected 0); the revision of that
creation is its place in line and its fencing token. It renews the key by compare-and-set on
its last revision, and is granted the lock once every earlier ticket that conflicts is gone: its
owner deleted it, somebody took it away after a full time to live of silence, or the server
let go of it. The resource accepts a write only with a token not below the highest it has seen.

What a contender reads is a prefix of the bucket's stream that holds its own ticket, read from
any replica; from there on it hears the stream in order. How the server lets go of silent keys
decides what such a reading is worth, so it is a rule: `markers` (an expiry is a message in the
stream, the same on all replicas), `silent` (one server, which just forgets), `local` (each
replica forgets by its own clock: unsafe, see the mutant).

Time is as in `leader`. Each contender wants the lock once; after a loss of the bucket, again.

Must never be:

- conflicting holders before their deadlines at once, also across a loss of the bucket;
- a grant while an earlier conflicting ticket is in the bucket (first come, first served, among the living);
- a grant with a token below that of an earlier conflicting grant;
- a write accepted by the resource under a token below one it has accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from tests.model.tickets_state import (
    GENERATION,
    Bounds,
    Contender,
    Key,
    Other,
    Put,
    Rules,
    Said,
    World,
    older,
    told,
    with_contender,
    with_key,
)

Step = tuple[str, World]


class Tickets:
    """The transition system; see the module."""

    def __init__(self, bounds: Bounds, rules: Rules | None = None) -> None:
        self._bounds = bounds
        self._rules = rules or Rules()
        self._all: Final = range(len(bounds.modes))
        said = " ".join(f"{name}={getattr(bounds, name)}" for name in bounds.__struct_fields__)
        self.name = f"tickets {said} expiry={self._rules.expiry}"

    def initial(self) -> World:
        count = len(self._bounds.modes)
        return World((Key(),) * count, (Contender(),) * count, granted=(0,) * count)

    def fault(self, state: World) -> str | None:
        if state.fault is not None:
            return state.fault
        holding = [
            number
            for number, contender in enumerate(state.contenders)
            if contender.phase == "holding" and contender.left
        ]
        if self._bounds.slots > 1:
            return "too many hold the semaphore" if len(holding) > self._bounds.slots else None
        if any(self._conflict(a, b) for a in holding for b in holding if a < b):
            return "two holders that conflict are before their deadlines"
        return None

    def _conflict(self, first: int, second: int) -> bool:
        modes = self._bounds.modes
        return "exclusive" in {modes[first], modes[second]}

    def steps(self, state: World) -> Iterator[Step]:
        for name, after in self._all_steps(state):
            yield name, self._forget(after)

    def _forget(self, state: World) -> World:
        """Without writes that no revision can ever satisfy again."""
        rules = self._rules
        if not state.under_way or not (rules.rising_revisions and rules.renew_by_cas and rules.evict_by_cas):
            return state
        keys = state.keys
        living = frozenset(
            put for put in state.under_way if put.expected <= 0 or keys[put.owner].revision == put.expected
        )
        return state if len(living) == len(state.under_way) else state._replace(under_way=living)

    def _all_steps(self, state: World) -> Iterator[Step]:
        yield "tick", self._tick(state)
        yield from self._server(state)
        for number, contender in enumerate(state.contenders):
            if contender.phase != "over":
                for name, after in self._own_steps(state, number, contender):
                    yield f"{number} {name}", after

    def _tick(self, state: World) -> World:
        ttl = self._bounds.ttl
        keys = tuple(
            key._replace(age=min(key.age + 1, ttl)) if key.revision > 0 else key for key in state.keys
        )
        return state._replace(
            keys=keys, contenders=tuple(older(contender, ttl) for contender in state.contenders)
        )

    # The bucket.

    def _server(self, state: World) -> Iterator[Step]:
        for owner, key in enumerate(state.keys):
            old = key.age >= self._bounds.ttl - self._bounds.skew
            if key.revision > 0 and old and self._bounds.expires:
                yield f"the server lets go of the ticket of {owner}", self._expire(state, owner)
        if state.revision // GENERATION < self._bounds.losses:
            yield "the bucket is lost and made again", self._lose(state)
        for put in state.under_way:
            after = self._arrive(state._replace(under_way=state.under_way - {put}), put)
            yield f"{put.what!r} of {put.owner} by {put.writer} arrives", after
        for use in state.uses_under_way:
            yield f"a write of {use[0]} under token {use[1]} reaches the resource", self._use(state, use)

    def _expire(self, state: World, owner: int) -> World:
        if self._rules.expiry == "markers":
            return self._store(state, Put(owner, owner, "gone", 0))
        return with_key(state, owner, Key())

    def _lose(self, state: World) -> World:
        """Nobody hears anything of it; that the bucket is another is seen when it is looked at."""
        revision = (state.revision // GENERATION + 1) * GENERATION
        return state._replace(keys=(Key(),) * len(state.keys), revision=revision)

    def _arrive(self, state: World, put: Put) -> World:
        there = state.keys[put.owner].revision
        conditional = self._rules.evict_by_cas if put.writer != put.owner else self._rules.renew_by_cas
        if put.expected == 0 and there != 0:
            return state
        if conditional and not self._same(abs(there), put.expected):
            return state
        if there <= 0 and put.what == "gone" and put.expected:
            return state
        state = self._store(state, put)
        owner = state.contenders[put.owner]
        waits = owner.pending == put.what and (put.what != "created" or owner.creations == put.attempt)
        if put.writer == put.owner and waits and not owner.answer:
            state = with_contender(state, put.owner, owner._replace(answer=state.revision))
        return state

    def _store(self, state: World, put: Put) -> World:
        revision = state.revision + 1
        key = Key(-revision) if put.what == "gone" else Key(revision, 0, revision, put.attempt)
        if put.what == "renewed":
            key = key._replace(place=state.keys[put.owner].place or revision)
        said = Said(put.owner, put.what, revision)
        contenders = tuple([told(contender, said) for contender in state.contenders])
        state = with_key(state._replace(contenders=contenders, revision=revision), put.owner, key)
        if put.what != "created":
            return state
        others = tuple(self._ahead(state, put.owner))
        creator = state.contenders[put.owner]._replace(others=others, unheard=())
        return with_contender(state, put.owner, creator)

    def _ahead(self, state: World, number: int) -> Iterator[Other]:
        """What a reading of the stream up to a ticket's creation shows of those before it."""
        for owner, key in enumerate(state.keys):
            if owner != number and key.revision > 0 and self._conflict(owner, number):
                place = key.place if self._rules.token_of_creation else key.revision
                yield Other(owner, place, key.revision)

    def _same(self, first: int, second: int) -> bool:
        if self._rules.rising_revisions:
            return first == second
        return first % GENERATION == second % GENERATION

    def _use(self, state: World, use: tuple[int, int]) -> World:
        state = state._replace(uses_under_way=state.uses_under_way - {use})
        if self._shown(use[1]) >= self._shown(state.highest_used):
            return state._replace(highest_used=use[1])
        if self._rules.checked_resource:
            return state
        return state._replace(fault=f"the resource accepts token {use[1]} after {state.highest_used}")

    def _shown(self, token: int) -> int:
        """As the users of the lock see it."""
        return token if self._rules.rising_revisions else token % GENERATION

    # A contender and its own ticket.

    def _own_steps(self, state: World, number: int, contender: Contender) -> Iterator[Step]:
        if contender.pending:
            if contender.answer:
                yield "looks at its answer", self._judge(state, number, contender)
            else:
                yield "reads back", self._read_back(state, number, contender)
        elif contender.phase == "idle":
            if contender.creations < self._bounds.creations:
                more = contender._replace(creations=contender.creations + 1)
                yield "creates its ticket", self._send(state, number, more, "created")
        elif contender.renewals < self._bounds.renewals[number]:
            more = contender._replace(renewals=contender.renewals + 1)
            yield "renews", self._send(state, number, more, "renewed")
        if contender.phase == "waiting":
            yield from self._wait_steps(state, number, contender)
        elif contender.phase == "holding":
            yield from self._hold_steps(state, number, contender)

    def _send(
        self, state: World, number: int, contender: Contender, what: Literal["created", "renewed"]
    ) -> World:
        attempt = contender.creations if what == "created" else 0
        put = Put(number, number, what, contender.revision, attempt)
        sent = contender._replace(pending=what, elapsed=0)
        return with_contender(state._replace(under_way=state.under_way | {put}), number, sent)

    def _read_back(self, state: World, number: int, contender: Contender) -> World:
        """No answer: what lies there tells, from the leader of the bucket."""
        key, known = state.keys[number], contender._replace(pending="", elapsed=0)
        if not self._rules.read_back:
            supposed = key.revision if key.revision > 0 else state.revision + 1
            return with_contender(state, number, contender._replace(answer=supposed))
        if contender.pending == "created":
            if key.revision <= 0:
                return with_contender(state, number, known)  # to be sent again; the first may yet arrive
            if key.attempt == contender.creations or not self._rules.read_back_exactly:
                return with_contender(state, number, contender._replace(answer=key.revision))
            # An earlier attempt: the ticket is ours, but since when is not known before it is renewed.
            place = known._replace(phase="waiting", token=key.revision, revision=key.revision)
            return with_contender(state, number, place)
        if key.revision == contender.revision:
            return with_contender(state, number, known)  # to be sent again
        if key.revision <= 0 or key.attempt:  # an end is an end, whatever arrived after it
            return with_contender(state, number, contender._replace(answer=-1))
        return with_contender(state, number, contender._replace(answer=key.revision))

    def _judge(self, state: World, number: int, contender: Contender) -> World:
        revision = contender.answer
        known = contender._replace(pending="", elapsed=0, answer=0)
        if revision < 0:
            return with_contender(state, number, Contender("over", token=known.token))
        spent = contender.elapsed if self._rules.deadline_from_send else 0
        left = max(self._bounds.ttl - self._rules.margin - spent, 0)
        token = contender.token or revision
        if not self._rules.token_of_creation:
            token = revision
        phase = "waiting" if contender.phase == "idle" else contender.phase
        held = known._replace(phase=phase, token=token, revision=revision, left=left)
        return with_contender(state, number, held)

    # Waiting.

    def _wait_steps(self, state: World, number: int, contender: Contender) -> Iterator[Step]:
        if contender.token // GENERATION != state.revision // GENERATION:
            fresh = Contender(creations=contender.creations - 1, renewals=contender.renewals)
            yield "learns that the bucket was lost", with_contender(state, number, fresh)
        if not contender.reading:
            for shown in self._readings(state, contender):
                read = shown._replace(reading=True)
                yield (
                    f"reads of {[other.owner for other in read.others]}",
                    with_contender(state, number, read),
                )
        elif contender.unheard:
            yield "hears", with_contender(state, number, self._hear(contender))
        if contender.reading:
            if self._bounds.evictions:
                yield from self._evict_steps(state, number, contender)
            if contender.left and self._may_be_granted(state, number, contender):
                yield "is granted", self._grant(state, number, contender)

    def _readings(self, state: World, contender: Contender) -> Iterator[Contender]:
        """What a first reading may show: any replica may be as far as it likes."""
        if not self._rules.reads_own_ticket:
            yield contender._replace(others=(), unheard=())
        shown = contender
        while True:
            if self._rules.expiry in {"markers", "local"}:
                yield shown
            if not shown.unheard:
                break
            shown = self._hear(shown)
        if self._rules.expiry != "markers":
            yield shown._replace(others=tuple(self._not_forgotten(state, shown)))

    def _not_forgotten(self, state: World, contender: Contender) -> Iterator[Other]:
        """Without the tickets which the one server, or some replica, no longer has because of their age."""
        old = self._bounds.ttl - self._bounds.skew if self._rules.expiry == "local" else self._bounds.ttl + 1
        for other in contender.others:
            key = state.keys[other.owner]
            if key.revision > 0 and key.age < old:
                yield other

    def _hear(self, contender: Contender) -> Contender:
        said, *rest = contender.unheard
        others = contender.others
        if said.what == "gone":
            others = tuple([other for other in others if other.owner != said.owner])
        else:
            others = tuple([self._renewed(other, said) for other in others])
        others = tuple([other for other in others if other.place < contender.token])
        return contender._replace(unheard=tuple(rest), others=others)

    def _renewed(self, other: Other, said: Said) -> Other:
        if other.owner != said.owner:
            return other
        place = other.place if self._rules.token_of_creation else said.revision
        return Other(other.owner, place, said.revision)

    def _evict_steps(self, state: World, number: int, contender: Contender) -> Iterator[Step]:
        for other in contender.others:
            if other.silent < self._bounds.ttl and self._rules.evict_after_ttl:
                continue
            for expected in (other.revision, 0):
                put = Put(number, other.owner, "gone", expected)
                after = state._replace(under_way=state.under_way | {put})
                yield f"evicts {other.owner} at {expected}", after

    def _may_be_granted(self, state: World, number: int, contender: Contender) -> bool:
        again = contender.token // GENERATION > 0
        if again and self._rules.quiet_after_loss and contender.quiet < self._bounds.ttl:
            return False
        return len(contender.others) < self._bounds.slots

    def _grant(self, state: World, number: int, contender: Contender) -> World:
        granted = (*state.granted[:number], contender.token, *state.granted[number + 1 :])
        holding = contender._replace(phase="holding", reading=False, others=(), unheard=(), quiet=0)
        after = with_contender(state._replace(granted=granted), number, holding)
        return after._replace(fault=self._unjust(state, number, contender))

    def _unjust(self, state: World, number: int, contender: Contender) -> str | None:
        """What is wrong with a grant, as only somebody who sees everything can say."""
        others = [owner for owner in self._all if owner != number and self._conflict(owner, number)]
        granted = [self._shown(state.granted[owner]) for owner in others]
        if self._bounds.slots == 1 and max(granted, default=0) > self._shown(contender.token):
            return f"token {self._shown(contender.token)} is granted after {max(granted)}"
        if contender.token // GENERATION != state.revision // GENERATION:
            return None  # granted by what was read before the loss
        living = [owner for owner in others if state.keys[owner].revision > 0]
        before = [owner for owner in living if state.keys[owner].place < contender.token]
        if len(before) >= self._bounds.slots:
            return f"{number} is granted before {before[0]}, which came first"
        return None

    # Holding.

    def _hold_steps(self, state: World, number: int, contender: Contender) -> Iterator[Step]:
        if not contender.pending:
            put = Put(number, number, "gone", contender.revision)
            over = Contender("over", token=contender.token)
            after = state._replace(under_way=state.under_way | {put})
            yield "releases", with_contender(after, number, over)
        if contender.left and contender.uses < self._bounds.uses:
            uses = state.uses_under_way | {(number, contender.token)}
            used = contender._replace(uses=contender.uses + 1)
            yield "writes to the resource", with_contender(state._replace(uses_under_way=uses), number, used)
