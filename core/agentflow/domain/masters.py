"""Masters: who is registered, and which of them leads.

An election counts only if its epoch is the next and the master is known; anything else on
its subject is noise. It carries the contract level, which only rises.
"""

from __future__ import annotations

from agentflow import wire
from agentflow.domain.state import APPLIED, SUPERSEDED, At, Kind, Master, Namespace, Verdict
from agentflow.events import LeaderElected, MasterJoined, MasterLeft, Reason
from agentflow.limits import LEVEL_FIRST, MASTERS_MAX


def master_joined(state: Namespace, event: MasterJoined, at: At) -> Verdict:
    """A master is there; one of the same name that was there before is not."""
    state.masters.pop(at.actor, None)
    if len(state.masters) >= MASTERS_MAX:
        del state.masters[next(iter(state.masters))]
    state.masters[at.actor] = Master(
        name=at.actor,
        instance=event.instance,
        level=event.level,
        host=event.host,
        pid=event.pid,
        seq=at.seq,
        joined_ms=state.clock_ms,
    )
    return APPLIED


def master_left(state: Namespace, event: MasterLeft, at: At) -> Verdict:
    """A master is gone."""
    master = state.masters.get(at.actor)
    if master is None or master.instance != event.instance:
        return SUPERSEDED
    del state.masters[at.actor]
    return APPLIED


def leader_elected(state: Namespace, event: LeaderElected, at: At) -> Verdict:
    """Another leader, and the contract level in force from here on."""
    fault = _fault(state, event, at)
    if fault:
        return Verdict(Kind.QUARANTINED, Reason.CONFLICT, fault)
    state.epoch = event.epoch
    state.leader = event.master
    state.level = event.level
    state.elected_seq = at.seq
    return APPLIED


def _fault(state: Namespace, event: LeaderElected, at: At) -> str:
    """Why an election does not count; empty if it does."""
    if at.actor != wire.ELECTED_ACTOR or event.epoch != state.epoch + 1:
        return f"epoch {event.epoch} does not follow {state.epoch}"
    if event.level < state.level:
        return f"level {event.level} is below {state.level}, which is in force"
    if state.level == LEVEL_FIRST:
        return ""  # masters register from level 2 on
    master = state.masters.get(event.master)
    if master is None:
        return f"no master is called {event.master}"
    if master.level < event.level:
        return f"{event.master} knows level {master.level}, not {event.level}"
    return ""
