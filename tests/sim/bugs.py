"""Defences that can be switched off, to show that the simulation would notice.

Each is a context manager that patches one place of the code under test. `expects` is the
check that has to fail with one of the first `seeds` seeds. A check without a bug that trips
it proves little; see the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

from msgspec import Struct

from agentflow import writer
from agentflow.domain import decided, fold, plan, policies, reported, workflows
from agentflow.domain.life import State
from agentflow.domain.state import SUPERSEDED, Memory, Namespace, Task
from agentflow.errors import AppendRefused, AppendUnknown
from agentflow.events import TaskCancelled
from agentflow.locks import contender
from agentflow.log import memory
from agentflow.log.port import Appended, Done, Fence, Frame
from agentflow_nodes.master import follower, leader, liveness
from tests.sim import worker
from tests.sim.model import Check

TASKS: Final = 400
"""Tasks with which a bug is to be noticed."""


class Bug(Struct, frozen=True):
    """A defence that is switched off while the context is entered."""

    name: str
    expects: Check
    planted: Callable[[], AbstractContextManager[Any]]
    seeds: int = 8


def _patch(owner: Any, name: str, replacement: object) -> AbstractContextManager[Any]:
    return mock.patch.object(owner, name, replacement)


# The log -----------------------------------------------------------------------------


@contextmanager
def _no_fence() -> Generator[None]:
    """The log takes decisions of any leader."""
    arrive = memory.MemoryLog.arrive

    def unfenced(self: memory.MemoryLog, frames: Sequence[Frame], fence: Fence | None) -> Appended:
        elects = fence is not None and fence.subject == frames[0].subject
        return arrive(self, frames, fence if elects else None)

    with _patch(memory.MemoryLog, "arrive", unfenced):
        yield


@contextmanager
def _no_fence_and_no_epochs() -> Generator[None]:
    """Neither does the log refuse a deposed leader, nor the fold."""

    def from_anybody(state: Namespace, event: Any, at: Any) -> Any:
        at.epoch = state.epoch
        return decided.decided(state, event, at)

    meaning = mock.patch.dict(fold.MEANING, dict.fromkeys(decided.DECISIONS, from_anybody))
    with _no_fence(), meaning:
        yield


@contextmanager
def _loses_what_it_acknowledged() -> Generator[None]:
    """The log acknowledges now and then what it did not store."""
    arrive = memory.MemoryLog.arrive
    arrivals = itertools.count(1)

    def forgetful(self: memory.MemoryLog, frames: Sequence[Frame], fence: Fence | None) -> Appended:
        if fence is None and "submitted" in frames[0].subject and not next(arrivals) % 10:
            return Done(self._stream().last_seq)
        return arrive(self, frames, fence)

    with _patch(memory.MemoryLog, "arrive", forgetful):
        yield


@contextmanager
def _doubt_is_a_refusal() -> Generator[None]:
    """The writer calls refused what may be stored."""
    judge = writer.Writer._judge

    def certain(self: writer.Writer, *given: Any) -> int | None:
        try:
            return judge(self, *given)
        except AppendUnknown as unknown:
            raise AppendRefused(0, str(unknown)) from unknown

    with _patch(writer.Writer, "_judge", certain):
        yield


# The fold ----------------------------------------------------------------------------


def _any_attempt() -> AbstractContextManager[Any]:
    """An outcome counts whichever attempt it is of."""

    def held(state: Namespace, event: Any, at: Any) -> Any:
        task = state.tasks.get(event.id)
        return SUPERSEDED if task is None or task.worker is None else task

    return _patch(reported, "_held", held)


def _no_memory_of_ids() -> AbstractContextManager[Any]:
    """What is submitted again after its end is another task."""
    return _patch(Memory, "get", lambda *_given: None)


def _no_backoff() -> AbstractContextManager[Any]:
    """What failed is tried again at once."""
    return _patch(policies, "backoff_ms", lambda *_given: 0)


def _endless_retries() -> AbstractContextManager[Any]:
    """What failed is tried again however often it did."""
    return _patch(policies, "retries", lambda *_given, **_named: True)


@contextmanager
def _no_dependencies() -> Generator[None]:
    """All tasks of a workflow are ready at once."""
    build = workflows.build

    def unordered(*given: Any) -> Any:
        workflow = build(*given)
        for task in workflow.tasks.values():
            assert task.node is not None
            task.node.waiting = 0
            task.node.uses = ()
        return workflow

    with _patch(workflows, "build", unordered):
        yield


@contextmanager
def _cancels_what_runs() -> Generator[None]:
    """A cancellation is confirmed while a worker holds the task."""

    def cancel(draft: Any) -> None:
        for task in draft.state.cancels.values():
            draft.say(TaskCancelled(id=task.id, reason=task.cancel or ""), draft.state.leader)

    anything = frozenset({State.PENDING, State.READY, State.RUNNING})
    with _patch(plan, "_cancel", cancel), _patch(decided, "_CANCELLABLE", anything):
        yield


@contextmanager
def _folds_twice() -> Generator[None]:
    """What is delivered again is folded again."""

    def again(state: Namespace, seq: int, *given: Any) -> Any:
        state.seq = min(state.seq, seq - 1)
        return fold.fold(state, seq, *given)

    with _patch(follower, "fold", again):
        yield


# The plan ----------------------------------------------------------------------------


def _endless_room() -> AbstractContextManager[Any]:
    """Every worker takes everything."""
    return _patch(policies.Room, "admits", lambda *_given: True)


@contextmanager
def _plans_by_chance() -> Generator[None]:
    """Where a task goes follows from something that is not in the log."""
    drawn = itertools.count()

    def load(self: policies.Room) -> float:
        return self.held + next(drawn) * 7 % 5

    def pick(self: policies.LeastLoaded, task: Task, quick_us: int, now_ms: int) -> Any:
        rooms = [room for _, _, room in self._heap if room.admits(self._line, quick_us, self._policy)]
        return min(rooms, key=load, default=None)

    with _patch(policies.LeastLoaded, "pick", pick):
        yield


# The nodes ---------------------------------------------------------------------------


def _plans_before_it_has_read() -> AbstractContextManager[Any]:
    """A leader plans on a fold without its own last decisions."""
    return _patch(leader.Leader, "_judge_append", lambda *_given: None)


def _hears_no_silence() -> AbstractContextManager[Any]:
    """No worker is ever given up."""
    return _patch(liveness.Liveness, "silences", lambda *_given: [])


@contextmanager
def _runs_for_any_incarnation() -> Generator[None]:
    """A worker reads and runs what was assigned to its predecessors."""
    ours = _patch(worker.SimWorker, "_is_ours", lambda *_given: True)
    with ours, _patch(worker.SimWorker, "_reads_after", lambda *_given: 0):
        yield


def _runs_what_was_stored_twice() -> AbstractContextManager[Any]:
    """A worker runs an assignment as often as it lies in the log."""
    return _patch(worker.SimWorker, "_seen_before", lambda *_given: False)


def _waits_for_no_holder() -> AbstractContextManager[Any]:
    """Whoever comes has the lock."""
    return _patch(contender.Contender, "_is_first", lambda *_given: True)


def _begins_suspects_unsaid() -> AbstractContextManager[Any]:
    """A worker begins suspects without saying so first."""
    return _patch(worker.SimWorker, "_begins_announced", lambda *_given: False)


def _bug(planted: Callable[[], AbstractContextManager[Any]], expects: Check, seeds: int = 8) -> Bug:
    return Bug(planted.__name__.strip("_"), expects, planted, seeds)


BUGS: Final[Sequence[Bug]] = (
    _bug(_no_fence, Check.FENCE),
    _bug(_no_fence_and_no_epochs, Check.LEADER, seeds=24),
    _bug(_loses_what_it_acknowledged, Check.STORED),
    _bug(_doubt_is_a_refusal, Check.REFUSED),
    _bug(_any_attempt, Check.CURRENT),
    _bug(_no_memory_of_ids, Check.ONE_TASK),
    _bug(_no_backoff, Check.BACKOFF),
    _bug(_endless_retries, Check.BACKS_OFF),
    _bug(_no_dependencies, Check.DEPENDENCIES),
    _bug(_cancels_what_runs, Check.WAITING),
    _bug(_folds_twice, Check.SAME),
    _bug(_endless_room, Check.ROOM),
    _bug(_plans_by_chance, Check.REPLAY),
    _bug(_plans_before_it_has_read, Check.ASSIGNED),
    _bug(_hears_no_silence, Check.REST, seeds=16),
    _bug(_runs_for_any_incarnation, Check.ASSIGNED),
    _bug(_begins_suspects_unsaid, Check.SAID),
    _bug(_runs_what_was_stored_twice, Check.RUN_ONCE, seeds=16),
    _bug(_waits_for_no_holder, Check.EXCLUSIVE),
)


def planted(*bugs: Bug) -> AbstractContextManager[ExitStack]:
    """Several at once."""
    stack = ExitStack()
    for bug in bugs:
        stack.enter_context(bug.planted())
    return stack
