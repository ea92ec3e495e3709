"""Leading: election, plan, fenced write, read-back, and again.

A leader plans only on a fold that holds its own election and everything it wrote since.
Its writes carry the fence; once the log refuses one because somebody else was elected, the
term is over. A write whose fate is unknown ends the term too: the next election, read
back, is the barrier behind which that fate is known.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

from msgspec.structs import replace

from agentflow import wire
from agentflow.domain.plan import Plan, Silence, plan
from agentflow.ending import end_tasks
from agentflow.errors import LogGone, OperatingError
from agentflow.events import LeaderElected, Policy, PolicyChanged
from agentflow.frames import Decision, encode
from agentflow.limits import LEVEL_FIRST
from agentflow.log.port import Appended, Done, Fence, Frame, Log, Reason, Refused
from agentflow.log.stored import msg_id_of
from agentflow.log.stream import RECOVERY
from agentflow.logs import get_logger
from agentflow_nodes.master.composing import Composer
from agentflow_nodes.master.config import MasterConfig
from agentflow_nodes.master.follower import Follower

IN_FLIGHT_MAX: Final = 12
"""Frames written at the same time on one replica; fenced writes to several exclude each other."""
HOUSEKEEPING_S: Final = 5.0
BYTES_CLOSED_SHARE: Final = 0.8
"""Share of the log's hard limit at which submissions are turned away."""
BYTES_OPEN_SHARE: Final = 0.7
_WAKE_S_MAX: Final = 0.25
_PAUSE_S_FIRST: Final = 0.005
_PAUSE_S_MAX: Final = 0.5
_PATIENCE_TTLS: Final = 2
"""Times to live of a lease after which a leader that cannot write gives up."""

_log = get_logger(__name__)


class End(enum.Enum):
    """Why a term ended."""

    DEPOSED = "deposed"
    """Somebody else was elected."""
    RETIRED = "retired"
    """We were asked to step down."""
    STUCK = "stuck"
    """We cannot write, or do not read what we wrote: somebody else should try."""
    LEVEL = "level"
    """A higher contract level can be put in force, by another election."""
    DOUBT = "doubt"
    """A write's fate is unknown, or the fence does not hold although nobody else leads."""


