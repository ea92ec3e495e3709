"""Attempts: one assignment, run through to the event that reports it.

Resolve, run, classify, report. What an attempt may end in is a short union
(`agentflow_nodes.worker.outcome`), translated into events here and nowhere else.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec
from msgspec import UNSET, Raw, Struct, structs

from agentflow import ids
from agentflow.checks import unsound
from agentflow.client.function import Function
from agentflow.context import TaskContext
from agentflow.errors import AppendUnknown, Disconnected, ObjectMissing, OperatingError
from agentflow.events import Event, ObjectRef, TaskAssigned, TaskCompleted, TaskDeclined, TaskFailed
from agentflow.frames import decode_any, encode
from agentflow.limits import DEPTH_MAX, INLINE_BYTES_MAX, TAIL_LENGTH_MAX, TEXT_LENGTH_MAX
from agentflow.log.port import Log
from agentflow.logs import get_logger
from agentflow.objects import ObjectStore
from agentflow_nodes.worker import materials, outcome
from agentflow_nodes.worker.calls import Call, judge_async
from agentflow_nodes.worker.config import WorkerConfig
from agentflow_nodes.worker.functions import FunctionRunner
from agentflow_nodes.worker.materials import BadInput, Materials, as_text
from agentflow_nodes.worker.outcome import Completed, Failed, Kind, Outcome
from agentflow_nodes.worker.processes import ProcessExit, ProcessRunner, shell_argv

if TYPE_CHECKING:
    from agentflow.locks.held import Held

RESULT_VARIABLE: Final = "AGENTFLOW_RESULT"
LOCK_VARIABLE: Final = "AGENTFLOW_LOCK"
LOCK_TOKEN_VARIABLE: Final = "AGENTFLOW_LOCK_TOKEN"  # noqa: S105 - the name of a variable, no secret
RESULT_BYTES_MAX: Final = 64 * 1024 * 1024
_HIDDEN: Final = ("AGENTFLOW_", "NATS_")
"""Our own settings are none of a task's business: they may hold credentials."""
_TAIL_BYTES: Final = 8 * 1024
_STORE_PAUSE_S: Final = 1.0

_log = get_logger(__name__)


class Run(Struct):
    """An attempt being run."""

    assigned: TaskAssigned
    started_at_ms: int
    started: float
    """Monotonic, seconds."""
    begun: bool = True
    """False while it waits for its lock."""
    announced: bool = False
    why: str = ""
    """Why it is being ended: "timeout", or what a stop said."""
    kind: Kind = "stopped"
    """What kind of failure it is if it is ended."""
    over: bool = False
    """Reported already; whatever comes after does not count."""
    held: Held | None = None
    """The lock it runs under."""
    told: asyncio.Future[int] | None = None
    """Its outcome's way into the log, if a lock waits for that."""

    def begin(self) -> None:
        """Its time runs from here on."""
        self.started_at_ms = time.time_ns() // 1_000_000
        self.started = time.monotonic()
        self.begun = True


