"""A second fold, naive and in plain dicts, written from docs/contract.md and docs/lifecycle.md.

It shares nothing with `agentflow.domain` but the judged events. Where the two differ, one of
them is wrong, or the contract leaves something open. It forgets nothing and knows no queue
but "waits, and nobody wants it cancelled"; timers, rejections and digests are none of its business.

    tasks      id -> {state, attempt, priority, worker, incarnation, cancel, ...}
    workflows  id -> {state, tasks}
    workers    name -> {incarnation, draining}; those that are there
    masters    name -> {instance, level}
    locks      name -> {token -> mode}; those held
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import Any, Final

from agentflow.checks import Bad, priority_of
from agentflow.events import SINCE, Role
from agentflow.frames import Judged
from agentflow.ids import uuid7_time_ms
from agentflow.references import uses

FINAL: Final = ("completed", "failed", "skipped", "cancelled")
HOUR_MS: Final = 3_600_000

Fold = dict[str, Any]
Entry = dict[str, Any]


def empty() -> Fold:
    """A log nobody has written to."""
    state: Fold = dict.fromkeys(("seq", "epoch", "generation", "now_ms"), 0)
    known: dict[str, Fold] = {
        name: {} for name in ("tasks", "workflows", "workers", "masters", "locks", "tokens")
    }
    return {**state, **known, "level": 1, "leader": "", "accepting": True, "parts": []}


def read(state: Fold, seq: int, time_ns: int, judged: Judged) -> None:
    """Take in one message."""
    if seq <= state["seq"]:
        return
    state["seq"], state["now_ms"] = seq, max(state["now_ms"], time_ns // 1_000_000)
    if judged.kind not in ("workflow.part", "workflow.submitted") or any(
        at < seq - 1 for at, _, _ in state["parts"][-1:]
    ):
        state["parts"] = []
    if judged.whole is not None or max(judged.level, SINCE[judged.kind]) > state["level"]:
        return
    decided = judged.role is Role.LEADER and judged.kind != "leader.elected"
    if decided and (judged.decision is None or judged.decision.epoch != state["epoch"]):
        return
    for index, event in enumerate(judged.items):
        if not isinstance(event, Bad):
            HOW[judged.kind](state, event, judged.actor, (seq, index))


# Tasks and workflows --------------------------------------------------------------------


def task_submitted(state: Fold, event: Any, _actor: str, at: tuple[int, int]) -> None:
    if state["accepting"] and is_new(state, event.id):
        enter(state, event.id or "at-{}-{}".format(*at), event, "ready")


def enter(state: Fold, name: str, work: Any, first: str, workflow: str = "") -> None:
    state["tasks"][name] = {
        "state": first,
        "attempt": 0,
        "priority": priority_of(work.priority),
        "worker": "",
        "incarnation": 0,
        "cancel": False,
        "backs_off": False,
        "spent": 0,
        "started": False,
        "retry": work.retry,
        "lock": work.lock,
        "workflow": workflow,
        "needs": {f"{workflow}/{needed}" for needed in getattr(work, "dependencies", ())},
    }


def is_new(state: Fold, name: str) -> bool:
    made_ms = uuid7_time_ms(name)
    in_time = made_ms is None or made_ms <= state["now_ms"] + HOUR_MS
    return not name or (name not in state["tasks"] and name not in state["workflows"] and in_time)


def workflow_part(state: Fold, event: Any, actor: str, at: tuple[int, int]) -> None:
    parts = state["parts"]
    before = {(who, part.workflow) for _, who, part in parts}
    follows = event.part == len(parts) and before <= {(actor, event.workflow)}
    state["parts"] = [*parts, (at[0], actor, event)] if follows else []


def workflow_submitted(state: Fold, event: Any, actor: str, at: tuple[int, int]) -> None:
    parts, state["parts"] = state["parts"], []
    if event.parts != len(parts) or any((who, part.workflow) != (actor, event.id) for _, who, part in parts):
        return
    works = [work for _, _, part in parts for work in part.tasks] + list(event.tasks)
    if not is_graph(works) or not is_new(state, event.id) or not state["accepting"]:
        return
    name = event.id or "at-{}-{}".format(*at)
    state["workflows"][name] = {"state": "running", "tasks": [f"{name}/{work.task_id}" for work in works]}
    for work in works:
        enter(state, f"{name}/{work.task_id}", work, "pending" if work.dependencies else "ready", name)


def is_graph(works: list[Any]) -> bool:
    needs = {work.task_id: set(work.dependencies) for work in works}
    if not works or len(needs) != len(works) or not set().union(*needs.values()) <= set(needs):
        return False
    try:
        TopologicalSorter(needs).prepare()
    except CycleError:
        return False
    return all(set(uses(work)) <= needs[work.task_id] for work in works)


def end(state: Fold, name: str, final: str) -> None:
    """A task ends; what depends on it gets ready or is skipped, and its workflow may end."""
    task = state["tasks"][name]
    task.update(state=final, worker="", incarnation=0)
    if not task["workflow"]:
        return
    workflow = state["workflows"][task["workflow"]]
    tasks = {each: state["tasks"][each] for each in workflow["tasks"]}
    for each, other in tasks.items():
        if name not in other["needs"] or other["state"] != "pending":
            continue
        if final == "completed" and all(tasks[needed]["state"] == "completed" for needed in other["needs"]):
            other["state"] = "ready"
        elif final != "completed" and not other["cancel"]:
            end(state, each, "skipped")
    ends = {each["state"] for each in tasks.values()}
    if ends <= set(FINAL):
        workflow["state"] = next((bad for bad in ("failed", "cancelled") if bad in ends), "completed")


def cancel_requested(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    names = [event.id] if event.id in state["tasks"] else []
    cancel(state, names)


def workflow_cancel_requested(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    cancel(state, state["workflows"].get(event.id, {"tasks": []})["tasks"])


def cancel(state: Fold, names: list[str]) -> None:
    for name in names:
        task = state["tasks"][name]
        task["cancel"] = task["cancel"] or task["state"] not in FINAL


def reprioritized(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    task = state["tasks"].get(event.id)
    if task is not None and task["state"] in ("pending", "ready"):
        task["priority"] = priority_of(event.priority)


# What the leader decides --------------------------------------------------------------------


def assigned(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    task, worker = state["tasks"].get(event.id), state["workers"].get(actor)
    if task is None or worker is None or worker["incarnation"] != event.incarnation:
        return
    taken = {other["lock"] for other in state["tasks"].values() if other["state"] == "running"} - {""}
    if task["state"] == "ready" and task["attempt"] + 1 == event.attempt and task["lock"] not in taken:
        task.update(
            state="running", attempt=event.attempt, worker=actor, incarnation=event.incarnation, started=False
        )


def retried(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    task = state["tasks"].get(event.id)
    if (
        task is not None
        and task["backs_off"]
        and (task["state"], task["attempt"]) == ("pending", event.attempt)
    ):
        task.update(state="ready", backs_off=False)


def ends_as(final: str, *before: str) -> Any:
    """A decision that ends a task which is in one of some states."""

    def decided(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
        if state["tasks"].get(event.id, {"state": ""})["state"] in before:
            end(state, event.id, final)

    return decided


def policy_changed(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    state["accepting"] = event.policy.accepting


# Workers and what they say --------------------------------------------------------------------


def joined(state: Fold, event: Any, actor: str, at: tuple[int, int]) -> None:
    lose(state, actor)
    state["workers"][actor] = {"incarnation": at[0], "draining": False}


def lose(state: Fold, worker: str, *, left: bool = False) -> None:
    """A worker is there no more; only what it had certainly begun costs the task anything."""
    state["workers"].pop(worker, None)
    for task in state["tasks"].values():
        if task["worker"] == worker:
            task["spent"] += task["started"] and not left
            task.update(state="ready", worker="", incarnation=0)


def is_there(state: Fold, worker: str, incarnation: int) -> bool:
    return worker in state["workers"] and bool(state["workers"][worker]["incarnation"] == incarnation)


def draining(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    if is_there(state, actor, event.incarnation):
        state["workers"][actor]["draining"] = True


def drain_requested(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    if event.worker in state["workers"]:
        state["workers"][event.worker]["draining"] = True


def left(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    if is_there(state, actor, event.incarnation):
        lose(state, actor, left=True)


def lost(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    if is_there(state, event.worker, event.incarnation):
        lose(state, event.worker)


def held(state: Fold, event: Any, actor: str) -> Entry | None:
    """The task of which a worker may speak: it runs this attempt, there, now."""
    task: Entry | None = state["tasks"].get(event.id)
    said = (actor, event.incarnation, event.attempt)
    if task is None or (task["worker"], task["incarnation"], task["attempt"]) != said:
        return None
    return task


def started(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    task = held(state, event, actor)
    if task is not None:
        task["started"] = True


def completed(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    if held(state, event, actor) is not None:
        end(state, event.id, "completed")


def declined(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    task = held(state, event, actor)
    if task is not None:
        task.update(state="ready", worker="", incarnation=0)


def failed(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    task = held(state, event, actor)
    if task is None:
        return
    task.update(worker="", incarnation=0)
    if event.error == "stopped":
        task["state"] = "ready"
        return
    task["spent"] += 1
    retry = task["retry"]
    attempts = 1 if retry is None or event.error in retry.non_retryable else retry.max_attempts
    if event.retryable and task["spent"] < attempts and not task["cancel"]:
        task.update(state="pending", backs_off=True)
    else:
        end(state, event.id, "failed")


# Masters and locks ----------------------------------------------------------------------------


def elected(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    known = state["masters"].get(event.master, {"level": 0})["level"]
    allowed = state["level"] == 1 or known >= event.level
    if actor == "epoch" and event.epoch == state["epoch"] + 1 and event.level >= state["level"] and allowed:
        state.update(epoch=event.epoch, leader=event.master, level=event.level)


def master_joined(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    state["masters"][actor] = {"instance": event.instance, "level": event.level}


def master_left(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    if state["masters"].get(actor, {"instance": None})["instance"] == event.instance:
        del state["masters"][actor]


def opened(state: Fold, event: Any, actor: str, _at: tuple[int, int]) -> None:
    if actor == "bucket":
        state["generation"] = max(state["generation"], event.generation)


def acquired(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    """Of tokens no longer held only the highest is remembered."""
    holds = state["locks"].setdefault(event.name, {})
    highest = max([state["tokens"].get(event.name, 0), *holds])
    alone = event.mode == "exclusive"
    later = any(mode == "exclusive" and token > event.token for token, mode in holds.items())
    if alone and event.token > highest:
        holds.clear()
    elif alone or later or event.token in (*holds, state["tokens"].get(event.name, 0)):
        return
    holds.update({event.token: event.mode})
    for token in [token for token, mode in holds.items() if mode == "exclusive" and token < event.token]:
        del holds[token]
    state["tokens"][event.name] = max(highest, event.token)


def released(state: Fold, event: Any, _actor: str, _at: tuple[int, int]) -> None:
    state["locks"].get(event.name, {}).pop(event.token, None)
    state["tokens"][event.name] = max(state["tokens"].get(event.name, 0), event.token)


def nothing(_state: Fold, _event: Any, _actor: str, _at: tuple[int, int]) -> None:
    """It changes no state that is compared here."""


HOW: Final = {
    "task.submitted": task_submitted,
    "workflow.part": workflow_part,
    "workflow.submitted": workflow_submitted,
    "task.cancel_requested": cancel_requested,
    "workflow.cancel_requested": workflow_cancel_requested,
    "task.reprioritized": reprioritized,
    "worker.drain_requested": drain_requested,
    "lock.opened": opened,
    "lock.acquired": acquired,
    "lock.released": released,
    "lock.lost": released,
    "leader.elected": elected,
    "policy.changed": policy_changed,
    "task.assigned": assigned,
    "task.stop": nothing,
    "task.retried": retried,
    "task.timed_out": ends_as("failed", "ready"),
    "task.cancelled": ends_as("cancelled", "pending", "ready"),
    "task.quarantined": ends_as("failed", "ready"),
    "worker.lost": lost,
    "event.rejected": nothing,
    "workflow.completed": nothing,
    "master.joined": master_joined,
    "master.left": master_left,
    "worker.joined": joined,
    "worker.draining": draining,
    "worker.left": left,
    "task.started": started,
    "task.completed": completed,
    "task.failed": failed,
    "task.declined": declined,
}
