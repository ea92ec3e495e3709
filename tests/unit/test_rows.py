"""Rows of frames taken at one go are those of their events taken one after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from agentflow import events
from agentflow.domain.state import Namespace
from agentflow.log.port import Message
from agentflow_projections import rows
from agentflow_projections.columns import Columns
from agentflow_projections.rows import Recorder
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
            begun = self.chance.choice((0, 1_700_000_000_000))
            said = [
                events.TaskCompleted(
                    id=task.id,
                    attempt=task.attempt + (self.chance.random() < 0.03),
                    incarnation=worker.incarnation,
                    started_at_ms=begun,
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
        assert rows_of(messages) == found
        patch.setattr(rows, "IN_BULK", frozenset())
        assert rows_of(messages) == found


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
    found.extend_columns([range(2, 4), ["b", "c"]])
    found.append((4, "d"))
    assert len(found) == 4
    assert list(found) == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    assert found.columns() == [[1, 2, 3, 4], ["a", "b", "c", "d"]]
    taken = found.take()
    found.append((5, "e"))
    assert (list(taken)[-1], list(found)) == ((4, "d"), [(5, "e")])
