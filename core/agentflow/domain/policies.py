"""Policies: when to try again, and which worker to take.

Jitter and random placement are hashes of what is in the log, so that every fold and
every replay comes to the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol
from zlib import crc32

if TYPE_CHECKING:
    from agentflow.domain.queue import Demand, Line
    from agentflow.domain.state import Task, Worker
    from agentflow.events import Policy, Retry

_HASH_RANGE: Final = 2**32
_CPU_TOLERANCE: Final = 1e-9
"""Sums of fractions of cores do not come out exactly."""


def retries(retry: Retry | None, failures: int, error: str, *, retryable: bool) -> bool:
    """Whether a task that has failed `failures` times, last with `error`, is tried again."""
    if retry is None or not retryable:
        return False
    return failures < retry.max_attempts and error not in retry.non_retryable


def backoff_ms(retry: Retry | None, failures: int, task: str) -> int:
    """How long to wait after the failure number `failures`, milliseconds.

    Exponential with a cap and with jitter, after "Exponential Backoff And Jitter"
    (Brooker, 2015); the chance in it is a hash of task and failure.
    """
    if retry is None:
        return 0
    grown = retry.backoff_s * min(retry.backoff_factor ** min(failures - 1, 1_000), 1e12)
    share = 1.0 - retry.jitter * (crc32(f"{task} {failures}".encode()) / _HASH_RANGE)
    return int(min(grown, retry.backoff_s_max) * share * 1000)


class Room:
    """What a plan may still put on one worker. Lives as long as the plan."""

    __slots__ = ("cpu", "expected_us", "gpus", "held", "memory_mb", "order", "suspects", "worker")

    def __init__(self, worker: Worker, order: int) -> None:
        self.worker = worker
        self.order = order
        self.held = len(worker.held)
        self.expected_us = worker.expected_us
        self.suspects = worker.suspects
        self.cpu = worker.cpu - worker.used_cpu + _CPU_TOLERANCE
        self.memory_mb = worker.memory_mb - worker.used_memory_mb
        self.gpus = worker.gpus - worker.used_gpus

    @property
    def load(self) -> float:
        """Tasks held for each slot."""
        return self.held / self.worker.slots

    def admits(self, line: Line, expected_us: int, policy: Policy) -> bool:
        """Whether one more task of the line may go there now.

        A slot is free, or the work ahead is expected to be done so soon that waiting there
        costs priority little: throughput is bounded by what a worker may hold.
        """
        worker = self.worker
        if line.suspect and self.suspects:
            return False
        if self.held >= worker.slots:
            ahead_us = policy.ahead_ms * 1000 * worker.slots
            if not expected_us or line.suspect or self.held >= worker.slots + worker.ahead:
                return False
            if self.expected_us + expected_us > ahead_us:
                return False
        demand = line.demand
        return demand.plain or (
            demand.cpu <= self.cpu and demand.memory_mb <= self.memory_mb and demand.gpus <= self.gpus
        )

    def take(self, line: Line, expected_us: int) -> None:
        """One more task of the line goes there."""
        self.held += 1
        self.expected_us += expected_us
        self.suspects += line.suspect
        demand = line.demand
        if not demand.plain:
            self.cpu -= demand.cpu
            self.memory_mb -= demand.memory_mb
            self.gpus -= demand.gpus


def eligible(demand: Demand, worker: Worker) -> bool:
    """Whether the worker could run such tasks if it were idle."""
    return (
        (not demand.function or demand.function in worker.functions)
        and (not demand.group or demand.group == worker.group)
        and demand.cpu <= worker.cpu + _CPU_TOLERANCE
        and demand.memory_mb <= worker.memory_mb
        and demand.gpus <= worker.gpus
        and all(worker.labels.get(name) == value for name, value in demand.labels)
    )


class Strategy(Protocol):
    """Chooses among the rooms of the workers that a line's tasks can run on.

    Made anew for each line and plan; `pick` returns None when nobody has room.
    """

    def pick(self, task: Task) -> Room | None: ...


class LeastLoaded:
    """The worker with the fewest tasks for each slot, by name among equals."""

    def __init__(self, rooms: Sequence[Room], line: Line, expected_us: int, policy: Policy) -> None:
        self._heap = [(room.load, room.order, room) for room in rooms]
        heapq.heapify(self._heap)
        self._line, self._expected_us, self._policy = line, expected_us, policy

    def pick(self, task: Task) -> Room | None:
        heap = self._heap
        while heap:
            load, order, room = heap[0]
            if load != room.load:
                heapq.heapreplace(heap, (room.load, order, room))
            elif not room.admits(self._line, self._expected_us, self._policy):
                heapq.heappop(heap)
            elif not _declined(task, room):
                return room
            else:
                return self._other(task)
        return None

    def _other(self, task: Task) -> Room | None:
        free = [room for _, _, room in self._heap if not _declined(task, room)]
        free = [room for room in free if room.admits(self._line, self._expected_us, self._policy)]
        return min(free, key=lambda room: (room.load, room.order), default=None)


class _Scanning:
    """Looks at every worker for every task."""

    def __init__(self, rooms: Sequence[Room], line: Line, expected_us: int, policy: Policy) -> None:
        self._rooms = list(rooms)
        self._line, self._expected_us, self._policy = line, expected_us, policy

    def _free(self, task: Task) -> list[Room]:
        self._rooms = [room for room in self._rooms if room.admits(self._line, self._expected_us, self._policy)]
        return [room for room in self._rooms if not _declined(task, room)]


class RoundRobin(_Scanning):
    """The next worker by name after the one that got the last task."""

    def __init__(self, rooms: Sequence[Room], line: Line, expected_us: int, policy: Policy, last: str) -> None:
        super().__init__(rooms, line, expected_us, policy)
        self._last = last

    def pick(self, task: Task) -> Room | None:
        free = self._free(task)
        if not free:
            return None
        after = [room for room in free if room.worker.name > self._last]
        chosen = min(after or free, key=lambda room: room.worker.name)
        self._last = chosen.worker.name
        return chosen


class Random(_Scanning):
    """Any worker with room: a hash of the task's id and attempt chooses."""

    def pick(self, task: Task) -> Room | None:
        free = self._free(task)
        if not free:
            return None
        return free[crc32(f"{task.id} {task.attempt}".encode()) % len(free)]


class BinPacking(_Scanning):
    """The fullest worker that still has room, so that others stay empty for large tasks."""

    def pick(self, task: Task) -> Room | None:
        return max(self._free(task), key=lambda room: (room.load, -room.order), default=None)


def strategy(policy: Policy, rooms: Sequence[Room], line: Line, expected_us: int, last: str) -> Strategy:
    """The policy's strategy for one line."""
    match policy.strategy:
        case "round_robin":
            return RoundRobin(rooms, line, expected_us, policy, last)
        case "random":
            return Random(rooms, line, expected_us, policy)
        case "bin_packing":
            return BinPacking(rooms, line, expected_us, policy)
        case _:
            return LeastLoaded(rooms, line, expected_us, policy)


def _declined(task: Task, room: Room) -> bool:
    return task.declined is not None and room.worker.incarnation in task.declined
