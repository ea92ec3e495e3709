"""What must hold of a run, judged from the log, the clients' and the tasks' journals.

Every check counts what it looked at: one that looked at nothing has checked nothing, and a
run over many seeds fails if there is one.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from agentflow import wire
from agentflow.checks import Bad
from agentflow.domain.fold import fold
from agentflow.domain.plan import Plan, Silence, plan
from agentflow.domain.state import APPLIED, Kind, Namespace, Verdict
from agentflow.events import (
    Event,
    EventRejected,
    PolicyChanged,
    Role,
    TaskAssigned,
    TaskCompleted,
    TaskFailed,
    TaskStarted,
    TaskSubmitted,
    WorkflowSubmitted,
)
from agentflow.frames import Decision, Judged, encode, judge
from agentflow.log.port import Message
from tests.sim.bodies import Began
from tests.sim.client import Intent
from tests.sim.locks import Hold
from tests.sim.master import Observed
from tests.sim.model import FINAL, Attempt, Check, Model, Where
from tests.unit.dump import digest

_SUBMISSIONS: Final = frozenset({TaskSubmitted.kind, WorkflowSubmitted.kind})
SAMPLED: Final = 5
"""One plan in so many is made again."""


class Evidence(Struct):
    """What a run leaves behind."""

    seed: int
    namespace: str
    messages: Sequence[Message]
    intents: Sequence[Intent]
    journal: Sequence[Began]
    holds: Sequence[Hold]
    observed: Sequence[Observed]
    states: Mapping[str, Namespace]
    """The masters' folds at the end, by name."""
    failures: Sequence[str]
    """Processes that failed, and what they failed of."""
    unrest: str
    """What was still to come when it should have come to rest; "" if nothing."""


class Findings(Struct):
    """What the checks say of it."""

    violations: list[str]
    looked: Counter[str]
    seen: Counter[str]
    digest: str
    """Of the log and all verdicts."""


def check(evidence: Evidence) -> Findings:
    """Judge a run."""
    audit = _Audit(evidence)
    audit.walk()
    audit.compare_submissions()
    audit.compare_effects()
    audit.compare_holds()
    audit.compare_ends()
    audit.compare_folds()
    audit.must(not evidence.failures, Check.PROCESSES, *evidence.failures)
    audit.must(not evidence.unrest, Check.REST, evidence.unrest)
    model = audit.model
    return Findings(model.violations, model.looked, model.seen, audit.hash.hexdigest())


