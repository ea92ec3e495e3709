"""One client of a campaign, in a process of its own: `python -m tests.chaos.load`.

Killed and started again it goes on where its journal ends; what was under way then stays unknown.

It writes what it is about to do into its journal before it does it, and afterwards how that went:
`ok` (acknowledged), `fail` (certainly not in the log) or `unknown`. What was unknown is handed
over again under the same id, as a careful client would.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import uvloop
from msgspec import Struct, structs

import agentflow
from agentflow import wire
from agentflow.client.handle import Handle
from agentflow.errors import AgentFlowError, AppendRefused, InvalidRequest
from agentflow.events import Needs, TaskSubmitted
from agentflow.fresh import new_id
from tests.chaos import app
from tests.chaos.journal import Journal, read
from tests.chaos.options import NAMESPACE

PATIENCE_S = 2.0
"""After this long without an acknowledgement the client calls a write unknown."""
_TICK_S = 0.05
_BULKS_MAX = 6
"""Bulk submissions under way at once."""
_SINGLES_MAX = 48
_BULK_TASKS_MAX = 1_000
_REPEATS_MAX = 40
_TOLD_WITHIN_S = 600.0
"""How long a client waits for ends once all is handed over; the campaign stops waiting earlier."""
_RECENT = 256
_LOCKS = 2
"""Doors, and as many semaphores."""
_LOCK_WAIT_S = 4.0
_LOCK_TTL_S = 2
_PERMITS = 2
LockMode = Literal["exclusive", "shared", "semaphore"]
SHELL_SCRIPT = 'env | sort; test -n "$CHAOS_NUMBER"'
"""Shows all that a task's environment holds."""

_POISON = (
    b"",
    b"\x00\xff",
    b"[]",
    b'{"function":"noop","args":[NaN]}',
    b'{"function":"noop","function":"noop"}',
    b'[{"function":""},5]',
    b'{"id":"at-1-1","function":"noop"}',
    b"[" * 500,
)


class _Known(Struct, frozen=True):
    """Something handed over and acknowledged."""

    number: int
    handle: Handle[Any]
    event: TaskSubmitted | None = None


