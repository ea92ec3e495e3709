"""What a store of archives promises, of a folder and of a bucket that is spoken to over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agentflow.errors import InvalidRequest
from agentflow_projections.archive_store import ArchiveLocked, ArchiveUnreachable, Store, open_store
from tests.s3 import Keys, S3Server
from tests.servers import free_port

Attempt = Callable[[], object]


def use(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """What this process is told of a store."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(place: str) -> Store:
    return open_store(place)


def test_what_was_put_is_read(store: Store) -> None:
    large = os.urandom(12_000_000)  # sent in parts
    for name, data in (("a/b/c.json", b"{}"), ("a/b/empty", b""), ("a/large", large)):
        store.put(name, data)
        assert bytes(store.read(name)) == data
    store.put("a/b/c.json", b"another")
    assert bytes(store.read("a/b/c.json")) == b"another"


def test_names_are_told_in_order(store: Store) -> None:
    assert store.names() == []
    for name in ("b/2/x", "a/1/x", "a/1/a", "b/1/x"):
        store.put(name, b"data")
    assert store.names() == ["a/1/a", "a/1/x", "b/1/x", "b/2/x"]
    assert store.within("b").names() == ["1/x", "2/x"]
    assert store.within("none").names() == []


def test_a_part_of_a_store_is_a_store(store: Store) -> None:
    store.within("shop").put("day/x", b"data")
    assert bytes(store.read("shop/day/x")) == b"data"
    assert store.within("shop").where == f"{store.where}/shop"


def test_what_is_not_there_is_told(store: Store) -> None:
    store.put("a/b/x", b"data")
    with pytest.raises(FileNotFoundError):
        store.read("a/b/none")
    with pytest.raises(FileNotFoundError), store.files(["a/b/none"]) as (path,):
        path.read_bytes()


def test_what_is_removed_is_gone(store: Store) -> None:
    for name in ("a/1/x", "a/1/y", "a/2/x", "b/x"):
        store.put(name, b"data")
    store.remove("a/1/x")
    store.remove("a/1/x")
    assert store.names() == ["a/1/y", "a/2/x", "b/x"]
    store.remove_all("a/2")
    store.remove_all("a/2")
    assert store.names() == ["a/1/y", "b/x"]


def test_files_are_at_hand_while_they_are_needed(store: Store) -> None:
    store.put("a/x", b"1")
    store.put("b/x", b"2")
    with store.files(["b/x", "a/x"]) as paths:
        assert [path.read_bytes() for path in paths] == [b"2", b"1"]


def test_a_folder_knows_one_writer(tmp_path: Path) -> None:
    with open_store(tmp_path).locked():
        with pytest.raises(ArchiveLocked, match="one is enough"), open_store(tmp_path).locked():
            pass
        assert open_store(tmp_path).within("x").names() == []
    with open_store(tmp_path).locked():
        pass


@pytest.mark.parametrize("where", ["s3://", "s3://key@bucket/x", "s3://bucket/x?colour=red", "gs://bucket/x"])
def test_a_name_of_no_store_is_told(where: str) -> None:
    with pytest.raises(InvalidRequest, match="expected"):
        open_store(where)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (Keys("", ""), "AWS_ACCESS_KEY_ID is not set"),
        (Keys("nobody", "nothing"), "access denied. Expected keys that may"),
    ],
    ids=["none", "unknown"],
)
def test_whom_the_store_does_not_know_is_told(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keys: Keys, said: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no keys there, either
    use(monkeypatch, s3.environment(keys))
    store = open_store(f"s3://{s3.bucket}/archive")
    with pytest.raises(ArchiveUnreachable, match=said):
        store.names()


def test_who_may_only_read_reads(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, s3.environment())
    open_store(f"s3://{s3.bucket}/read").put("x", b"data")
    use(monkeypatch, s3.environment(s3.reader))
    store = open_store(f"s3://{s3.bucket}/read")
    assert (store.names(), bytes(store.read("x"))) == (["x"], b"data")
    attempts: list[Attempt] = [lambda: store.put("y", b""), lambda: store.remove("x")]
    for attempt in attempts:
        with pytest.raises(ArchiveUnreachable, match="access denied"):
            attempt()


def test_a_bucket_that_is_not_there_is_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, s3.environment())
    store = open_store("s3://nowhere-at-all/archive")
    attempts: list[Attempt] = [store.names, lambda: store.put("x", b"data")]
    for attempt in attempts:
        with pytest.raises(ArchiveUnreachable, match="no bucket 'nowhere-at-all'"):
            attempt()


def test_a_store_that_does_not_answer_is_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, s3.environment(url=f"http://127.0.0.1:{free_port()}"))
    store = open_store(f"s3://{s3.bucket}/archive")
    with pytest.raises(ArchiveUnreachable, match="cannot be reached; is AWS_ENDPOINT_URL right"):
        store.names()


def test_an_address_may_say_where_the_store_is(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, s3.environment())
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    store = open_store(f"s3://{s3.bucket}/said?endpoint_override={s3.url}&region=us-east-1")
    store.put("x", b"data")
    assert (store.where, store.names()) == (f"s3://{s3.bucket}/said", ["x"])
