"""The audit of a run: its journals in DuckDB, and every invariant asked of them in SQL.

`python -m tests.chaos.audit FOLDER` audits a run that was kept.
"""

from __future__ import annotations

import re
import sys
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import duckdb
import msgspec
from msgspec import Struct

from tests.chaos import journal
from tests.chaos.folding import INDEXES, Folding
from tests.chaos.histories import compared
from tests.chaos.options import NAMESPACE
from tests.chaos.record import recorded

HASHES: Final = "hashes.bin"
RUN: Final = "run.json"
_HERE: Final = Path(__file__).parent
_CHUNK_ROWS: Final = 20_000
_SHOWN_MAX: Final = 5
_QUERY: Final = re.compile(r"-- name: (?P<name>\w+)\n(?P<rest>.*?)(?=\n-- name: |\Z)", re.DOTALL)
_ALWAYS: Final = "always"
_FX_FIELDS: Final = 7


class Invariant(Struct, frozen=True):
    """One query, and what has to be known about it."""

    name: str
    says: str
    part: str
    """The part of a run that feeds it; a run without may have no rows for it."""
    looked: str
    query: str


class Finding(Struct, frozen=True):
    """What an invariant's query found."""

    name: str
    says: str
    looked: int
    violations: int
    shown: list[list[Any]]
    """The first of them."""


def invariants() -> list[Invariant]:
    """All of them, as `invariants.sql` has them."""
    text = (_HERE / "invariants.sql").read_text()
    return [_invariant(match["name"], match["rest"]) for match in _QUERY.finditer(text)]


def _invariant(name: str, rest: str) -> Invariant:
    lines = rest.strip().splitlines()
    comments = [line.removeprefix("-- ") for line in lines if line.startswith("-- ")]
    given = dict(line.split(": ", 1) for line in comments if line.startswith(("part: ", "looked: ")))
    says = " ".join(line for line in comments if not line.startswith(("part: ", "looked: ")))
    query = "\n".join(line for line in lines if not line.startswith("-- "))
    return Invariant(name, says, given["part"], given["looked"], query)


def new_database() -> duckdb.DuckDBPyConnection:
    """The tables, empty."""
    connection = duckdb.connect()
    connection.execute((_HERE / "tables.sql").read_text())
    return connection


def check(connection: duckdb.DuckDBPyConnection, only: str = "") -> list[Finding]:
    """Ask every invariant of loaded tables, or only one."""
    connection.execute((_HERE / "derived.sql").read_text())
    parts = {_ALWAYS, *(name for (name,) in connection.execute("select name from part").fetchall())}
    wanted = [invariant for invariant in invariants() if only in {"", invariant.name}]
    return [_ask(connection, invariant, parts) for invariant in wanted]


def _ask(connection: duckdb.DuckDBPyConnection, invariant: Invariant, parts: set[str]) -> Finding:
    (looked,) = _one(connection, invariant.looked)
    connection.execute(f"create or replace temp table found as {invariant.query}")
    (violations,) = _one(connection, "select count(*) from found")
    rows = connection.execute(f"select * from found limit {_SHOWN_MAX}").fetchall()  # noqa: S608
    shown = [list(row) for row in rows]
    if not looked and invariant.part in parts:
        violations, shown = 1, [["it read no rows: nothing was checked"]]
    return Finding(invariant.name, invariant.says, looked, violations, shown)


