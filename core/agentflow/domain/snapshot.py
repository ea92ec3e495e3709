"""A state of the fold as bytes, and back.

A fold that starts from a snapshot and the tail of the log comes to the same state as one that
read the log from its beginning: whatever decides what comes next is in it. Left out is what
can be had again from the rest: eligible workers, lines set aside, timers that no longer count.

The form is this release's own (`FORM`): a snapshot of another form is no use, and nobody needs
it, since the log and its archive have everything.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import Struct

from agentflow.domain.life import State, WorkflowState
from agentflow.domain.queue import Demand, Lane, Line
from agentflow.domain.state import (
    At,
    Ended,
    Holding,
    Master,
    Memory,
    Namespace,
    Node,
    Payload,
    Result,
    Task,
    Terms,
    Timer,
    Worker,
    Workflow,
)
from agentflow.domain.tasks import terms_of
from agentflow.events import EventRejected, Policy, WorkflowPart

FORM: Final = 1
"""Raised with every change of what is written here, or of what it means."""

_NONE: Final = -1
_DIGEST_BITS: Final = 32


class SnapshotUnreadable(ValueError):
    """The bytes are no snapshot, or one of another form."""


class _Base(Struct, array_like=True, frozen=True, gc=False):
    """Written as an array: names would be most of it."""


class _Terms(_Base, array_like=True, frozen=True, gc=False):
    function: str
    shell: str
    cwd: str
    priority: int | str
    needs: tuple[float, int, int, str, tuple[tuple[str, str], ...]] | None
    retry: bytes | None
    timeout_s: float
    queue_timeout_s: float
    client: str
    notify: str
    lock: str
    line: int
    users: int


class _Node(_Base, array_like=True, frozen=True, gc=False):
    workflow: int
    task_id: str
    waiting: int
    dependents: list[int]
    uses: tuple[str, ...]
    result: Result | None
    end_seq: int
    end_index: int


class _Task(_Base, array_like=True, frozen=True, gc=False):
    id: str
    terms: int
    seq: int
    index: int
    digest: int
    args: bytes
    priority: int
    payload: Payload | None
    node: _Node | None
    state: State
    attempt: int
    failures: int
    losses: int
    ready_ms: int
    ticket: int
    worker: int
    quick_us: int
    started: bool
    suspect: bool
    stopping: bool
    cancel: str | None
    due_ms: int
    declined: dict[int, int] | None
    error: str
    order: int
    number: int


class _Workflow(_Base, array_like=True, frozen=True, gc=False):
    id: str
    seq: int
    index: int
    digest: int
    client: str
    notify: str
    tasks: list[int]
    open: int
    counts: dict[State, int]


class _Worker(_Base, array_like=True, frozen=True, gc=False):
    name: str
    incarnation: int
    slots: int
    ahead: int
    group: str
    labels: dict[str, str]
    cpu: float
    memory_mb: int
    gpus: int
    functions: list[str]
    host: str
    joined_ms: int
    level: int
    draining: bool
    held: list[int]
    quick_us: int
    slow: int
    used_cpu: float
    used_memory_mb: int
    used_gpus: int
    suspects: int
    assigned_seq: int
    completed: int
    failed: int


class _Line(_Base, array_like=True, frozen=True, gc=False):
    number: int
    demand: Demand
    suspect: bool
    lanes: list[tuple[int, list[int]]]


class _Queue(_Base, array_like=True, frozen=True, gc=False):
    tickets: int
    numbers: int
    lines: list[_Line]
    """Those with tasks in them."""


class _Ids(_Base, array_like=True, frozen=True, gc=False):
    keys: list[str]
    positions: list[int]
    digests: list[int]


class _Memory(_Base, array_like=True, frozen=True, gc=False):
    current: _Ids
    previous: _Ids
    early: _Ids
    ahead_ms: int
    started_ms: int
    horizon_ms: int
    oldest: str


class _Announcement(_Base, array_like=True, frozen=True, gc=False):
    id: str
    state: WorkflowState
    client: str
    notify: str
    seq: int
    index: int
    counts: dict[State, int]


class _Part(_Base, array_like=True, frozen=True, gc=False):
    seq: int
    index: int
    server_ms: int
    actor: str
    part: WorkflowPart


class _Document(Struct, frozen=True):
    form: int
    name: str
    plain: dict[str, Any]
    """Numbers and texts of the state, by name."""
    policy: Policy
    masters: list[Master]
    locks: dict[str, list[Holding]]
    lock_tokens: dict[str, int]
    lock_users: dict[str, str]
    terms: list[_Terms]
    unused: list[int]
    tasks: list[_Task]
    """First those that are open or of open workflows, by the order of the state."""
    workflows: list[_Workflow]
    workers: list[_Worker]
    queue: _Queue
    expectations: dict[str, int]
    backoffs: list[int]
    deadlines: list[tuple[int, int]]
    cancels: list[int]
    struck: list[int]
    answers: list[EventRejected]
    announcements: list[_Announcement]
    parts: list[_Part]
    closed: _Memory


PLAIN: Final = (
    "level",
    "seq",
    "server_ms",
    "clock_ms",
    "latest_ms",
    "newest",
    "epoch",
    "leader",
    "elected_seq",
    "lock_generation",
    "accepted",
    "workers_version",
    "last_worker",
    "running",
    "order",
    "parts_seq",
    "quarantined",
    "rejected",
    "superseded",
)
"""Parts of the state that are a number or a text."""

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(_Document)


def snapshot(state: Namespace) -> bytes:
    """The state as bytes: equal states give equal bytes."""
    return _encoder.encode(_Writer(state).document())


def state_hash(state: Namespace) -> str:
    """A digest of the state: equal for every fold that read the same log."""
    return hash_of(snapshot(state))


def hash_of(data: bytes) -> str:
    """The digest of a state written as a snapshot."""
    return blake2b(data, digest_size=16).hexdigest()


def restore(data: bytes, *, knows: int) -> Namespace:
    """The state that was written. Raises SnapshotUnreadable."""
    try:
        document = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise SnapshotUnreadable(f"no snapshot of form {FORM}: {error}") from error
    if document.form != FORM:
        raise SnapshotUnreadable(f"a snapshot of form {document.form}; this release reads {FORM}")
    try:
        return _Reader(document, knows).state()
    except (IndexError, KeyError, AttributeError) as error:
        raise SnapshotUnreadable(f"the snapshot refers to what it does not hold: {error!r}") from error


class _Writer:
    """A state on its way into a document: what refers to each other becomes numbers."""

    def __init__(self, state: Namespace) -> None:
        self.state = state
        self.tasks = list(state.tasks.values())
        self.task_number = {id(task): number for number, task in enumerate(self.tasks)}
        self.terms_number = {id(terms): number for number, terms in enumerate(state.terms.values())}
        self.worker_number = {id(worker): number for number, worker in enumerate(state.workers.values())}
        self.workflow_number = {id(each): number for number, each in enumerate(state.workflows.values())}

    def document(self) -> _Document:
        state = self.state
        return _Document(
            form=FORM,
            name=state.name,
            plain={name: getattr(state, name) for name in PLAIN},
            policy=state.policy,
            masters=list(state.masters.values()),
            locks={name: list(holdings.values()) for name, holdings in state.locks.items()},
            lock_tokens=state.lock_tokens,
            lock_users=state.lock_users,
            terms=[_terms(terms) for terms in state.terms.values()],
            unused=[self.terms_number[id(terms)] for terms in state.unused_terms.values()],
            tasks=[self._task(task) for task in self.tasks],
            workflows=[self._workflow(workflow) for workflow in state.workflows.values()],
            workers=[self._worker(worker) for worker in state.workers.values()],
            queue=self._queue(),
            expectations=state.expectations,
            backoffs=self._due(state.backoffs, Task.backs_off_until),
            deadlines=self._waits(),
            cancels=self._numbers(state.cancels.values()),
            struck=self._numbers(state.struck.values()),
            answers=list(state.answers.values()),
            announcements=[_announcement(ended) for ended in state.announcements.values()],
            parts=[_Part(at.seq, at.index, at.server_ms, at.actor, part) for at, part in state.parts],
            closed=_memory(state.closed),
        )

    def _numbers(self, tasks: Iterable[Task]) -> list[int]:
        return [self.task_number[id(task)] for task in tasks]

    def _due(self, timers: list[Timer], counts: Callable[[Task, int], bool]) -> list[int]:
        live = {
            (due_ms, order, self.task_number[id(task)])
            for due_ms, order, task in timers
            if counts(task, due_ms)
        }
        return [number for _, _, number in sorted(live)]

    def _waits(self) -> list[tuple[int, int]]:
        """Ends of queue timeouts that still count, with their tasks."""
        live = {
            (due_ms, order, self.task_number[id(task)])
            for due_ms, order, task in self.state.deadlines
            if task.awaits_first_start
        }
        return [(due_ms, number) for due_ms, _, number in sorted(live)]

    def _task(self, task: Task) -> _Task:
        return _Task(
            id=task.id,
            terms=self.terms_number[id(task.terms)],
            seq=task.seq,
            index=task.index,
            digest=task.digest,
            args=task.args,
            priority=task.priority,
            payload=task.payload,
            node=self._node(task.node) if task.node is not None else None,
            state=task.state,
            attempt=task.attempt,
            failures=task.failures,
            losses=task.losses,
            ready_ms=task.ready_ms,
            ticket=task.ticket,
            worker=self.worker_number[id(task.worker)] if task.worker is not None else _NONE,
            quick_us=task.quick_us,
            started=task.started,
            suspect=task.suspect,
            stopping=task.stopping,
            cancel=task.cancel,
            due_ms=task.due_ms,
            declined=task.declined,
            error=task.error,
            order=task.order,
            number=task.number,
        )

    def _node(self, node: Node) -> _Node:
        return _Node(
            workflow=self.workflow_number[id(node.workflow)],
            task_id=node.task_id,
            waiting=node.waiting,
            dependents=self._numbers(node.dependents),
            uses=node.uses,
            result=node.result,
            end_seq=node.end_seq,
            end_index=node.end_index,
        )

    def _workflow(self, workflow: Workflow) -> _Workflow:
        return _Workflow(
            id=workflow.id,
            seq=workflow.seq,
            index=workflow.index,
            digest=workflow.digest,
            client=workflow.client,
            notify=workflow.notify,
            tasks=self._numbers(workflow.tasks.values()),
            open=workflow.open,
            counts=workflow.counts,
        )

    def _worker(self, worker: Worker) -> _Worker:
        values = {name: getattr(worker, name) for name in _Worker.__struct_fields__}
        values["labels"] = dict(worker.labels)
        values["functions"] = sorted(worker.functions)
        values["held"] = self._numbers(worker.held.values())
        return _Worker(**values)

    def _queue(self) -> _Queue:
        queue = self.state.queue
        lines = sorted(queue.all_waiting(), key=lambda line: line.number)
        return _Queue(queue.tickets, queue.numbers, [self._line(line) for line in lines])

    def _line(self, line: Line) -> _Line:
        lanes = [(priority, self._numbers(lane)) for priority, lane in sorted(line.lanes.items())]
        return _Line(line.number, line.demand, line.suspect, lanes)


def _terms(terms: Terms) -> _Terms:
    function, shell, cwd, priority, needs, retry, timeout_s, queue_timeout_s, client, notify, lock = terms.key
    return _Terms(
        function=function,
        shell=shell,
        cwd=cwd,
        priority=priority,
        needs=needs,
        retry=retry,
        timeout_s=timeout_s,
        queue_timeout_s=queue_timeout_s,
        client=client,
        notify=notify,
        lock=lock,
        line=terms.line.number,
        users=terms.users,
    )


def _announcement(ended: Ended) -> _Announcement:
    assert isinstance(ended.state, WorkflowState)
    return _Announcement(
        ended.id, ended.state, ended.client, ended.notify, ended.seq, ended.index, ended.event
    )


def _memory(memory: Memory) -> _Memory:
    return _Memory(
        current=_ids(memory.current),
        previous=_ids(memory.previous),
        early=_ids(memory.early),
        ahead_ms=memory.ahead_ms,
        started_ms=memory.started_ms,
        horizon_ms=memory.horizon_ms,
        oldest=memory.oldest,
    )


def _ids(packed: dict[str, int]) -> _Ids:
    low = (1 << _DIGEST_BITS) - 1
    values = packed.values()
    return _Ids(list(packed), [each >> _DIGEST_BITS for each in values], [each & low for each in values])


class _Reader:
    """A document on its way back into a state."""

    def __init__(self, document: _Document, knows: int) -> None:
        self.document = document
        self.found = Namespace(document.name, knows=knows)
        self.lines: dict[int, Line] = {}
        self.terms: list[Terms] = []
        self.tasks: list[Task] = []

    def state(self) -> Namespace:
        document, state = self.document, self.found
        for name in PLAIN:
            setattr(state, name, document.plain[name])
        state.policy = document.policy
        state.masters = {master.name: master for master in document.masters}
        state.locks = {
            name: {holding.token: holding for holding in holdings}
            for name, holdings in document.locks.items()
        }
        state.lock_tokens = document.lock_tokens
        state.lock_users = document.lock_users
        state.expectations = document.expectations
        self._enter_terms()
        self._enter_tasks()
        self._link()
        self._enter_queue()
        self._enter_timers()
        state.cancels = self._named(document.cancels)
        state.struck = self._named(document.struck)
        state.answers = {(answer.seq, answer.index): answer for answer in document.answers}
        state.announcements = {each.id: _ended(each) for each in document.announcements}
        state.parts = [
            (At(each.seq, each.index, each.server_ms, each.actor), each.part) for each in document.parts
        ]
        state.closed = _memory_of(document.closed)
        return state

    def _enter_terms(self) -> None:
        state = self.found
        for written in self.document.terms:
            *key, number, users = msgspec.structs.astuple(written)
            terms = terms_of(tuple(key), partial(self.found.queue.reopen, number=number))
            terms.users = users
            state.terms[terms.key] = terms
            self.terms.append(terms)
        for index in self.document.unused:
            state.unused_terms[self.terms[index].key] = self.terms[index]

    def _enter_tasks(self) -> None:
        state = self.found
        for written in self.document.tasks:
            task = _task_of(written, self.terms[written.terms])
            self.tasks.append(task)
            state.tasks[task.id] = task

    def _named(self, numbers: Iterable[int]) -> dict[str, Task]:
        return {self.tasks[number].id: self.tasks[number] for number in numbers}

    def _link(self) -> None:
        """Tie tasks to their workflows, dependents and workers."""
        state = self.found
        workflows = [_workflow_of(written) for written in self.document.workflows]
        for written, task in zip(self.document.tasks, self.tasks, strict=True):
            node = written.node
            if node is None:
                continue
            workflow = workflows[node.workflow]
            dependents = [self.tasks[number] for number in node.dependents]
            task.node = Node(workflow, node.task_id, node.waiting, dependents, node.uses)
            task.node.result, task.node.end_seq, task.node.end_index = (
                node.result,
                node.end_seq,
                node.end_index,
            )
        for given, workflow in zip(self.document.workflows, workflows, strict=True):
            for number in given.tasks:
                task = self.tasks[number]
                assert task.node is not None
                workflow.tasks[task.node.task_id] = task
            state.workflows[workflow.id] = workflow
        for each in self.document.workers:
            worker = _worker_of(each, [self.tasks[number] for number in each.held])
            state.workers[worker.name] = worker
            for task in worker.held.values():
                task.worker = worker

    def _enter_queue(self) -> None:
        written, queue = self.document.queue, self.found.queue
        queue.tickets, queue.numbers = written.tickets, written.numbers
        for each in written.lines:
            line = queue.refill(each.demand, each.number, suspect=each.suspect)
            for priority, numbers in each.lanes:
                lane = line.lanes[priority] = Lane()
                lane.entries.extend((self.tasks[number].ticket, self.tasks[number]) for number in numbers)
                line.size += len(numbers)
            queue.size += line.size

    def _enter_timers(self) -> None:
        state = self.found
        state.backoffs = [
            (task.due_ms, task.order, task)
            for task in (self.tasks[number] for number in self.document.backoffs)
        ]
        state.deadlines = [
            (due_ms, self.tasks[number].order, self.tasks[number])
            for due_ms, number in self.document.deadlines
        ]
        heapq.heapify(state.backoffs)
        heapq.heapify(state.deadlines)


def _task_of(written: _Task, terms: Terms) -> Task:
    return Task(
        id=written.id,
        terms=terms,
        seq=written.seq,
        index=written.index,
        digest=written.digest,
        args=written.args,
        priority=written.priority,
        payload=written.payload,
        state=written.state,
        attempt=written.attempt,
        failures=written.failures,
        losses=written.losses,
        ready_ms=written.ready_ms,
        ticket=written.ticket,
        quick_us=written.quick_us,
        started=written.started,
        suspect=written.suspect,
        stopping=written.stopping,
        cancel=written.cancel,
        due_ms=written.due_ms,
        declined=written.declined,
        error=written.error,
        order=written.order,
        number=written.number,
    )


def _workflow_of(written: _Workflow) -> Workflow:
    return Workflow(
        id=written.id,
        seq=written.seq,
        index=written.index,
        digest=written.digest,
        client=written.client,
        notify=written.notify,
        tasks={},
        open=written.open,
        counts=written.counts,
    )


def _worker_of(written: _Worker, held: Sequence[Task]) -> Worker:
    values = msgspec.structs.asdict(written)
    values["functions"] = frozenset(written.functions)
    values["held"] = {task.id: task for task in held}
    return Worker(**values)


def _ended(each: _Announcement) -> Ended:
    return Ended(each.id, each.state, each.client, each.notify, each.seq, each.index, each.counts)


def _memory_of(written: _Memory) -> Memory:
    memory = Memory()
    memory.current = _packed(written.current)
    memory.previous = _packed(written.previous)
    memory.early = _packed(written.early)
    memory.ahead_ms = written.ahead_ms
    memory.started_ms = written.started_ms
    memory.horizon_ms = written.horizon_ms
    memory.oldest = written.oldest
    return memory


def _packed(found: _Ids) -> dict[str, int]:
    return {
        key: position << _DIGEST_BITS | digest
        for key, position, digest in zip(found.keys, found.positions, found.digests, strict=True)
    }
