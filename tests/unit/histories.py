"""Random histories: clusters that work, fail, die and talk nonsense, from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from msgspec import Raw

from agentflow import events, wire
from agentflow.checks import LOCK_MODES
from agentflow.domain.life import State
from agentflow.domain.plan import Silence
from agentflow.domain.state import Task, Verdict
from agentflow.events import KINDS, Event
from agentflow.frames import encode, level_headers
from agentflow.limits import ID_AHEAD_MS_MAX, LEVEL, LEVEL_FIRST
from tests.unit.given import (
    FUNCTION,
    NAMESPACE,
    Logged,
    Scene,
    acquired,
    cancel_requested,
    completed,
    declined,
    drain_requested,
    draining,
    elected,
    failed,
    flow,
    flow_cancel_requested,
    joined,
    left,
    lock_lost,
    master_joined,
    master_left,
    opened,
    policy,
    released,
    reprioritized,
    started,
    submitted,
)

STRATEGIES: Final = ("least_loaded", "round_robin", "random", "bin_packing")
_ERRORS: Final = ("error", "error", "timeout", "exit", "stopped", "fatal")


class History:
    """A cluster driven by chance. What it wrote is in `scene.messages`."""

    def __init__(self, seed: int, level: int | None = None) -> None:
        """The level is never above `level`; None: it begins with any, and rises at some time or never."""
        self.scene = Scene()
        self.chance = random.Random(seed)
        self.names = 0
        self.tokens = 0
        self.level_max = level or LEVEL
        self.level = level or self.chance.choice((LEVEL_FIRST, LEVEL))
        self.say_nonsense = True
        self.garble = True

    def run(self, steps: int) -> list[Logged]:
        """Take random steps."""
        self.scene.given(
            elected(level=self.level), policy(strategy=self.chance.choice(STRATEGIES), losses_max=2)
        )
        self.scene.given(master_joined("m1"), master_joined("m2"))
        for _ in range(steps):
            self.step()
        return self.scene.messages

    def step(self) -> None:
        """One thing happens."""
        self.scene.after(self.chance.choice((0, 1, 10, 300, 2_000)))
        moves: list[tuple[int, Callable[[], object]]] = [
            (10, self.lead),
            (4, self.submit),
            (2, self.submit_flow),
            (2, self.join),
            (9, self.work),
            (2, self.ask),
            (1, self.lose),
            (1, self.elect),
            (1, self.register),
            (2, self.hold),
        ]
        if self.say_nonsense:
            moves.append((2, self.nonsense))
        if self.garble:
            moves.append((2, self.mutate))
        (move,) = self.chance.choices([move for _, move in moves], [weight for weight, _ in moves])
        move()

    def lead(self) -> None:
        self.scene.lead()
        self.scene.state.ended.clear()

    def elect(self) -> list[Verdict]:
        level = self.chance.choice((None, None, self.level_max))
        return [self.scene.when(elected(master=self.chance.choice(("m1", "m2", "m3")), level=level))]

    def register(self) -> None:
        """A master comes, again maybe, or goes."""
        master = self.chance.choice(("m1", "m2", "m3"))
        came = master_joined(master, self.chance.choice((LEVEL, LEVEL, LEVEL_FIRST)))
        self.scene.given(self.chance.choice((came, came, master_left(master))))

    def hold(self) -> None:
        """Somebody tells of a lock: in order, too late, or twice."""
        chance = self.chance
        self.tokens += chance.choice((0, 1, 1, 1))
        name = chance.choice(("l1", "l2"))
        token = max(1, self.tokens - chance.choice((0, 0, 1, 2)))
        by = chance.choice(("cli", "w1"))
        took = acquired(name, token, by, mode=chance.choice(LOCK_MODES), permits=2, metadata={"why": "tests"})
        ended = chance.choice((released, lock_lost))(name, token, by)
        self.scene.given(chance.choice((took, took, ended, opened(chance.randint(1, 3)))))

    def name(self) -> str:
        self.names += 1
        return f"t{self.names}"

    def terms(self) -> dict[str, Any]:
        chance = self.chance
        return {
            "priority": chance.choice((0, 250, 500, "high", 1000)),
            "args": chance.choice(([], [1], ["x" * 2_000])),
            "retry": chance.choice(
                (
                    None,
                    events.Retry(max_attempts=3, backoff_s=0.0, non_retryable=["fatal"]),
                    events.Retry(max_attempts=2, backoff_s=1.5),
                )
            ),
            "needs": chance.choice(
                (None, None, events.Needs(cpu=0.3), events.Needs(memory_mb=100, group="g"))
            ),
            "queue_timeout_s": chance.choice((0.0, 0.0, 0.0, 3.0)),
            "timeout_s": chance.choice((0.0, 9.0)),
            "lock": chance.choice(("", "", "", "l1", "l2")) if self.may_lock() else "",
        }

    def may_lock(self) -> bool:
        """Whether a submission may name a lock: before the level allows it, few do."""
        return self.scene.state.level >= LEVEL or self.chance.random() < 0.1

    def submit(self) -> None:
        again = self.chance.random() < 0.2 and self.names
        name = f"t{self.chance.randint(1, self.names)}" if again else self.name()
        self.scene.given(submitted(self.chance.choice((name, name, "")), **self.terms()))

    def submit_flow(self) -> None:
        size = self.chance.randint(1, 6)
        graph: dict[str, list[str]] = {}
        for number in range(size):
            before = list(graph)
            graph[f"s{number}"] = self.chance.sample(before, self.chance.randint(0, min(2, len(before))))
        self.scene.given(flow(self.chance.choice((self.name(), "")), graph, **self.terms()))

    def join(self) -> None:
        self.scene.given(
            joined(
                f"w{self.chance.randint(1, 3)}",
                slots=self.chance.randint(1, 3),
                ahead=self.chance.choice((0, 5)),
                group=self.chance.choice(("", "g")),
                cpu=1.0,
                memory_mb=250,
                functions=self.chance.choice(([FUNCTION], [FUNCTION], [])),
                level=self.chance.choice((LEVEL, LEVEL, LEVEL_FIRST)),
            )
        )

    def held(self) -> list[Task]:
        return [task for worker in self.scene.state.workers.values() for task in worker.held.values()]

    def lose_others(self, name: str) -> None:
        """Every worker but one is lost."""
        for other in [worker for worker in self.scene.state.workers.values() if worker.name != name]:
            self.scene.carry_out(self.scene.plan(Silence(other.name, other.incarnation, "silent")))

    def work(self) -> None:
        """Workers report some of what they hold."""
        held = self.held()
        for task in self.chance.sample(held, min(len(held), self.chance.randint(1, 4))):
            self.report(task)

    def report(self, task: Task) -> None:
        chance = self.chance
        if task.suspect and not task.started:
            self.scene.given(started(task.id))
        if task.stopping and chance.random() < 0.8:
            self.scene.given(failed(task.id, "stopped"))
            return
        outcome = chance.random()
        if outcome < 0.6:
            result = chance.choice((b"1", b'"%s"' % (b"r" * 1_500), b"[" * 31 + b"]" * 31))
            self.scene.given(completed(task.id, run_us=chance.choice((0, 5, 4_000, 10**7)), result=result))
        elif outcome < 0.75:
            self.scene.given(failed(task.id, chance.choice(_ERRORS), retryable=chance.random() < 0.8))
        elif outcome < 0.85:
            self.scene.given(declined(task.id))
        else:
            self.scene.given(started(task.id))

    def ask(self) -> None:
        """A client wants something of a task or workflow, known or not."""
        state = self.scene.state
        known = [*state.tasks, *state.workflows, f"t{self.chance.randint(0, self.names)}", "nobody"]
        name = self.chance.choice(known)
        self.scene.given(
            self.chance.choice(
                (
                    cancel_requested(name),
                    flow_cancel_requested(name),
                    reprioritized(name, self.chance.choice((0, 700, "urgent"))),
                    drain_requested(self.chance.choice(("w1", "w2", "w9")), "maintenance"),
                )
            )
        )

    def lose(self) -> None:
        """A worker drains, leaves, or is heard of no more."""
        workers = list(self.scene.state.workers.values())
        if not workers:
            return
        worker = self.chance.choice(workers)
        end = self.chance.random()
        if end < 0.3:
            self.scene.given(draining(worker.name))
        elif end < 0.5:
            self.scene.given(left(worker.name))
        else:
            silence = Silence(worker.name, worker.incarnation, "silent")
            self.scene.carry_out(self.scene.plan(silence))

    def nonsense(self) -> None:
        """A well-formed event that somebody should not have said, or not then."""
        kind = self.chance.choice(list(KINDS))
        event = self.any_event(kind)
        epoch = self.chance.choice((0, 1, self.scene.state.epoch, 99))
        headers = self.chance.choice((self.scene.decision(epoch), self.scene.decision(epoch), {}))
        headers |= self.chance.choice(({}, level_headers([event]) or {}, {wire.VERSION: str(LEVEL)}))
        actor = self.chance.choice(("w1", "w2", "cli", "m1", wire.ELECTED_ACTOR, wire.LOCKS_ACTOR))
        self.scene.write(wire.event(NAMESPACE, kind, actor), encode([event]), headers)

    def any_event(self, kind: str) -> Event:
        """An event of a kind about tasks and workers that exist, existed, or never did."""
        state, chance = self.scene.state, self.chance
        incarnations = [worker.incarnation for worker in state.workers.values()]
        ahead_ms = chance.choice((-(10**9), 0, 1_000, 2 * ID_AHEAD_MS_MAX))
        some: dict[str, Any] = {
            "id": chance.choice(
                [*state.tasks, *state.workflows, "t1", "t2", "nobody", uuid_at(state.server_ms + ahead_ms)]
            ),
            "attempt": chance.randint(0, 3),
            "incarnation": chance.choice([*incarnations, 1, 2]),
            "epoch": chance.choice((1, state.epoch, state.epoch + 1, state.epoch + 2)),
            "worker": chance.choice(("w1", "w2", "w9")),
            "seq": max(1, state.seq - chance.randint(0, 3)),
            "index": chance.choice((-1, 0, 1)),
            "workflow": chance.choice(("f1", "f2")),
            "part": chance.choice((0, 1)),
            "parts": chance.choice((0, 1, 2)),
            "tasks": [events.WorkflowTask(task_id="s", function=FUNCTION)],
            "function": FUNCTION,
            "result": Raw(b"null"),
            "policy": events.Policy(
                version=chance.randint(1, 9), losses_max=2, accepting=chance.random() < 0.7
            ),
            "priority": chance.randint(0, 1000),
            "started_at_ms": 1,
            "reason": "reason",
            "error": "error",
            "detail": "detail",
            "client": "cli",
            "master": "m3",
            "state": str(State.COMPLETED),
            "instance": "unguessable",
            "slots": 1,
            "level": chance.choice((LEVEL_FIRST, self.level_max)),
            "lock": chance.choice(("", "l1")),
            "name": chance.choice(("l1", "l2")),
            "token": chance.randint(1, self.tokens + 2),
            "holder": "holder",
            "mode": chance.choice(LOCK_MODES),
            "permits": 2,
            "generation": chance.randint(1, 3),
        }
        event = KINDS[kind]
        return event(**{name: some[name] for name in event.__struct_fields__ if name in some})

    def mutate(self) -> None:
        """An earlier message again, with some bytes changed, or on another subject."""
        earlier = self.chance.choice(self.scene.messages)
        data = bytearray(earlier.data)
        for _ in range(self.chance.randint(0, 3)):
            place = self.chance.randrange(len(data))
            data[place : place + self.chance.randint(0, 3)] = self.chance.choice(
                (b"", b"\xff", b"[", b'"', b"9" * 30, b"\\u0000", b"NaN")
            )
        subject = self.chance.choice(
            (earlier.subject, self.chance.choice(self.scene.messages).subject, "af.x")
        )
        self.scene.write(subject, bytes(data), earlier.headers)


def uuid_at(made_ms: int, number: int = 0) -> str:
    """A UUIDv7 that claims to be made at a time."""
    made = f"{made_ms:012x}"
    return f"{made[:8]}-{made[8:]}-7000-8000-{number:012x}"