class _Audit:
    """One pass over the log, and what it is compared with."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.model = Model()
        self.must = self.model.must
        self.state = Namespace(evidence.namespace)
        self.hash = hashlib.sha256()
        self.plans = _Plans(evidence)
        self.submitted: dict[str, list[tuple[int, Kind]]] = defaultdict(list)
        """By id: where it was submitted, and what the fold made of it."""
        self.repeated: set[tuple[str, int, int]] = set()
        """Assignments that are in the log twice.

        The server recognises a repeated write by its time of arrival: one that a step of its
        clock has aged is stored again. The fold supersedes it, and no worker runs it.
        """
        self.clock_ms = 0
        self.server_ms = 0

    def walk(self) -> None:
        """Fold the log, and let the model follow."""
        for message in self.evidence.messages:
            self.plans.make(self.state)
            judged = judge(message.subject, message.data, message.headers)
            verdicts = fold(self.state, message.seq, message.time_ns, judged)
            self._note(message, verdicts)
            self._advance(message.time_ns // 1_000_000)
            self._take(message, judged, verdicts)
            self.state.ended.clear()

    def _note(self, message: Message, verdicts: Sequence[Verdict]) -> None:
        said = "".join(verdict.kind[0] for verdict in verdicts)
        self.hash.update(
            f"{message.seq} {message.time_ns} {message.subject} {message.headers} {said}".encode()
        )
        self.hash.update(message.data)

    def _advance(self, server_ms: int) -> None:
        """Log time: the server's, as far as it goes forward."""
        if self.clock_ms == 0:
            self.clock_ms = server_ms
        self.clock_ms += max(0, server_ms - (self.server_ms or server_ms))
        self.server_ms = server_ms

    def _take(self, message: Message, judged: Judged, verdicts: Sequence[Verdict]) -> None:
        where = Where(message.seq, self.clock_ms, judged.actor)
        if judged.decision is not None and judged.role is Role.LEADER:
            where.epoch, where.decided_ms = judged.decision.epoch, judged.decision.now_ms
            self._check_decision(message, judged, judged.decision)
        # A verdict on the whole message is one on each of its events.
        each = itertools.repeat(verdicts[0]) if len(verdicts) == 1 else verdicts
        for item, verdict in zip(judged.items, each, strict=False):
            self._count(item, verdict)
            if isinstance(item, TaskAssigned) and verdict.kind is Kind.SUPERSEDED:
                self.repeated.add((item.id, item.attempt, item.incarnation))
            if judged.kind in _SUBMISSIONS:
                self.submitted[getattr(item, "id", "")].append((message.seq, verdict.kind))
            if verdict is APPLIED and not isinstance(item, Bad):
                if where.epoch:
                    self.must(where.epoch == self.model.epoch, Check.LEADER, message.seq)
                self._follow(item, where)

    def _follow(self, event: Event, where: Where) -> None:
        try:
            self.model.take(event, where)
        except LookupError as error:
            self.must(False, Check.KNOWN, where.seq, event, repr(error))
        else:
            self.must(True, Check.KNOWN)

    def _check_decision(self, message: Message, judged: Judged, decision: Decision) -> None:
        stale = decision.epoch != self.model.epoch
        self.must(not stale, Check.FENCE, message.seq, decision)
        self.must(decision.basis < message.seq, Check.BASIS, message.seq, decision)
        made = self.plans.of(decision)
        events = [item for item in judged.items if not isinstance(item, Bad | PolicyChanged)]
        if made is not None and events and not stale:
            planned = made.decisions.get((judged.kind, judged.actor), [])
            same = encode(events)[1:-1] in encode(planned)
            self.must(same, Check.REPLAY, message.seq, judged.kind, judged.actor)

    def _count(self, item: Event | Bad, verdict: Verdict) -> None:
        seen = self.model.seen
        if verdict is not APPLIED:
            seen[f"events_{verdict.kind}"] += 1
        if verdict.kind is Kind.SUPERSEDED:
            seen["outcomes_superseded"] += isinstance(item, TaskCompleted | TaskFailed)
            seen["assignments_superseded"] += isinstance(item, TaskAssigned)
            seen["starts_superseded"] += isinstance(item, TaskStarted)
        seen["answers"] += isinstance(item, EventRejected)

    # Against the journals.

    def compare_submissions(self) -> None:
        """What clients were told, and what the log holds."""
        intended = {intent.id for intent in self.evidence.intents}
        for name in self.submitted:
            self.must(name in intended, Check.NOWHERE, name)
        for intent in self.evidence.intents:
            stored = self.submitted.get(intent.id, [])
            if intent.fate == "ok":
                held = any(seq == intent.seq for seq, _ in stored)
                self.must(held, Check.STORED, intent.id, intent.seq)
                kinds = {kind for _, kind in stored}
                self.must(kinds & {Kind.APPLIED, Kind.REJECTED}, Check.COUNTS, intent.id)
            if intent.refused_seq and intent.tasks:  # without tasks: under the id of another, which is there
                early = [seq for seq, _ in stored if seq <= intent.refused_seq]
                self.must(not early, Check.REFUSED, intent.id, early)

    def compare_effects(self) -> None:
        """What ran, and what the log says might."""
        self._compare_runs()
        lives, incarnations = self.model.lives, self.model.incarnations
        for began in self.evidence.journal:
            life = lives.get(began.task)
            attempts = life.attempts if life is not None else []
            attempt = attempts[began.attempt - 1] if 0 < began.attempt <= len(attempts) else None
            if began.inputs:
                self.must(not began.wrong, Check.INPUTS, began)
            known = attempt is not None and _is_of(attempt, began)
            self.must(known, Check.ASSIGNED, began)
            if attempt is None or life is None or not known:
                continue
            alive = incarnations[began.incarnation].ended_seq > began.last_seq
            if alive:
                self.must(attempt.ended_seq > began.last_seq, Check.BEGUN, began)
            else:
                self.model.seen["begun_by_the_lost"] += 1
            if began.suspect:
                said = attempt.started_seq <= began.last_seq or not alive
                self.must(said, Check.SAID, began)

    def _compare_runs(self) -> None:
        """No assignment is run twice, however often it was stored."""
        runs = Counter((began.task, began.attempt, began.incarnation) for began in self.evidence.journal)
        for run, count in runs.items():
            self.must(count == 1, Check.RUN_ONCE, *run, count)
        self.model.seen["assignments_stored_twice"] += len(self.repeated & runs.keys())

    def compare_holds(self) -> None:
        """What was done under a lock: one after the other, with tokens that rise."""
        latest: dict[str, Hold] = {}
        for hold in sorted(self.evidence.holds, key=lambda hold: hold.since_s):
            before = latest.get(hold.lock)
            latest[hold.lock] = hold
            self.model.seen["runs_under_locks"] += 1
            if before is not None:
                self.must(hold.since_s >= before.until_s, Check.EXCLUSIVE, before, hold)
                self.must(hold.token > before.token, Check.TOKENS, before, hold)

    def compare_ends(self) -> None:
        """Everything has ended, once, and the fold knows how."""
        for life in self.model.lives.values():
            self.must(life.state in FINAL, Check.ENDS, life.id, life.state)
            closed = self.state.closed.get(life.id)
            same = closed is not None and closed.state == life.state
            self.must(same, Check.AGREE, life.id, life.state, closed)
            if life.state == "completed":
                self.must(not life.waits_for, Check.DEPENDENCIES, life.id)

    def compare_folds(self) -> None:
        """Every master has come to the same, whatever stretches it read."""
        fresh = digest(self.state)
        for name, state in self.evidence.states.items():
            self.must(digest(state) == fresh, Check.SAME, name)
        # What comes again changes nothing.
        for message in self.evidence.messages[-50:]:
            judged = judge(message.subject, message.data, message.headers)
            again = fold(self.state, message.seq, message.time_ns, judged)
            self.must(not again, Check.ONCE, message.seq)
        self.must(digest(self.state) == fresh, Check.SAME, "after redelivery")


