"""Disks for tests that can be filled, and whose power can be cut; they need root and loop devices."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

WITHOUT_ROOT = "AGENTFLOW_NO_ROOT_TESTS"


def require_root() -> None:
    """Fail, saying how to run the test, unless file systems may be mounted here."""
    if os.environ.get(WITHOUT_ROOT) == "1":
        pytest.skip(f"{WITHOUT_ROOT}=1")
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.fail(
            "this test mounts file systems: run it as root where there are loop devices (in a container:"
            f" --privileged), or leave out all such tests with {WITHOUT_ROOT}=1",
            pytrace=False,
        )


@contextlib.contextmanager
def mounted(*arguments: str | Path, at: Path) -> Generator[Path]:
    """Something mounted at a folder: arguments as `mount` takes them."""
    at.mkdir(parents=True, exist_ok=True)
    _run("mount", *arguments, at)
    try:
        yield at
    finally:
        # Who still has a file open there is about to end.
        _run("umount", "--lazy", at)


@contextlib.contextmanager
def ext4(image: Path, at: Path) -> Generator[Path]:
    """An image, made if there is none, as a disk of its own."""
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(256 << 20)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", image)
    with mounted("-o", "loop", image, at=at):
        yield at


def cut_power(image: Path, copy: Path) -> None:
    """What would be on the disk if the power failed now: what the file system has written out, no more.

    Nothing may be written meanwhile, or the copy is of no single instant.
    """
    _run("cp", "--sparse=always", image, copy)


@contextlib.contextmanager
def small_disk(at: Path, mib: int) -> Generator[Path]:
    """A disk that is soon full."""
    with mounted("-t", "tmpfs", "-o", f"size={mib}m", "none", at=at):
        yield at


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
