"""Sharing namespaces out: any number of masters, each with a view of all, come to one even result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from hypothesis import given, settings
from hypothesis import strategies as st

from agentflow_nodes.master.sharing import SeatReport, Session, Standing, handover, leader_of, ranking

FOLLOWER = Standing.FOLLOWER
LEADER = Standing.LEADER


class World:
    """Masters, the namespaces each serves, and who leads what. One step is what all do upon one view."""

    def __init__(self, served: Mapping[str, Iterable[str]]) -> None:
        self.served = {name: set(namespaces) for name, namespaces in served.items()}
        self.leaders: dict[str, str] = {}
        self.successors: dict[str, tuple[str, str]] = {}
        self.moves: list[tuple[str, str, str]] = []

    def sessions(self) -> list[Session]:
        return [
            Session(name, f"{name}-1", seats={each: self._seat(name, each) for each in sorted(served)})
            for name, served in self.served.items()
        ]

    def _seat(self, name: str, namespace: str) -> SeatReport:
        if self.leaders.get(namespace) == name:
            return SeatReport(LEADER, 1)
        giver, taker = self.successors.get(namespace, ("", ""))
        return SeatReport(FOLLOWER, 1, successor=taker if giver == name else "")

    def step(self) -> bool:
        """Whether anything changed."""
        view = self.sessions()
        vacant = sorted(set().union(*self.served.values()) - self.leaders.keys())
        taken = {each: order[0] for each in vacant if (order := ranking(each, view))}
        gifts = {name: gift for name in self.served if (gift := handover(name, view)) is not None}
        assert len(gifts) <= 1, "one at a time"
        self.leaders.update(taken)
        self.successors.clear()
        for giver, (namespace, taker) in gifts.items():
            assert self.leaders[namespace] == giver
            del self.leaders[namespace]
            self.successors[namespace] = giver, taker
            self.moves.append((namespace, giver, taker))
        return bool(taken or gifts)

    def settle(self) -> None:
        """Step until nothing changes, which must be soon."""
        steps = 3 + 2 * len(set().union(*self.served.values()))
        for _ in range(steps):
            if not self.step():
                return
        raise AssertionError(f"still changing after {steps} steps: {self.moves}")

    def loads(self) -> dict[str, int]:
        led = list(self.leaders.values())
        return {name: led.count(name) for name in self.served}

    def leave(self, name: str) -> None:
        del self.served[name]
        self.leaders = {each: leader for each, leader in self.leaders.items() if leader != name}


def _spread(loads: Mapping[str, int]) -> int:
    return max(loads.values()) - min(loads.values())


def _namespaces(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


MASTERS = st.sets(st.sampled_from([f"m{number}" for number in range(7)]), min_size=1)
NAMESPACES = st.sets(st.sampled_from(_namespaces(20)), min_size=1)
slowly = settings(deadline=None, max_examples=50)


@slowly
@given(masters=MASTERS, namespaces=NAMESPACES)
def test_all_are_led_and_loads_differ_by_at_most_one(
    masters: AbstractSet[str], namespaces: AbstractSet[str]
) -> None:
    world = World(dict.fromkeys(sorted(masters), namespaces))
    world.settle()
    assert world.leaders.keys() == namespaces
    assert _spread(world.loads()) <= 1
    assert not world.moves, "what nobody led is shared out evenly at once"


@slowly
@given(masters=MASTERS, namespaces=NAMESPACES, data=st.data())
def test_whatever_was_led_by_whom_it_evens_out_and_stays(
    masters: AbstractSet[str], namespaces: AbstractSet[str], data: st.DataObject
) -> None:
    world = World(dict.fromkeys(sorted(masters), namespaces))
    led = st.one_of(st.none(), st.sampled_from(sorted(masters)))
    for namespace in sorted(namespaces):
        leader = data.draw(led)
        if leader is not None:
            world.leaders[namespace] = leader
    world.settle()
    assert _spread(world.loads()) <= 1
    assert not world.step()


@slowly
@given(masters=MASTERS, namespaces=NAMESPACES)
def test_a_newcomer_is_given_his_share_and_nothing_else_moves(
    masters: AbstractSet[str], namespaces: AbstractSet[str]
) -> None:
    world = World(dict.fromkeys(sorted(masters), namespaces))
    world.settle()
    world.served["newcomer"] = set(namespaces)
    world.settle()
    assert {taker for _, _, taker in world.moves} <= {"newcomer"}
    assert len(world.moves) == len(namespaces) // len(world.served)
    assert _spread(world.loads()) <= 1


@slowly
@given(masters=MASTERS.filter(lambda names: len(names) > 1), namespaces=NAMESPACES, data=st.data())
def test_when_one_goes_only_what_he_led_moves(
    masters: AbstractSet[str], namespaces: AbstractSet[str], data: st.DataObject
) -> None:
    world = World(dict.fromkeys(sorted(masters), namespaces))
    world.settle()
    gone = data.draw(st.sampled_from(sorted(masters)))
    before = dict(world.leaders)
    world.leave(gone)
    world.settle()
    stayed = {each for each, leader in before.items() if leader != gone}
    assert all(world.leaders[each] == before[each] for each in stayed)
    assert world.leaders.keys() == namespaces
    assert _spread(world.loads()) <= 1


@slowly
@given(
    served=st.dictionaries(
        st.sampled_from([f"m{number}" for number in range(8)]),
        st.sets(st.sampled_from(_namespaces(20)), min_size=1),
        min_size=1,
    )
)
def test_masters_that_serve_different_namespaces_settle_too(served: dict[str, set[str]]) -> None:
    """Whoever leads could give to nobody who serves the same and leads two fewer."""
    world = World(served)
    world.settle()
    loads = world.loads()
    assert world.leaders.keys() == set().union(*served.values())
    for namespace, leader in world.leaders.items():
        assert namespace in served[leader]
        others = [loads[name] for name, known in served.items() if namespace in known]
        assert loads[leader] <= min(others) + 1


def test_one_that_must_keep_all_it_leads_does_not_stop_others_from_giving() -> None:
    world = World({"alone": _namespaces(9), "full": ["x1", "x2", "x3", "x4"], "idle": ["x1", "x2", "x3"]})
    world.leaders = dict.fromkeys(_namespaces(9), "alone") | dict.fromkeys(("x1", "x2", "x3", "x4"), "full")
    world.settle()
    assert world.loads() == {"alone": 9, "full": 2, "idle": 2}


@slowly
@given(masters=MASTERS, namespaces=NAMESPACES)
def test_the_order_in_which_sessions_are_known_changes_nothing(
    masters: AbstractSet[str], namespaces: AbstractSet[str]
) -> None:
    world = World(dict.fromkeys(sorted(masters), namespaces))
    view = world.sessions()
    for namespace in namespaces:
        assert ranking(namespace, view) == ranking(namespace, view[::-1])
    world.leaders = dict.fromkeys(namespaces, min(masters))
    view = world.sessions()
    for name in masters:
        assert handover(name, view) == handover(name, view[::-1])


# One view -----------------------------------------------------------------------------


def session(name: str, **seats: SeatReport | Standing) -> Session:
    reports = {
        each: seat if isinstance(seat, SeatReport) else SeatReport(seat, 1) for each, seat in seats.items()
    }
    return Session(name, f"{name}-1", seats=reports)


def test_who_is_not_ready_is_not_asked() -> None:
    view = [
        session("a", x=Standing.CATCHING_UP),
        session("b", x=Standing.OUTDATED),
        session("c", x=FOLLOWER),
        session("d", y=FOLLOWER),
    ]
    assert ranking("x", view) == ["c"]
    assert ranking("z", view) == []


def test_the_one_who_leads_least_comes_first() -> None:
    view = [session("busy", x=FOLLOWER, y=LEADER), session("idle", x=FOLLOWER, y=FOLLOWER)]
    assert ranking("x", view) == ["idle", "busy"]


def test_a_successor_comes_before_those_who_lead_less() -> None:
    view = [
        session("giver", x=SeatReport(FOLLOWER, 1, successor="named"), y=FOLLOWER),
        session("named", x=FOLLOWER, y=LEADER),
        session("idle", x=FOLLOWER, y=FOLLOWER),
    ]
    assert ranking("x", view)[0] == "named"


def test_what_is_given_to_a_successor_counts_for_him_already() -> None:
    view = [
        session("giver", a=SeatReport(FOLLOWER, 1, successor="named"), b=FOLLOWER, c=LEADER),
        session("named", a=FOLLOWER, b=FOLLOWER),
        session("idle", a=FOLLOWER, b=FOLLOWER),
    ]
    assert ranking("b", view)[0] == "idle"


def test_of_two_who_claim_to_lead_the_one_elected_later_does() -> None:
    view = [session("old", x=SeatReport(LEADER, 3)), session("new", x=SeatReport(LEADER, 4))]
    assert leader_of("x", view) == "new"


def test_a_candidate_counts_as_leader() -> None:
    assert leader_of("x", [session("a", x=Standing.CANDIDATE), session("b", x=FOLLOWER)]) == "a"
    assert (
        handover("a", [session("a", x=Standing.CANDIDATE, y=Standing.CANDIDATE), session("b", x=FOLLOWER)])
        is None
    )


def test_whom_the_log_names_leads_although_his_session_does_not_say_so_yet() -> None:
    view: Sequence[Session] = [
        session("elected", x=SeatReport(FOLLOWER, 4)),
        session("other", x=SeatReport(FOLLOWER, 5)),
    ]
    assert leader_of("x", view, "elected", 5) == "elected"
    assert leader_of("x", view, "gone", 5) is None
    stepped_down = [session("elected", x=SeatReport(FOLLOWER, 5))]
    assert leader_of("x", stepped_down, "elected", 5) is None
