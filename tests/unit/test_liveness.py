"""Who lives: silence, deafness, and what does not count as either."""

from __future__ import annotations

from agentflow import wire
from agentflow.domain.state import Namespace, Worker
from agentflow.frames import encode
from agentflow_nodes.master.liveness import STALL_S_MAX, Heartbeat, Liveness

TTL_S = 5.0


class Ward:
    """One worker, a clock, and the leader's ear."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.state = Namespace("default")
        self.worker = Worker(
            name="w1",
            incarnation=7,
            slots=1,
            ahead=0,
            group="",
            labels={},
            cpu=0.0,
            memory_mb=0,
            gpus=0,
            functions=frozenset(),
            host="",
            joined_ms=0,
        )
        self.state.workers["w1"] = self.worker
        self.liveness = Liveness("default", TTL_S, clock=lambda: self.now)

    def beat(self, *, read: int = 0, incarnation: int = 7, stalled: bool = False) -> None:
        data = encode(Heartbeat(incarnation, read, stalled=stalled))
        self.liveness._on_heartbeat(wire.heartbeat("default", "w1"), data, "", None)

    def after(self, seconds: float) -> list[str]:
        """Who is given up then, and why."""
        self.now += seconds
        return [silence.reason for silence in self.liveness.silences(self.state)]


def test_a_worker_that_beats_lives() -> None:
    ward = Ward()
    for _ in range(10):
        ward.beat()
        assert ward.after(TTL_S - 1) == []


def test_one_that_is_silent_is_given_up() -> None:
    ward = Ward()
    ward.beat()
    assert ward.after(TTL_S - 1) == []
    assert ward.after(2.0) == ["no heartbeat for 5 s"]


def test_a_heartbeat_of_an_earlier_incarnation_counts_nothing() -> None:
    ward = Ward()
    assert ward.after(TTL_S) == []
    ward.beat(incarnation=6)
    assert ward.after(TTL_S + 1) == ["no heartbeat for 5 s"]


def test_after_an_election_or_a_gap_everybody_has_a_full_time_to_live() -> None:
    ward = Ward()
    ward.beat()
    assert ward.after(100.0) == ["no heartbeat for 5 s"]
    ward.liveness.refresh()
    assert ward.after(TTL_S - 1) == []
    ward.liveness._on_connection(False)
    assert ward.after(100.0) == []
    ward.liveness._on_connection(True)
    assert ward.after(TTL_S - 1) == []
    assert ward.after(2.0) == ["no heartbeat for 5 s"]


def test_one_that_beats_but_does_not_read_is_given_up() -> None:
    ward = Ward()
    ward.worker.assigned_seq = 50
    ward.beat(read=50)
    assert ward.after(TTL_S + 1) != []  # it must beat as well
    ward = Ward()
    ward.worker.assigned_seq = 50
    reasons: list[str] = []
    for _ in range(8):
        ward.beat(read=49)
        reasons += ward.after(1.0)
    assert set(reasons) == {"it has not read its assignments for 5 s"}


def test_one_that_is_always_a_little_behind_lives() -> None:
    ward = Ward()
    for number in range(100):
        ward.worker.assigned_seq = 10 * number
        ward.beat(read=10 * (number - 1))
        assert ward.after(1.0) == []


def test_nonsense_is_no_heartbeat() -> None:
    ward = Ward()
    ward.after(0.0)
    deep = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for data in (b"", b"{}", b'{"incarnation":"7","read":0}', b"\xff", deep):
        ward.now += 2.0
        ward.liveness._on_heartbeat(wire.heartbeat("default", "w1"), data, "", None)
    assert ward.after(0.0) == ["no heartbeat for 5 s"]


def test_who_stands_by_does_not_remember_every_worker_there_ever_was() -> None:
    ward = Ward()
    for incarnation in range(20_000):
        ward.now += 1.0
        ward.beat(incarnation=incarnation)
    assert len(ward.liveness._heard) < 2_000
    assert ("w1", 19_999) in ward.liveness._heard


class TestStalled:
    """Its keeper speaks for a worker whose event loop stands still."""

    def test_one_that_is_stalled_lives_although_it_reads_nothing(self) -> None:
        ward = Ward()
        ward.worker.assigned_seq = 50
        ward.beat(read=49)
        for _ in range(20):
            assert ward.after(1.0) == []
            ward.beat(read=49, stalled=True)

    def test_once_it_goes_on_it_has_its_full_time_to_read(self) -> None:
        ward = Ward()
        ward.worker.assigned_seq = 50
        ward.beat(read=49)
        ward.after(TTL_S - 1)
        ward.beat(read=49, stalled=True)
        ward.after(TTL_S - 1)
        reasons = []
        for _ in range(int(TTL_S) - 1):
            ward.beat(read=49)
            reasons += ward.after(1.0)
        assert reasons == []
        for _ in range(3):
            ward.beat(read=49)
            reasons += ward.after(1.0)
        assert set(reasons) == {"it has not read its assignments for 5 s"}

    def test_it_does_not_live_for_ever(self) -> None:
        ward = Ward()
        ward.beat()
        lived = 0
        while not (reasons := ward.after(1.0)):
            lived += 1
            ward.beat(stalled=True)
            assert lived < 2 * STALL_S_MAX
        assert reasons == ["its event loop stood still, and then no heartbeat for 5 s"]
        assert STALL_S_MAX - 1 <= lived <= STALL_S_MAX + TTL_S + 1

    def test_one_whose_keeper_falls_silent_is_given_up_as_any_other(self) -> None:
        ward = Ward()
        ward.beat()
        ward.after(2.0)
        ward.beat(stalled=True)
        assert ward.after(TTL_S + 1) != []
