"""A run small enough to be written down, in which nothing is wrong, and ways to spoil it."""

from __future__ import annotations

from typing import Any, Final

import duckdb

from tests.chaos.audit import invariants, new_database
from tests.chaos.folding import position

_EV_COLUMNS: Final = (
    "pos", "seq", "idx", "time_ms", "kind", "actor", "task", "attempt", "incarnation", "epoch", "basis",
    "verdict", "reason", "error", "ends", "suspect", "run_us", "retryable", "about_seq", "about_idx",
)  # fmt: skip
W1: Final = 2
"""Incarnation of worker w1, which is lost at 12."""
W2: Final = 3
LAST: Final = 37


class Run:
    """The tables of a run."""

    def __init__(self) -> None:
        self.connection: Final = new_database()

    def sql(self, statement: str) -> None:
        """Change the tables."""
        self.connection.execute(statement)

    def add(self, table: str, *row: Any) -> None:
        """A row of any table."""
        marks = ", ".join("?" * len(row))
        self.connection.execute(f"insert into {table} values ({marks})", list(row))  # noqa: S608

    def event(self, seq: int, kind: str, actor: str = "m1", **more: Any) -> None:
        """An event, the first of its message."""
        event: dict[str, Any] = {
            "pos": position(seq, 0),
            "seq": seq,
            "idx": 0,
            "time_ms": seq * 100,
            "kind": kind,
            "actor": actor,
            "verdict": "applied",
            "ends": False,
            "suspect": False,
            **more,
        }
        self.add("ev", *(event.get(column) for column in _EV_COLUMNS))

    def message(self, seq: int, kind: str, epoch: int = 0, writer: str = "m1") -> None:
        """A message of one event."""
        term = "term" if epoch else ""
        self.add("msg", seq, seq * 100, "chaos", kind, writer, term, epoch, 1, seq * 7, seq * 7, False)

    def said(self, seq: int, kind: str, actor: str = "m1", *, epoch: int = 0, **more: Any) -> None:
        """An event and its message."""
        self.message(seq, kind, epoch, f"m{epoch}")
        self.event(seq, kind, actor, epoch=epoch or None, **more)

    def task(self, task: str, seq: int, runs: str, *, workflow: str | None = None, **more: Any) -> None:
        """An accepted task."""
        given = {"max": 1, "backoff": 0.0, "timeout": 0, "cpu": 0.0, **more}
        backoff = (given["backoff"], 2.0, 400.0, 0.5)
        self.add("task", task, seq, 0, workflow, runs, given["max"], *backoff, given["timeout"], given["cpu"])


def sound_run() -> Run:
    """A run with something of everything, and nothing wrong."""
    run = Run()
    _nodes(run)
    _tasks(run)
    _workflow(run)
    _refused(run)
    _locks(run)
    _observations(run)
    return run


def _nodes(run: Run) -> None:
    run.said(1, "leader.elected", "epoch", epoch=1)
    for name, incarnation, pid in (("w1", W1, 11), ("w2", W2, 12)):
        run.said(incarnation, "worker.joined", name)
        run.add("worker", name, incarnation, 2, 1, 4.0, pid)
    run.said(12, "worker.lost", epoch=1, incarnation=W1)
    run.said(15, "leader.elected", "epoch", epoch=2)


def _submit(run: Run, seq: int, number: int, task: str, *, is_workflow: bool = False) -> None:
    run.said(seq, "workflow.submitted" if is_workflow else "task.submitted", "client-0", task=task)
    run.add("submitted", seq, 0, "client-0", number, task, "applied", None, is_workflow)
    run.add("sub", "client-0", number, "workflow" if is_workflow else "bulk", "ok", None)


def _assign(run: Run, seq: int, task: str, attempt: int, incarnation: int, *, suspect: bool = False) -> None:
    epoch = 1 if seq < 15 else 2
    run.said(
        seq, "task.assigned", f"w{incarnation - 1}", epoch=epoch, task=task, attempt=attempt,
        incarnation=incarnation, basis=seq - 1, suspect=suspect,
    )  # fmt: skip


def _complete(run: Run, seq: int, task: str, attempt: int, incarnation: int) -> None:
    actor = f"w{incarnation - 1}"
    run.said(seq, "task.completed", actor, task=task, attempt=attempt, incarnation=incarnation, ends=True)


