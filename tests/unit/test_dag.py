"""The workflow as a graph: faults, orders, readiness, critical path."""

from __future__ import annotations

import time
from itertools import pairwise, permutations
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentflow.domain import dag

DIAMOND = {"fetch": [], "build": ["fetch"], "test": ["fetch"], "ship": ["build", "test"]}
LARGE = 100_000

Tasks: TypeAlias = list[tuple[str, list[str]]]


@st.composite
def graphs(draw: st.DrawFn, size_max: int = 12) -> dict[str, list[str]]:
    """Acyclic graphs, their tasks given in any order."""
    size = draw(st.integers(0, size_max))
    ids = [f"t{index}" for index in draw(st.permutations(range(size)))]
    upstream = [
        draw(st.lists(st.sampled_from(ids[:index]), max_size=4)) if index else [] for index in range(size)
    ]
    given_order = draw(st.permutations(range(size)))
    return {ids[index]: upstream[index] for index in given_order}


@st.composite
def graphs_with_task(draw: st.DrawFn) -> tuple[dict[str, list[str]], str]:
    """An acyclic graph and one of its tasks."""
    graph = draw(graphs().filter(bool))
    return graph, draw(st.sampled_from(list(graph)))


@st.composite
def graphs_with_planted_cycle(draw: st.DrawFn) -> dict[str, list[str]]:
    """A graph in which some tasks, two at least, were made to depend on each other in a circle."""
    graph = draw(graphs().filter(lambda graph: len(graph) > 1))
    circle = draw(st.lists(st.sampled_from(list(graph)), min_size=2, unique=True))
    for task, dependency in pairwise([*circle, circle[0]]):
        graph[task] = [*graph[task], dependency]
    return graph


def respects_edges(graph: dag.Graph, order: list[str]) -> bool:
    position = {task: index for index, task in enumerate(order)}
    return all(position[dep] < position[task] for task in order for dep in graph[task] if dep in position)


def upstream_by_definition(graph: dag.Graph, task: str) -> set[str]:
    """Everything upstream, said as simply as possible."""
    direct = set(graph[task])
    return direct.union(*(upstream_by_definition(graph, dependency) for dependency in direct))


def paths_to(graph: dag.Graph, task: str) -> list[list[str]]:
    """Every chain of dependencies that ends in `task`."""
    return [[task], *([*path, task] for dependency in graph[task] for path in paths_to(graph, dependency))]


class TestValidate:
    def test_given_a_diamond_finds_no_fault(self) -> None:
        assert dag.validate(list(DIAMOND.items())) == []

    def test_given_no_tasks_finds_no_fault(self) -> None:
        assert dag.validate([]) == []

    def test_names_the_task_and_the_dependency_nobody_is(self) -> None:
        assert dag.validate([("build", ["fetsch"])]) == [dag.UnknownDependency("build", "fetsch")]

    def test_names_an_id_used_more_than_once_only_once(self) -> None:
        assert dag.validate([("build", []), ("build", []), ("build", [])]) == [dag.DuplicateTask("build")]

    def test_a_task_that_depends_on_itself_is_not_also_a_cycle(self) -> None:
        assert dag.validate([("build", ["build"])]) == [dag.SelfDependency("build")]

    def test_names_a_cycle_task_by_task(self) -> None:
        tasks: Tasks = [("free", []), ("a", ["free", "b"]), ("b", ["c"]), ("c", ["a"]), ("behind", ["c"])]

        assert dag.validate(tasks) == [dag.Cycle(("a", "b", "c"))]

    def test_a_task_behind_a_cycle_is_not_named(self) -> None:
        tasks: Tasks = [("behind", ["a"]), ("a", ["b"]), ("b", ["a"])]

        assert dag.validate(tasks) == [dag.Cycle(("a", "b"))]

    def test_reports_cycles_that_share_no_task_each(self) -> None:
        tasks: Tasks = [("a", ["b"]), ("b", ["a"]), ("c", ["d"]), ("d", ["c"])]

        assert dag.validate(tasks) == [dag.Cycle(("a", "b")), dag.Cycle(("c", "d"))]

    def test_finds_faults_of_all_kinds_at_once(self) -> None:
        tasks: Tasks = [("a", ["b"]), ("b", ["a"]), ("c", ["c", "x"]), ("c", [])]

        assert dag.validate(tasks) == [
            dag.DuplicateTask("c"),
            dag.SelfDependency("c"),
            dag.UnknownDependency("c", "x"),
            dag.Cycle(("a", "b")),
        ]

    @given(graphs())
    def test_an_acyclic_graph_has_no_fault(self, graph: dict[str, list[str]]) -> None:
        assert dag.validate(list(graph.items())) == []

    @given(graphs_with_planted_cycle())
    def test_a_planted_cycle_is_found_and_is_one(self, graph: dict[str, list[str]]) -> None:
        cycles = [fault.path for fault in dag.validate(list(graph.items())) if isinstance(fault, dag.Cycle)]

        assert cycles
        for path in cycles:
            assert all(dependency in graph[task] for task, dependency in pairwise([*path, path[0]]))
            assert len(set(path)) == len(path) > 1

    @given(graphs_with_planted_cycle())
    def test_cycles_reported_share_no_task(self, graph: dict[str, list[str]]) -> None:
        faults = dag.validate(list(graph.items()))
        named = [task for fault in faults if isinstance(fault, dag.Cycle) for task in fault.path]

        assert len(named) == len(set(named))


