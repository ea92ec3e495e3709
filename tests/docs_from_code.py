"""The parts of the documentation that are rendered from the code.

They stand between `<!-- from the code: NAME -->` and `<!-- end -->`. `python -m
tests.docs_from_code` brings them in step, `tests/unit/test_docs.py` sees that they are.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from agentflow import events, limits, wire
from agentflow.domain import life
from agentflow.events import KINDS, ROLES, SINCE, Reason, Role
from agentflow_projections.queries import ready_made
from agentflow_projections.query import described_here

ROOT: Final = Path(__file__).resolve().parent.parent
_REGION: Final = re.compile(r"(<!-- from the code: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SHARED: Final = ("Work", "WorkflowTask", "Needs", "Retry", "ObjectRef", "Input", "Policy")
"""Structs that events are made of."""
_ADDRESSED: Final = frozenset({"task.assigned", "task.stop"})
_FIXED_ACTORS: Final = {"leader.elected": wire.ELECTED_ACTOR, "lock.opened": wire.LOCKS_ACTOR}
_SPEAKERS: Final = {
    Role.CLIENT: "client",
    Role.LEADER: "master",
    Role.MASTER: "master",
    Role.WORKER: "worker",
}
_SAYS: Final = {
    Role.CLIENT: "Said by any client",
    Role.LEADER: "Decided by the leader",
    Role.MASTER: "Said by a master",
    Role.WORKER: "Said by a worker",
}
_TYPES: Final = {
    "str": "string",
    "Integer": "integer",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "Raw | UnsetType": "any JSON",
    "list[Any]": "array of any JSON",
    "dict[str, Any]": "object of any JSON",
    "Integer | str": "integer or string",
}
_LIST: Final = re.compile(r"list\[(\w+)\]")
_DICT: Final = re.compile(r"dict\[str, (\w+)\]")


class _Field(NamedTuple):
    name: str
    type: str
    default: str
    """Empty if the field must be given."""
    meaning: str


def _class(source: str, name: str) -> ast.ClassDef:
    found = next(
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name
    )
    assert found.bases, name
    return found


def _documented(body: list[ast.stmt]) -> Iterator[tuple[ast.AnnAssign, str]]:
    """Annotated names with the string that stands below each."""
    for place, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign):
            continue
        below = body[place + 1] if place + 1 < len(body) else None
        said = ""
        if (
            isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            said = " ".join(below.value.value.split())
        yield node, said


def _fields(name: str) -> list[_Field]:
    """A struct's own fields, in order."""
    fields = []
    for node, meaning in _documented(_class(inspect.getsource(events), name).body):
        hint = ast.unparse(node.annotation)
        if hint.startswith("ClassVar"):
            continue
        default = "" if node.value is None else _default(node.value)
        fields.append(_Field(ast.unparse(node.target), _json_type(hint), default, meaning))
    return fields


def _default(value: ast.expr) -> str:
    text = ast.unparse(value)
    if text in {"None", "UNSET"}:
        return "absent"
    if text in {"LEVEL", "LEVEL_FIRST"}:
        return f"`{getattr(limits, text)}`"
    literal = ast.literal_eval(value)
    shown = {True: "true", False: "false"}.get(literal, text) if isinstance(literal, bool) else text
    return "`" + shown.replace("'", '"') + "`"


def _json_type(hint: str) -> str:
    hint = hint.removesuffix(" | None")
    if hint in _TYPES:
        return _TYPES[hint]
    for pattern, text in ((_LIST, "array of {}"), (_DICT, "object of {}")):
        found = pattern.fullmatch(hint)
        if found is not None:
            return text.format(_json_type(found[1]) + ("s" if found[1] == "str" else ""))
    return f"[{hint}](#{hint.lower()})"


