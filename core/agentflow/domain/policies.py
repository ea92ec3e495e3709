"""Policies: when to try again, and which worker to take.

Jitter and random placement are hashes of what is in the log, so that every fold and
every replay comes to the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol
from zlib import crc32

if TYPE_CHECKING:
    from agentflow.domain.queue import Demand, Line
    from agentflow.domain.state import Task, Worker
    from agentflow.events import Policy, Retry

LOCKS_SINCE: Final = 2
"""The contract level a worker must know to hold locks for its tasks."""
_HASH_RANGE: Final = 2**32
_GROWTH_LOG_MAX: Final = 60.0
"""A backoff of a nanosecond, grown by e to this power, is above the longest allowed."""
_CPU_TOLERANCE: Final = 1e-9
"""Sums of fractions of cores do not come out exactly."""


def retries(retry: Retry | None, spent: int, error: str, *, retryable: bool) -> bool:
    """Whether a task of which `spent` attempts failed or were lost, the last with `error`, is tried again."""
    if retry is None or not retryable:
        return False
    return spent < retry.max_attempts and error not in retry.non_retryable


def backoff_ms(retry: Retry | None, failures: int, task: str) -> int:
    """How long to wait after the failure number `failures`, milliseconds.

    Exponential with a cap and with jitter, after "Exponential Backoff And Jitter"
    (Brooker, 2015); the chance in it is a hash of task and failure.
    """
    if retry is None:
        return 0
    # The power of a large factor would overflow.
    is_large = (failures - 1) * math.log(retry.backoff_factor) > _GROWTH_LOG_MAX
    grown = retry.backoff_s * (
        math.exp(_GROWTH_LOG_MAX) if is_large else retry.backoff_factor ** (failures - 1)
    )
    share = 1.0 - retry.jitter * (crc32(f"{task} {failures}".encode()) / _HASH_RANGE)
    return int(min(grown, retry.backoff_s_max) * share * 1000)


class Room:
    """What a plan may still put on one worker. Lives as long as the plan."""

    __slots__ = ("cpu", "gpus", "held", "memory_mb", "order", "quick_us", "slow", "suspects", "worker")

    def __init__(self, worker: Worker, order: int) -> None:
        self.worker = worker
        self.order = order
        self.held = len(worker.held)
        self.quick_us = worker.quick_us
        self.slow = worker.slow
        self.suspects = worker.suspects
        self.cpu = worker.cpu - worker.used_cpu + _CPU_TOLERANCE
        self.memory_mb = worker.memory_mb - worker.used_memory_mb
        self.gpus = worker.gpus - worker.used_gpus

    @property
    def load(self) -> float:
        """Tasks held for each slot."""
        return self.held / self.worker.slots

    def admits(self, line: Line, quick_us: int, policy: Policy) -> bool:
        """Whether one more task of the line may go there now: a slot is free, or it may wait there.

        `quick_us` is its expected run time if that is known and short, else 0.
        """
        if line.suspect and self.suspects:
            return False
        if self.held >= self.worker.slots and (line.suspect or not self._admits_ahead(quick_us, policy)):
            return False
        demand = line.demand
        return demand.plain or (
            demand.cpu <= self.cpu and demand.memory_mb <= self.memory_mb and demand.gpus <= self.gpus
        )

    def _admits_ahead(self, quick_us: int, policy: Policy) -> bool:
        """Throughput is bounded by what a worker may hold beyond its slots.

        So it may hold more where the wait is expected to be so short that it costs priority
        little: behind tasks known to be quick, in slots that no other task occupies.
        """
        quick_slots = self.worker.slots - self.slow
        return (
            quick_us > 0
            and self.held < self.worker.slots + self.worker.ahead
            and self.quick_us + quick_us <= policy.ahead_ms * 1000 * quick_slots
        )

    def take(self, line: Line, quick_us: int) -> None:
        """One more task of the line goes there."""
        self.held += 1
        self.quick_us += quick_us
        self.slow += not quick_us
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
        and (not demand.lock or worker.level >= LOCKS_SINCE)
    )


class Strategy(Protocol):
    """Chooses among the rooms of the workers that a line's tasks can run on.

    Made anew for each line and plan. Workers that declined a task are left out until then.
    """

    def pick(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        """The room for a task; None if nobody has any."""
        ...


class LeastLoaded:
    """The worker with the fewest tasks for each slot, the first that joined among equals."""

    def __init__(self, rooms: Sequence[Room], line: Line, policy: Policy) -> None:
        self._heap = [(room.load, room.order, room) for room in rooms]
        heapq.heapify(self._heap)
        self._line, self._policy = line, policy

    def pick(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        """The first of the heap, which is put in order as far as need be."""
        heap = self._heap
        while heap:
            load, order, room = heap[0]
            if load != room.load:
                heapq.heapreplace(heap, (room.load, order, room))
            elif not room.admits(self._line, quick_us, self._policy):
                heapq.heappop(heap)
            elif _declined(task, room, now_ms):
                return self._other(task, quick_us, now_ms)
            else:
                return room
        return None

    def _other(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        willing = [room for _, _, room in self._heap if not _declined(task, room, now_ms)]
        free = [room for room in willing if room.admits(self._line, quick_us, self._policy)]
        return min(free, key=lambda room: (room.load, room.order), default=None)


class _Scanning:
    """Looks at every worker for every task."""

    def __init__(self, rooms: Sequence[Room], line: Line, policy: Policy) -> None:
        self._rooms = list(rooms)
        self._line, self._policy = line, policy

    def _free(self, task: Task, quick_us: int, now_ms: int) -> list[Room]:
        """Where the task may go: workers with a free slot, if there are any."""
        self._rooms = [room for room in self._rooms if room.admits(self._line, quick_us, self._policy)]
        willing = [room for room in self._rooms if not _declined(task, room, now_ms)]
        idle = [room for room in willing if room.held < room.worker.slots]
        return idle or willing


class Turn:
    """Whose turn it was last in a round robin; one for all lines of a plan."""

    __slots__ = ("last",)

    def __init__(self, last: str) -> None:
        self.last = last


class RoundRobin(_Scanning):
    """The next worker by name after the one that got the last task."""

    def __init__(self, rooms: Sequence[Room], line: Line, policy: Policy, turn: Turn) -> None:
        super().__init__(rooms, line, policy)
        self._turn = turn

    def pick(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        """The next by name, or the first."""
        free = self._free(task, quick_us, now_ms)
        if not free:
            return None
        after = [room for room in free if room.worker.name > self._turn.last]
        chosen = min(after or free, key=lambda room: room.worker.name)
        self._turn.last = chosen.worker.name
        return chosen


class Random(_Scanning):
    """Any worker with room: a hash of the task's id and attempt chooses."""

    def pick(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        """Any of them."""
        free = self._free(task, quick_us, now_ms)
        if not free:
            return None
        return free[crc32(f"{task.id} {task.attempt}".encode()) % len(free)]


class BinPacking(_Scanning):
    """The fullest worker that still has room, so that others stay empty for large tasks."""

    def pick(self, task: Task, quick_us: int, now_ms: int) -> Room | None:
        """The fullest, the first that joined among equals."""
        free = self._free(task, quick_us, now_ms)
        return max(free, key=lambda room: (room.load, -room.order), default=None)


def strategy(policy: Policy, rooms: Sequence[Room], line: Line, turn: Turn) -> Strategy:
    """The policy's strategy for one line."""
    match policy.strategy:
        case "round_robin":
            return RoundRobin(rooms, line, policy, turn)
        case "random":
            return Random(rooms, line, policy)
        case "bin_packing":
            return BinPacking(rooms, line, policy)
        case _:
            return LeastLoaded(rooms, line, policy)


def _declined(task: Task, room: Room, now_ms: int) -> bool:
    return task.declined is not None and task.declined.get(room.worker.incarnation, now_ms) > now_ms
