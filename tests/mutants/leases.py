"""Defences in leases: deadlines, compare-and-set, and the fate of writes in doubt."""

from __future__ import annotations

from typing import Final

from tests.mutants.mutant import Mutant

_JETSTREAM: Final = "core/agentflow/leases/jetstream.py"
_MEMORY: Final = "core/agentflow/leases/memory.py"


def _server(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/test_leases.py::TestOneServer::test_{name}" for name in names)


def _memory(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_memory_leases.py::TestMemoryLeases::test_{name}" for name in names)


LEASES: Final = (
    Mutant(
        "no margin",
        _JETSTREAM,
        "lease.ttl_s * (1 - MARGIN_SHARE)",
        "lease.ttl_s",
        ("tests/integration/test_lease_deadline.py",),
    ),
    Mutant(
        "no margin (memory)",
        _MEMORY,
        "lease.ttl_s * (1 - MARGIN_SHARE)",
        "lease.ttl_s",
        _memory("the_holder_gives_up_before_the_server_does"),
        quick=True,
    ),
    Mutant(
        "the deadline counts from the answer",
        _JETSTREAM,
        "return _held(lease, ack.seq, before)",
        "return _held(lease, ack.seq, self._clock())",
        ("tests/integration/test_lease_deadline.py",),
    ),
    Mutant(
        "renewals last for ever",
        _JETSTREAM,
        "            wire.TTL: str(lease.ttl_s),\n",
        '            wire.TTL: "never" if lease.epoch else str(lease.ttl_s),\n',
        _server("a_lease_ends_by_itself_though_it_was_renewed"),
    ),
    Mutant(
        "leases are written without compare-and-set",
        _JETSTREAM,
        "            wire.EXPECTED_SUBJECT_SEQ: str(lease.revision),\n",
        "",
        _server("one_of_many_acquires"),
    ),
    Mutant(
        "a renewal in doubt is not read back",
        _JETSTREAM,
        "            if last is not None and msg_id_of(last) == write_id:\n"
        "                return _held(lease, last.seq, before)\n",
        "            return None\n",
        _server("a_renewal_whose_answer_was_lost_is_found_out"),
    ),
    Mutant(
        "eviction takes whatever is there",
        _JETSTREAM,
        "            elif last.seq != entry.revision:\n                return self._entry(last).epoch != entry.epoch\n",
        "            else:\n                base = last.seq\n",
        _server("a_holder_who_wrote_is_not_evicted"),
    ),
    Mutant(
        "what another holds is taken by the next renewal",
        _JETSTREAM,
        "        if lease.epoch:\n            return None\n",
        "",
        _server(
            "a_released_lease_is_free_and_its_epoch_past", "a_lease_ends_by_itself_though_it_was_renewed"
        ),
    ),
    Mutant(
        "revisions of a bucket made anew begin at 1",
        "core/agentflow/leases/bucket.py",
        'return config | ({"first_seq": first_seq} if first_seq else {})',
        "return config",
        ("tests/integration/test_leases.py::test_revisions_begin_where_they_are_told_to",),
    ),
)
