"""The stream behind a log: its configuration, its description, and the JetStream API's JSON.

Every option is named, also those that are off: defaults change between server releases, and
a stream that somebody else created differently must be noticed before it is written to.
"""

from __future__ import annotations

import asyncio
import calendar
import time
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from agentflow import wire
from agentflow.bus import Bus
from agentflow.connection import parse_headers
from agentflow.errors import Disconnected, LogGone, LogTrimmed, OperatingError, StreamMismatch
from agentflow.limits import FRAME_BYTES_MAX
from agentflow.log.port import Identity, Message, Trim
from agentflow.log.publisher import ApiError
from agentflow.log.stored import DUPLICATE_WINDOW_S

# A named limit: unset means 1,000 on a current server.
_CONSUMERS_MAX: Final = 5000
MESSAGE_BYTES_MAX: Final = FRAME_BYTES_MAX + 64 * 1024
"""Most bytes of data and headers of one message."""

NO_MESSAGE: Final = 10037
NO_STREAM: Final = 10059
_NAME_IN_USE: Final = 10058

_NOT_NOW: Final = 10008
"""No leader of the cluster."""
_TOO_FEW_SERVERS: Final = frozenset({10005, 10074})

_ASK_S_FIRST: Final = 1.0
_ATTEMPT_S_MAX: Final = 2.0
_PAUSE_S: Final = 0.2

T = TypeVar("T")


class _State(Struct, frozen=True):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    subjects: dict[str, int] | None = None
    """Messages by subject, of those that were asked for."""


class _Group(Struct, frozen=True, gc=False):
    """The servers that hold a stream."""

    leader: str = ""
    replicas: list[dict[str, Any]] = []


class StreamInfo(Struct, frozen=True):
    """What the server says of a stream."""

    config: dict[str, Any]
    created: str
    ts: str = ""
    """The server's time of answering."""
    state: _State = _State()
    cluster: _Group | None = None
    """None if the server is alone."""
    total: int = 0
    """Subjects there are, of those that were asked for."""

    @property
    def led(self) -> bool:
        """Whether somebody leads the stream: otherwise this is what one replica knew some time ago."""
        return self.cluster is None or bool(self.cluster.leader)

    @property
    def identity(self) -> Identity:
        """The same in the log's words."""
        state = self.state
        trim = read_trim(self.config)
        first_seq = state.first_seq if state.messages else state.last_seq + 1
        return Identity(
            name=self.config["name"],
            created_ns=parse_time_ns(self.created),
            # Of what was trimmed single messages stay.
            first_seq=first_seq if trim is None else max(first_seq, trim.seq + 1),
            last_seq=state.last_seq,
            replicas=self.config["num_replicas"],
            bytes=state.bytes,
            bytes_max=self.config.get("max_bytes", -1),
            trim=trim,
        )


_TRIM: Final = "af-trim"
"""The key in the stream's metadata."""


def read_trim(config: Mapping[str, Any]) -> Trim | None:
    """What a stream's configuration says of its trimming. Raises StreamMismatch if that cannot be read."""
    written = (config.get("metadata") or {}).get(_TRIM)
    if written is None:
        return None
    try:
        return msgspec.json.decode(written, type=Trim)
    except msgspec.DecodeError as error:
        raise StreamMismatch(
            f"stream {config['name']}: expected a record of trimming in metadata {_TRIM!r}, found {written!r}: {error}"
        ) from error


def with_trim(config: Mapping[str, Any], trim: Trim) -> dict[str, Any]:
    """The configuration of a stream with another record of trimming."""
    metadata = {**(config.get("metadata") or {}), _TRIM: msgspec.json.encode(trim).decode()}
    return {**config, "metadata": metadata}


class _Stored(Struct, frozen=True, gc=False):
    """A message as STREAM.MSG.GET shows it."""

    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: bytes = b""


class _StoredAnswer(Struct, frozen=True, gc=False):
    message: _Stored


class _Failure(Struct, frozen=True, gc=False):
    error: ApiError | None = None


_read_failure: Final = msgspec.json.Decoder(_Failure).decode


class ApiFailed(OperatingError):
    """The JetStream API answered with an error. Never leaves the adapters."""

    def __init__(self, request: str, error: ApiError) -> None:
        super().__init__(f"{request}: {error.description} ({error.err_code})")
        self.error = error


class _TooFewServers(StreamMismatch):
    """More replicas are asked for than there are servers, so far."""


