"""Where archives lie: in a folder, or in a bucket of a store that speaks S3.

A store holds names and what is under them, whole or not at all: in a folder by writing beside
and renaming, in a bucket because an object is there only once it was sent to its end. Nothing
else is asked of it; in particular no rename, which S3 does not have, so what consists of
several files is there when the last of them is.

A folder knows one writer at a time. A bucket does not: who writes there looks, before the file
that makes the others count, whether all is as he left it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
from msgspec import Struct

from agentflow.errors import InvalidRequest, OperatingError

S3: Final = "s3://"
UNFINISHED: Final = ".unfinished"
"""How a file ends that is being written in a folder."""

_CONNECT_S_MAX: Final = 5.0
_REQUEST_S_MAX: Final = 10.0
"""Without a byte; three times, then it is said. A slow line is none that is silent."""
_ATTEMPTS_MAX: Final = 3
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS: Final = ("AWS_REGION", "AWS_DEFAULT_REGION")
_KEY: Final = "AWS_ACCESS_KEY_ID"
_REGION: Final = "us-east-1"
"""What stores other than Amazon's expect, or do not look at."""
_DENIED: Final = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY_ID",
    "INVALID_CLIENT_TOKEN_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "EXPIRED_TOKEN",
    "HTTP status 403",
)


class ArchiveLocked(OperatingError):
    """Another archiver works in the same place."""


class ArchiveUnreachable(OperatingError):
    """The store does not answer, or does not let us. Nothing is lost: it can be tried again."""


class Store(Protocol):
    """Names with slashes in them, and what is under them."""

    @property
    def where(self) -> str:
        """As people name it."""
        ...

    def within(self, name: str) -> Store:
        """The part of it below a name."""
        ...

    def names(self) -> list[str]:
        """All there is, in order. Raises ArchiveUnreachable, OSError."""
        ...

    def read(self, name: str) -> Any:
        """A buffer of what is under a name. Raises FileNotFoundError, ArchiveUnreachable, OSError."""
        ...

    def put(self, name: str, data: Any) -> None:
        """Put a buffer under a name, to last, all of it or nothing. Raises ArchiveUnreachable, OSError."""
        ...

    def remove(self, name: str) -> None:
        """Remove one; it need not be there. Raises ArchiveUnreachable, OSError."""
        ...

    def remove_all(self, name: str) -> None:
        """Remove all below a name; nothing need be there. Raises ArchiveUnreachable, OSError."""
        ...

    def files(self, names: Sequence[str]) -> AbstractContextManager[list[Path]]:
        """These as files, while it is entered. Raises FileNotFoundError, ArchiveUnreachable, OSError."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """Entered means that nobody else is. Raises ArchiveLocked; a bucket cannot tell."""
        ...


def open_store(where: str | Path) -> Store:
    """The store of that name: `s3://bucket/prefix`, or a folder. Raises InvalidRequest."""
    text = str(where)
    if text.startswith(S3):
        return S3Store.of(text)
    if "://" in text:
        raise InvalidRequest(f"expected a folder or {S3}bucket/prefix, found {text!r}")
    return FolderStore(Path(where))


class FolderStore(Struct, frozen=True):
    """A folder."""

    folder: Path

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.folder)

    def within(self, name: str) -> FolderStore:
        """See Store."""
        return FolderStore(self.folder / name)

    def names(self) -> list[str]:
        """See Store."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)

    def read(self, name: str) -> Any:
        """See Store."""
        return pa.py_buffer((self.folder / name).read_bytes())

    def put(self, name: str, data: Any) -> None:
        """See Store."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + UNFINISHED)
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        self._sync(path.parent)

    def _sync(self, folder: Path) -> None:
        """Make what folders list outlast a loss of power, from this one up to the store's own."""
        while True:
            number = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
            if folder in {self.folder, folder.parent}:
                return
            folder = folder.parent

    def remove(self, name: str) -> None:
        """See Store."""
        (self.folder / name).unlink(missing_ok=True)

    def remove_all(self, name: str) -> None:
        """See Store."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder / name)

    @contextmanager
    def files(self, names: Sequence[str]) -> Generator[list[Path]]:
        """See Store: they are where they are."""
        yield [self.folder / name for name in names]

    @contextmanager
    def locked(self) -> Generator[None]:
        """See Store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArchiveLocked(f"another archiver works in {self.folder}: one is enough") from error
            yield
        finally:
            os.close(lock)