class TestDescribe:
    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            (
                dag.UnknownDependency("build", "fetsch"),
                "task 'build' depends on 'fetsch', which is not a task of this workflow",
            ),
            (dag.DuplicateTask("build"), "more than one task has the id 'build'"),
            (dag.SelfDependency("build"), "task 'build' depends on itself"),
            (dag.Cycle(("a", "b")), "tasks wait for each other in a circle: a -> b -> a"),
        ],
    )
    def test_says_it_in_plain_words(self, fault: dag.Fault, words: str) -> None:
        assert dag.describe(fault) == words

    def test_leaves_out_the_middle_of_a_long_cycle(self) -> None:
        words = dag.describe(dag.Cycle(tuple(f"t{index}" for index in range(LARGE))))

        assert "t5 -> (99988 more) -> t99994" in words
        assert words.endswith("t99999 -> t0")


class TestExecutionOrder:
    def test_given_a_diamond_follows_it(self) -> None:
        assert dag.execution_order(DIAMOND) == ["fetch", "build", "test", "ship"]

    def test_the_earliest_given_goes_first(self) -> None:
        assert dag.execution_order({"z": [], "late": ["z"], "a": []}) == ["z", "late", "a"]

    def test_a_dependency_named_twice_counts_once(self) -> None:
        assert dag.execution_order({"b": ["a", "a"], "a": []}) == ["a", "b"]

    def test_a_cycle_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="a -> b -> a"):
            dag.execution_order({"a": ["b"], "b": ["a"]})

    def test_a_task_that_depends_on_itself_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="a -> a"):
            dag.execution_order({"a": ["a"]})

    def test_an_unknown_dependency_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="'ghost'"):
            dag.execution_order({"a": ["ghost"]})

    @given(graphs())
    def test_has_every_task_once_after_what_it_depends_on(self, graph: dict[str, list[str]]) -> None:
        order = dag.execution_order(graph)

        assert sorted(order) == sorted(graph)
        assert respects_edges(graph, order)

    @given(graphs())
    def test_tasks_given_in_a_valid_order_keep_it(self, graph: dict[str, list[str]]) -> None:
        order = dag.execution_order(graph)

        assert dag.execution_order({task: graph[task] for task in order}) == order

    @given(graphs(size_max=6))
    def test_is_the_first_of_all_valid_orders(self, graph: dict[str, list[str]]) -> None:
        valid = (list(order) for order in permutations(graph) if respects_edges(graph, list(order)))

        assert dag.execution_order(graph) == next(valid)


class TestLevels:
    def test_given_a_diamond_the_middle_runs_side_by_side(self) -> None:
        assert dag.levels(DIAMOND) == [["fetch"], ["build", "test"], ["ship"]]

    def test_given_nothing_there_are_none(self) -> None:
        assert dag.levels({}) == []

    @given(graphs())
    def test_a_task_is_one_level_above_its_highest_dependency(self, graph: dict[str, list[str]]) -> None:
        level = {task: index for index, tasks in enumerate(dag.levels(graph)) for task in tasks}

        assert level.keys() == graph.keys()
        for task, dependencies in graph.items():
            assert level[task] == max((level[dependency] + 1 for dependency in dependencies), default=0)


class TestReadySet:
    def test_at_first_what_depends_on_nothing(self) -> None:
        assert dag.ready_set(DIAMOND, set(), set()) == ["fetch"]

    def test_what_was_started_is_not_ready_again(self) -> None:
        assert dag.ready_set(DIAMOND, set(), {"fetch"}) == []

    def test_what_waited_for_a_completed_task_is_ready(self) -> None:
        assert dag.ready_set(DIAMOND, {"fetch"}, {"fetch", "test"}) == ["build"]

    def test_a_task_with_one_dependency_open_is_not_ready(self) -> None:
        assert dag.ready_set(DIAMOND, {"fetch", "build"}, {"test"}) == []

    @given(graphs())
    def test_running_what_is_ready_until_nothing_is_runs_everything(
        self, graph: dict[str, list[str]]
    ) -> None:
        waves: list[list[str]] = []
        completed: set[str] = set()
        while ready := dag.ready_set(graph, completed, completed):
            waves.append(ready)
            completed.update(ready)

        assert waves == dag.levels(graph)