def log_config(namespace: str, *, replicas: int, bytes_max: int) -> dict[str, Any]:
    """The configuration of a namespace's log."""
    return {
        "name": wire.stream(namespace),
        "subjects": [wire.stream_subjects(namespace)],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "num_replicas": replicas,
        "max_bytes": bytes_max,
        "max_msgs": -1,
        "max_msgs_per_subject": -1,
        "max_age": 0,
        "max_msg_size": MESSAGE_BYTES_MAX,
        "max_consumers": _CONSUMERS_MAX,
        "duplicate_window": DUPLICATE_WINDOW_S * 1_000_000_000,
        "compression": "none",
        # History is not edited; only its oldest part is cut off, once archived.
        "deny_delete": True,
        "deny_purge": False,
        "sealed": False,
        "no_ack": False,
        "allow_direct": True,
        "mirror_direct": False,
        "allow_atomic": True,
        # Each of these lets a client remove, replace or delay messages by a header.
        "allow_rollup_hdrs": False,
        "allow_msg_ttl": False,
        "allow_msg_schedules": False,
        "allow_msg_counter": False,
        "allow_batched": False,
        "discard_new_per_subject": False,
    }


# What is an operator's to change later.
_FREE: Final = frozenset({"max_bytes", "num_replicas"})
# Options we do not set, that would change what the stream holds or when it is on disk.
_MUST_BE_UNSET: Final = (
    "mirror",
    "sources",
    "republish",
    "subject_transform",
    "persist_mode",
    "subject_delete_marker_ttl",
)


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Each option we rely on that is not as expected, in words.

    The server leaves out what is off, so absent means False (or 0, or "").
    """
    wrong = [
        f"{option}: expected {value!r}, found {found.get(option, type(value)())!r}"
        for option, value in expected.items()
        if option not in _FREE and found.get(option, type(value)()) != value
    ]
    wanted, replicas = expected["num_replicas"], found.get("num_replicas", 1)
    if replicas < wanted:
        name = expected["name"]
        advice = f"change it with 'nats stream edit {name} --replicas {wanted}', or ask for {replicas}"
        wrong.append(f"num_replicas: expected {wanted} or more, found {replicas} ({advice})")
    unwanted = [option for option in _MUST_BE_UNSET if found.get(option)]
    return wrong + [f"{option}: expected unset, found {found[option]!r}" for option in unwanted]


async def ask(
    bus: Bus, request: str, payload: Mapping[str, Any] | None, answer: type[T], timeout_s: float
) -> T:
    """Ask the JetStream API. Raises ApiFailed, Disconnected."""
    body = b"" if payload is None else msgspec.json.encode(payload)
    raw = await bus.js_api(request, body, timeout_s)
    try:
        failure = _read_failure(raw)
        if failure.error is None:
            return msgspec.json.decode(raw, type=answer)
    except msgspec.DecodeError as error:
        raise Disconnected(f"{request}: an answer that is not JetStream's: {raw[:200]!r}") from error
    raise ApiFailed(request, failure.error)


async def ask_again(
    bus: Bus, request: str, payload: Mapping[str, Any] | None, answer: type[T], timeout_s: float
) -> T:
    """Ask for what may be asked twice, until it is answered: who was to answer may have died.

    Raises ApiFailed, Disconnected.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    attempt_s = _ASK_S_FIRST
    while True:
        left_s = deadline - loop.time()
        try:
            return await ask(bus, request, payload, answer, min(attempt_s, left_s))
        except Disconnected:
            if deadline - loop.time() <= _PAUSE_S:
                raise
        await asyncio.sleep(_PAUSE_S)
        attempt_s *= 2


async def stream_info(bus: Bus, name: str, timeout_s: float) -> StreamInfo:
    """Describe a stream. Raises LogGone if there is none, Disconnected.

    A replica without a leader answers too, with what it knew when it lost touch. That is not
    believed: it would make the log look as if it had gone back.
    """
    try:
        info = await ask_again(bus, f"STREAM.INFO.{name}", None, StreamInfo, timeout_s)
    except ApiFailed as failed:
        if failed.error.err_code == NO_STREAM:
            raise LogGone(f"there is no stream {name}") from failed
        raise Disconnected(str(failed)) from failed
    if not info.led:
        count = info.config.get("num_replicas", 1)
        raise Disconnected(
            f"stream {name} has no leader: fewer than {count // 2 + 1} of the {count} servers that hold it"
            " reach each other, or they are electing"
        )
    return info


async def same_stream(bus: Bus, opened: Identity, last_known: int, timeout_s: float) -> Identity:
    """The identity and extent of a stream that was opened before. Raises LogGone, Disconnected."""
    try:
        found = (await stream_info(bus, opened.name, timeout_s)).identity
    except LogGone as gone:
        raise LogGone(f"{gone} any more, {last_known} was seen in it; {RECOVERY}") from gone
    check_same(opened, found, last_known)
    return found


def check_same(opened: Identity, found: Identity, last_known: int) -> None:
    """Raise LogGone unless what is found is what was opened, and all that was known is there."""
    if found.created_ns != opened.created_ns:
        raise LogGone(
            f"stream {found.name} was deleted and created again: expected the one created at"
            f" {_shown(opened.created_ns)}, found one of {_shown(found.created_ns)}; {RECOVERY}"
        )
    if found.last_seq < last_known:
        raise LogGone(went_back(found.name, found.last_seq, last_known))


