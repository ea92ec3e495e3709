"""Hashes of folds, told to all who fold the same log, and compared.

Each fold takes a digest of its state at positions that all agree on (`agentflow.domain.digest`)
and tells it on a subject that nothing keeps. A difference means that one of the two has a
fault, a damaged snapshot or memory: it is logged as an error, and `agentflow masters` shows it
until the folds agree again. Nobody steps down for it, since two cannot say who is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus, Subscription
from agentflow.domain.digest import FORM, Agreement, Difference, Digest, Digests
from agentflow.errors import Disconnected
from agentflow.frames import encode
from agentflow.logs import get_logger

_log = get_logger(__name__)


class FoldHash(Struct, frozen=True):
    """A fold's digest, on the wire."""

    by: str
    """Name of the master or projector."""
    instance: str
    """Tells apart processes of one name."""
    form: int
    seq: int
    hash: str


_decode: Final = msgspec.json.Decoder(FoldHash).decode


class FoldHashes:
    """Tells the digests of one fold while `tells` says so, and listens to those of others.

    Who still reads what others read long ago only listens.
    """

    def __init__(
        self,
        bus: Bus,
        namespace: str,
        name: str,
        instance: str,
        tells: Callable[[], bool],
    ) -> None:
        self._bus = bus
        self._namespace = namespace
        self._name, self._instance = name, instance
        self._agreement = Agreement({})
        self._digests: Digests | None = None
        self._tells = tells
        self._offered: Subscription | None = None

    @property
    def difference(self) -> Difference | None:
        """A fold that differs now, the one that did so first; None: all that are known agree."""
        return min(self._agreement.differences.values(), key=lambda each: each.seq, default=None)

    def watch(self, digests: Digests) -> None:
        """Whose digests are told and compared from now on; what was known of another fold is forgotten."""
        self._unwatch()
        self._agreement = Agreement(digests.kept)
        self._digests = digests
        digests.on_digest = self._on_own

    def _unwatch(self) -> None:
        if self._digests is not None:
            self._digests.on_digest = None

    async def listen(self) -> None:
        """Begin to hear of others."""
        self._offered = await self._bus.subscribe(wire.folds(self._namespace), self._on_told)

    def close(self) -> None:
        """End it."""
        self._unwatch()
        if self._offered is not None:
            self._offered.end()

    def _on_own(self, made: Digest) -> None:
        for difference in self._agreement.reached(made.seq):
            self._alarm(difference)
        if not self._tells():
            return
        told = FoldHash(self._name, self._instance, FORM, made.seq, made.hash)
        try:
            self._bus.publish(wire.folds(self._namespace), encode(told))
        except Disconnected as error:
            _log.debug("a fold's hash was not told", error=str(error))

    def _on_told(self, _subject: str, data: bytes, _reply: str, _headers: object) -> None:
        try:
            told = _decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:
            _log.debug("a fold's hash could not be read", error=str(error))
            return
        if told.form != FORM or told.instance == self._instance:
            return
        difference = self._agreement.hear(told.by, Digest(told.seq, told.hash))
        if difference is not None:
            self._alarm(difference)

    def _alarm(self, difference: Difference) -> None:
        _log.error(
            "two folds of the same log differ",
            namespace=self._namespace,
            own=self._name,
            other=difference.other,
            differs_at=difference.seq,
            agreed_at=difference.agreed_seq,
            advice="compare both with 'agentflow replay --until POSITION'; restart the one that is wrong",
        )
