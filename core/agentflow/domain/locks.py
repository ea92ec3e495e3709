"""Locks, as their holders tell of them: who held what, when, with which token.

The bucket of locks decides who holds a lock (`agentflow.locks`); here its history is kept.
Tokens of one lock rise, so a word about a lower one than was heard of comes too late.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from agentflow import wire
from agentflow.domain.state import APPLIED, SUPERSEDED, At, Holding, Kind, Namespace, Verdict
from agentflow.events import LockAcquired, LockLost, LockOpened, LockReleased, Reason
from agentflow.limits import LOCKS_MAX

_EXCLUSIVE: Final = "exclusive"


def lock_opened(state: Namespace, event: LockOpened, at: At) -> Verdict:
    """The bucket is created anew, and tokens go on above all earlier ones."""
    if at.actor != wire.LOCKS_ACTOR or event.generation <= state.lock_generation:
        detail = f"generation {event.generation} does not follow {state.lock_generation}"
        return Verdict(Kind.QUARANTINED, Reason.CONFLICT, detail)
    state.lock_generation = event.generation
    return APPLIED


def lock_acquired(state: Namespace, event: LockAcquired, at: At) -> Verdict:
    """Somebody holds a lock. An exclusive one has nobody else's hold beside it."""
    before = state.locks.get(event.name, {})
    if _is_late(state, event, before):
        return SUPERSEDED
    holdings = _shared(before) if event.mode != _EXCLUSIVE else {}
    if sum(map(len, state.locks.values())) - len(before) + len(holdings) >= LOCKS_MAX:
        detail = f"{LOCKS_MAX} holders of locks are known; this one is not kept"
        return Verdict(Kind.QUARANTINED, Reason.OVERLOADED, detail)
    holdings[event.token] = Holding(
        token=event.token,
        holder=event.holder,
        client=at.actor,
        mode=event.mode,
        permits=event.permits,
        ttl_s=event.ttl_s,
        since_ms=state.clock_ms,
        metadata=event.metadata,
    )
    state.locks[event.name] = holdings
    _remember(state, event.name, event.token)
    return APPLIED


def _is_late(state: Namespace, event: LockAcquired, holdings: Mapping[int, Holding]) -> bool:
    """Whether a hold is known already, or over, or a later one is known that had nobody beside it."""
    latest = state.lock_tokens.get(event.name, 0)
    if event.mode == _EXCLUSIVE:
        return event.token <= max(latest, *holdings, 0)
    return (
        event.token == latest
        or event.token in holdings
        or any(token > event.token for token, holding in holdings.items() if holding.mode == _EXCLUSIVE)
    )


def _shared(holdings: Mapping[int, Holding]) -> dict[int, Holding]:
    """Those that may have others beside them."""
    return {token: holding for token, holding in holdings.items() if holding.mode != _EXCLUSIVE}


def lock_ended(state: Namespace, event: LockReleased | LockLost, _at: At) -> Verdict:
    """A lock was given back or lost, maybe by a holder that had not yet said that it holds it."""
    holdings = state.locks.get(event.name, {})
    if holdings.pop(event.token, None) is None and event.token <= state.lock_tokens.get(event.name, 0):
        return SUPERSEDED
    if not holdings:
        state.locks.pop(event.name, None)
    _remember(state, event.name, event.token)
    return APPLIED


def _remember(state: Namespace, name: str, token: int) -> None:
    tokens = state.lock_tokens
    tokens[name] = max(token, tokens.pop(name, 0))
    if len(tokens) > LOCKS_MAX:
        del tokens[next(iter(tokens))]
