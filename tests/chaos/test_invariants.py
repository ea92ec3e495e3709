"""Each invariant fires on a run in which it is broken, and is silent on one in which nothing is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.chaos.audit import check, invariants
from tests.chaos.folding import position
from tests.chaos.small_run import LAST, W1, W2, Run, empty, sound_run

LATER = LAST + 5


@pytest.fixture(scope="module")
def written() -> Run:
    return sound_run()


@pytest.fixture
def run(written: Run) -> Iterator[Run]:
    """The sound run; what a test does to it is undone."""
    written.sql("begin")
    yield written
    written.sql("rollback")


SPOILT: dict[str, Callable[[Run], None]] = {
    "I01_acknowledged_submission_lost": lambda run: run.add("sub", "client-0", 99, "bulk", "ok", None),
    "I01b_acknowledged_cancellation_lost": lambda run: run.add("sub", "client-0", 98, "cancel", "ok", "t9"),
    "I02_phantom_submission": lambda run: run.sql("update sub set result = 'fail' where n = 1"),
    "I03_one_key_two_tasks": lambda run: _submitted(run, 1, "t9"),
    "I03b_one_id_two_tasks": lambda run: _submitted(run, 99, "t1"),
    "I03c_conflict_accepted": lambda run: run.sql("update submitted set verdict = 'applied' where n = 6"),
    "I04_not_exactly_one_end": lambda run: run.task("t9", 4, "noop"),
    "I04b_end_that_ends_nothing": lambda run: run.event(LATER, "task.cancelled", task="t9"),
    "I05_event_after_end": lambda run: run.event(LATER, "task.started", "w1", task="t1"),
    "I06_attempts_not_1_to_n": lambda run: _assigned(run, "t1", 3, W2),
    "I07a_word_of_another_attempt_counted": lambda run: _completed(run, LATER, "t2", 1, W2),
    "I07b_word_of_the_dead_counted": lambda run: _completed(run, LATER, "t2", 2, W1),
    "I08a_two_leaders_in_one_epoch": lambda run: run.sql("update msg set writer = 'm9' where seq = 8"),
    "I08b_deposed_leader_reached_the_log": lambda run: run.message(LATER, "task.assigned", 1),
    "I08c_decision_of_another_epoch_counted": lambda run: run.said(LATER, "task.stop", epoch=1),
    "I08d_epochs_not_one_by_one": lambda run: run.sql("update msg set epoch = 4 where seq = 15"),
    "I09a_lock_held_twice": lambda run: run.sql(
        "update fx set mono_ns = 1000 where what = 'held' and token = 40"
    ),
    "I09b_token_not_rising": lambda run: run.sql("update lock set token = 39 where token = 41"),
    "I09c_write_under_no_token": lambda run: run.sql("update fx set token = 99 where token = 41"),
    "I09d_more_holders_than_permits": lambda run: _held_too(run, "S", 43),
    "I09e_lower_token_written": lambda run: run.add("fx", 9, "write", "L", 0, "client-0", 21, 9, 40),
    "I10_started_before_what_it_depends_on": lambda run: run.sql("update ev set pos = 1 where seq = 19"),
    "I11a_masters_know_otherwise": lambda run: run.sql("update answer set state = 'running'"),
    "I11b_something_left_at_rest": lambda run: run.sql("update rest set size = 1"),
    "I12a_not_exactly_one_verdict": lambda run: run.sql("delete from ev where seq = 5"),
    "I12b_node_spoke_nonsense": lambda run: run.event(LATER, "task.completed", "w1", verdict="quarantined"),
    "I12c_rejection_not_answered": lambda run: run.sql("delete from ev where kind = 'event.rejected'"),
    "I12d_sound_submission_rejected": lambda run: run.add(
        "submitted", LATER, 0, "client-0", 1, "t1", "rejected", "bad_type", False
    ),
    "I13a_gap_in_the_log": lambda run: run.sql("delete from msg where seq = 20"),
    "I13b_log_changed_after_it_was_read": lambda run: run.sql("update msg set live_hash = 0 where seq = 20"),
    "I13c_another_log": lambda run: run.add("identity", 9, "AF_chaos", 2, 1, LAST),
    "I13d_master_ahead_of_the_log": lambda run: run.sql(f"update answer set seq = {LATER}"),  # noqa: S608
    "I13e_log_went_back": lambda run: run.add("identity", 9, "AF_chaos", 1, 1, LAST - 1),
    "I15a_another_namespace": lambda run: run.sql("update msg set namespace = 'other' where seq = 6"),
    "I15b_worker_spoke_for_another": lambda run: run.sql("update ev set actor = 'w2' where seq = 6"),
    "I16a_assigned_after_cancelled": lambda run: _assigned(run, "t3", 1, W2),
    "I16b_assigned_although_known_to_be_unwanted": lambda run: _assigned(run, "t3", 1, W2),
    "I17a_too_many_attempts": lambda run: run.event(
        LATER, "task.failed", "w2", task="t4", attempt=2, error="error"
    ),
    "I17b_tried_again_too_soon": lambda run: run.sql("update ev set time_ms = 901 where seq = 10"),
    "I17c_hopeless_tried_again": lambda run: run.event(LATER, "task.retried", task="wf/x", attempt=1),
    "I19a_more_at_once_than_slots": lambda run: _begun_at_once(run, 3),
    "I19b_holds_more_than_it_can": lambda run: _held_at_once(run, 4),
    "I19c_suspects_together": lambda run: _held_at_once(run, 2, suspect=True),
    "I19d_more_cores_than_there_are": lambda run: _held_at_once(run, 2, cpu=3.0),
    "I20a_not_alive_afterwards": lambda run: run.sql("update liveness set ok = false"),
    "I20b_client_never_told": lambda run: run.add("told", "client-0", 2, "t2", "", 0),
    "I20c_node_ended_by_itself": lambda run: run.add("exited", "worker-0", 23, 1, True, False),
    "I21_timed_out_early": lambda run: run.sql("update ev set run_us = 100 where seq = 31"),
    "I22_object_not_what_it_was": lambda run: run.sql("update object set wrong = 'other bytes'"),
    "I23_told_otherwise": lambda run: run.sql("update told set state = 'failed' where task = 't1'"),
    "I24_secret_shown": lambda run: run.sql("update file set canary = true"),
    "E01_effect_of_nothing_assigned": lambda run: run.sql("update fx set worker = 'w2'"),
    "E02_completed_without_effect": lambda run: run.sql("delete from fx where what = 'end'"),
    "H01_history_is_not_the_log": lambda run: run.sql("update history set wrong = '36 rows, expected 37'"),
    "E03_one_assignment_run_twice": lambda run: run.add("fx", 9, "begin", "t1", 1, "w1", 11, 9, 0),
}


def _submitted(run: Run, number: int, task: str) -> None:
    run.add("submitted", LATER, 0, "client-0", number, task, "applied", None, False)


def _assigned(run: Run, task: str, attempt: int, incarnation: int) -> None:
    run.event(LATER, "task.assigned", "w2", task=task, attempt=attempt, incarnation=incarnation, basis=LAST)


def _completed(run: Run, seq: int, task: str, attempt: int, incarnation: int) -> None:
    actor = f"w{incarnation - 1}"
    run.event(seq, "task.completed", actor, task=task, attempt=attempt, incarnation=incarnation)


def _held_too(run: Run, name: str, token: int) -> None:
    """Somebody holds it besides, before and after the others."""
    run.add("lock", position(36, 1), "lock.acquired", name, token, "client-1", "semaphore", 1, "applied")
    run.add("fx", 20, "hold", name, 0, "client-1", 22, 1, token)
    run.add("fx", 21, "held", name, 0, "client-1", 22, 9999, token)


def _begun_at_once(run: Run, count: int) -> None:
    for number in range(count):
        run.add("fx", 10 + number, "begin", f"t{number}", 1, "w1", 11, 0, 0)


def _held_at_once(run: Run, count: int, *, suspect: bool = False, cpu: float = 0.0) -> None:
    for number in range(count):
        run.task(f"held-{number}", LATER, "noop", cpu=cpu)
        run.event(
            LATER + number,
            "task.assigned",
            "w2",
            task=f"held-{number}",
            attempt=1,
            incarnation=W2,
            suspect=suspect,
        )


def broken(run: Run, only: str = "") -> dict[str, int]:
    """The invariants that a run breaks, and how often."""
    return {finding.name: finding.violations for finding in check(run.connection, only) if finding.violations}


def test_nothing_is_found_where_nothing_is_wrong_and_every_query_had_something_to_look_at(run: Run) -> None:
    findings = check(run.connection)
    assert not [finding for finding in findings if finding.violations]
    assert not [finding.name for finding in findings if not finding.looked]


def test_there_is_a_spoilt_run_for_every_invariant() -> None:
    assert set(SPOILT) == {invariant.name for invariant in invariants()}


@pytest.mark.parametrize("name", SPOILT)
def test_a_broken_invariant_is_found(run: Run, name: str) -> None:
    SPOILT[name](run)
    assert broken(run, name)


def test_a_query_without_rows_has_checked_nothing(run: Run) -> None:
    empty(run.connection)
    assert set(broken(run)) == {invariant.name for invariant in invariants()}


def test_what_a_run_did_not_contain_need_not_be_checked(run: Run) -> None:
    run.sql("delete from lock")
    run.sql("delete from fx where what in ('hold', 'write', 'held')")
    assert set(broken(run)) == {invariant.name for invariant in invariants() if invariant.part == "lock"}
    run.sql("delete from part where name = 'lock'")
    assert not broken(run)
