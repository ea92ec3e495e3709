"""Ids: what clients may choose, what a UUIDv7 tells, what is derived."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentflow import ids
from agentflow.fresh import new_id
from agentflow.limits import ID_LENGTH_MAX

TIMES = st.integers(0, 2**48 - 1)
CHOSEN = st.text("aZ09_-", min_size=1, max_size=20)


@pytest.mark.parametrize(
    "text", ["a", "A-1_z", "0", "-", "at", "at_5", "AT-5", "x" * ID_LENGTH_MAX, "build-wheel"]
)
def test_may_be_chosen(text: str) -> None:
    assert ids.is_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b",
        "a b",
        "a*",
        ">",
        "a/b",
        "at-5-0",
        "at-",
        "x" * (ID_LENGTH_MAX + 1),
        "x" * 300,
        "é",
        "a\n",
        "\0",
        "٣",
    ],
)
def test_may_not_be_chosen(text: str) -> None:
    assert not ids.is_id(text)


def test_a_fresh_id_is_a_uuid7_that_may_be_chosen() -> None:
    fresh = new_id()
    assert uuid.UUID(fresh).version == 7
    assert uuid.UUID(fresh).variant == uuid.RFC_4122
    assert ids.is_id(fresh)
    assert ids.uuid7_time_ms(fresh) is not None


def test_fresh_ids_differ() -> None:
    assert len({new_id() for _ in range(1_000)}) == 1_000


@given(made_ms=TIMES, low=st.integers(0, 2**62 - 1))
def test_a_uuid7_tells_when_it_was_made(made_ms: int, low: int) -> None:
    text = str(uuid.UUID(int=(made_ms << 80) | (7 << 76) | (2 << 62) | low))
    assert ids.uuid7_time_ms(text) == made_ms
    assert text.startswith(ids.uuid7_prefix(made_ms))


@given(first=TIMES, second=TIMES)
def test_prefixes_sort_by_time(first: int, second: int) -> None:
    assert (ids.uuid7_prefix(first) < ids.uuid7_prefix(second)) == (first < second)


@given(made_ms=TIMES, low=st.integers(0, 2**62 - 1))
def test_a_uuid7_lies_between_the_prefixes_of_its_time_and_the_next(made_ms: int, low: int) -> None:
    text = str(uuid.UUID(int=(made_ms << 80) | (7 << 76) | (2 << 62) | low))
    assert ids.uuid7_prefix(made_ms) < text
    assert made_ms == 2**48 - 1 or text < ids.uuid7_prefix(made_ms + 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "build-7",
        str(uuid.UUID(int=0)),
        "eeb0aeb8-0489-4437-88bd-41902b4a7599",
        "0190A000-0000-7000-8000-000000000000",
        "0190a000-0000-7000-c000-000000000000",
        "0190a000-0000-7000-8000-00000000000",
        "0190a000-0000-7000-8000-000000000000\n",
        "0190a000x0000-7000-8000-000000000000",
    ],
)
def test_nothing_else_tells_a_time(text: str) -> None:
    assert ids.uuid7_time_ms(text) is None


def test_an_id_left_out_follows_from_the_position() -> None:
    assert ids.derived(17, 3) == "at-17-3"
    assert not ids.is_id(ids.derived(17, 3))


@given(workflow=CHOSEN, task=CHOSEN)
def test_a_task_of_a_workflow_names_it(workflow: str, task: str) -> None:
    name = ids.in_workflow(workflow, task)
    assert ids.workflow_of(name) == workflow
    assert not ids.is_id(name)


def test_a_task_alone_names_no_workflow() -> None:
    assert ids.workflow_of("a") is None