def _table(fields: list[_Field]) -> str:
    if not fields:
        return "No fields of its own.\n"
    lines = ["| field | type | if left out | |", "|---|---|---|---|"]
    lines += [
        f"| `{field.name}` | {field.type} | {field.default or '**required**'} | {_cell(field.meaning)} |"
        for field in fields
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _prose(name: str) -> str:
    doc = getattr(events, name).__doc__
    return textwrap.dedent(str(inspect.cleandoc(doc))) + "\n"


def _subject(kind: str) -> str:
    return f"af.<namespace>.{kind}.{_actor(kind)}"


def _actor(kind: str) -> str:
    if kind in _FIXED_ACTORS:
        return _FIXED_ACTORS[kind]
    return "<worker spoken to>" if kind in _ADDRESSED else f"<{_SPEAKERS[ROLES[kind]]}>"


def _head(kind: str) -> str:
    """The subject of a kind, and the level its messages must name."""
    since = SINCE[kind]
    level = "" if since == limits.LEVEL_FIRST else f", with `{wire.VERSION}: {since}`"
    return f"`{_subject(kind)}`{level}\n"


def events_text() -> str:
    """Every event with its fields, by who says it."""
    parts = []
    for role, title in _SAYS.items():
        parts.append(f"### {title}\n")
        for kind in (kind for kind in KINDS if ROLES[kind] is role):
            name = KINDS[kind].__name__
            parts += [f"#### `{kind}`\n", _head(kind), _prose(name)]
            base = KINDS[kind].__mro__[1].__name__
            if base in _SHARED:
                parts.append(f"All fields of [{base}](#{base.lower()}), and:\n")
            parts.append(_table(_fields(name)))
    parts.append("### What they are made of\n")
    for name in _SHARED:
        parts += [f"#### {name}\n", _prose(name)]
        base = getattr(events, name).__mro__[1].__name__
        if base in _SHARED:
            parts.append(f"All fields of [{base}](#{base.lower()}), and:\n")
        parts.append(_table(_fields(name)))
    return "\n".join(parts)


def limits_text() -> str:
    """Every limit, with its value and meaning."""
    lines = ["| limit | value | |", "|---|---|---|"]
    meaning = ""
    for node, said in _documented(ast.parse(inspect.getsource(limits)).body):
        name = ast.unparse(node.target)
        value = getattr(limits, name)
        meaning = said
        lines.append(f"| `{name}` | {_value(name, value)} | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


_KIB: Final = 1024
_DAY_S: Final = 86_400


def _value(name: str, value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    assert isinstance(value, int | float)
    if "BYTES" in name or name in {"SCRIPT_LENGTH_MAX", "TAIL_LENGTH_MAX"}:
        unit = "KiB" if "BYTES" in name else "Ki characters"
        return f"{value // _KIB} {unit}"
    if name == "SECONDS_MAX":
        return f"{value / _DAY_S:.0f} days"
    if name == "INTEGER_MAX":
        return "2^63 - 1"
    return f"{value:,}"


def reasons_text() -> str:
    """Every reason an event is not accepted for."""
    return ", ".join(f"`{reason}`" for reason in Reason) + "\n"


def life_text() -> str:
    """The life of a task as a picture."""
    return f"```mermaid\n{life.mermaid()}\n```\n"


def tables_text() -> str:
    """Every table for people with its columns, as the database itself describes them."""
    parts = []
    for each in (each for each in described_here() if not each.base):
        parts += [f"## {each.name}\n", f"{each.meaning}\n", "| column | type | |", "|---|---|---|"]
        parts += [
            f"| `{name}` | {_sql_type(kind)} | {_cell(meaning)} |" for name, kind, meaning in each.columns
        ]
        parts.append("")
    base = [f"| `{each.name}` | {_cell(each.meaning)} |" for each in described_here() if each.base]
    return "\n".join([*parts, "## The tables beneath\n", "| table | |", "|---|---|", *base]) + "\n"


def reports_text() -> str:
    """Every ready-made question with what it may be told."""
    lines = ["| report | answers | may be told |", "|---|---|---|"]
    for each in ready_made().values():
        told = [
            f"`{one.name}`: {one.meaning}" + ("" if one.required else f" ({one.default})")
            for one in each.parameters
        ]
        lines.append(f"| `{each.name}` | {_cell(each.summary)} | {_cell('; '.join(told))} |")
    return "\n".join(lines) + "\n"


def _sql_type(kind: str) -> str:
    return "one of a few words" if kind.startswith("ENUM") else kind.lower()


RENDERERS: Final[dict[str, Callable[[], str]]] = {
    "events": events_text,
    "life": life_text,
    "limits": limits_text,
    "reasons": reasons_text,
    "reports": reports_text,
    "tables": tables_text,
}


def documents() -> list[Path]:
    """The documentation's pages."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def in_step(text: str) -> str:
    """A page with its rendered parts as the code has them now."""
    return _REGION.sub(lambda found: f"{found[1]}\n{RENDERERS[found[2]]().strip()}\n\n{found[3]}", text)


def main() -> None:
    """Rewrite the pages."""
    for page in documents():
        page.write_text(in_step(page.read_text()))


if __name__ == "__main__":
    main()
