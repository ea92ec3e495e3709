"""Defences in the contract and the fold: who is believed, and what counts once."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

_ASKED: Final = "core/agentflow/domain/asked.py"
_DECIDED: Final = "core/agentflow/domain/decided.py"
_FOLD: Final = "core/agentflow/domain/fold.py"
_FRAMES: Final = "core/agentflow/frames.py"
_MANY: Final = "core/agentflow/domain/many.py"
_MASTERS: Final = "core/agentflow/domain/masters.py"
_PLAN: Final = "core/agentflow/domain/plan.py"
_POLICIES: Final = "core/agentflow/domain/policies.py"
_REPORTED: Final = "core/agentflow/domain/reported.py"
_STEPS: Final = "core/agentflow/domain/steps.py"


def _fold(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_fold.py::test_{name}" for name in names)


def _many(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_many.py::test_{name}" for name in names)


def _frames(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_frames.py::test_{name}" for name in names)


def _plan(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_plan.py::test_{name}" for name in names)


DOMAIN: Final = (
    Mutant(
        "decisions of earlier terms count",
        _DECIDED,
        "if at.epoch != state.epoch:",
        "if at.epoch > state.epoch:",
        _fold("nothing_decided_in_an_old_term_changes_anything"),
        quick=True,
    ),
    Mutant(
        "an election of any epoch counts",
        _MASTERS,
        " or event.epoch != state.epoch + 1:",
        ":",
        _fold("an_election_counts_if_it_is_the_next"),
    ),
    Mutant(
        "an election on any subject counts",
        _MASTERS,
        "at.actor != wire.ELECTED_ACTOR or ",
        "",
        _fold("an_election_on_another_subject_is_none"),
    ),
    Mutant(
        "outcomes of earlier attempts count",
        _REPORTED,
        "        or task.attempt != event.attempt\n",
        "",
        _fold("outcomes_of_others_do_not_count"),
        quick=True,
    ),
    Mutant(
        "outcomes of dead incarnations count",
        _REPORTED,
        "        or worker.incarnation != event.incarnation\n",
        "",
        _fold("outcomes_of_others_do_not_count"),
    ),
    Mutant(
        "workers speak for each other",
        _REPORTED,
        "        or worker.name != at.actor\n",
        "",
        _fold("outcomes_of_others_do_not_count"),
    ),
    Mutant(
        "a task may be assigned twice",
        _DECIDED,
        "task.state is not State.READY or event.attempt != task.attempt + 1:",
        "event.attempt != task.attempt + 1:",
        _fold("assignments_that_come_too_late", "a_task_is_assigned_once"),
    ),
    Mutant(
        "ids of ended tasks are forgotten",
        _ASKED,
        " or state.closed.get(new_id)\n    if known",
        "\n    if known",
        _fold("ids_of_ended_tasks_are_remembered"),
        quick=True,
    ),
    Mutant(
        "whole frames of an earlier term count",
        _MANY,
        " or at.epoch != state.epoch",
        "",
        _many("assignments_to_nobody_and_of_an_old_term"),
    ),
    Mutant(
        "a frame may assign a task twice, or end it twice",
        _MANY,
        " if len(set(named)) == len(named) else None",
        "",
        _many("assignments_of_what_does_not_wait", "outcomes_of_what_does_not_run"),
    ),
    Mutant(
        "outcomes of earlier attempts count in whole frames",
        _MANY,
        "            or event.attempt != task.attempt\n",
        "",
        _many("one_outcome_unlike_the_others"),
    ),
    Mutant(
        "whole frames forget the ids of ended tasks",
        _MANY,
        "        and closed.previous.keys().isdisjoint(once)\n",
        "",
        _many("one_submission_unlike_the_others"),
    ),
    Mutant(
        "the same id with another body passes for a duplicate",
        _ASKED,
        "        if known.digest == digest:\n",
        "        if known is not None:\n",
        _fold("the_same_id_with_another_body_is_a_conflict"),
    ),
    Mutant(
        "ids older than those remembered pass for new",
        _ASKED,
        "if made_ms < state.closed.horizon_ms:",
        "if made_ms < 0:",
        _fold("a_uuid7_from_before_the_ids_remembered_is_too_old"),
    ),
    Mutant(
        "a full log takes submissions",
        _ASKED,
        "if not state.policy.accepting:",
        "if state.policy is None:",
        _fold("a_nearly_full_log_takes_no_submissions"),
    ),
    Mutant(
        "a message delivered again is folded again",
        _FOLD,
        "    if seq <= state.seq:\n",
        "    if seq < 0:\n",
        _fold("redelivery_of_any_stretch_changes_nothing"),
    ),
    Mutant(
        "log time goes back with the server's clock",
        _FOLD,
        "    elif server_ms > state.server_ms:\n",
        "    else:\n",
        _fold("log_time_never_goes_back"),
    ),
    Mutant(
        "answers to bad input pile up",
        _FOLD,
        "if len(state.answers) >= ANSWERS_MAX:",
        "if len(state.answers) < 0:",
        _fold("answers_are_bounded"),
    ),
    Mutant(
        "a message of a level not in force counts",
        _FOLD,
        "judged.level > min(state.level, state.knows):",
        "judged.level > state.knows:",
        ("tests/unit/test_levels.py",),
    ),
    Mutant(
        "what a lost worker held is no suspect",
        _STEPS,
        "        task.suspect = not task.started or is_at_stake(state, task)\n",
        "",
        _fold("a_lost_worker_leaves_suspects"),
    ),
    Mutant(
        "a loss before the start costs a life",
        _STEPS,
        "        if task.started:\n",
        "        if task is not None:\n",
        _fold("a_lost_assignment_does_not"),
    ),
    Mutant(
        "suspects go in crowds",
        _POLICIES,
        "if line.suspect and self.suspects:",
        "if line.suspect and self.suspects < 0:",
        _plan("suspects_go_one_at_a_time_to_a_worker"),
    ),
    Mutant(
        "a task may kill workers for ever",
        _PLAN,
        "if task.losses >= losses_max and",
        "if task.losses >= 1_000_000 * losses_max and",
        _plan("a_task_that_cost_too_many_workers_is_quarantined"),
        quick=True,
    ),
    Mutant(
        "cancelled tasks are not confirmed by the leader",
        _PLAN,
        "    if state.cancels:\n        _cancel(draft)\n",
        "",
        _plan("a_cancelled_task_is_neither_assigned_nor_timed_out_nor_retried"),
    ),
    Mutant(
        "decisions need no header",
        _FRAMES,
        "if role is Role.LEADER and decision is None and",
        "if role is None and decision is None and",
        _frames("only_an_election_comes_without_a_decision"),
        quick=True,
    ),
    Mutant(
        "the fast way is trusted with any spelling",
        _FRAMES,
        "    if not same or not 0 <",
        "    if not 0 <",
        _frames("what_is_wrong_with_an_event_is_said_of_the_event"),
    ),
    Mutant(
        "keys may stand twice",
        _FRAMES,
        "return found if len(found) == len(pairs) else _Duplicated(found)",
        "return found",
        _frames("what_is_wrong_with_an_event_is_said_of_the_event"),
        quick=True,
    ),
    Mutant(
        "NaN is a number",
        "core/agentflow/checks.py",
        "return None if value - value == 0.0 else Reason.BAD_NUMBER",
        "return None",
        ("tests/unit/test_checks.py::test_unsound_arguments",),
    ),
    Mutant(
        "nesting is not bounded",
        _FRAMES,
        "    if depth > FRAME_DEPTH_MAX:\n",
        "    if depth < 0:\n",
        _frames(
            "what_is_no_frame_is_bad_as_a_whole", "the_verdict_does_not_depend_on_how_deep_the_caller_is"
        ),
    ),
    Mutant(
        "whatever lies there under our message id is ours (memory)",
        "core/agentflow/log/stored.py",
        "return stored == (frame.subject, frame.data, frame.msg_id)",
        "return stored[2] == frame.msg_id",
        (
            "tests/integration/test_log.py::TestMemoryLog::test_a_message_id_used_by_another_message_is_refused",
        ),
    ),
    Mutant(
        "after doubt a refusal is believed",
        "core/agentflow/writer.py",
        "            pauses.in_doubt = True\n",
        "",
        ("tests/unit/test_writer.py::TestFaults::test_after_doubt_a_refusal_is_not_believed",),
        quick=True,
    ),
    Mutant(
        "who is no master may be elected",
        _MASTERS,
        "    if state.level == LEVEL_FIRST:\n",
        "    if state.level >= LEVEL_FIRST:\n",
        ("tests/unit/test_masters.py",),
    ),
    Mutant(
        "the contract level falls",
        _MASTERS,
        "    if event.level < state.level:\n",
        "    if event.level < 0:\n",
        ("tests/unit/test_levels.py::test_it_never_falls",),
    ),
    Mutant(
        "two tasks run under one lock",
        _DECIDED,
        "    if demand.lock in state.lock_users:\n",
        "    if demand.lock is None:\n",
        ("tests/unit/test_locked_tasks.py::test_a_second_assignment_under_a_lock_does_not_count",),
        quick=True,
    ),
)