def _tasks(run: Run) -> None:
    _submit(run, 4, 1, "t1")
    run.task("t1", 4, "effect", cpu=1.0)
    _assign(run, 5, "t1", 1, W1)
    _complete(run, 6, "t1", 1, W1)
    _submit(run, 7, 2, "t2")
    run.task("t2", 7, "flaky", max=3, backoff=50.0)
    _assign(run, 8, "t2", 1, W2)
    run.said(
        9, "task.failed", "w2", task="t2", attempt=1, incarnation=W2, error="error", retryable=True
    )  # fmt: skip
    run.said(10, "task.retried", epoch=1, task="t2", attempt=1)
    _assign(run, 11, "t2", 2, W1)
    _assign(run, 13, "t2", 3, W2, suspect=True)
    _complete(run, 14, "t2", 3, W2)
    _submit(run, 23, 4, "t3")
    run.task("t3", 23, "nap")
    run.said(24, "task.cancel_requested", "client-0", task="t3")
    run.add("sub", "client-0", 5, "cancel", "ok", "t3")
    run.said(25, "task.cancelled", epoch=2, task="t3", ends=True)
    _submit(run, 29, 7, "t4")
    run.task("t4", 29, "slow", timeout=300)
    _assign(run, 30, "t4", 1, W2)
    run.said(
        31, "task.failed", "w2", task="t4", attempt=1, incarnation=W2, error="timeout", run_us=300_100, ends=True,
        retryable=True,
    )  # fmt: skip
    for pos, what in enumerate(("begin", "end")):
        run.add("fx", pos, what, "t1", 1, "w1", 11, pos, 0)


def _workflow(run: Run) -> None:
    """`a` before `b`; `x` fails for good, so `y` is skipped."""
    _submit(run, 16, 3, "wf", is_workflow=True)
    for name in "abxy":
        run.task(f"wf/{name}", 16, "added", workflow="wf")
    run.add("dep", "wf/b", "wf/a")
    run.add("dep", "wf/y", "wf/x")
    _assign(run, 17, "wf/a", 1, W2)
    _complete(run, 18, "wf/a", 1, W2)
    _assign(run, 19, "wf/b", 1, W2)
    _complete(run, 20, "wf/b", 1, W2)
    _assign(run, 21, "wf/x", 1, W2)
    run.said(
        22, "task.failed", "w2", task="wf/x", attempt=1, incarnation=W2, error="error", retryable=False, ends=True
    )  # fmt: skip
    run.add("skipped", "wf/y", position(22, 0))
    run.add("workflow_ended", "wf", "failed")


def _refused(run: Run) -> None:
    run.said(26, "task.submitted", "client-0", task="t1", verdict="rejected", reason="conflict")
    run.add("submitted", 26, 0, "client-0", 6, "t1", "rejected", "conflict", False)
    run.add("sub", "client-0", 6, "conflict", "ok", "t1")
    run.said(27, "event.rejected", epoch=2, about_seq=26, about_idx=0)
    run.said(28, "no.such", "poison", verdict="quarantined", reason="unknown_kind")


def _locks(run: Run) -> None:
    kinds = ("lock.acquired", "lock.released")
    for seq, kind, token in zip(range(32, 36), kinds * 2, (40, 40, 41, 41), strict=True):
        run.said(seq, kind, "client-0")
        run.add("lock", position(seq, 0), kind, "L", token, "client-0", "exclusive", 1, "applied")
    for seq, kind in zip(range(36, 38), kinds, strict=True):
        run.said(seq, kind, "client-0")
        run.add("lock", position(seq, 0), kind, "S", 42, "client-0", "semaphore", 1, "applied")
    pos = 3
    for name, token in (("L", 40), ("L", 41), ("S", 42)):
        for what in ("hold", "held") if name == "S" else ("hold", "write", "held"):
            run.add("fx", pos, what, name, 0, "client-0", 21, pos * 10, token)
            pos += 1


def _observations(run: Run) -> None:
    run.add("answer", "m1", 6, "t1", "completed", 6, 0, "completed", 6, 0)
    run.add("told", "client-0", 1, "t1", "completed", position(6, 0))
    run.add("told", "client-0", 3, "wf", "failed", position(22, 0))
    for number in range(2):
        run.add("identity", number, "AF_chaos", 1, 1, LAST)
    run.add("liveness", "exactly one leader", True, "")
    run.add("exited", "client-0", 21, 0, True, False)
    run.add("exited", "master-0", 22, -9, True, True)
    run.add("object", 6, "an object", "")
    run.add("file", "worker-0.log", False)
    run.add("rest", "tasks", 0)
    run.add("history", "history-0", "frames", LAST, "")
    for part in sorted({invariant.part for invariant in invariants()} - {"always"}):
        run.add("part", part)


def empty(connection: duckdb.DuckDBPyConnection) -> None:
    """Take all rows away, but what the run was said to contain."""
    tables = [name for (name,) in connection.execute("select table_name from duckdb_tables()").fetchall()]
    for table in tables:
        if table != "part":
            connection.execute(f"delete from {table}")  # noqa: S608