class S3Store(Struct, frozen=True):
    """Part of a bucket. Keys and region come from where all tools of S3 take them.

    That is the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
    `AWS_PROFILE`, `AWS_REGION`, `AWS_ENDPOINT_URL`), the files in `~/.aws`, or the machine's role.
    """

    filesystem: Any
    bucket: str
    prefix: str

    @property
    def _root(self) -> str:
        return f"{self.bucket}/{self.prefix}".rstrip("/")

    @classmethod
    def of(cls, where: str) -> S3Store:
        """A store by its name, `s3://bucket/prefix?region=…&endpoint_override=…`. Raises InvalidRequest."""
        found = urlsplit(where)
        options = dict(parse_qsl(found.query))
        unknown = options.keys() - {"region", "endpoint_override"}
        if unknown or not found.netloc or "@" in found.netloc:
            raise InvalidRequest(
                f"expected {S3}bucket/prefix, with ?region= and &endpoint_override= if they are not in the environment,"
                f" found {where!r}"
            )
        endpoint = options.get("endpoint_override") or _first(_ENDPOINTS)
        region = options.get("region") or _first(_REGIONS)
        return cls(_connect(found.netloc, endpoint, region), found.netloc, found.path.strip("/"))

    @property
    def where(self) -> str:
        """Its address."""
        return f"{S3}{self._root}"

    def within(self, name: str) -> S3Store:
        """See Store."""
        return S3Store(self.filesystem, self.bucket, f"{self.prefix}/{name}".lstrip("/"))

    def names(self) -> list[str]:
        """See Store."""
        selector = pafs.FileSelector(self._root, recursive=True, allow_not_found=True)
        with self._errors():
            found = self.filesystem.get_file_info(selector)
            if not found:
                self._check_bucket()
        start = len(self._root) + 1
        return sorted(each.path[start:] for each in found if each.type == pafs.FileType.File)

    def _check_bucket(self) -> None:
        """What is in a bucket that is not there looks like nothing."""
        found = self.filesystem.get_file_info(self.bucket)
        if found.type == pafs.FileType.NotFound:
            raise ArchiveUnreachable(self._no_bucket())

    def read(self, name: str) -> Any:
        """See Store."""
        with self._errors(), self.filesystem.open_input_file(f"{self._root}/{name}") as file:
            return file.read_buffer()

    def put(self, name: str, data: Any) -> None:
        """See Store."""
        with self._errors(), self.filesystem.open_output_stream(f"{self._root}/{name}") as file:
            file.write(data)

    def remove(self, name: str) -> None:
        """See Store."""
        with suppress(FileNotFoundError), self._errors():
            self.filesystem.delete_file(f"{self._root}/{name}")

    def remove_all(self, name: str) -> None:
        """See Store."""
        with suppress(FileNotFoundError), self._errors():
            self.filesystem.delete_dir(f"{self._root}/{name}")

    @contextmanager
    def files(self, names: Sequence[str]) -> Generator[list[Path]]:
        """See Store: copied into the folder for temporary files."""
        import tempfile  # noqa: PLC0415 - only here

        with tempfile.TemporaryDirectory(prefix="agentflow-archive-") as folder:
            paths = [Path(folder, f"{number}-{Path(name).name}") for number, name in enumerate(names)]
            for name, path in zip(names, paths, strict=True):
                path.write_bytes(self.read(name))
            yield paths

    def locked(self) -> AbstractContextManager[None]:
        """See Store: there is nothing to lock."""
        return nullcontext()

    def _no_bucket(self) -> str:
        return f"{self.where}: there is no bucket {self.bucket!r}, or not at this endpoint: create it, or name another"

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ArchiveUnreachable(self._described(str(error))) from error

    def _described(self, text: str) -> str:
        if "NO_SUCH_BUCKET" in text:
            return self._no_bucket()
        if any(each in text for each in _DENIED):
            return (
                f"{self.where}: access denied. Expected keys that may list, read, write and delete there, in"
                f" {_KEY} and AWS_SECRET_ACCESS_KEY or a profile in ~/.aws: {text}"
            )
        if "NETWORK_CONNECTION" in text:
            return f"{self.where} cannot be reached; is AWS_ENDPOINT_URL right? {text}"
        keyless = "" if os.environ.get(_KEY) else f"; {_KEY} is not set: are there other keys?"
        return f"{self.where}: {text}{keyless}"


def _first(names: Sequence[str]) -> str:
    return next(filter(None, map(os.environ.get, names)), "")


def _connect(bucket: str, endpoint: str, region: str) -> Any:
    if not endpoint and not region:
        with suppress(OSError):  # the first request says what is wrong
            region = pafs.resolve_s3_region(bucket)
    options: dict[str, Any] = {
        "region": region or _REGION,
        "endpoint_override": endpoint or None,
        "connect_timeout": _CONNECT_S_MAX,
        "request_timeout": _REQUEST_S_MAX,
        "background_writes": False,
        # An object of one part is sent with one request.
        "allow_delayed_open": True,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS_MAX),
    }
    return pafs.S3FileSystem(**options)
