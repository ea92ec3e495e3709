"""Two runs of a workflow, side by side."""

from __future__ import annotations

from agentflow_projections.compare import Comparison, compare, critical_path
from agentflow_projections.history import History
from tests.unit.given import NAMESPACE, Scene, assigned, completed, elected, failed, flow, given, joined
from tests.unit.told import messages_of

DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def run(scene: Scene, workflow: str, ran_ms: dict[str, int], worker: str = "w1") -> None:
    """Run tasks one after the other, each for so long."""
    scene.given(flow(workflow, DIAMOND))
    for task, ms in ran_ms.items():
        scene.given(assigned(f"{workflow}/{task}", worker)).after(ms)
        scene.given(completed(f"{workflow}/{task}", run_us=ms * 1_000))


def history_of(scene: Scene) -> History:
    history = History(NAMESPACE)
    for message in messages_of(scene.messages):
        history.apply(message)
    return history


def compared(scene: Scene, first: str = "f1", second: str = "f2") -> Comparison:
    history = history_of(scene)
    return compare(history.workflows[first], history.workflows[second], scene.now_ms)


def at_work() -> Scene:
    return given(elected(), joined("w1"), joined("w2"))


def test_tasks_of_one_name_are_compared() -> None:
    scene = at_work()
    run(scene, "f1", {"a": 10, "b": 20, "c": 5, "d": 1})
    run(scene, "f2", {"a": 10, "b": 500, "c": 5, "d": 1}, worker="w2")
    found = compared(scene)
    assert [pair.task for pair in found.tasks] == ["a", "b", "c", "d"]
    slower = found.tasks[1]
    assert slower.first is not None
    assert slower.second is not None
    assert (slower.first.run_ms, slower.second.run_ms) == (20.0, 500.0)
    assert (slower.first.worker, slower.second.worker) == ("w1", "w2")
    assert slower.longer_ms == 480.0
    assert (found.first.took_ms, found.second.took_ms) == (36, 516)
    assert (found.first.ran_ms, found.first.waited_ms) == (36.0, 20), "c, while b ran"


def test_the_critical_path_is_what_each_waited_for_last() -> None:
    scene = at_work()
    run(scene, "f1", {"a": 10, "b": 20, "c": 5, "d": 1})
    run(scene, "f2", {"a": 10, "c": 5, "b": 20, "d": 1})
    history = history_of(scene)
    assert critical_path(history.workflows["f1"]) == ["a", "c", "d"]
    assert critical_path(history.workflows["f2"]) == ["a", "b", "d"]


def test_other_ends_and_other_tasks() -> None:
    scene = at_work()
    run(scene, "f1", {"a": 10, "b": 20, "c": 5, "d": 1})
    scene.given(flow("f2", {"a": [], "e": ["a"]}), assigned("f2/a")).after(7).given(failed("f2/a", "broken"))
    found = compared(scene)
    by_name = {pair.task: pair for pair in found.tasks}
    assert (by_name["a"].same_state, by_name["b"].second, by_name["e"].first) == (False, None, None)
    assert by_name["a"].second is not None
    assert by_name["a"].second.error.startswith("broken")
    assert (found.second.state, found.second.critical_path) == ("failed", ["a"])


def test_a_run_that_goes_on() -> None:
    scene = at_work()
    run(scene, "f1", {"a": 10})
    scene.given(flow("f2", DIAMOND)).after(100)
    found = compared(scene)
    assert (found.first.critical_path, found.second.critical_path) == (["a"], [])
    assert found.second.took_ms == 100
