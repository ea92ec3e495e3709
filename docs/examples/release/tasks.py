"""The Python tasks of the release example.

Each is an ordinary function and can be called as one; `agentflow.task` gives it the name under
which a workflow asks for it. Arguments and results are JSON, which is all that travels from
task to task: files stay where they are, their paths are passed on.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import os
import shutil
import subprocess
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import agentflow

HERE = Path(__file__).resolve().parent
GIT_TIMEOUT_S = 60

# The history of the example's repository: a message, and the files that come with it.
HISTORY = (
    ("Describe the package", ("README.md", "pyproject.toml")),
    ("Write and read Roman numerals", ("src",)),
    ("Test numerals and the command line", ("tests",)),
)


class Work(TypedDict):
    """Where this release is made."""

    repository: str
    source: str
    """Where the clone is to go."""
    dist: str
    run_shard: str
    version: str
    commit: str


class Shards(TypedDict):
    """The tests, dealt out."""

    tests: int
    shards: list[list[str]]


class Lines(TypedDict):
    """Lines of code by top folder."""

    total: int
    by_folder: dict[str, int]


class ShardResult(TypedDict):
    """What run_shard.py says of one shard."""

    ran: int
    failed: int
    seconds: float


class Summary(TypedDict):
    """The release in a few words."""

    version: str
    tests: int
    archive: str
    report: str


@agentflow.task(name="release.prepare")
def prepare() -> Work:
    """Make a folder to work in, and in it the git repository to release from."""
    folder = Path(tempfile.mkdtemp(prefix="agentflow-release-"))
    repository, dist = folder / "origin", folder / "dist"
    repository.mkdir()
    dist.mkdir()
    _git(repository, "init", "--quiet", "--initial-branch=main")
    for hour, (message, names) in enumerate(HISTORY):
        _commit(repository, message, names, hour)
    return {
        "repository": str(repository),
        "source": str(folder / "source"),
        "dist": str(dist),
        "run_shard": str(HERE / "run_shard.py"),
        "version": _project(repository)["version"],
        "commit": _git(repository, "rev-parse", "HEAD"),
    }


@agentflow.task(name="release.plan_shards")
def plan_shards(source: str, shards: int) -> Shards:
    """Find the tests without running anything, and deal them out like cards."""
    tests = [test for path in sorted(Path(source, "tests").glob("test_*.py")) for test in _tests_in(path)]
    return {"tests": len(tests), "shards": [tests[index::shards] for index in range(shards)]}


@agentflow.task(name="release.count_lines")
def count_lines(source: str) -> Lines:
    """Count the lines of Python that are not blank."""
    by_folder = {
        folder: sum(_count(path) for path in Path(source, folder).rglob("*.py"))
        for folder in ("src", "tests")
    }
    return {"total": sum(by_folder.values()), "by_folder": by_folder}


@agentflow.task(name="release.build_wheel")
def build_wheel(source: str, dist: str) -> str:
    """Build the wheel and return its path.

    A wheel of pure Python is a zip file with three files about it (PEP 427), so this needs
    neither network nor build tools, and equal sources give an equal wheel.
    """
    project = _project(Path(source))
    stem = f"{project['name']}-{project['version']}"
    package = Path(source, "src")
    files = {str(path.relative_to(package)): path.read_bytes() for path in sorted(package.rglob("*.py"))}
    files |= {f"{stem}.dist-info/{name}": text.encode() for name, text in _about(project).items()}
    record = f"{stem}.dist-info/RECORD"
    files[record] = "".join([*_record(files), f"{record},,\n"]).encode()
    wheel = Path(dist, f"{stem}-py3-none-any.whl")
    _write_zip(wheel, files)
    return str(wheel)


@agentflow.task(name="release.checksum")
def checksum(artifacts: list[str], dist: str) -> dict[str, str]:
    """Write SHA256SUMS, as `sha256sum --check` reads it, and return the digests by file name."""
    digests = {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in artifacts}
    Path(dist, "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return digests


@agentflow.task(name="release.report")
def report(  # noqa: PLR0913 - one argument for each task it reports on
    *,
    work: Work,
    planned: int,
    shards: list[ShardResult],
    lines: Lines,
    digests: dict[str, str],
    changelog: str,
    smoke: dict[str, str],
    archive: str,
) -> Summary:
    """Write report.md beside the artifacts. Raises ValueError if a planned test was not run."""
    ran = sum(shard["ran"] for shard in shards)
    if ran != planned:
        message = f"expected all {planned} tests to be run, found {ran}"
        raise ValueError(message)
    text = _report(
        work=work,
        shards=shards,
        lines=lines,
        digests=digests,
        changelog=changelog,
        smoke=smoke,
        archive=archive,
    )
    path = Path(work["dist"], "report.md")
    path.write_text(text)
    return {"version": work["version"], "tests": ran, "archive": archive, "report": str(path)}


def _git(folder: Path, *words: str, hour: int = 0) -> str:
    """Run git as on a machine where nobody has configured it, and return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    date = f"2024-01-01T{hour:02}:00:00Z"
    fixed = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_DATE": date,
        "GIT_COMMITTER_DATE": date,
    }
    who = ("-c", "user.name=Widget", "-c", "user.email=widget@example.org")
    done = subprocess.run(  # noqa: S603 - the words are ours
        ["git", *who, *words],  # noqa: S607 - git is where the PATH says
        cwd=folder,
        env=inherited | fixed,
        timeout=GIT_TIMEOUT_S,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def _commit(repository: Path, message: str, names: Sequence[str], hour: int) -> None:
    """Copy part of the package into the repository and commit it."""
    for name in names:
        origin, copy = HERE / "widget" / name, repository / name
        if origin.is_dir():
            shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(origin, copy)
    _git(repository, "add", *names)
    _git(repository, "commit", "--quiet", f"--message={message}", hour=hour)


def _project(source: Path) -> dict[str, Any]:
    """The [project] table of a package."""
    project: dict[str, Any] = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    return project


def _tests_in(path: Path) -> Iterator[str]:
    """The names by which unittest knows the tests in a file."""
    for top in ast.parse(path.read_text()).body:
        if isinstance(top, ast.ClassDef):
            for item in top.body:
                if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                    yield f"tests.{path.stem}.{top.name}.{item.name}"


def _count(path: Path) -> int:
    return sum(1 for line in path.read_text().splitlines() if line.strip())


def _about(project: Mapping[str, Any]) -> dict[str, str]:
    """The files that tell an installer what the wheel is."""
    scripts = "".join(f"{name} = {target}\n" for name, target in project["scripts"].items())
    return {
        "METADATA": (
            "Metadata-Version: 2.1\n"
            f"Name: {project['name']}\n"
            f"Version: {project['version']}\n"
            f"Summary: {project['description']}\n"
            f"Requires-Python: {project['requires-python']}\n"
        ),
        "WHEEL": ("Wheel-Version: 1.0\nGenerator: agentflow\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        "entry_points.txt": f"[console_scripts]\n{scripts}",
    }


def _record(files: Mapping[str, bytes]) -> Iterator[str]:
    """The lines of RECORD: path, digest, size."""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        yield f"{name},sha256={digest},{len(data)}\n"


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """A zip file that depends on nothing but its content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)


def _report(
    *,
    work: Work,
    shards: Sequence[ShardResult],
    lines: Lines,
    digests: Mapping[str, str],
    changelog: str,
    smoke: Mapping[str, str],
    archive: str,
) -> str:
    """The report, as Markdown."""
    rows = [f"| {n} | {shard['ran']} | {shard['seconds']:.2f} |" for n, shard in enumerate(shards, start=1)]
    sums = [f"- `{name}` {digest}" for name, digest in digests.items()]
    return "\n".join(
        [
            f"# widget {work['version']}",
            "",
            f"Commit `{work['commit'][:12]}`, {lines['total']} lines of Python.",
            f"Installed from the wheel it says {smoke['version']}, and that 1994 is {smoke['answer']}.",
            "",
            "| shard | tests | seconds |",
            "|---|---|---|",
            *rows,
            "",
            "## Changes",
            "",
            changelog,
            "",
            f"## Files, all in `{Path(archive).name}`",
            "",
            *sums,
            "",
        ]
    )