RECOVERY: Final = "restore it from a backup, or start all nodes anew, with nothing of what was in it"


def went_back(name: str, found: int, known: int) -> str:
    """The words for a log that lost its end."""
    return f"stream {name} went back: it ends at {found}, {known} was seen; {RECOVERY}"


def cut_off(found: Identity, wanted: int) -> LogGone:
    """The error of a log that lost what is wanted of its beginning."""
    return LogGone(
        f"stream {found.name} was purged: it begins at {found.first_seq}, {wanted} is wanted; {RECOVERY}"
    )


def trimmed_off(found: Identity, wanted: int) -> LogTrimmed:
    """The error of who wants what was trimmed away."""
    assert found.trim is not None, "only what was recorded is a trim"
    return LogTrimmed(
        f"stream {found.name} was trimmed up to {found.trim.seq}, {wanted} is wanted: read it from the archive,"
        f" or begin with the snapshot of {found.trim.snapshot_seq}"
    )


def _shown(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_ns / 1e9))


class _Names(Struct, frozen=True, gc=False):
    total: int = 0
    streams: list[str] | None = None


async def stream_names(bus: Bus, timeout_s: float) -> list[str]:
    """The names of all streams. Raises Disconnected."""
    found: list[str] = []
    while True:
        try:
            page = await ask_again(bus, "STREAM.NAMES", {"offset": len(found)}, _Names, timeout_s)
        except ApiFailed as failed:
            raise Disconnected(str(failed)) from failed
        found += page.streams or []
        if not page.streams or len(found) >= page.total:
            return found


async def open_stream(
    bus: Bus, config: dict[str, Any], *, create: bool, timeout_s: float, tolerated: tuple[str, ...] = ()
) -> StreamInfo:
    """Describe the stream, creating it if it is missing and `create` is set, and check it.

    Servers that are electing, or looking for each other, are waited for. Options `tolerated`
    may be otherwise than configured. Raises StreamMismatch naming every other difference, LogGone
    if it is missing, Disconnected.
    """
    name = config["name"]
    info = await _describe_when_possible(bus, config, create=create, timeout_s=timeout_s)
    wrong = [each for each in differences(config, info.config) if not each.startswith(tolerated)]
    if wrong:
        raise StreamMismatch(f"stream {name} is not as AgentFlow needs it: " + "; ".join(wrong))
    return info


async def _describe_when_possible(
    bus: Bus, config: dict[str, Any], *, create: bool, timeout_s: float
) -> StreamInfo:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        try:
            return await _describe(bus, config, create=create, timeout_s=min(timeout_s, _ATTEMPT_S_MAX))
        except (Disconnected, _TooFewServers):
            if asyncio.get_running_loop().time() + _PAUSE_S >= deadline:
                raise
            await asyncio.sleep(_PAUSE_S)


async def _describe(bus: Bus, config: dict[str, Any], *, create: bool, timeout_s: float) -> StreamInfo:
    try:
        return await stream_info(bus, config["name"], timeout_s)
    except LogGone:
        if not create:
            raise
        return await _create(bus, config, timeout_s)


async def get_message(
    bus: Bus, stream: str, query: Mapping[str, int | str], timeout_s: float
) -> Message | None:
    """Ask a stream's leader for one message. Raises LogGone, Disconnected."""
    try:
        answer = await ask_again(bus, f"STREAM.MSG.GET.{stream}", query, _StoredAnswer, timeout_s)
    except ApiFailed as failed:
        if failed.error.err_code == NO_MESSAGE:
            return None
        if failed.error.err_code == NO_STREAM:
            raise LogGone(str(failed)) from failed
        raise Disconnected(str(failed)) from failed
    stored = answer.message
    headers = parse_headers(stored.hdrs) if stored.hdrs else None
    return Message(stored.seq, parse_time_ns(stored.time), stored.subject, stored.data, headers)


async def _create(bus: Bus, config: dict[str, Any], timeout_s: float) -> StreamInfo:
    name = config["name"]
    try:
        return await ask(bus, f"STREAM.CREATE.{name}", config, StreamInfo, timeout_s)
    except ApiFailed as failed:
        if failed.error.err_code == _NAME_IN_USE:  # somebody else was quicker
            return await stream_info(bus, name, timeout_s)
        if failed.error.err_code in _TOO_FEW_SERVERS:
            replicas = config["num_replicas"]
            raise _TooFewServers(
                f"stream {name} cannot have {replicas} replicas ({failed.error.description}): run {replicas}"
                " nats-servers in one cluster, or ask for fewer replicas"
            ) from failed
        if failed.error.err_code == _NOT_NOW:
            raise Disconnected(f"cannot create stream {name}: {failed}") from failed
        raise OperatingError(f"cannot create stream {name}: {failed}") from failed


def parse_time_ns(text: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 UTC time, of which `datetime` keeps microseconds only."""
    seconds = calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S"))
    fraction = text[20:].rstrip("Z") if text[19:20] == "." else ""
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or 0)
