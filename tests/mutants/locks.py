"""Defences of locks: the line, the deadline, and tokens that rise for ever."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

_CONTENDER: Final = "core/agentflow/locks/contender.py"
_HELD: Final = "core/agentflow/locks/held.py"
_KEEPER: Final = "core/agentflow/locks/keeper.py"
_TICKET: Final = "core/agentflow/locks/ticket.py"


def _locks(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/test_locks.py::test_{name}" for name in names)


LOCKS: Final = (
    Mutant(
        "nobody waits for those who came first",
        _TICKET,
        "if place.entry.epoch < token]",
        "if place.entry.epoch < 0]",
        _locks("contenders_exclude_each_other"),
    ),
    Mutant(
        "shared holders do not wait for an exclusive one",
        _TICKET,
        "return [place for place in earlier if place.ticket.mode is not Mode.SHARED]",
        "return []",
        _locks("shared_holders_share_and_an_exclusive_one_does_not"),
    ),
    Mutant(
        "a semaphore has a permit too many",
        _TICKET,
        "len(earlier) >= mine.ticket.permits",
        "len(earlier) > mine.ticket.permits",
        _locks("a_semaphore_has_as_many_holders_as_permits"),
    ),
    Mutant(
        "tickets of the living are taken away",
        "core/agentflow/leases/port.py",
        "        return now - self.seen >= self.ttl_s\n",
        "        return now >= self.seen\n",
        _locks("contenders_exclude_each_other"),
    ),
    Mutant(
        "a holder past its deadline does not know it",
        _KEEPER,
        "        if not self.left_s:\n",
        "        if self.left_s < 0:\n",
        _locks("a_holder_cut_off_knows_it_and_the_next_one_follows"),
    ),
    Mutant(
        "a lock past its deadline is renewed",
        _KEEPER,
        "            if not self.is_kept():\n                return False\n",
        "",
        ("tests/unit/test_keeper.py::test_nothing_is_sent_once_the_deadline_has_passed",),
    ),
    Mutant(
        "a renewal that comes too late counts",
        _KEEPER,
        "            elif self.is_kept():\n",
        "            else:\n",
        ("tests/unit/test_keeper.py::test_a_renewal_answered_too_late_changes_nothing",),
        quick=True,
    ),
    Mutant(
        "granted although the log took too long",
        _CONTENDER,
        "        await self._write([event])\n        if not keeper.is_kept():\n            raise TicketLost(keeper.reason)\n",
        "        await self._write([event])\n",
        ("tests/unit/test_contender.py::test_who_is_late_when_the_log_has_it_holds_nothing",),
    ),
    Mutant(
        "a ticket goes though its end is not in the log",
        _HELD,
        "        if said:\n            await self._remove(lease)\n",
        "        await self._remove(lease)\n",
        ("tests/unit/test_contender.py::test_a_ticket_whose_end_may_be_stored_later_is_left_to_expire",),
    ),
    Mutant(
        "who joins a watch is not told what it has told before",
        "core/agentflow/locks/lines.py",
        "        self.catch_up(waiting)\n        self._waiting[",
        "        self._waiting[",
        ("tests/unit/test_lock_line.py::test_who_joins_a_watch_is_told_what_changed_since_his_reading",),
    ),
    Mutant(
        "a reading that is too old for the watch will do",
        "core/agentflow/locks/lines.py",
        "        if since < self._floor:\n            return False\n",
        "",
        ("tests/unit/test_lock_line.py::test_whose_reading_is_too_old_reads_again",),
    ),
    Mutant(
        "granted by what the watch tells alone",
        _CONTENDER,
        "                if self._waiting.has_read:\n                    return\n",
        "                return\n",
        ("tests/unit/test_lock_line.py::test_nobody_is_granted_anything_by_what_the_watch_tells_alone",),
    ),
    Mutant(
        "a semaphore goes past who uses it differently",
        _TICKET,
        "is_full or not _agree(earlier, mine.ticket)",
        "is_full",
        ("tests/unit/test_lock_line.py::test_a_semaphore_waits_for_those_who_use_it_differently",),
    ),
    Mutant(
        "a ticket that its owner removed meanwhile is taken away",
        _CONTENDER,
        "        if self._line.place(place.entry.key) is None:\n"
        "            return  # removed while we took another away\n",
        "",
        (
            "tests/unit/test_lock_line.py::test_a_silent_ticket_that_goes_while_another_is_taken_away_is_left_alone",
        ),
    ),
    Mutant(
        "granted at once in a bucket made again",
        _CONTENDER,
        " and self._clock() >= self._bucket.granting_from",
        "",
        ("tests/unit/test_contender.py::test_in_a_bucket_made_again_nobody_holds_before_the_others_gave_up",),
    ),
    Mutant(
        "a reading without the own ticket will do",
        _CONTENDER,
        "            if all(entry.key != self._key for entry in snapshot.entries):\n"
        '                raise TicketLost("our ticket is no longer there")\n',
        "",
        ("tests/unit/test_contender.py::test_whose_ticket_is_gone_holds_nothing",),
    ),
    Mutant(
        "tokens of a bucket made again begin anew",
        "core/agentflow/locks/bucket.py",
        "            first_seq=first_seq,\n",
        "",
        _locks("a_bucket_deleted_under_a_holder_is_a_loss_and_tokens_rise"),
    ),
)
