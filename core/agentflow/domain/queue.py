"""The queue of ready tasks.

Tasks of equal demand form a line: they fit the same workers, so one look per line and
plan is enough, and a million tasks that fit nowhere cost the next one nothing. Inside a
line there is a lane for each priority, first in, first out.

Ageing is linear in log time: a task's rank, `priority - ageing * time it became ready`,
changes neither with time nor with what else happens, so lanes need no sorting and the
best of a line is the best head of its lanes.

Leaving the queue is lazy: an entry counts only while its ticket is the task's.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from agentflow.domain.state import Task, Worker

_STALE_MIN: Final = 64


class Demand(Struct, frozen=True, gc=False):
    """What decides where a task may run."""

    function: str = ""
    lock: str = ""
    """Name of the lock that a task holds while it runs."""
    cpu: float = 0.0
    memory_mb: int = 0
    gpus: int = 0
    group: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it asks for no amount of anything."""
        return not (self.cpu or self.memory_mb or self.gpus)


class Lane:
    """Tasks of equal demand and priority, first in, first out."""

    __slots__ = ("entries", "stale")

    def __init__(self) -> None:
        self.entries: deque[tuple[int, Task]] = deque()
        self.stale = 0

    def __iter__(self) -> Iterator[Task]:
        for ticket, task in self.entries:
            if task.ticket == ticket:
                yield task

    def left(self, tickets: Iterable[int]) -> None:
        """Entries became stale."""
        entries = self.entries
        for ticket in tickets:
            if entries and entries[0][0] == ticket:
                entries.popleft()
            else:
                self.stale += 1
        while entries and entries[0][1].ticket != entries[0][0]:
            entries.popleft()
            self.stale -= 1
        if self.stale > _STALE_MIN and self.stale * 2 > len(entries):
            self.entries = deque(entry for entry in entries if entry[1].ticket == entry[0])
            self.stale = 0


class Line:
    """Tasks of equal demand."""

    __slots__ = ("demand", "eligible", "lanes", "number", "plain", "size", "suspect", "users", "version")

    def __init__(self, demand: Demand, number: int, *, suspect: bool) -> None:
        self.demand = demand
        self.plain = demand.plain and not demand.lock
        """Whether its tasks take nothing but a slot of a worker."""
        self.suspect = suspect
        self.number = number
        self.users = 0
        """Terms that refer to it."""
        self.lanes: dict[int, Lane] = {}
        self.size = 0
        self.eligible: list[Worker] = []
        """Workers that can ever run these tasks, as of `version` of the workers."""
        self.version = -1

    def tasks(self, ageing_per_s: float) -> Iterator[Task]:
        """The tasks, best rank first."""
        if len(self.lanes) == 1:
            return iter(next(iter(self.lanes.values())))
        return heapq.merge(*self.lanes.values(), key=lambda task: rank(task, ageing_per_s))


Rank: TypeAlias = tuple[float, int]


def rank(task: Task, ageing_per_s: float) -> Rank:
    """Sorts the next task first: priority plus ageing, then who came first."""
    return task.ready_ms * ageing_per_s / 1000.0 - task.priority, task.ticket


