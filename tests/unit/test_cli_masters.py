"""What `agentflow masters` makes of sessions and logs."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from agentflow.domain.digest import Difference
from agentflow.log.port import Identity
from agentflow_nodes.cli.masters import Election, Living, Overview, Served, document, tables
from agentflow_nodes.cli.namespaces import named
from agentflow_nodes.master.sharing import SeatReport, Session, Standing

NOW_MS = 1_700_000_000_000


def identity(name: str, last_seq: int) -> Identity:
    return Identity(name, 1, 1, last_seq, 1, 1_000, -1)


def living(name: str, **seats: SeatReport) -> Living:
    session = Session(
        name, f"{name}-1", level=2, host="h\x1b[31mx", pid=7, started_ms=NOW_MS - 65_000, seats=seats
    )
    return Living(session, NOW_MS - 500)


def shown(found: Overview) -> list[list[str]]:
    """The lines, as words."""
    console = Console(width=200, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: PTH123, SIM115
    console.print(tables(found, NOW_MS))
    return [line.split() for line in console.export_text().splitlines()]


TWO = Overview(
    [
        living("a", shop=SeatReport(Standing.LEADER, 4, 90), mail=SeatReport(Standing.FOLLOWER, 1, 7, "b")),
        living("b", shop=SeatReport(Standing.CATCHING_UP, 2, 40), mail=SeatReport(Standing.FOLLOWER, 1, 7)),
    ],
    {
        "mail": Served(identity("mail", 7), Election("a", 1, 1, 2, NOW_MS - 9_000), {}),
        "shop": Served(identity("shop", 100), Election("a", 4, 2, 80, NOW_MS - 3_000), {"b": 1_500}),
    },
)


def test_each_master_in_each_namespace() -> None:
    lines = shown(TWO)
    assert ["a", "2", "1", "2", "hx:7", "1", "m", "05", "s"] in lines
    assert ["shop", "a", "leader", "4", "2", "90", "10", "3.0", "s", "ago"] in lines
    assert ["shop", "b", "catching", "up", "2", "40", "60", "(1.5", "s)"] in lines


def test_a_fold_that_differs() -> None:
    seat = SeatReport(Standing.FOLLOWER, 1, 7, differs=Difference("b", 4_096, 2_048))
    found = Overview([living("a", mail=seat)], {"mail": TWO.namespaces["mail"]})
    assert ["its", "fold", "differs", "from", "b's", "at", "4096,", "the", "same", "at", "2048"] in shown(
        found
    )
    assert document(found)["masters"][0]["seats"][0]["differs"] == {
        "other": "b",
        "seq": 4_096,
        "agreed_seq": 2_048,
    }


def test_a_namespace_without_a_leader() -> None:
    lines = shown(TWO)
    assert ["mail", "nobody", "leads", "1", "1", "7", "last", "a,", "9.0", "s", "ago"] in lines
    assert ["mail", "a", "follower", "1", "7", "0", "b"] in lines


def test_a_namespace_that_never_had_one() -> None:
    found = Overview([], {"new": Served(identity("new", 3), None, {})})
    assert ["new", "nobody", "leads", "3", "never"] in shown(found)


def test_as_json() -> None:
    found: Any = document(TWO)
    assert [each["leader"] for each in found["namespaces"]] == [None, "a"]
    assert found["masters"][1]["seats"] == [
        {
            "namespace": "mail",
            "standing": "follower",
            "epoch": 1,
            "seq": 7,
            "lag": 0,
            "lag_ms": 0,
            "successor": None,
            "differs": None,
        },
        {
            "namespace": "shop",
            "standing": "catching_up",
            "epoch": 2,
            "seq": 40,
            "lag": 60,
            "lag_ms": 1_500,
            "successor": None,
            "differs": None,
        },
    ]


def test_whom_the_log_elected_leads_before_his_session_says_so() -> None:
    served = Served(identity("x", 9), Election("a", 5, 2, 9, NOW_MS), {})
    assert Overview([living("a", x=SeatReport(Standing.FOLLOWER, 4, 8))], {"x": served}).leader("x") == "a"
    assert Overview([living("b", x=SeatReport(Standing.FOLLOWER, 4, 8))], {"x": served}).leader("x") is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ()),
        (["a"], ("a",)),
        (["a,b", "c"], ("a", "b", "c")),
        (["b, a", "b"], ("b", "a")),
        (["a,"], ("a", "")),
    ],
)
def test_several_namespaces(given: list[str] | None, expected: tuple[str, ...]) -> None:
    assert named(given) == expected