class Leader:
    """One term of one master. `silences` tells which workers have not been heard of for too long."""

    def __init__(
        self,
        log: Log,
        follower: Follower,
        config: MasterConfig,
        silences: Callable[[], Sequence[Silence]],
        *,
        nonce: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._follower = follower
        self._name = config.name
        self._config = config
        self._replicas = config.replicas
        self._silences = silences
        self._nonce = nonce or secrets.token_urlsafe(9)
        self._clock = clock
        self._patience_s = _PATIENCE_TTLS * config.lease_ttl_s
        self._end: End | None = None
        self._numbers = itertools.count(1)
        self._composer = Composer(follower.state, config.name, self._new_msg_id)
        self._wake = asyncio.Event()
        self._timer: asyncio.Handle | None = None
        self._look_at = 0.0
        """When the timer is due, on the loop's clock: uvloop's does not know if that is now."""
        self._at_rest = False
        """There was nothing to do when it was last looked at."""
        self._awaited_seq = 0
        """Nothing is to be done before this is folded."""
        self._made: tuple[int, int, Plan] | None = None
        """A plan made on being woken: the position it is made on, log time, the plan."""
        self._fence = Fence(wire.elected(log.namespace), 0)
        self._written_seq = 0
        self.leading = False
        """Whether the fold holds our election, and no later one."""
        self.elected_seq = 0
        self.deposed = False
        self._accepting: bool | None = None  # what the policy has to say, if it must change

    @property
    def wrote(self) -> bool:
        """Whether it could write anything after its election."""
        return self._written_seq > self.elected_seq

    def end(self, why: End) -> None:
        """End the term in good order: after the write that is under way, if one is."""
        self._end = self._end or why
        self._wake.set()

    @property
    def signature(self) -> str:
        """What the message ids of this term begin with."""
        return f"{self._name}.{self._nonce}"

    async def elect(
        self, *, level: int = LEVEL_FIRST, after: int | None = None, unheard: Collection[str] = ()
    ) -> bool:
        """Try to be elected; True once the election is read back and counts.

        The compare-and-set is on whatever lies last on the subject, also if it is noise.
        With `after`, the sequence of the last election known, a valid successor is not
        contested: False, and `deposed` is set. An election of our own of which we did not
        hear is no successor: it bears one of the signatures `unheard`. That of another master
        of our name is one.
        """
        subject = wire.elected(self._log.namespace)
        self._replicas = (await self._log.identity()).replicas
        last = await self._log.last(subject)
        last_seq = last.seq if last is not None else 0
        await self._read_up_to(last_seq)
        known_seq = self._follower.state.elected_seq
        if known_seq > last_seq and await self._log.read(known_seq) is None:
            raise LogGone(
                f"the last election, message {known_seq}, is not in the log any more: it was purged; {RECOVERY}"
            )
        state = self._follower.state
        if after is not None and state.elected_seq > after and not await self._is_among(unheard):
            self.deposed = True
            return False
        epoch = state.epoch + 1
        data = encode([LeaderElected(epoch=epoch, master=self._name, level=level)])
        frame = Frame(subject, data, self._new_msg_id())
        appended = await self._log.append(frame, fence=Fence(subject, last_seq))
        if not isinstance(appended, Done):
            _log.info(
                "not elected",
                namespace=self._log.namespace,
                master=self._name,
                epoch=epoch,
                why=appended.detail,
            )
            return False
        await self._read_up_to(appended.seq)
        self._fence = Fence(subject, appended.seq)
        self._written_seq = self.elected_seq = appended.seq
        self.leading = state.epoch == epoch and state.elected_seq == appended.seq
        _log.info(
            "elected",
            namespace=self._log.namespace,
            master=self._name,
            epoch=epoch,
            seq=appended.seq,
            counts=self.leading,
        )
        return self.leading

    async def _is_among(self, signatures: Collection[str]) -> bool:
        """Whether the election that counts was written under one of them."""
        if not signatures:
            return False
        message = await self._log.read(self._follower.state.elected_seq)
        msg_id = msg_id_of(message) if message is not None else None
        return (msg_id or "").rpartition(".")[0] in signatures

    async def lead(self) -> End:
        """Plan and write until the term ends."""
        accepting = self._follower.state.policy.accepting
        if self._policy_with(accepting=accepting) != self._follower.state.policy:
            self._accepting = accepting
        keeper = asyncio.create_task(self._keep_house(), name="housekeeping")
        try:
            while True:
                await self._follower.ready()
                end = await self._step()
                if end is not None:
                    _log.info("term over", namespace=self._log.namespace, master=self._name, why=end.value)
                    return end
        finally:
            self.leading = False
            if self._timer is not None:
                self._timer.cancel()
            self._follower.forget()
            await end_tasks(keeper)

    async def _step(self) -> End | None:
        state = self._follower.state
        if state.elected_seq != self._fence.seq:
            return End.DEPOSED
        if self._end is not None:
            return self._end
        self._wake.clear()
        if state.seq < self._written_seq:
            return await self._read_back()
        now_ms = self._follower.now_ms
        if self._accepting is not None:
            return await self._write(self._policy_change(self._accepting), now_ms)
        ready, self._made = self._made, None
        if ready is not None and ready[0] == state.seq:
            _, now_ms, made = ready
        else:
            made = plan(state, now_ms, self._silences())
        if made:
            return await self._write(made, now_ms)
        self._look_again_by(made.wake_ms, now_ms)
        self._at_rest = True
        await self._wake.wait()
        self._at_rest = False
        return None

    async def _read_back(self) -> End | None:
        try:
            await self._read_up_to(self._written_seq)
        except OperatingError as error:
            _log.warning("what was written is not read back", namespace=self._log.namespace, error=str(error))
            return End.STUCK
        return None

    def wake(self) -> None:
        """Something was folded or observed.

        Most of what is folded calls for nothing: then a leader at rest is left alone.
        """
        state = self._follower.state
        if state.seq < self._awaited_seq:
            return
        if self._at_rest and self._accepting is None and state.elected_seq == self._fence.seq:
            now_ms = self._follower.now_ms
            made = plan(state, now_ms)
            if not made:
                self._look_again_by(made.wake_ms, now_ms)
                return
            self._made = (state.seq, now_ms, made)
        self._wake.set()

    def _look_again_by(self, wake_ms: int | None, now_ms: int) -> None:
        """Wake by a log time, and now and then in any case: workers may have fallen silent."""
        wait_s = _WAKE_S_MAX if wake_ms is None else min(max(wake_ms - now_ms, 1) / 1000, _WAKE_S_MAX)
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        if self._timer is not None:
            if self._look_at <= until:
                return
            self._timer.cancel()
        self._look_at = until
        self._timer = loop.call_at(until, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._wake.set()

    async def _write(self, made: Plan, now_ms: int) -> End | None:
        state = self._follower.state
        decision = Decision(state.epoch, state.seq, now_ms, state.policy.version)
        frames = self._frames(made, decision)
        if self._replicas > 1:
            for frame in frames:
                end = self._judge_append(await self._append(frame))
                if end is not None:
                    return end
            return None
        for start in range(0, len(frames), IN_FLIGHT_MAX):
            stretch = frames[start : start + IN_FLIGHT_MAX]
            if len(stretch) == 1:
                ends = [self._judge_append(await self._append(stretch[0]))]
            else:
                appended = await asyncio.gather(*map(self._append, stretch))
                ends = [self._judge_append(done) for done in appended]
            for end in ends:
                if end is not None:
                    return end
        return None

    def _frames(self, made: Plan, decision: Decision) -> list[Frame]:
        frames = []
        for (kind, actor), events in made.decisions.items():
            for frame, judged in self._composer.frames(kind, actor, events, decision):
                self._follower.expect(frame, judged)
                frames.append(frame)
        return frames

    async def _append(self, frame: Frame) -> Appended:
        pause_s = _PAUSE_S_FIRST
        until = self._clock() + self._patience_s
        while True:
            appended = await self._log.append(frame, fence=self._fence)
            if not isinstance(appended, Refused) or appended.reason not in {Reason.BUSY, Reason.FULL}:
                return appended
            if appended.reason is Reason.BUSY and self._clock() > until:
                self._end = self._end or End.STUCK
            if self._end is not None:
                return appended
            if pause_s >= _PAUSE_S_MAX:
                _log.warning(
                    "a decision cannot be written",
                    namespace=self._log.namespace,
                    why=appended.reason,
                    detail=appended.detail,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _PAUSE_S_MAX)

    def _judge_append(self, appended: Appended) -> End | None:
        if isinstance(appended, Done):
            self._written_seq = max(self._written_seq, appended.seq)
            return None
        _log.warning("a decision was not written", namespace=self._log.namespace, why=appended.detail)
        return self._end or End.DOUBT

    def _policy_with(self, *, accepting: bool) -> Policy:
        """Our policy, under the version that holds."""
        return replace(self._config.policy, version=self._follower.state.policy.version, accepting=accepting)

    def _policy_change(self, accepting: bool) -> Plan:  # noqa: FBT001 - what it is about
        self._accepting = None
        policy = self._policy_with(accepting=accepting)
        change = PolicyChanged(policy=replace(policy, version=policy.version + 1))
        return Plan({(change.kind, self._name): [change]}, None)

    async def _keep_house(self) -> None:
        """Turn submissions away while the log is nearly full, so that outcomes still have room."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                identity = await self._log.identity()
            except OperatingError as error:
                _log.warning("the log's size is not known", namespace=self._log.namespace, error=str(error))
                continue
            limits = [limit for limit in (identity.bytes_max, self._config.log_bytes_max) if limit > 0]
            if not limits:
                continue
            share = identity.bytes / min(limits)
            accepting = self._follower.state.policy.accepting
            if (accepting and share > BYTES_CLOSED_SHARE) or (not accepting and share < BYTES_OPEN_SHARE):
                _log.warning(
                    "the log's fill level changed",
                    namespace=self._log.namespace,
                    share=round(share, 3),
                    accepting=not accepting,
                )
                self._accepting = not accepting
                self.wake()

    async def _read_up_to(self, seq: int) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._folded(seq)
        except TimeoutError as error:
            read = self._follower.state.seq
            raise OperatingError(
                f"message {seq} is not read within {self._patience_s} s, only {read}"
            ) from error

    async def _folded(self, seq: int) -> None:
        """Wait until everything up to `seq` is folded."""
        self._awaited_seq = seq
        while self._follower.state.seq < seq:
            self._wake.clear()
            await self._wake.wait()

    def _new_msg_id(self) -> str:
        return f"{self.signature}.{next(self._numbers)}"