class Attempts:
    """Runs assignments. An async context manager; left, nothing of it runs any more."""

    def __init__(
        self,
        config: WorkerConfig,
        functions: Mapping[str, Function[..., Any]],
        log: Log,
        objects: ObjectStore,
    ) -> None:
        self._config = config
        self._functions = functions
        self._log = log
        self._objects = objects
        self._processes = ProcessRunner(tail_bytes=_TAIL_BYTES)
        self._runner = FunctionRunner(threads=config.slots, processes=config.slots, mark=self._processes.mark)
        # Marks our programs among all of this machine, other workers' and other namespaces' included.
        self._nonce = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._folder = Path()
        self._environment: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="agentflow-"))
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith(_HIDDEN)
        }
        await self._processes.__aenter__()
        await self._runner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.__aexit__(kind, error, trace)
        await self._processes.__aexit__(kind, error, trace)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def run(self, run: Run) -> Event:
        """Run an attempt and return the event that reports it. Raises only CancelledError."""
        assigned = run.assigned
        function = None
        if assigned.function:
            function = self._functions.get(assigned.function)
            if function is None:
                return declined(assigned, f"no function is called {assigned.function}")
        try:
            if materials.plain(assigned):
                given = materials.inline(assigned)
                if function is not None and function.mode == "async" and not assigned.timeout_s:
                    return await self._run_here(run, function, given)
            else:
                given = await materials.gather(self._log, self._objects, assigned)
            if function is not None:
                return await self._run_function(run, function, given)
            return await self._run_process(run, given)
        except (BadInput, ObjectMissing) as error:
            return _failed(run, Failed("error", f"input: {error}", retryable=False))
        except (OperatingError, TimeoutError) as error:
            return declined(assigned, f"its arguments could not be fetched: {error}")
        except Exception as error:  # noqa: BLE001 - see below
            # A fault of ours, or input nobody thought of: the task ends of it, the worker does not.
            _log.exception("an attempt failed in the worker", task=assigned.id)
            return _failed(run, Failed("error", f"{type(error).__name__}: {error}", retryable=False))

    async def _run_here(self, run: Run, function: Function[..., Any], given: Materials) -> Event:
        """A coroutine function without a time limit runs inside its slot: a task of its own would cost more."""
        assigned = run.assigned
        try:
            args, kwargs = function.types.convert(given.args, given.kwargs)
        except msgspec.ValidationError as error:
            return _bad_arguments(run, function, error)
        ended = await judge_async(
            Call(function.call, args, kwargs, self._context(run), tuple(assigned.non_retryable))
        )
        return await self._report(run, ended, "", "")

    async def _run_function(self, run: Run, function: Function[..., Any], given: Materials) -> Event:
        assigned = run.assigned
        try:
            args, kwargs = function.types.convert(given.args, given.kwargs)
        except msgspec.ValidationError as error:
            return _bad_arguments(run, function, error)
        ended = await self._runner.run(
            # The name of the plain function leads to the task: only that can be found again in a child.
            function if function.mode == "process" else function.call,  # type: ignore[arg-type]
            args,
            kwargs,
            mode=function.mode,
            timeout_s=assigned.timeout_s or None,
            task=self._context(run),
            non_retryable=assigned.non_retryable,
        )
        return await self._report(run, ended, "", "")

    def _context(self, run: Run) -> TaskContext:
        assigned = run.assigned
        timeout_s = assigned.timeout_s
        return TaskContext(
            task_id=assigned.id,
            attempt=assigned.attempt,
            namespace=self._config.namespace,
            worker=self._config.name,
            workflow_id=ids.workflow_of(assigned.id),
            deadline=time.time() + timeout_s if timeout_s else None,
            lock=assigned.lock,
            lock_token=run.held.token if run.held is not None else None,
        )

    async def _run_process(self, run: Run, given: Materials) -> Event:
        assigned = run.assigned
        number = next(self._numbers)
        result_path = self._folder / f"{number}.json"
        argv = shell_argv(assigned.shell) if assigned.shell else [as_text(value) for value in given.argv]
        env = {
            **self._environment,
            **{name: as_text(value) for name, value in given.env.items()},
            RESULT_VARIABLE: str(result_path),
            "AGENTFLOW_TASK_ID": assigned.id,
            "AGENTFLOW_ATTEMPT": str(assigned.attempt),
        }
        if run.held is not None:
            env |= {LOCK_VARIABLE: run.held.name, LOCK_TOKEN_VARIABLE: str(run.held.token)}
        try:
            exited = await self._processes.run(
                argv,
                env=env,
                cwd=assigned.cwd or None,
                timeout_s=assigned.timeout_s or None,
                token=f"{self._nonce}-{number}",
            )
            run.started_at_ms = exited.started_at_ms
            ended = outcome.of_exit(exited, assigned.timeout_s or None)
            stdout = exited.stdout_tail
            if isinstance(ended, Completed):
                ended, stdout = _process_result(result_path, exited)
        finally:
            result_path.unlink(missing_ok=True)
        if isinstance(ended, Failed) and ended.kind in assigned.non_retryable:
            ended = structs.replace(ended, retryable=False)
        return await self._report(run, ended, stdout, exited.stderr_tail, exited.duration_us)

    async def _report(self, run: Run, ended: Outcome, stdout: str, stderr: str, run_us: int = 0) -> Event:
        assigned = run.assigned
        run_us = run_us or int((time.monotonic() - run.started) * 1e6)
        if isinstance(ended, Failed):
            return _failed(run, ended, stdout, stderr, run_us)
        value = bytes(ended.value)
        result: Any = UNSET if value == b"null" else ended.value
        ref = None
        if len(value) > INLINE_BYTES_MAX:
            try:
                ref, result = await self._store(value), UNSET
            except OperatingError as error:
                return _failed(
                    run, Failed("result", f"the result could not be stored: {error}"), stdout, stderr, run_us
                )
        return TaskCompleted(
            id=assigned.id,
            attempt=assigned.attempt,
            incarnation=assigned.incarnation,
            started_at_ms=run.started_at_ms,
            run_us=run_us,
            result=result,
            object=ref,
            stdout=_text(stdout),
            stderr=_text(stderr),
        )

    async def _store(self, value: bytes) -> ObjectRef:
        """Put a result into the object store, however long it takes: nobody else has it.

        Raises OperatingError if the store refuses it.
        """
        while True:
            try:
                return await self._objects.put(value)
            except (Disconnected, AppendUnknown) as error:
                _log.warning("a result could not be stored yet", error=str(error))
                await asyncio.sleep(_STORE_PAUSE_S)


