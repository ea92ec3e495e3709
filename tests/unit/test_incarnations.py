"""A dead incarnation that still beats does not keep the living one's seat warm."""

from __future__ import annotations

from tests.unit.test_liveness import TTL_S, Ward


def test_heartbeats_of_an_earlier_incarnation_keep_nobody_alive() -> None:
    ward = Ward()
    ward.beat()
    given_up: list[str] = []
    for _ in range(3):
        ward.beat(incarnation=6)
        given_up = ward.after(TTL_S / 2)
    assert given_up == ["no heartbeat for 5 s"]
