"""How whatever a task does becomes an outcome."""

from __future__ import annotations

import signal
from typing import Any

import msgspec
import pytest

from agentflow.errors import NonRetryable
from agentflow_nodes.worker import outcome
from agentflow_nodes.worker.outcome import MESSAGE_BYTES_MAX, TRACEBACK_BYTES_MAX, Completed, Failed, bounded
from agentflow_nodes.worker.processes import ProcessExit, shell_argv


def exit_with(**fields: Any) -> ProcessExit:
    return ProcessExit(started_at_ms=0, duration_us=1, **fields)


def raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301 - for its traceback
    except BaseException as caught:  # noqa: BLE001
        return caught


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


class SpecialError(ValueError): ...


@pytest.mark.parametrize(
    ("value", "json"),
    [(None, b"null"), (1, b"1"), ("é", '"é"'.encode()), ({"a": [1.5, True]}, b'{"a":[1.5,true]}')],
)
def test_a_result_is_encoded_once(value: object, json: bytes) -> None:
    done = outcome.completed(value)
    assert isinstance(done, Completed)
    assert bytes(done.value) == json


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


DEEP = nested(40)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        "\udc80",
        "\0",
        {"\0": 1},
        {1: {2: lambda: None}},
        (i for i in "ab"),
        1 << 70,
        float("nan"),
        DEEP,
    ],
)
def test_a_result_that_is_no_json_fails_for_good(value: object) -> None:
    failed = outcome.completed(value)
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.retryable) == ("result", False)


def test_a_circular_result_fails() -> None:
    value: list[object] = []
    value.append(value)
    failed = outcome.completed(value)
    assert isinstance(failed, Failed)
    assert failed.kind == "result"


@pytest.mark.parametrize(
    ("error", "names", "retryable"),
    [
        (ValueError("x"), (), True),
        (NonRetryable("x"), (), False),
        (type("Mine", (NonRetryable,), {})("x"), (), False),
        (ValueError("x"), ("ValueError",), False),
        (ValueError("x"), ("builtins.ValueError",), False),
        (SpecialError("x"), ("ValueError",), False),
        (KeyError("x"), ("ValueError",), True),
    ],
)
def test_which_errors_are_retried(error: Exception, names: tuple[str, ...], *, retryable: bool) -> None:
    assert outcome.failed(raised(error), names).retryable is retryable


def test_an_error_says_its_type_its_message_and_where() -> None:
    failed = outcome.failed(raised(ValueError("no such order")))
    assert failed.kind == "error"
    assert failed.message == "ValueError: no such order"
    assert "test_outcome.py" in failed.traceback_tail


@pytest.mark.parametrize(
    "error",
    [
        UnprintableError(),
        ValueError("\udc80\0"),
        ValueError("x" * 10_000_000),
        ExceptionGroup("g", [ValueError("\0")]),
    ],
)
def test_any_message_is_bounded_and_can_be_written(error: Exception) -> None:
    failed = outcome.failed(raised(error))
    written = msgspec.json.encode(failed)
    assert b"\\u0000" not in written
    assert len(failed.message.encode()) <= MESSAGE_BYTES_MAX
    assert len(failed.traceback_tail.encode()) <= TRACEBACK_BYTES_MAX
    assert msgspec.json.decode(written, type=Completed | Failed) == failed


def test_a_deep_recursion_has_a_short_traceback() -> None:
    def again() -> None:
        again()

    with pytest.raises(RecursionError) as caught:
        again()
    failed = outcome.failed(caught.value)
    assert "RecursionError" in failed.message
    assert len(failed.traceback_tail.encode()) <= TRACEBACK_BYTES_MAX


def test_sys_exit_is_an_exit() -> None:
    assert outcome.failed(raised(SystemExit(3))) == Failed("exit", "the function called sys.exit(3)")


def test_text_is_cut_between_characters() -> None:
    assert bounded("ééé", 5) == "éé"
    assert bounded("ééé", 5, tail=True) == "éé"
    assert bounded("a\0b\udc80", 100) == "a\ufffdb\\udc80"


def test_exits_become_outcomes() -> None:
    assert outcome.of_exit(exit_with(exit_code=0, stdout_tail="hi\n")) == outcome.completed("hi\n")
    assert outcome.of_exit(exit_with(exit_code=3)) == Failed("exit", "exit status 3")
    assert outcome.of_exit(exit_with(exit_code=3, stderr_tail="why\n")) == Failed(
        "exit", "exit status 3: why"
    )
    assert outcome.of_exit(exit_with(signal=signal.SIGSEGV)) == Failed("signal", "killed by SIGSEGV")
    assert outcome.of_exit(exit_with(error="no such file")) == Failed("spawn", "no such file")
    assert outcome.of_exit(exit_with(signal=15, timed_out=True), 2.0) == Failed(
        "timeout", "not finished within 2 s"
    )
    assert outcome.of_exit(exit_with(signal=15, stopped=True, error="closed")) == Failed("stopped", "closed")
    real_time = outcome.of_exit(exit_with(signal=40))
    assert isinstance(real_time, Failed)
    assert real_time.message == "killed by signal 40"


def test_a_long_stderr_fits_the_message() -> None:
    failed = outcome.of_exit(exit_with(exit_code=1, stderr_tail="é" * 8192))
    assert isinstance(failed, Failed)
    assert len(failed.message.encode()) <= MESSAGE_BYTES_MAX


def test_a_script_ends_at_the_first_failure() -> None:
    assert shell_argv("echo hi") == ["/bin/sh", "-ec", "echo hi"]