class Load:
    """What one client does. All chance comes from its seed."""

    def __init__(
        self, client: agentflow.Client, journal: Journal, resource: Resource, chance: random.Random
    ) -> None:
        self._client = client
        self._resource = resource
        self._journal = journal
        self._chance = chance
        self._number = 0
        self.handed_over = 0
        """Tasks given to the log, whatever became of them."""
        self._began = time.monotonic()
        self._recent: deque[_Known] = deque(maxlen=_RECENT)
        self._bulks: set[asyncio.Task[None]] = set()
        self._singles: set[asyncio.Task[None]] = set()
        self._told: set[asyncio.Task[None]] = set()
        self._acts: list[Callable[[], Awaitable[None]]] = [
            self._effect,
            self._nap,
            self._flaky,
            self._shell,
            self._workflow,
            self._cancel,
            self._regret,
            self._again,
            self._conflict,
            self._odd,
            self._reprioritize,
            self._poison,
            self._lock,
        ]

    def go_on(self, path: Path) -> None:
        """Begin, or go on where the journal ends."""
        for entry in read(path):
            if entry["op"] == "begin":
                self._began = entry["at"]
            elif entry["op"] == "intent":
                self._number = max(self._number, entry["n"] + entry["count"])
                self.handed_over += entry["tasks"]
        if self._number:
            self._chance.seed(self._number)
        else:
            self._journal.write(op="begin", at=self._began)

    async def run(self, tasks: int, seconds: float) -> None:
        """Hand over about so many tasks in this time, and wait for what became of some of them."""
        while self.handed_over < tasks:
            elapsed = time.monotonic() - self._began
            due = min(tasks, int(tasks * (elapsed + _TICK_S) / seconds))
            if len(self._singles) < _SINGLES_MAX:
                self._start(self._singles, self._chance.choice(self._acts)())
            missing = due - self.handed_over
            while missing > 0 and len(self._bulks) < _BULKS_MAX:
                count = min(missing, _BULK_TASKS_MAX)
                self._start(self._bulks, self._bulk(count))
                missing -= count
            await asyncio.sleep(_TICK_S)
        await _all(self._bulks)
        await _all(self._singles)
        if self._told:
            _, untold = await asyncio.wait(self._told, timeout=_TOLD_WITHIN_S)
            for task in untold:
                task.cancel()
            await _all(untold)

    def _start(self, among: set[asyncio.Task[None]], act: Awaitable[None]) -> None:
        task = asyncio.ensure_future(act)
        among.add(task)
        task.add_done_callback(among.discard)

    def _intend(self, kind: str, count: int = 1, tasks: int = 1, **more: Any) -> int:
        """Take the next numbers, and say what for."""
        first = self._number
        self._number += count
        self.handed_over += tasks
        self._journal.write(op="intent", kind=kind, n=first, count=count, tasks=tasks, **more)
        return first

    async def _try(self, number: int, act: Awaitable[Any]) -> Any:
        """Do it and write down how it went; what it returned, None unless it was acknowledged."""
        try:
            done = await asyncio.wait_for(act, PATIENCE_S)
        except (AppendRefused, InvalidRequest) as error:
            self._journal.write(op="fail", n=number, why=str(error)[:200])
        except (AgentFlowError, TimeoutError) as error:
            self._journal.write(op="unknown", n=number, why=str(error)[:200])
        else:
            self._journal.write(op="ok", n=number)
            return done
        return None

    # What is handed over ---------------------------------------------------------------

    async def _bulk(self, count: int) -> None:
        first = self._intend("bulk", count, count)
        calls = [(number,) for number in range(first, first + count)]
        handles = await self._try(first, self._client.submit_many(app.noop, calls))
        if handles:
            place = self._chance.randrange(count)
            self._remember(_Known(first + place, handles[place]))

    async def _hand_over(self, event: TaskSubmitted, number: int) -> None:
        """One task under an id of our own, until it is acknowledged."""
        event = structs.replace(event, id=new_id())
        for _ in range(_REPEATS_MAX):
            handle = await self._try(number, self._client.submit_task(event))
            if handle is not None:
                self._remember(_Known(number, handle, event))
                return
            self._journal.write(op="intent", kind="repeat", n=number, count=1, tasks=0)
            await asyncio.sleep(self._chance.uniform(0.05, 0.3))
        self._journal.write(op="unknown", n=number, why="given up")

    def _remember(self, known: _Known) -> None:
        self._recent.append(known)
        if self._chance.random() < 0.3:
            self._start(self._told, self._listen(known))

    async def _listen(self, known: _Known) -> None:
        """Wait for its end, as a client does."""
        try:
            told = await known.handle.outcome()
        except (asyncio.CancelledError, AgentFlowError) as error:
            self._journal.write(op="untold", n=known.number, task=known.handle.id, why=repr(error)[:200])
            return
        self._journal.write(
            op="told", n=known.number, task=told.id, state=told.state, seq=told.seq, index=told.index
        )

    async def _effect(self) -> None:
        number = self._intend("effect")
        await self._hand_over(TaskSubmitted(function="effect", args=[number]), number)

    async def _nap(self) -> None:
        number = self._intend("nap")
        seconds = round(self._chance.choice((0.01, 0.05, 0.2, 0.5, 2.0)), 3)
        options: dict[str, Any] = dict(app.nap.wire_options)
        if self._chance.random() < 0.5:
            options["needs"] = Needs(cpu=1.0)
        await self._hand_over(TaskSubmitted(function="nap", args=[number, seconds], **options), number)

    async def _flaky(self) -> None:
        number = self._intend("flaky")
        args = [number, self._chance.randint(1, 5)]
        await self._hand_over(TaskSubmitted(function="flaky", args=args, **app.flaky.wire_options), number)

    async def _shell(self) -> None:
        number = self._intend("shell")
        event = TaskSubmitted(shell=SHELL_SCRIPT, env={"CHAOS_NUMBER": str(number)})
        await self._hand_over(event, number)

    async def _odd(self) -> None:
        """What fails for good, takes too long, or has a large result."""
        kind = self._chance.choice(("hopeless", "slow", "large", "nap_in_thread"))
        number = self._intend(kind)
        function = agentflow.registered()[kind]
        args: list[Any] = [number, 0.1] if kind == "nap_in_thread" else [number]
        await self._hand_over(TaskSubmitted(function=kind, args=args, **function.wire_options), number)

    async def _workflow(self) -> None:
        count = self._chance.randint(3, 20)
        number = self._intend("workflow", 1, count)
        flow = agentflow.Workflow(str(number), id=new_id())
        steps: list[Any] = []
        for _ in range(count):
            upstream = self._chance.sample(steps, min(len(steps), self._chance.randint(0, 3)))
            broken = self._chance.random() < 0.03
            step = flow.add(app.hopeless, number) if broken else flow.add(app.added, number, *upstream)
            if broken and upstream:
                flow.after(step, *upstream)
            steps.append(step)
        for _ in range(_REPEATS_MAX):
            handle = await self._try(number, self._client.submit_workflow(flow))
            if handle is not None:
                self._remember(_Known(number, handle))
                return
            self._journal.write(op="intent", kind="repeat", n=number, count=1, tasks=0)

    # What is said about what was handed over -------------------------------------------

    def _any_recent(self) -> _Known | None:
        return self._chance.choice(self._recent) if self._recent else None

    async def _cancel(self) -> None:
        known = self._any_recent()
        if known is not None:
            number = self._intend("cancel", tasks=0, task=known.handle.id)
            await self._try(number, self._client.cancel(known.handle.id, "chaos"))

    async def _regret(self) -> None:
        """Hand over something that takes a while, and cancel it: while it waits, or while it runs."""
        number = self._intend("nap")
        event = TaskSubmitted(function="nap", args=[number, 3.0], **app.nap.wire_options)
        await self._hand_over(event, number)
        known = next((known for known in self._recent if known.number == number), None)
        await asyncio.sleep(self._chance.choice((0.0, 0.1, 1.0)))
        if known is not None:
            number = self._intend("cancel", tasks=0, task=known.handle.id)
            await self._try(number, self._client.cancel(known.handle.id, "chaos"))

    async def _reprioritize(self) -> None:
        known = self._any_recent()
        if known is not None and known.event is not None:
            number = self._intend("reprioritize", tasks=0, task=known.handle.id)
            await self._try(number, self._client.reprioritize(known.handle.id, "high"))

    async def _again(self) -> None:
        """The same task under the same id: it must not run again."""
        known = self._any_recent()
        if known is not None and known.event is not None:
            self._journal.write(op="intent", kind="again", n=known.number, count=1, tasks=0)
            await self._try(known.number, self._client.submit_task(known.event))

    async def _conflict(self) -> None:
        """Another task under an id that is taken: it must be rejected."""
        known = self._any_recent()
        if known is not None and known.event is not None:
            number = self._intend("conflict", tasks=0, task=known.handle.id)
            event = TaskSubmitted(id=known.handle.id, function="noop", args=[number])
            await self._try(number, self._client.submit_task(event))

    async def _poison(self) -> None:
        """What no client should write, and anyone can."""
        self._intend("poison", tasks=0)
        subject = wire.event(NAMESPACE, self._chance.choice(("task.submitted", "no.such")), "poison")
        try:
            self._client.bus.publish(subject, self._chance.choice(_POISON))
        except AgentFlowError:
            return

    # Locks -----------------------------------------------------------------------------

    async def _lock(self) -> None:
        """Hold a lock for a moment, and write under its token where lower tokens are refused."""
        mode: LockMode = self._chance.choice(("exclusive", "exclusive", "shared", "semaphore"))
        name = f"{mode if mode == 'semaphore' else 'door'}-{self._chance.randrange(_LOCKS)}"
        number = self._intend("lock", tasks=0, task=name)
        permits = _PERMITS if mode == "semaphore" else 1
        lock = self._client.lock(name, wait_s=_LOCK_WAIT_S, ttl_s=_LOCK_TTL_S, mode=mode, permits=permits)
        try:
            async with lock as held:
                self._resource.say("hold", name, held.token, time.monotonic())
                try:
                    for _ in range(self._chance.randint(1, 5)):
                        await asyncio.sleep(self._chance.choice((0.0, 0.02, 0.2)))
                        if mode == "exclusive":
                            self._resource.write(name, held.token)
                finally:
                    self._resource.say("held", name, held.token, min(time.monotonic(), held.deadline))
        except (AgentFlowError, TimeoutError) as error:
            self._journal.write(op="unknown", n=number, why=repr(error)[:200])
        else:
            self._journal.write(op="ok", n=number)


