"""Defences in the log: the fence, the fate of writes in doubt, and reading without holes."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

_FOLLOW: Final = "core/agentflow/log/follow.py"
_JETSTREAM: Final = "core/agentflow/log/jetstream.py"
_STORED: Final = "core/agentflow/log/stored.py"
_STREAM: Final = "core/agentflow/log/stream.py"


def _log(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/test_log.py::TestJetStreamLog::test_{name}" for name in names)


def _faults(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/test_log_faults.py::test_{name}" for name in names)


LOG: Final = (
    Mutant(
        "no fence",
        _STORED,
        "    if fence is not None:\n",
        "    if fence is not None and fence.subject == frame.subject:\n",
        _log("a_fence_on_another_subject_holds_until_somebody_writes_there"),
    ),
    Mutant(
        "no compare-and-set",
        _STORED,
        "    if fence is not None:\n",
        "    if fence is not None and fence.subject != frame.subject:\n",
        _log("compare_and_set_admits_one"),
    ),
    Mutant(
        "no message ids",
        _STORED,
        "    if frame.msg_id is not None:\n",
        "    if frame.msg_id == '':\n",
        _log("a_repeated_write_is_stored_once"),
    ),
    Mutant(
        "whatever lies there under our message id is ours",
        _JETSTREAM,
        "if message is None or not is_stored_as(frame, message):",
        "if message is None:",
        _log("a_message_id_used_by_another_message_is_refused"),
    ),
    Mutant(
        "a compare-and-set in doubt is not looked for",
        _JETSTREAM,
        "elif write.fence is not None and write.fence.subject == first.subject:",
        "elif write.fence is None and write.frames == ():",
        _log("a_repeated_compare_and_set_is_not_refused_by_itself"),
    ),
    Mutant(
        "a fenced write in doubt is not looked for",
        _JETSTREAM,
        "        elif write.in_doubt:\n            after = write.after\n",
        "",
        _log("a_write_in_doubt_is_looked_for_when_another_fence_has_fallen"),
    ),
    Mutant(
        "a write without an id is repeated",
        _JETSTREAM,
        "if not write.repeatable or write.left_s <= pause_s:",
        "if write.left_s <= pause_s:",
        _faults("a_write_without_an_id_is_never_repeated"),
    ),
    Mutant(
        "silence is taken for a refusal",
        _JETSTREAM,
        '            write.in_doubt = True\n            write.note("no acknowledgement came")\n            return None\n',
        '            return Refused(Reason.BUSY, 0, "no acknowledgement came")\n',
        _faults("a_lost_acknowledgement_is_found_out"),
    ),
    Mutant(
        "a log made anew is written on",
        _JETSTREAM,
        "        if ack.seq <= write.last_known:\n",
        "        if ack.seq < 0:\n",
        _log("a_write_into_a_log_that_was_made_anew_is_told"),
    ),
    Mutant(
        "a log made anew is read on",
        _STREAM,
        "    if found.created_ns != opened.created_ns:\n",
        "    if found.created_ns < 0:\n",
        ("tests/integration/test_recreated_log.py",),
    ),
    Mutant(
        "a log that went back is read on",
        _STREAM,
        "    if found.last_seq < last_known:\n",
        "    if found.last_seq < 0:\n",
        _log("a_log_that_ends_before_the_position_is_gone"),
    ),
    Mutant(
        "a delivery that got lost is not missed",
        _FOLLOW,
        "        if delivery != self._deliveries + 1:\n",
        "        if delivery <= self._deliveries:\n",
        _faults("a_delivery_that_got_lost_is_fetched_again"),
    ),
    Mutant(
        "frames may have any size",
        _STORED,
        "    if largest > FRAME_BYTES_MAX:\n",
        "    if largest > 100 * FRAME_BYTES_MAX:\n",
        _log("a_frame_has_a_largest_size"),
    ),
    Mutant(
        "headers smuggle in lines",
        "core/agentflow/connection.py",
        'if text.count("\\r") != len(headers) or text.count("\\n") != len(headers) or "\\x00" in text:',
        'if "\\x00" in text:',
        ("tests/integration/test_bus.py::test_a_header_cannot_smuggle_in_another",),
    ),
    Mutant(
        "acknowledged is not fsynced",
        "nodes/agentflow_nodes/embedded/server.py",
        '"always" if self._sync == "always" else "2m"',
        '"2m"',
        ("tests/integration/test_embedded.py::test_the_server_is_told_what_we_rely_on",),
    ),
)