class TestChains:
    def test_upstream_of_the_last_task_in_the_order_it_runs(self) -> None:
        assert dag.dependency_chain(DIAMOND, "ship") == ["fetch", "build", "test"]

    def test_downstream_of_the_first_task_in_the_order_it_runs(self) -> None:
        assert dag.descendants(DIAMOND, "fetch") == ["build", "test", "ship"]

    def test_dependents_turn_the_graph_round(self) -> None:
        assert dag.dependents(DIAMOND) == {
            "fetch": ["build", "test"],
            "build": ["ship"],
            "test": ["ship"],
            "ship": [],
        }

    @pytest.mark.parametrize("function", [dag.dependency_chain, dag.descendants])
    def test_a_task_nobody_knows_is_refused(self, function: object) -> None:
        assert callable(function)
        with pytest.raises(ValueError, match="'ghost'"):
            function(DIAMOND, "ghost")

    @given(graphs_with_task())
    def test_the_chain_is_everything_upstream_in_order(self, case: tuple[dict[str, list[str]], str]) -> None:
        graph, task = case
        chain = dag.dependency_chain(graph, task)

        assert set(chain) == upstream_by_definition(graph, task)
        assert len(chain) == len(set(chain))
        assert respects_edges(graph, [*chain, task])

    @given(graphs_with_task())
    def test_descendants_are_those_with_the_task_upstream(
        self, case: tuple[dict[str, list[str]], str]
    ) -> None:
        graph, task = case

        assert set(dag.descendants(graph, task)) == {
            other for other in graph if task in upstream_by_definition(graph, other)
        }

    @given(graphs())
    def test_turned_round_twice_is_the_same_graph(self, graph: dict[str, list[str]]) -> None:
        again = dag.dependents(dag.dependents(graph))

        assert {task: set(ids) for task, ids in again.items()} == {t: set(ids) for t, ids in graph.items()}


class TestCriticalPath:
    def test_goes_through_the_slower_branch(self) -> None:
        duration = {"fetch": 1.0, "build": 5.0, "test": 2.0, "ship": 1.5}

        assert dag.critical_path(DIAMOND, duration) == (["fetch", "build", "ship"], 7.5)

    def test_may_be_a_single_task(self) -> None:
        assert dag.critical_path(DIAMOND | {"train": []}, {"train": 9.0}) == (["train"], 9.0)

    def test_of_nothing_is_nothing(self) -> None:
        assert dag.critical_path({}, {}) == ([], 0.0)

    @given(graphs(size_max=8), st.data())
    def test_no_chain_takes_longer(self, graph: dict[str, list[str]], data: st.DataObject) -> None:
        duration = {task: float(data.draw(st.integers(0, 20))) for task in graph}
        path, length = dag.critical_path(graph, duration)

        lengths = [sum(duration[t] for t in chain) for task in graph for chain in paths_to(graph, task)]
        assert length == max(lengths, default=0.0)
        assert length == sum(duration[task] for task in path)
        assert all(dependency in graph[task] for dependency, task in pairwise(path))


class TestProgress:
    def test_counts_states_and_what_is_over(self) -> None:
        states = {"a": "completed", "b": "failed", "c": "running", "d": "completed", "e": "pending"}

        assert dag.progress(states) == dag.Progress(
            5, {"completed": 2, "failed": 1, "running": 1, "pending": 1}, 0.6
        )

    def test_nothing_to_do_is_done(self) -> None:
        assert dag.progress({}) == dag.Progress(0, {}, 1.0)


class TestLarge:
    """100,000 tasks: neither the stack nor the clock minds. Timed generously, for busy machines."""

    def test_a_deep_chain(self) -> None:
        chain = {f"t{index}": [f"t{index - 1}"] if index else [] for index in range(LARGE)}
        backwards = dict(reversed(chain.items()))

        started = time.process_time()
        assert dag.validate(list(chain.items())) == []
        assert dag.execution_order(backwards) == list(chain)
        assert len(dag.levels(chain)) == LARGE
        assert len(dag.dependency_chain(chain, f"t{LARGE - 1}")) == LARGE - 1
        assert len(dag.descendants(chain, "t0")) == LARGE - 1
        assert dag.critical_path(chain, dict.fromkeys(chain, 1.0))[1] == LARGE
        assert time.process_time() - started < 10

    def test_one_circle(self) -> None:
        circle = [(f"t{index}", [f"t{index - 1}" if index else f"t{LARGE - 1}"]) for index in range(LARGE)]

        (fault,) = dag.validate(circle)

        assert isinstance(fault, dag.Cycle)
        assert len(fault.path) == LARGE

    def test_a_wide_fan(self) -> None:
        leaves = [f"t{index}" for index in range(LARGE)]
        first: dict[str, list[str]] = {"first": []}
        fan = first | {leaf: ["first"] for leaf in leaves} | {"last": leaves}

        assert dag.execution_order(fan) == list(fan)
        assert dag.ready_set(fan, {"first"}, {"first"}) == leaves