class Resource:
    """What locks guard: it takes a write only under a token that is not below the highest it has seen.

    One file for each lock, shared by all clients. Writes, and how long holders could be certain
    of their locks, are lines of the journal of side effects.
    """

    def __init__(self, folder: Path, client: str) -> None:
        self._folder = folder
        self._client = client
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._effects = os.open(folder / "effects.tsv", flags, 0o644)

    def write(self, name: str, token: int) -> None:
        """Write, or have it refused."""
        with (self._folder / f"resource-{name}").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            highest = int(file.read() or 0)
            if token > highest:
                file.truncate(0)
                file.write(str(token))
                file.flush()
            self.say("write" if token >= highest else "refused", name, token, time.monotonic())

    def say(self, what: str, name: str, token: int, at: float) -> None:
        """A line of the journal. `at` is monotonic."""
        line = f"{what}\t{name}\t0\t{self._client}\t{os.getpid()}\t{int(at * 1e9)}\t{token}\n"
        os.write(self._effects, line.encode())

    def close(self) -> None:
        """Give the journal back."""
        os.close(self._effects)


async def _all(tasks: set[asyncio.Task[None]]) -> None:
    while tasks:
        await asyncio.gather(*tasks)


async def _main(given: argparse.Namespace) -> None:
    journal = Journal(Path(given.journal))
    resource = Resource(Path(given.journal).parent, given.name)
    try:
        async with agentflow.Client(
            given.url.split(","), namespace=NAMESPACE, name=given.name, replicas=given.replicas
        ) as client:
            load = Load(client, journal, resource, random.Random(f"{given.seed} {given.name}"))
            load.go_on(Path(given.journal))
            await load.run(given.tasks, given.seconds)
        journal.write(op="done")
    finally:
        journal.close()
        resource.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--journal", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    uvloop.run(_main(_arguments()))
