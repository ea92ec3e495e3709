"""A master's seat in one namespace: it follows the log, stands by warm, and leads.

The sessions say whose turn it is (`sharing`); only the log makes a leader, and only the log
deposes one. So a leader that cannot renew its session but can write goes on, until the log
refuses it or somebody else is elected; and one whose turn it is not any more steps down
between two writes.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from agentflow import wire
from agentflow.domain.plan import Silence
from agentflow.domain.state import Ended, Namespace
from agentflow.ending import end_tasks
from agentflow.errors import LogGone, OperatingError
from agentflow.events import Event, MasterJoined, MasterLeft
from agentflow.frames import encode, level_headers
from agentflow.limits import LEVEL_FIRST
from agentflow.log.port import Done, Frame, Log
from agentflow.logs import get_logger
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.follower import Follower
from agentflow_nodes.master.leader import End, Leader
from agentflow_nodes.master.liveness import Liveness
from agentflow_nodes.master.sessions import Sessions
from agentflow_nodes.master.sharing import SeatReport, Standing, is_named, leader_of, ranking

_PATIENCE_TTLS: Final = 2
"""Times to live of a lease for which nothing is given up."""
_LOOK_S: Final = 1.0
"""Whose turn it is, is looked at this often even if nothing is told."""
_TURN_S: Final = 0.5
"""How much longer the next in rank waits for the one before it to be elected."""
_LAG_S_MAX: Final = 1.0
_LAG_EVENTS_PER_S: Final = 50_000
"""How much longer a candidate waits whose fold is behind: about what it takes to catch up."""
_ELECT_PAUSE_S: Final = 0.1
_REGISTER_TIMEOUT_S: Final = 5.0
_LEAVE_TIMEOUT_S: Final = 0.5
_DEAF_S: Final = 2.0
"""A leader that has not looked at its workers for so long has not heard them either."""

_log = get_logger(__name__)


class Seat:
    """One namespace of one master. `run` ends only with an error: LogGone, or a bug.

    `on_ended` is told, while it leads, what ended.
    """

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        log: Log,
        config: MasterConfig,
        instance: str,
        sessions: Sessions,
        on_ended: Callable[[Sequence[Ended]], None],
        *,
        state: Namespace | None = None,
        clock: Callable[[], float] = time.monotonic,
        new_nonce: Callable[[], str] = lambda: secrets.token_urlsafe(9),
    ) -> None:
        self.namespace: Final = log.namespace
        self.follower: Final = Follower(log, self._on_folded, level=config.level, state=state, clock=clock)
        self.liveness: Final = Liveness(log.namespace, config.worker_ttl_s, clock)
        self.caught_up: Final = asyncio.Event()
        """Set once it has folded what the log held when it started."""
        self._log = log
        self._config = config
        self._instance = instance
        self._sessions = sessions
        self._on_ended = on_ended
        self._clock = clock
        self._new_nonce = new_nonce
        self._leader: Leader | None = None
        self._campaigning = False
        self._vacant = asyncio.Event()
        self._vacant.set()
        self._successor = ""
        self._target_seq: int | None = None
        self._changed = asyncio.Event()
        self._looked_at = clock()
        self._orphan_since: float | None = None
        self._not_before = float("-inf")
        self._patience_s = _PATIENCE_TTLS * config.lease_ttl_s
        self._epoch_seen = 0
        self._elected_at = clock()
        """When we read the last election."""
        self._level_seen = LEVEL_FIRST
        self._level_rose = asyncio.Event()
        self._registering = asyncio.Lock()
        self._registered = False
        self._leaving = False

    @property
    def leading(self) -> bool:
        """Whether it leads now, as far as it knows."""
        return self._leader is not None and self._leader.leading

    @property
    def standing(self) -> Standing:
        """What it is."""
        if self.leading:
            return Standing.LEADER
        if self._campaigning:
            return Standing.CANDIDATE
        if not self.caught_up.is_set():
            return Standing.CATCHING_UP
        if self.follower.state.level > self._config.level:
            return Standing.OUTDATED
        return Standing.FOLLOWER

    def report(self) -> SeatReport:
        """The same for others."""
        state = self.follower.state
        return SeatReport(self.standing, state.epoch, state.seq, self._successor)

    def look(self) -> None:
        """The masters changed: whose turn is it?"""
        leader = self._leader
        if leader is not None and leader.leading and self._level() > self.follower.state.level:
            leader.end(End.LEVEL)
        self._changed.set()

    def hand_over(self, successor: str) -> None:
        """Step down in good order, in favour of somebody else."""
        if self._leader is not None:
            _log.info("handing over", namespace=self.namespace, to=successor)
            self._successor = successor
            self._leader.end(End.RETIRED)

    async def run(self) -> None:
        """Follow, and lead when it is our turn."""
        following = asyncio.create_task(self.follower.run(), name=f"follower {self.namespace}")
        standing = asyncio.create_task(self._stand(), name=f"seat {self.namespace}")
        registering = asyncio.create_task(self._keep_registered(), name=f"registration {self.namespace}")
        tasks = (following, standing, registering)
        self._on_folded(())  # it may begin with a state
        try:
            await self._find_target()
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:  # the follower's error says most
                if task in done:
                    task.result()
        except LogGone:
            self._registered = False  # nobody has heard of us in what took the log's place
            raise
        finally:
            await end_tasks(registering, standing, following)

    async def leave(self) -> None:
        """Step down and say so, so that others take over at once."""
        self._leaving = True
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                if self._leader is not None:
                    self._leader.end(End.RETIRED)
                await self._vacant.wait()
                if self._registered:
                    self._registered = False
                    await self._say(MasterLeft(instance=self._instance))
        except (OperatingError, TimeoutError) as error:
            _log.info("left without saying so", namespace=self.namespace, error=str(error) or "no answer")

    async def read_all(self) -> None:
        """Wait until everything that is in the log now is folded. Raises OperatingError."""
        await self.follower.reach((await self._log.identity()).last_seq)

    # Following -------------------------------------------------------------------------

    def _on_folded(self, ended: Sequence[Ended]) -> None:
        leader = self._leader
        if leader is not None:
            if ended and leader.leading:
                self._on_ended(ended)
            leader.wake()
        self._note_caught_up()
        state = self.follower.state
        if state.epoch != self._epoch_seen:
            self._epoch_seen = state.epoch
            self._elected_at = self._clock()
        if state.level != self._level_seen:
            self._level_seen = state.level
            self._level_rose.set()

    async def _find_target(self) -> None:
        """Learn how far the log goes, as soon as somebody can say."""
        while self._target_seq is None:
            try:
                self._target_seq = (await self._log.identity()).last_seq
            except LogGone:
                raise
            except OperatingError as error:
                _log.warning("how far the log goes is not known", namespace=self.namespace, error=str(error))
                await asyncio.sleep(_LOOK_S)
        self._note_caught_up()

    def _note_caught_up(self) -> None:
        target = self._target_seq
        if target is not None and self.follower.state.seq >= target and not self.caught_up.is_set():
            self.caught_up.set()
            self._changed.set()

    # Whose turn ------------------------------------------------------------------------

    async def _stand(self) -> None:
        await self.caught_up.wait()
        self._sessions.touch()
        while True:
            self._changed.clear()
            wait_s = self._until_turn_s()
            if wait_s <= 0:
                await self._campaign()
                continue
            try:
                async with asyncio.timeout(min(wait_s, _LOOK_S)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _until_turn_s(self) -> float:
        """Seconds until it is our turn, as far as is known now; 0 or less: it is."""
        sessions, state = self._sessions.alive(), self.follower.state
        now = self._clock()
        # His session says so soon: if not, he does not read the log.
        elected = state.leader if now - self._elected_at < self._patience_s else ""
        waits = self._leaving or not self._sessions.held
        if waits or leader_of(self.namespace, sessions, elected, state.epoch) is not None:
            self._orphan_since = None
            if self._successor:
                self._successor = ""
                self._sessions.touch()
            return _LOOK_S
        if self._orphan_since is None:
            self._orphan_since = now
        order = ranking(self.namespace, sessions)
        if self._config.name not in order:
            return _LOOK_S
        place = order.index(self._config.name)
        seqs = [session.seats[self.namespace].seq for session in sessions if self.namespace in session.seats]
        lag = max(seqs) - state.seq
        wait_s = place * _TURN_S + min(_LAG_S_MAX, max(0, lag) / _LAG_EVENTS_PER_S)
        turn_at = self._orphan_since + wait_s
        if not is_named(self._config.name, self.namespace, sessions):
            turn_at = max(turn_at, self._not_before)
        return turn_at - now

    def _level(self) -> int:
        """The contract level that can be put in force: the highest that every living master knows."""
        sessions = self._sessions.alive()
        levels = [session.level for session in sessions if self.namespace in session.seats]
        return max(min([*levels, self._config.level]), self.follower.state.level)

    # Leading ---------------------------------------------------------------------------

    async def _campaign(self) -> None:
        self._campaigning = True
        self._vacant.clear()
        self._successor = ""
        self._orphan_since = None
        self._sessions.touch()
        try:
            end = await self._lead()
        finally:
            self._leader = None
            self._campaigning = False
            self._vacant.set()
            self._sessions.touch()
        if end is not End.DEPOSED:
            # Others first: we had our turn.
            self._not_before = self._clock() + self._config.lease_ttl_s

    async def _lead(self) -> End:
        """Lead, one term after the other, until one ends for good or nothing can be written any more."""
        last_term = self.follower.state.elected_seq
        unheard: set[str] = set()
        patience_s = self._patience_s
        give_up_at = self._clock() + patience_s
        while not self._leaving:
            begun = self._clock()
            leader = self._leader = self._new_leader()
            end = await self._term(leader, last_term, unheard)
            if end in _OVER:
                return end
            if leader.elected_seq:
                last_term = leader.elected_seq
                unheard.clear()
            else:
                unheard.add(leader.signature)
            now = self._clock()
            if leader.wrote or (leader.elected_seq and now - begun > patience_s):
                give_up_at = now + patience_s
            elif now > give_up_at:
                _log.warning("giving up: nothing can be written", namespace=self.namespace)
                return End.STUCK
            await asyncio.sleep(_ELECT_PAUSE_S)
        return End.RETIRED

    async def _term(self, leader: Leader, last_term: int, unheard: Collection[str]) -> End:
        try:
            await self._register()
            if await leader.elect(level=self._level(), after=last_term, unheard=unheard):
                self._sessions.touch()
                self._look_again()
                return await leader.lead()
        except LogGone:
            raise
        except OperatingError as error:
            _log.warning("the term could not be held", namespace=self.namespace, error=str(error))
        return End.DEPOSED if leader.deposed else End.DOUBT

    def _new_leader(self) -> Leader:
        return Leader(
            self._log,
            self.follower,
            self._config,
            self._silences,
            nonce=self._new_nonce(),
            clock=self._clock,
        )

    def _look_again(self) -> None:
        """Everybody has a fresh, full time to live from now."""
        self.liveness.refresh()
        self._looked_at = self._clock()

    def _silences(self) -> Sequence[Silence]:
        now = self._clock()
        if now - self._looked_at > max(_DEAF_S, self._config.worker_ttl_s / 2):
            self.liveness.refresh()  # it was us who were not there
        self._looked_at = now
        return self.liveness.silences(self.follower.state)

    # Registration ----------------------------------------------------------------------

    async def _keep_registered(self) -> None:
        """From level 2 on only registered masters are elected."""
        while True:
            await self._level_rose.wait()
            self._level_rose.clear()
            await self.caught_up.wait()
            while not await self._register():  # noqa: ASYNC110 - what it waits for is the log
                await asyncio.sleep(_LOOK_S)

    async def _register(self) -> bool:
        """Register if that is called for and not done; False if it failed."""
        state = self.follower.state
        async with self._registering:
            found = state.masters.get(self._config.name)
            if not LEVEL_FIRST < state.level <= self._config.level or (
                found is not None and found.instance == self._instance
            ):
                return True
            joined = MasterJoined(
                instance=self._instance, level=self._config.level, host=socket.gethostname(), pid=os.getpid()
            )
            try:
                async with asyncio.timeout(_REGISTER_TIMEOUT_S):
                    await self.follower.reach(await self._say(joined))
            except (OperatingError, TimeoutError) as error:
                _log.warning("not registered yet", namespace=self.namespace, error=str(error) or "no answer")
                return False
            self._registered = True
            return True

    async def _say(self, event: Event) -> int:
        subject = wire.event(self.namespace, event.kind, self._config.name)
        msg_id = f"{self._config.name}.{self._new_nonce()}.1"
        appended = await self._log.append(Frame(subject, encode([event]), msg_id, level_headers([event])))
        if not isinstance(appended, Done):
            raise OperatingError(appended.detail)
        return appended.seq


_OVER: Final = frozenset({End.DEPOSED, End.RETIRED, End.STUCK})