def _one(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    return connection.execute(query).fetchall()[0]


class _Rows:
    """Rows on their way into tables, in chunks."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._waiting: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def add(self, table: str, row: tuple[Any, ...]) -> None:
        rows = self._waiting[table]
        rows.append(row)
        if len(rows) >= _CHUNK_ROWS:
            self._write(table)

    def flush(self) -> None:
        for table in list(self._waiting):
            self._write(table)

    def _write(self, table: str) -> None:
        rows = self._waiting.pop(table, [])
        if rows:
            appender = self._connection.appender(table)
            appender.append_rows(rows)
            appender.flush()


class Audit:
    """Loads a run's folder."""

    def __init__(self, folder: Path, canary: str) -> None:
        self.connection: Final = new_database()
        self._folder = folder
        self._canary = canary
        self._rows = _Rows(self.connection)
        self._parts: set[str] = set()

    def load(self) -> None:
        """Everything in the folder."""
        self._load_log()
        self._load_clients()
        self._load_effects()
        self._load_observations()
        self._load_files()
        for table in compared(self._folder):
            self._rows.add("history", (table.folder, table.table, table.rows, table.wrong))
        for part in sorted(self._parts):
            self._rows.add("part", (part,))
        self._rows.flush()

    def coverage(self) -> dict[str, int]:
        """What the run went through."""
        queries = {
            "messages": "select count(*) from msg",
            "events": "select count(*) from ev",
            "tasks": "select count(*) from task",
            "elections": "select count(*) from msg where kind = 'leader.elected'",
            "losses": "select count(*) from ev where kind = 'worker.lost' and verdict = 'applied'",
            "superseded": "select count(*) from ev where verdict = 'superseded'",
            "superseded_outcomes": "select count(*) from ev where verdict = 'superseded'"
            " and kind in ('task.completed', 'task.failed')",
            "quarantines": "select count(*) from ev where verdict = 'quarantined'",
            "tasks_given_up": "select count(*) from ev where kind = 'task.quarantined' and verdict = 'applied'",
            "rejections": "select count(*) from ev where verdict = 'rejected'",
            "duplicates": "select count(*) from ev where verdict = 'duplicate'",
            "retries": "select count(*) from ev where kind = 'task.retried' and verdict = 'applied'",
            "cancelled": "select count(*) from ending where state = 'cancelled'",
            "skipped": "select count(*) from ending where state = 'skipped'",
            "unknown_to_clients": "select count(*) from sub where result = 'unknown'",
            "locks": "select count(*) from lock where kind = 'lock.acquired' and verdict = 'applied'",
            "locks_lost": "select count(*) from lock where kind = 'lock.lost' and verdict = 'applied'",
            "late_releases": "select count(*) from lock r join lock a on a.kind = 'lock.acquired'"
            " and a.name = r.name and a.token > r.token and a.pos < r.pos and a.mode = 'exclusive'"
            " where r.kind = 'lock.released'",
            "stale_writes_refused": "select count(*) from fx where what = 'refused'",
            "restarts": "select count(*) from exited where node not like 'client-%'",
        }
        return {name: int(_one(self.connection, query)[0]) for name, query in queries.items()}

    def _load_log(self) -> None:
        live = array("Q", (self._folder / HASHES).read_bytes())
        asked: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for answer in journal.read(self._folder / "answers.jsonl"):
            asked[answer["seq"]].append(answer)
        folding = Folding(NAMESPACE, self._rows, asked, live, self._canary)
        for message in recorded(self._folder):
            folding.take(message)
        folding.rest()
        for seq, answers in asked.items():  # of positions that the log does not have
            for answer in answers:
                self._rows.add("answer", (answer["master"], seq, "", "", 0, 0, None, 0, 0))

    def _load_clients(self) -> None:
        for path in sorted(self._folder.glob("client-*.jsonl")):
            self._load_client(path.stem, path)

    def _load_client(self, client: str, path: Path) -> None:
        """Of each number: ok if it was ever acknowledged; fail if it certainly never got into the log."""
        intents: dict[int, dict[str, Any]] = {}
        tries: Counter[int] = Counter()
        results: dict[int, Counter[str]] = defaultdict(Counter)
        for entry in journal.read(path):
            match entry["op"]:
                case "intent":
                    intents.setdefault(entry["n"], entry)
                    tries[entry["n"]] += 1
                    self._parts.add(entry["kind"])
                case "ok" | "fail" | "unknown":
                    results[entry["n"]][entry["op"]] += 1
                case "told":
                    pos = entry["seq"] * INDEXES + entry["index"] + 1
                    self._rows.add("told", (client, entry["n"], entry["task"], entry["state"], pos))
                case "untold":
                    self._rows.add("told", (client, entry["n"], entry["task"], "", 0))
                case _:
                    pass
        for first, intent in intents.items():
            result = _result(tries[first], results[first])
            for number in range(first, first + intent["count"]):
                self._rows.add("sub", (client, number, intent["kind"], result, intent.get("task")))

    def _load_effects(self) -> None:
        for place, fields in enumerate(_effects(self._folder / "effects.tsv")):
            what, task, attempt, worker, pid, mono_ns, token = fields
            row = (place, what, task, int(attempt), worker, int(pid), int(mono_ns), int(token))
            self._rows.add("fx", row)

    def _load_observations(self) -> None:
        add, folder = self._rows.add, self._folder
        for at, seen in enumerate(journal.read(folder / "identities.jsonl")):
            add("identity", (at, seen["name"], seen["created_ns"], seen["first_seq"], seen["last_seq"]))
        for found in journal.read(folder / "liveness.jsonl"):
            add("liveness", (found["what"], found["ok"], found["detail"]))
        for end in journal.read(folder / "exits.jsonl"):
            add("exited", (end["node"], end["pid"], end["code"], end["ready"], end["by_us"]))
        for ref in journal.read(folder / "objects.jsonl"):
            add("object", (ref["seq"], ref["name"], ref["wrong"]))
        for fault in journal.read(folder / "faults.jsonl"):
            add("fault", (fault["number"], fault["family"], fault["kind"], fault["target"], fault["hit"]))
            if fault["hit"]:
                self._parts.add(fault["kind"])

    def _load_files(self) -> None:
        canary = self._canary.encode()
        for path in sorted(self._folder.iterdir()):
            if path.suffix in {".log", ".jsonl", ".tsv"}:
                self._rows.add("file", (path.name, canary in path.read_bytes()))


def _result(tries: int, results: Counter[str]) -> str:
    if results["ok"]:
        return "ok"
    return "fail" if results["fail"] == tries else "unknown"


def _effects(path: Path) -> Iterator[list[str]]:
    """The lines of the journal of side effects; a torn one, of a killed process, is left out."""
    if path.exists():
        for line in path.read_text().splitlines():
            fields = line.split("\t")
            if len(fields) == _FX_FIELDS:
                yield fields


def main(folder: Path) -> int:
    """Audit a kept run, and print what is wrong with it; how many invariants are broken."""
    run = msgspec.json.decode((folder / RUN).read_bytes())
    began = time.monotonic()
    audit = Audit(folder, run["canary"])
    audit.load()
    findings = check(audit.connection)
    lines = [f"loaded and checked in {time.monotonic() - began:.1f} s: {audit.coverage()}"]
    lines += [f"{each.name}: {each.violations} of {each.looked} {each.shown or ''}" for each in findings]
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return sum(1 for finding in findings if finding.violations)


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
