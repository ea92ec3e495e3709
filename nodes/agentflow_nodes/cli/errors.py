"""What a command may end in.

0    done; an awaited task or workflow completed
1    an awaited task or workflow failed, was cancelled or skipped
2    the command was not understood: an unknown option, a bad value, an unsound file
3    there is no such task, workflow or namespace
4    NATS cannot be reached, or something around us failed
5    the leader rejected what was asked
6    the log is not the one it was: deleted, created again, purged or cut under us. Starting again
     does not help; the message says what was expected, what was found and what to do
7    a lock was not free in time, or was lost while the command ran
130  interrupted with Ctrl-C
"""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit statuses, the same for all commands."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    OPERATING = 4
    REJECTED = 5
    LOG_GONE = 6
    LOCK = 7
    INTERRUPTED = 130


class CliError(Exception):
    """A command cannot go on. The message says what was expected, what was found and what to do."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code


def usage(message: str) -> CliError:
    """The command line itself is wrong."""
    return CliError(message, Exit.USAGE)


def not_found(message: str) -> CliError:
    """What was asked for does not exist."""
    return CliError(message, Exit.NOT_FOUND)


def operating(message: str) -> CliError:
    """The world around us failed."""
    return CliError(message, Exit.OPERATING)


def classify(error: BaseException) -> tuple[str, Exit] | None:
    """An exception as message and exit status; None for a bug."""
    if isinstance(error, CliError):
        return str(error), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", Exit.INTERRUPTED
    code = _code_of(error)
    return None if code is None else (str(error) or type(error).__name__, code)


def _code_of(error: BaseException) -> Exit | None:
    # Importing the package takes longer than most commands' help.
    from agentflow import errors  # noqa: PLC0415

    match error:
        case errors.InvalidRequest():
            return Exit.USAGE
        case errors.SubmissionRejected():
            return Exit.REJECTED
        case errors.LogGone():
            return Exit.LOG_GONE
        case errors.TaskError():
            return Exit.FAILED
        case errors.AgentFlowError() | TimeoutError() | OSError():
            return Exit.OPERATING
        case _:
            return None