def _process_result(path: Path, exited: ProcessExit) -> tuple[Outcome, str]:
    """What a process gave: the JSON it wrote, or else its output as text; and what to show of its output."""
    try:
        with path.open("rb") as file:
            data = file.read(RESULT_BYTES_MAX + 1)
    except FileNotFoundError:
        text = exited.stdout_tail.strip().replace("\0", "\ufffd")
        return Completed(Raw(encode(text or None))), ""
    except OSError as error:
        return Failed("result", f"${RESULT_VARIABLE} could not be read: {error}"), exited.stdout_tail
    return _json_result(data), exited.stdout_tail


def _json_result(data: bytes) -> Outcome:
    if len(data) > RESULT_BYTES_MAX:
        return Failed(
            "result", f"${RESULT_VARIABLE} holds more than {RESULT_BYTES_MAX} bytes", retryable=False
        )
    try:
        value = decode_any(data)
        if unsound(value, DEPTH_MAX - 1) is None:
            return Completed(Raw(encode(value)))
        fault = "it breaks the limits on nesting, numbers and text"
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        fault = str(error)
    return Failed("result", f"${RESULT_VARIABLE} does not hold JSON: {fault}", retryable=False)


def declined(assigned: TaskAssigned, reason: str) -> TaskDeclined:
    """The report of an attempt that is not run here."""
    return TaskDeclined(
        id=assigned.id, attempt=assigned.attempt, incarnation=assigned.incarnation, reason=reason
    )


def _failed(run: Run, ended: Failed, stdout: str = "", stderr: str = "", run_us: int = 0) -> TaskFailed:
    assigned = run.assigned
    return TaskFailed(
        id=assigned.id,
        attempt=assigned.attempt,
        incarnation=assigned.incarnation,
        error=ended.kind,
        message=ended.message[:TEXT_LENGTH_MAX].replace("\0", "\ufffd"),
        retryable=ended.retryable,
        started_at_ms=run.started_at_ms,
        run_us=run_us or int((time.monotonic() - run.started) * 1e6),
        traceback=_text(ended.traceback_tail),
        stdout=_text(stdout),
        stderr=_text(stderr),
    )


def _bad_arguments(run: Run, function: Function[..., Any], error: Exception) -> TaskFailed:
    return _failed(run, Failed("error", f"arguments of {function.name}: {error}", retryable=False))


def failed(run: Run, ended: Failed) -> TaskFailed:
    """The report of an attempt that failed."""
    return _failed(run, ended)


def _text(text: str) -> str:
    """The end of a text, without what the contract does not allow in strings."""
    return text[-TAIL_LENGTH_MAX:].replace("\0", "\ufffd") if text else ""
