"""What an attempt may end in: a closed union, and the one place where anything else is translated into it.

    Completed(value)                                    the JSON of the result
    Failed(kind, message, retryable, traceback_tail)    why there is none

Whatever a task throws, returns, prints or dies of becomes one of the two, bounded in size and safe to write:
no lone surrogates, no U+0000.
"""

from __future__ import annotations

import signal
import traceback
from typing import TYPE_CHECKING, Literal

import msgspec

from agentflow.checks import unsound
from agentflow.errors import NonRetryable
from agentflow.limits import DEPTH_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentflow_nodes.worker.processes import ProcessExit

MESSAGE_BYTES_MAX = 4096
TRACEBACK_BYTES_MAX = 8192
TRACEBACK_FRAMES_MAX = 64

Kind = Literal["error", "timeout", "stopped", "exit", "signal", "spawn", "result", "crash", "lock_lost"]
"""
error      the function raised
timeout    the attempt took longer than it may
stopped    we ended it: cancelled, withdrawn, or the worker leaves
exit       a non-zero exit status, or the function called `sys.exit`
signal     the process was killed by a signal that was not ours
spawn      it could not be started at all
result     it returned something that is no JSON
crash      the child process running the function died
lock_lost  the lock it ran under was lost: it was stopped
"""


class Completed(msgspec.Struct, frozen=True, tag="completed"):
    """The attempt succeeded. `value` is its result, already encoded, so that it is encoded only once."""

    value: msgspec.Raw


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The attempt failed. `retryable` is False if another attempt cannot help."""

    kind: Kind
    message: str
    retryable: bool = True
    traceback_tail: str = ""


Outcome = Completed | Failed

_NULL = Completed(msgspec.Raw(b"null"))
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


def bounded(text: str, limit: int, *, tail: bool = False) -> str:
    r"""`text` cut to `limit` bytes of UTF-8 (its end, if `tail`), with what cannot be written made visible.

    >>> bounded("a\udc80b", 100)
    'a\\udc80b'
    """
    text = text[-limit:] if tail else text[:limit]
    data = text.replace("\0", "\ufffd").encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data.decode()
    return (data[-limit:] if tail else data[:limit]).decode("utf-8", "ignore")


def completed(value: object) -> Outcome:
    """The outcome of a function that returned `value`.

    What msgspec can encode is a result, within the limits of the contract: a task whose outcome the folds
    quarantine would never end. A NaN inside of a list or an object becomes null.
    """
    if value is None:
        return _NULL
    try:
        encoded = _encode(value)
        fault = unsound(value if isinstance(value, float) else _decode(encoded), DEPTH_MAX - 1)
    except Exception as error:  # noqa: BLE001 - an object may raise anything while it is being encoded
        return _no_result(value, f"{type(error).__name__}: {_said(error)}")
    return Completed(msgspec.Raw(encoded)) if fault is None else _no_result(value, fault)


def _no_result(value: object, fault: str) -> Failed:
    what = f"the result, a {type(value).__qualname__}, is no JSON that the log takes: {fault}"
    return Failed("result", bounded(what, MESSAGE_BYTES_MAX), retryable=False)


def failed(error: BaseException, non_retryable: Sequence[str] = ()) -> Failed:
    """The outcome of a function that raised `error`.

    `non_retryable` names exception types for which another attempt is pointless, as `ValueError` or
    `package.module.Error`; subclasses count.
    """
    if isinstance(error, SystemExit):
        return Failed("exit", bounded(f"the function called sys.exit({error.code!r})", MESSAGE_BYTES_MAX))
    retryable = not isinstance(error, NonRetryable) and not (
        non_retryable and _names(type(error)).intersection(non_retryable)
    )
    message = f"{type(error).__qualname__}: {_said(error)}"
    return Failed("error", bounded(message, MESSAGE_BYTES_MAX), retryable, _traceback_tail(error))


def timed_out(timeout_s: float | None) -> Failed:
    """The outcome of an attempt that took too long."""
    return Failed("timeout", f"not finished within {timeout_s:g} s" if timeout_s is not None else "timed out")


def stopped(reason: str) -> Failed:
    """The outcome of an attempt that we ended; whether there is another one is for the leader to say."""
    return Failed("stopped", bounded(reason, MESSAGE_BYTES_MAX))


def refused(what: str) -> Failed:
    """The outcome of an attempt that could not be started."""
    return Failed("spawn", bounded(what, MESSAGE_BYTES_MAX))


def crashed(what: str) -> Failed:
    """The outcome of a function whose process died under it."""
    return Failed("crash", bounded(what, MESSAGE_BYTES_MAX))


def of_exit(ended: ProcessExit, timeout_s: float | None = None) -> Outcome:
    """The outcome of a shell script or a program; the result of a good one is the tail of its output."""
    if ended.timed_out:
        return timed_out(timeout_s)
    if ended.stopped:
        return stopped(ended.error or "stopped")
    if ended.error is not None:
        return refused(ended.error)
    if ended.exit_code == 0:
        return completed(ended.stdout_tail)
    if ended.signal is not None:
        return Failed("signal", _with_stderr(f"killed by {_signal_name(ended.signal)}", ended.stderr_tail))
    return Failed("exit", _with_stderr(f"exit status {ended.exit_code}", ended.stderr_tail))


def _with_stderr(what: str, stderr: str) -> str:
    """A failed program says why at the end of its stderr."""
    tail = bounded(stderr.strip(), MESSAGE_BYTES_MAX - len(what) - 2, tail=True)
    return f"{what}: {tail}" if tail else what


def _signal_name(signum: int) -> str:
    try:
        name = signal.Signals(signum).name
    except ValueError:
        name = f"signal {signum}"
    return f"{name} (not sent by the worker: out of memory?)" if signum == signal.SIGKILL else name


def _said(error: BaseException) -> str:
    """`str(error)`, which is the user's code and may raise as well."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001
        return "<its message cannot be printed>"


def _names(kind: type[BaseException]) -> set[str]:
    names = {base.__name__ for base in kind.__mro__}
    return names | {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}


def _traceback_tail(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(error, limit=-TRACEBACK_FRAMES_MAX)
    except Exception:  # noqa: BLE001 - formatting calls the user's code
        return ""
    return bounded("".join(lines), TRACEBACK_BYTES_MAX, tail=True)
