"""From what was submitted to what the fold keeps of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final
from zlib import crc32

import msgspec

from agentflow.checks import priority_of
from agentflow.domain.life import State
from agentflow.domain.queue import Demand, Line
from agentflow.domain.state import At, Namespace, Payload, Task, Terms
from agentflow.events import Needs, Retry, TaskSubmitted, Work, WorkflowSubmitted, WorkflowTask
from agentflow.limits import FOLD_BYTES_MAX

UNUSED_TERMS_MAX: Final = 128
"""Terms kept although no open task has them."""

_encode: Final = msgspec.json.Encoder(order="deterministic").encode
_decode_retry: Final = msgspec.json.Decoder(Retry).decode


def new_task(state: Namespace, work: Work, task_id: str, at: At, *, notify: str = "") -> Task:
    """The task for a piece of submitted work, not entered anywhere yet."""
    terms = _terms(state, work, at.actor, notify)
    args = _encode(work.args) if work.args else b""
    digest = crc32(args, terms.digest)
    payload = None
    if work.kwargs or work.argv or work.env or work.object is not None or len(args) > FOLD_BYTES_MAX:
        payload, digest = _payload(work, args, digest)
        if payload.fetch:
            args = b""
    return Task(
        id=task_id,
        terms=terms,
        seq=at.seq,
        index=at.index,
        digest=digest,
        args=args,
        priority=terms.priority,
        payload=payload,
    )


def are_alike(submissions: Sequence[TaskSubmitted]) -> bool:
    """Whether they differ in nothing but id, title and arguments, and those are all that there is to keep of each."""
    first = submissions[0]
    function, shell, cwd, priority = first.function, first.shell, first.cwd, first.priority
    timeout_s, lock, notify = first.timeout_s, first.lock, first.notify
    for each in submissions:
        if (
            each.function != function
            or each.shell != shell
            or each.cwd != cwd
            or each.priority != priority
            or each.timeout_s != timeout_s
            or each.queue_timeout_s
            or each.lock != lock
            or each.notify != notify
            or each.kwargs
            or each.argv
            or each.env
            or each.object is not None
        ):
            return False
    # Compared as text, since -0.0 equals 0.0.
    asked = [
        (each.retry, each.needs) for each in submissions if each.retry is not None or each.needs is not None
    ]
    return not asked or (len(asked) == len(submissions) and len(set(map(_encode, asked))) == 1)


def new_tasks(state: Namespace, submissions: Sequence[TaskSubmitted], at: At) -> list[Task] | None:
    """The tasks of submissions that are alike, accepted and ready; None if arguments are too long to be kept."""
    arguments = [_encode(each.args) if each.args else b"" for each in submissions]
    if max(map(len, arguments)) > FOLD_BYTES_MAX:
        return None
    first, count, before = submissions[0], len(submissions), state.accepted
    terms = _terms(state, first, at.actor, first.notify, count)
    seq, ready_ms, digest, priority = at.seq, state.clock_ms, terms.digest, terms.priority
    state.accepted += count
    return [
        Task(
            id=each.id,
            terms=terms,
            seq=seq,
            index=index,
            digest=crc32(args, digest),
            args=args,
            priority=priority,
            state=State.READY,
            ready_ms=ready_ms,
            number=before + index + 1,
        )
        for index, (each, args) in enumerate(zip(submissions, arguments, strict=True))
    ]


def _payload(work: Work, args: bytes, digest: int) -> tuple[Payload, int]:
    kwargs = _encode(work.kwargs) if work.kwargs else b""
    argv = _encode(work.argv) if work.argv else b""
    env = _encode(work.env) if work.env else b""
    # Set apart by what no JSON text holds, or kwargs could pass for env.
    digest = crc32(b"\0".join((b"", kwargs, argv, env, _encode(work.object))), digest)
    if len(args) + len(kwargs) + len(argv) + len(env) > FOLD_BYTES_MAX:
        return Payload(object=work.object, fetch=True), digest
    return Payload(kwargs, argv, env, work.object), digest


def _terms(state: Namespace, work: Work, client: str, notify: str, users: int = 1) -> Terms:
    needs = work.needs
    # Structs compare field by field; the key holds no dict, so it can be hashed.
    key = (
        work.function,
        work.shell,
        work.cwd,
        work.priority,
        None if needs is None else _needs_key(needs),
        None if work.retry is None else _retry_key(work.retry),
        work.timeout_s,
        work.queue_timeout_s,
        client,
        notify,
        work.lock,
    )
    terms = state.terms.get(key)
    if terms is None:
        terms = state.terms[key] = terms_of(key, state.queue.open)
    elif not terms.users:
        del state.unused_terms[key]
    terms.users += users
    return terms


def release_terms(state: Namespace, terms: Terms, users: int = 1) -> None:
    """So many tasks with these terms are gone.

    Terms nobody uses are kept for a while: whoever sends one task after the other sends the
    next one under the same.
    """
    terms.users -= users
    if terms.users:
        return
    unused = state.unused_terms
    unused[terms.key] = terms
    if len(unused) > UNUSED_TERMS_MAX:
        oldest = unused.pop(next(iter(unused)))
        state.queue.close(oldest.line)
        del state.terms[oldest.key]


def _needs_key(needs: Needs) -> tuple[Any, ...]:
    return (needs.cpu + 0.0, needs.memory_mb, needs.gpus, needs.group, tuple(sorted(needs.labels.items())))


def _retry_key(retry: Retry) -> bytes:
    return _encode(retry)


def terms_of(key: tuple[Any, ...], open_line: Callable[[Demand], Line]) -> Terms:
    """Terms, from what tells them from others; see `_terms`."""
    function, shell, cwd, priority, needs, retry_key, timeout_s, queue_timeout_s, client, notify, lock = key
    function = sys.intern(function)
    retry = None if retry_key is None else _decode_retry(retry_key)
    demand = Demand(function, lock, *(needs or ()))
    # Adding zero makes -0.0 and 0.0 one, as they are in the key.
    timeouts = (timeout_s + 0.0, queue_timeout_s + 0.0)
    described: tuple[Any, ...] = (function, shell, cwd, priority, needs, retry, timeouts)
    if lock:
        described += (lock,)
    return Terms(
        key=key,
        function=function,
        shell=shell,
        cwd=cwd,
        priority=priority_of(priority),
        demand=demand,
        line=open_line(demand),
        retry=retry,
        timeout_s=timeout_s,
        queue_timeout_ms=int(queue_timeout_s * 1000),
        client=client,
        notify=notify,
        run_key=function or f"$process {crc32(shell.encode()):08x}",
        digest=crc32(_encode(described)),
        only_function=not (shell or cwd or timeout_s or lock or (retry and retry.non_retryable)),
    )


def digest_of_workflow(event: WorkflowSubmitted, tasks: Sequence[WorkflowTask]) -> int:
    """CRC-32 of a workflow's name, description and tasks."""
    return crc32(_encode((event.name, event.description, tasks)))