class Queue:
    """All ready tasks of a namespace."""

    __slots__ = ("_suspects", "lines", "numbers", "parked", "size", "tickets", "version", "waiting")

    def __init__(self) -> None:
        self.lines: dict[Demand, Line] = {}
        """Every line that open tasks could wait in."""
        self._suspects: dict[Demand, Line] = {}
        self.waiting: dict[int, Line] = {}
        """Lines with tasks in them, by number."""
        self.parked: dict[int, Line] = {}
        """Lines with tasks that no worker can ever run, as of `version` of the workers."""
        self.version = -1
        self.size = 0
        self.tickets = 0
        self.numbers = 0
        """Lines ever opened."""

    def open(self, demand: Demand) -> Line:
        """The line for a demand; to be given back with `close`."""
        line = self.lines.get(demand)
        if line is None:
            line = self.lines[demand] = self._new_line(demand, suspect=False)
        line.users += 1
        return line

    def close(self, line: Line) -> None:
        """Somebody who opened the line needs it no more."""
        line.users -= 1
        if not line.users:
            del self.lines[line.demand]

    def _new_line(self, demand: Demand, *, suspect: bool) -> Line:
        self.numbers += 1
        return Line(demand, self.numbers, suspect=suspect)

    def reopen(self, demand: Demand, number: int) -> Line:
        """A line for tasks of a demand as it was opened once, under its number."""
        line = self.lines.get(demand)
        if line is None:
            line = self.lines[demand] = Line(demand, number, suspect=False)
        line.users += 1
        return line

    def refill(self, demand: Demand, number: int, *, suspect: bool) -> Line:
        """A line with tasks in it as it was once: they are to be entered."""
        line = self.lines[demand]
        if suspect:
            line = self._suspects[demand] = Line(demand, number, suspect=True)
        self.waiting[number] = line
        return line

    def _suspect_line(self, demand: Demand) -> Line:
        line = self._suspects.get(demand)
        if line is None:
            line = self._suspects[demand] = self._new_line(demand, suspect=True)
        return line

    def push(self, task: Task, *, front: bool = False) -> None:
        """Queue a ready task, behind its equals or, if it was queued before, in front."""
        line = self._suspect_line(task.terms.demand) if task.suspect else task.terms.line
        lane = line.lanes.get(task.priority)
        if lane is None:
            lane = line.lanes[task.priority] = Lane()
        self.tickets += 1
        task.ticket = self.tickets
        if front:
            lane.entries.appendleft((task.ticket, task))
        else:
            lane.entries.append((task.ticket, task))
        if not line.size:
            self.waiting[line.number] = line
        line.size += 1
        self.size += 1

    def push_all(self, tasks: Sequence[Task]) -> None:
        """Queue ready tasks of the same terms, none of them queued before, each behind the other."""
        first, count = tasks[0], len(tasks)
        line = first.terms.line
        lane = line.lanes.get(first.priority)
        if lane is None:
            lane = line.lanes[first.priority] = Lane()
        if not line.size:
            self.waiting[line.number] = line
        for ticket, task in enumerate(tasks, self.tickets + 1):
            task.ticket = ticket
        lane.entries.extend([(task.ticket, task) for task in tasks])
        self.tickets += count
        line.size += count
        self.size += count

    def remove(self, task: Task) -> None:
        """Take a task out."""
        line = self._suspect_line(task.terms.demand) if task.suspect else task.terms.line
        ticket, task.ticket = task.ticket, 0
        self._left(line, task.priority, (ticket,))

    def remove_all(self, tasks: Sequence[Task]) -> None:
        """Take tasks out, none of them suspect: at one go if they wait in one lane."""
        line, priority = tasks[0].terms.line, tasks[0].priority
        if not all([task.terms.line is line and task.priority == priority for task in tasks]):  # noqa: C419 - a list is faster
            for task in tasks:
                self.remove(task)
            return
        tickets = [task.ticket for task in tasks]
        for task in tasks:
            task.ticket = 0
        self._left(line, priority, tickets)

    def _left(self, line: Line, priority: int, tickets: Sequence[int]) -> None:
        lane, count = line.lanes[priority], len(tickets)
        lane.left(tickets)
        line.size -= count
        self.size -= count
        if not lane.entries:
            del line.lanes[priority]
        if not line.size:
            self.waiting.pop(line.number, None)
            self.parked.pop(line.number, None)
            if line.suspect:
                del self._suspects[line.demand]

    def park(self, line: Line) -> None:
        """No worker can run what waits in the line, until the workers change."""
        del self.waiting[line.number]
        self.parked[line.number] = line

    def unpark(self, version: int) -> None:
        """The workers changed: look at every line again."""
        if version != self.version:
            self.version = version
            self.waiting.update(self.parked)
            self.parked.clear()

    def all_waiting(self) -> Iterator[Line]:
        """Every line with tasks in it."""
        yield from self.waiting.values()
        yield from self.parked.values()

    def depth_by_priority(self) -> dict[int, int]:
        """How many tasks wait at each priority."""
        depths: dict[int, int] = {}
        for line in self.all_waiting():
            for priority, lane in line.lanes.items():
                depths[priority] = depths.get(priority, 0) + len(lane.entries) - lane.stale
        return depths

    def head(self, count: int, ageing_per_s: float) -> list[Task]:
        """The next tasks in order of rank, whether or not they fit a worker."""
        streams = (line.tasks(ageing_per_s) for line in self.all_waiting())
        return list(islice(heapq.merge(*streams, key=lambda task: rank(task, ageing_per_s)), count))
