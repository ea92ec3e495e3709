"""Rows of frames taken at one go are those of their events taken one after the other."""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import events
from agentflow.domain.state import Namespace
from agentflow.log.port import Message
from agentflow_projections import columns as columns_module
from agentflow_projections import rows
from agentflow_projections.columns import Columns, arrow_table
from agentflow_projections.database import Checkpoint, Database, arrow_schemas
from agentflow_projections.rows import Recorder
from tests.rows import Rows, all_rows
from tests.unit.given import FUNCTION, NAMESPACE, Logged, Scene, elected, flow, joined

SEEDS = st.integers(0, 2**32)


class Crowd:
    """A cluster whose frames hold many events, some of which do not count."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.scene = Scene().given(elected())
        self.names = 0

    def run(self, steps: int) -> list[Logged]:
        for _ in range(steps):
            self.scene.after(self.chance.choice((0, 1, 10)))
            self.chance.choice((self.submit, self.submit, self.flow, self.join, self.work, self.work))()
            self.scene.lead()
            self.scene.state.ended.clear()
        return self.scene.messages

    def submit(self) -> None:
        chance, alike = self.chance, self.chance.random() < 0.6
        self.scene.say("cli", [self.task(alike=alike) for _ in range(chance.randint(1, 12))])

    def task(self, *, alike: bool) -> events.TaskSubmitted:
        chance = self.chance
        again = chance.random() < 0.03
        self.names += not again
        if alike:
            return events.TaskSubmitted(id=f"t{self.names}", function=FUNCTION, args=[self.names])
        return events.TaskSubmitted(
            id=chance.choice((f"t{self.names}", "")),
            function=FUNCTION,
            title=chance.choice(("", "a title")),
            priority=chance.choice((500, "high")),
            retry=chance.choice((None, events.Retry(max_attempts=2))),
            needs=chance.choice((None, events.Needs(cpu=0.5, labels={"disk": "ssd"}))),
            timeout_s=chance.choice((0.0, 9.0)),
            queue_timeout_s=chance.choice((0.0, 60.0)),
        )

    def flow(self) -> None:
        names = [f"s{number}" for number in range(self.chance.randint(2, 8))]
        middle = dict.fromkeys(names[1:], names[:1])
        self.names += 1
        self.scene.given(flow(f"f{self.names}", {names[0]: [], **middle}))

    def join(self) -> None:
        labels = {"disk": "ssd"}
        self.scene.given(joined(self.chance.choice(("w1", "w2")), slots=8, ahead=20, cpu=8.0, labels=labels))

    def work(self) -> None:
        """A worker completes what it holds, and what it does not."""
        for worker in list(self.scene.state.workers.values()):
            held = list(worker.held.values())
            self.chance.shuffle(held)
            begun = self.chance.choice(((0,), (1_700_000_000_000,), (1, 2, 3), (0, 1)))
            said = [
                events.TaskCompleted(
                    id=task.id,
                    attempt=task.attempt + (self.chance.random() < 0.03),
                    incarnation=worker.incarnation,
                    started_at_ms=self.chance.choice(begun),
                    run_us=self.chance.randint(0, 9),
                )
                for task in held
            ]
            if said:
                self.scene.say(worker.name, said)


def rows_of(messages: Sequence[Logged]) -> dict[str, Columns]:
    recorder = Recorder(Namespace(NAMESPACE))
    for message in messages:
        recorder.apply(Message(*message[:3], message.data, message.headers))
    return recorder.take()


@with_random(seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_many_at_once_make_the_rows_of_one_after_the_other(seed: int) -> None:
    messages = Crowd(seed).run(25)
    found = rows_of(messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BULK_MIN", 10**9)
        one_by_one = rows_of(messages)
        assert one_by_one == found
        patch.setattr(rows, "IN_BULK", frozenset())
        assert rows_of(messages) == found
    for table, schema in arrow_schemas().items():
        if table in found:
            assert plain(found[table].arrow(schema)) == plain(one_by_one[table].arrow(schema))
            assert plain(found[table].arrow(schema)) == as_arrow_makes_it(found[table], schema)


def plain(table: pa.Table) -> pa.Table:
    """A table whose Arrow memory makes sense, in one piece."""
    table.validate(full=True)
    return table.combine_chunks()


def as_arrow_makes_it(found: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Value by value."""
    columns = zip(*found, strict=True)
    return pa.table(
        [pa.array(each, kind) for each, kind in zip(columns, schema.types, strict=True)], schema=schema
    )


