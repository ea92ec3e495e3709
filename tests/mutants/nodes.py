"""Defences of master and worker: who lives, who is deposed, what may run, and what is left behind."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

_LEADER: Final = "nodes/agentflow_nodes/master/leader.py"
_LIVENESS: Final = "nodes/agentflow_nodes/master/liveness.py"
_PROCESSES: Final = "nodes/agentflow_nodes/worker/processes.py"
_REAPER: Final = "nodes/agentflow_nodes/worker/reaper.py"
_WORKER: Final = "nodes/agentflow_nodes/worker/node.py"


def _liveness(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_liveness.py::test_{name}" for name in names)


def _processes(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/test_processes.py::test_{name}" for name in names)


NODES: Final = (
    Mutant(
        "connected but deaf passes for alive",
        _LIVENESS,
        "            elif self._is_deaf(",
        "            elif worker is None and self._is_deaf(",
        _liveness("one_that_beats_but_does_not_read_is_given_up"),
        quick=True,
    ),
    Mutant(
        "silence counts over our own absence",
        _LIVENESS,
        "        if not self._connected:\n            return []\n",
        "",
        _liveness("after_an_election_or_a_gap_everybody_has_a_full_time_to_live"),
    ),
    Mutant(
        "a gap leaves no fresh time to live",
        _LIVENESS,
        "        self._fresh_at = self._clock()\n        self._unread.clear()\n",
        "        self._unread.clear()\n",
        _liveness("after_an_election_or_a_gap_everybody_has_a_full_time_to_live"),
    ),
    Mutant(
        "heartbeats of dead incarnations count",
        _LIVENESS,
        "self._heard.setdefault((worker, beat.incarnation), _Heard(now, now))",
        "self._heard.setdefault((worker, max((k[1] for k in self._heard), default=beat.incarnation)), _Heard(now, now))",
        ("tests/unit/test_incarnations.py",),
    ),
    Mutant(
        "a deposed leader goes on",
        _LEADER,
        "        if state.elected_seq != self._fence.seq:\n            return End.DEPOSED\n",
        "",
        ("tests/unit/test_term.py::test_a_leader_at_rest_notices_that_another_was_elected",),
    ),
    Mutant(
        "a leader plans without what it has written",
        _LEADER,
        "        if state.seq < self._written_seq:\n            return await self._read_back()\n",
        "",
        ("tests/unit/test_term.py::test_nothing_is_planned_before_what_was_written_is_read_back",),
        quick=True,
    ),
    Mutant(
        "elections without compare-and-set",
        _LEADER,
        "appended = await self._log.append(frame, fence=Fence(subject, last_seq))",
        "appended = await self._log.append(frame)",
        ("tests/unit/test_term.py::test_of_two_at_once_one_is_elected_and_the_log_holds_one_election",),
    ),
    Mutant(
        "an election of a namesake passes for our own",
        _LEADER,
        " and not await self._is_among(unheard):",
        " and state.leader != self._name:",
        ("tests/unit/test_term.py::test_of_two_with_one_name_the_later_is_a_successor_and_is_not_contested",),
        quick=True,
    ),
    Mutant(
        "an election of our own of which we did not hear passes for a successor",
        _LEADER,
        " and not await self._is_among(unheard):",
        ":",
        ("tests/unit/test_term.py::test_an_election_of_ones_own_of_which_nothing_was_heard_is_no_successor",),
    ),
    Mutant(
        "who cannot write does not hear that it is to make way",
        _LEADER,
        "            if self._end is not None:\n                return appended\n",
        "            if self._end is End.STUCK:\n                return appended\n",
        ("tests/unit/test_seat.py::test_one_that_cannot_write_makes_way_at_once_when_asked",),
    ),
    Mutant(
        "whom the log names is waited for for ever",
        "nodes/agentflow_nodes/master/seat.py",
        'state.leader if now - self._elected_at < self._patience_s else ""',
        "state.leader",
        ("tests/unit/test_seat.py::test_one_elected_who_never_says_so_is_not_waited_for_for_ever",),
    ),
    Mutant(
        "a worker runs what another incarnation was assigned",
        _WORKER,
        "if assigned.incarnation != self._incarnation:",
        "if assigned.incarnation < 0:",
        ("tests/integration/test_assignments.py::test_only_what_names_its_incarnation_runs",),
    ),
    Mutant(
        "an assignment stored twice runs twice",
        _WORKER,
        " and self._seen_before(message):",
        " and False:",
        ("tests/integration/test_worker.py::test_an_assignment_stored_twice_is_run_once",),
    ),
    Mutant(
        "a suspect runs before its start is acknowledged",
        "nodes/agentflow_nodes/worker/slots.py",
        "            await self._writer.write([_started(run)])\n",
        "            self._writer.say(_started(run))\n",
        ("tests/integration/test_assignments.py::test_a_suspect_runs_once_its_start_is_acknowledged",),
    ),
    Mutant(
        "only the first process of a run is killed",
        _REAPER,
        "        os.killpg(pgid, signum)\n",
        "        os.kill(pgid, signum)\n",
        ("tests/integration/test_process_groups.py",),
    ),
    Mutant(
        "what left its group is not looked for",
        _PROCESSES,
        "return seen.session == self.pid or seen.token == self.token",
        "return seen.session == self.pid",
        _processes("what_escaped_its_group_is_found"),
    ),
    Mutant(
        "nobody cleans up behind a killed worker",
        _REAPER,
        "    if not register.released:\n        reap(",
        "    if register.released:\n        reap(",
        _processes("a_killed_worker_leaves_nothing"),
    ),
    Mutant(
        "daemons left behind are not swept",
        _PROCESSES,
        "return seen.token in tokens",
        "return False",
        _processes("a_daemon_left_behind_is_swept"),
    ),
    Mutant(
        "what ignores SIGTERM lives",
        _PROCESSES,
        "            await self._dismiss(child, until)\n            kill_group(child.pid, signal.SIGKILL)\n            await self._census.sweep(child.owns)\n",
        "            await self._dismiss(child, until)\n",
        _processes("what_ignores_term_is_killed"),
    ),
    Mutant(
        "our settings reach the tasks",
        "nodes/agentflow_nodes/worker/attempts.py",
        "for name, value in os.environ.items() if not name.startswith(_HIDDEN)",
        "for name, value in os.environ.items()",
        ("tests/integration/test_client.py::TestPrograms::test_our_own_settings_are_not_in_its_environment",),
    ),
    Mutant(
        "the second of a name goes unnoticed",
        _WORKER,
        "            case WorkerJoined() if seq > self._incarnation and event.instance != self._instance:\n",
        "            case WorkerJoined() if seq < 0:\n",
        ("tests/integration/test_worker.py::test_the_second_of_a_name_replaces_the_first",),
    ),
)
