"""A workflow as a directed acyclic graph: what is wrong with it, in which order it runs, how far it is.

A graph is a plain mapping from a task's id to the ids it depends on; the mapping's order is
the order the tasks were given in, and it breaks every tie, so that equal input gives equal
output everywhere. An id named twice among one task's dependencies counts once.

Only `validate` takes what people send. Everything else expects a graph that `validate` found
no fault in, and raises `ValueError` where it can tell that this is not so.

Nothing here recurses: a chain of 100,000 tasks is as good as a fan of 100,000. Every function
is linear in tasks and dependencies, but for a logarithm in `execution_order`.

The order is Kahn's (A. B. Kahn, "Topological sorting of large networks", CACM 5, 1962), the
critical path is the longest path along it (Kelley and Walker, 1959).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import Final, TypeAlias, assert_never

from msgspec import Struct

from agentflow.domain.life import FINAL

Graph: TypeAlias = Mapping[str, Sequence[str]]


SHOWN_MAX: Final = 12
"""Most tasks of a cycle that `describe` names; the middle of a longer one is left out."""


class UnknownDependency(Struct, frozen=True, tag=True):
    """`task` depends on an id that no task has."""

    task: str
    dependency: str


class DuplicateTask(Struct, frozen=True, tag=True):
    """More than one task has this id."""

    task: str


class SelfDependency(Struct, frozen=True, tag=True):
    """The task depends on itself."""

    task: str


class Cycle(Struct, frozen=True, tag=True):
    """Each task of `path` depends on the next, the last one on the first. At least two tasks."""

    path: tuple[str, ...]


Fault: TypeAlias = UnknownDependency | DuplicateTask | SelfDependency | Cycle


class Progress(Struct, frozen=True):
    """How far a workflow is."""

    total: int
    counts: dict[str, int]
    """Tasks by state; a state nobody is in is left out."""
    done: float
    """Fraction of the tasks that are in a final state, 0 to 1; 1 if there are no tasks."""


def validate(tasks: Sequence[tuple[str, Sequence[str]]]) -> list[Fault]:
    """What is wrong with a workflow; an empty list means that it can run.

    Takes pairs of id and dependencies, because a mapping could not hold a duplicate; of tasks
    with the same id the first is searched for cycles. The cycles reported share no task. If
    there is any cycle at least one is reported, but breaking it may bring another to light.
    """
    graph: dict[str, Sequence[str]] = {}
    for task, dependencies in tasks:
        graph.setdefault(task, dependencies)
    return [*_duplicates(tasks), *_bad_dependencies(tasks, graph), *map(Cycle, _cycles(graph))]


def describe(fault: Fault) -> str:
    """The fault in plain words, for the person who wrote the workflow."""
    match fault:
        case UnknownDependency(task, dependency):
            return f"task {task!r} depends on {dependency!r}, which is not a task of this workflow"
        case DuplicateTask(task):
            return f"more than one task has the id {task!r}"
        case SelfDependency(task):
            return f"task {task!r} depends on itself"
        case Cycle(path):
            return f"tasks wait for each other in a circle: {_walk(path)}"
    assert_never(fault)


def execution_order(graph: Graph) -> list[str]:
    """All tasks, each after everything it depends on; among those possible, the earliest given.

    Tasks given in a valid order keep it. Raises ValueError naming a cycle, if there is one.
    """
    ids = list(graph)
    position = {task: index for index, task in enumerate(ids)}
    missing = _missing_counts(graph)
    downstream = dependents(graph)
    ready = [position[task] for task, count in missing.items() if count == 0]
    order: list[str] = []
    while ready:
        task = ids[heapq.heappop(ready)]
        order.append(task)
        for dependent in _release(downstream[task], missing):
            heapq.heappush(ready, position[dependent])
    _require_all(order, graph)
    return order


def levels(graph: Graph) -> list[list[str]]:
    """Tasks by the length of the longest way to them: those of one level can run side by side."""
    level: dict[str, int] = {}
    for task in execution_order(graph):
        level[task] = 1 + max((level[dependency] for dependency in graph[task]), default=-1)
    result: list[list[str]] = [[] for _ in range(1 + max(level.values(), default=-1))]
    for task in graph:
        result[level[task]].append(task)
    return result


def ready_set(graph: Graph, completed: AbstractSet[str], started: AbstractSet[str]) -> list[str]:
    """Tasks that may start now, in the order given: not `started`, all dependencies `completed`.

    `started` are those that have left the queue, however they went on.
    """
    return [
        task
        for task, dependencies in graph.items()
        if task not in started
        and task not in completed
        and all(dependency in completed for dependency in dependencies)
    ]


def dependency_chain(graph: Graph, task: str) -> list[str]:
    """Everything `task` waits for, directly or not, in execution order; not `task` itself."""
    _require_task(graph, task)
    return _ordered_subset(graph, _reachable(graph, task))


def descendants(graph: Graph, task: str) -> list[str]:
    """Everything that waits for `task`, directly or not, in execution order; not `task` itself."""
    _require_task(graph, task)
    return _ordered_subset(graph, _reachable(dependents(graph), task))


def dependents(graph: Graph) -> dict[str, list[str]]:
    """The graph turned round: for each task those that depend on it directly, in the order given."""
    result: dict[str, list[str]] = {task: [] for task in graph}
    for task, dependencies in graph.items():
        for dependency in set(dependencies):
            if dependency not in result:
                _require_task(result, dependency)
            result[dependency].append(task)
    return result


def critical_path(graph: Graph, duration: Mapping[str, float]) -> tuple[list[str], float]:
    """The chain of tasks that takes longest, first to last, and how long it takes.

    With workers enough, no schedule ends sooner. Durations are not negative, in any unit; a
    task without one takes no time. Of equally long chains always the same one is returned. An
    empty graph gives an empty path.
    """
    finish: dict[str, float] = {}
    before: dict[str, str | None] = {}
    for task in execution_order(graph):
        before[task] = max(graph[task], key=finish.__getitem__, default=None)
        finish[task] = duration.get(task, 0.0) + _finish_of(before[task], finish)
    last = max(finish, key=finish.__getitem__, default=None)
    return _trace(last, before), _finish_of(last, finish)


def progress(states: Mapping[str, str]) -> Progress:
    """Count tasks by state, given the state of each."""
    counts = dict(Counter(states.values()))
    finished = sum(count for state, count in counts.items() if state in FINAL)
    return Progress(len(states), counts, finished / len(states) if states else 1.0)


def _duplicates(tasks: Iterable[tuple[str, Sequence[str]]]) -> Iterator[Fault]:
    """A fault for each id that occurs more than once."""
    counts = Counter(task for task, _ in tasks)
    return (DuplicateTask(task) for task, count in counts.items() if count > 1)


def _bad_dependencies(tasks: Iterable[tuple[str, Sequence[str]]], known: Container[str]) -> Iterator[Fault]:
    """A fault for each dependency on the task itself or on nobody."""
    for task, dependencies in tasks:
        for dependency in dict.fromkeys(dependencies):
            if dependency == task:
                yield SelfDependency(task)
            elif dependency not in known:
                yield UnknownDependency(task, dependency)


def _cycles(graph: Graph) -> Iterator[tuple[str, ...]]:
    """Cycles of two tasks or more that share no task; at least one, if there is any.

    What Kahn's algorithm cannot order depends on something it cannot order either. So from any
    such task, going to its first such dependency, and on from there, ends in a cycle, or where
    an earlier walk has been.
    """
    stuck = _stuck(graph)
    seen: set[str] = set()
    for start in stuck:
        walk: dict[str, int] = {}
        task = start
        while task not in seen:
            seen.add(task)
            walk[task] = len(walk)
            task = next(dep for dep in graph[task] if dep in stuck and dep != task)
        if task in walk:
            yield tuple(walk)[walk[task] :]


def _stuck(graph: Graph) -> dict[str, int]:
    """Tasks on a cycle or behind one, in the order given; self- and unknown dependencies do not count."""
    known = {
        task: [dependency for dependency in dependencies if dependency in graph and dependency != task]
        for task, dependencies in graph.items()
    }
    missing = _missing_counts(known)
    downstream = dependents(known)
    free = [task for task, count in missing.items() if count == 0]
    while free:
        free.extend(_release(downstream[free.pop()], missing))
    return {task: count for task, count in missing.items() if count > 0}


def _missing_counts(graph: Graph) -> dict[str, int]:
    """How many different tasks each one waits for."""
    return {task: len(set(dependencies)) for task, dependencies in graph.items()}


def _release(waiting: Iterable[str], missing: dict[str, int]) -> Iterator[str]:
    """Count one dependency less for each of `waiting`; those for which it was the last."""
    for task in waiting:
        missing[task] -= 1
        if missing[task] == 0:
            yield task


def _reachable(edges: Graph, start: str) -> set[str]:
    """All that can be reached from `start` along `edges`, without `start` itself."""
    found: set[str] = set()
    frontier = [start]
    while frontier:
        fresh = [task for task in edges[frontier.pop()] if task not in found]
        found.update(fresh)
        frontier.extend(fresh)
    return found - {start}


def _ordered_subset(graph: Graph, chosen: AbstractSet[str]) -> list[str]:
    """The chosen tasks in the execution order of the whole graph."""
    return [task for task in execution_order(graph) if task in chosen]


def _finish_of(task: str | None, finish: Mapping[str, float]) -> float:
    """When a task ends; at once, where there is none."""
    return 0.0 if task is None else finish[task]


def _trace(last: str | None, before: Mapping[str, str | None]) -> list[str]:
    """The path that ends in `last`, from its beginning."""
    path: list[str] = []
    while last is not None:
        path.append(last)
        last = before[last]
    return path[::-1]


def _walk(path: Sequence[str]) -> str:
    """A cycle as arrows, back to where it began."""
    shown = list(path)
    if len(path) > SHOWN_MAX:
        half = SHOWN_MAX // 2
        shown = [*path[:half], f"({len(path) - 2 * half} more)", *path[-half:]]
    return " -> ".join([*shown, path[0]])


def _require_task(graph: Container[str], task: str) -> None:
    if task not in graph:
        msg = f"expected the id of a task of the graph, found {task!r}"
        raise ValueError(msg)


def _require_all(order: Sequence[str], graph: Graph) -> None:
    """Raise unless every task was put in order."""
    if len(order) == len(graph):
        return
    own = ((task,) for task, dependencies in graph.items() if task in dependencies)
    msg = f"expected a graph without cycles, found {_walk(next(chain(_cycles(graph), own)))}"
    raise ValueError(msg)