def test_the_file_holds_the_same_rows_whether_they_came_at_one_go_or_not() -> None:
    messages = Crowd(2).run(60)
    held = [held_of(rows_of(messages))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BULK_MIN", 10**9)
        held.append(held_of(rows_of(messages)))
    assert held[0] == held[1]
    assert {name: len(found) for name, found in held[0].items() if name != "checkpoint" and found} == {
        name: len(found) for name, found in rows_of(messages).items()
    }


def held_of(found: Mapping[str, Columns]) -> Rows:
    with Database(None, NAMESPACE) as database:
        database.commit(found, Checkpoint("log", 1, 1, 1, b""), at_ms=0)
        return all_rows(database)


def test_there_are_frames_of_every_kind_that_are_taken_at_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("_many_submitted", "_many_assigned", "_many_completed", "_one_by_one", "_submitted_alike"):
        monkeypatch.setattr(Recorder, name, noting(taken, name, getattr(Recorder, name)))
    rows_of(Crowd(1).run(60))
    assert set(taken) == {
        "_many_submitted",
        "_many_assigned",
        "_many_completed",
        "_one_by_one",
        "_submitted_alike",
    }


def noting(taken: list[str], name: str, method: object) -> object:
    def called(*given: object) -> object:
        taken.append(name)
        return method(*given)  # type: ignore[operator]

    return called


def test_rows_come_in_the_order_in_which_they_were_added() -> None:
    found = Columns()
    found.append((1, "a"))
    found.extend_columns(2, [range(2, 4), ["b", "c"]])
    found.append((4, "d"))
    found.extend_columns(2, [array("q", (9, 7)), "e"])
    assert len(found) == 6
    assert list(found) == [(1, "a"), (2, "b"), (3, "c"), (4, "d"), (9, "e"), (7, "e")]
    assert found.columns() == [[1, 2, 3, 4, 9, 7], ["a", "b", "c", "d", "e", "e"]]
    taken = found.take()
    found.append((5, "f"))
    assert (list(taken)[-1], len(taken), list(found)) == ((7, "e"), 6, [(5, "f")])


SCHEMA = pa.schema(
    {
        "number": pa.int64(),
        "small": pa.int32(),
        "at": pa.timestamp("ms"),
        "share": pa.float64(),
        "text": pa.string(),
        "data": pa.binary(),
    }
)
NUMBERS = st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1))
VALUES: list[st.SearchStrategy[Any]] = [
    *(NUMBERS,) * 3,
    st.one_of(st.none(), st.floats(allow_nan=False)),
    st.one_of(st.none(), st.text(max_size=5)),
    st.binary(max_size=5),
]
"""What may be in the columns of `SCHEMA`."""


@st.composite
def blocks(draw: st.DrawFn) -> tuple[int, list[Any]]:
    """Rows by column: how many, and the columns in one of the forms that are allowed."""
    count = draw(st.integers(1, 6))
    columns: list[Any] = []
    for values in VALUES:
        forms = [values, st.lists(values, min_size=count, max_size=count)]
        if values is NUMBERS:
            numbers = st.lists(st.integers(-9, 9), min_size=count, max_size=count)
            first = draw(st.integers(-9, 9))
            forms += [st.builds(array, st.just("q"), numbers), st.just(range(first, first + count))]
        columns.append(draw(st.one_of(forms)))
    return count, columns


@with_random(
    added=st.lists(st.one_of(blocks(), st.tuples(*VALUES)), min_size=1, max_size=8), piece=st.integers(1, 9)
)
@settings(max_examples=100, deadline=None)
def test_a_table_has_the_rows_in_whatever_form_they_were_added(added: list[Any], piece: int) -> None:
    found, expected = Columns(), list[Any]()
    for each in added:
        if len(each) == len(VALUES):
            found.append(each)
            expected.append(each)
        else:
            count, columns = each
            found.extend_columns(count, columns)
            listed = [part if type(part) in {list, range, array} else [part] * count for part in columns]
            expected += zip(*listed, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "PIECE", piece)
        patch.setattr(columns_module, "_ARRAY_BYTES_MAX", 5 * piece)
        assert plain(arrow_table(found, SCHEMA)) == as_arrow_makes_it(expected, SCHEMA)
        assert plain(arrow_table(expected, SCHEMA)) == as_arrow_makes_it(expected, SCHEMA)
    assert list(found) == expected
