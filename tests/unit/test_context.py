"""The task a function runs in."""

from __future__ import annotations

import pickle

import pytest

from agentflow.context import TaskContext, current, running

TASK = TaskContext(task_id="t1", attempt=2, namespace="default", worker="w1", deadline=12.5)


def test_outside_of_a_task_there_is_none() -> None:
    with pytest.raises(RuntimeError, match="outside of a task"):
        current()


def test_inside_it_is_known_and_afterwards_not() -> None:
    with running(TASK):
        assert current() is TASK
    with pytest.raises(RuntimeError):
        current()


def test_it_can_be_sent_to_a_child_process() -> None:
    assert pickle.loads(pickle.dumps(TASK)) == TASK