def _is_of(attempt: Attempt, began: Began) -> bool:
    given = (attempt.incarnation, attempt.worker)
    return given == (began.incarnation, began.worker) and attempt.assigned_seq <= began.last_seq


class _Plans:
    """Some of the leaders' plans, made again on a fold of what they had folded."""

    def __init__(self, evidence: Evidence) -> None:
        self._wanted: dict[int, dict[Decision, Plan | None]] = defaultdict(dict)
        self._silences: dict[tuple[int, int], Sequence[Silence]] = {
            (each.basis, each.now_ms): each.silences for each in evidence.observed
        }
        for message in evidence.messages:
            header = (message.headers or {}).get(wire.DECISION)
            if header is not None:
                decision = Decision(*map(int, header.split()))
                if decision.basis % SAMPLED == evidence.seed % SAMPLED:
                    self._wanted[decision.basis][decision] = None

    def make(self, state: Namespace) -> None:
        """Make the plans whose basis is this fold."""
        wanted = self._wanted.get(state.seq)
        if wanted is not None:
            for decision in wanted:
                silences = self._silences.get((decision.basis, decision.now_ms), ())
                wanted[decision] = plan(state, decision.now_ms, silences)

    def of(self, decision: Decision) -> Plan | None:
        """The plan made for a decision, if it was among the chosen."""
        return self._wanted.get(decision.basis, {}).get(decision)
