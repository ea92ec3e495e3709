"""The documentation: what is rendered from the code is in step, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from agentflow import wire
from agentflow.checks import Bad
from agentflow.events import KINDS, ROLES, SINCE, Role
from agentflow.frames import judge, level_of
from agentflow.limits import LEVEL, LEVEL_FIRST
from tests.docs_from_code import RENDERERS, ROOT, documents, in_step

DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
PAGES = [*documents(), *DECISIONS, ROOT / "CHANGELOG.md"]
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)]*))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_STATUS = re.compile(r"^Status: (accepted|superseded by \d{3})$", re.MULTILINE)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", documents(), ids=_name)
def test_a_page_is_in_step_with_the_code(page: Path) -> None:
    text = page.read_text()
    assert in_step(text) == text, "run `uv run just docs`"


@pytest.mark.parametrize("name", RENDERERS)
def test_every_rendered_part_has_its_place(name: str) -> None:
    found = [page for page in documents() if f"<!-- from the code: {name} -->" in page.read_text()]
    assert found


def test_the_contract_names_every_event_and_its_level() -> None:
    text = (ROOT / "docs" / "contract.md").read_text()
    assert f"up to level {LEVEL}." in text
    assert all(f"#### `{kind}`" in text for kind in KINDS)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
        if "://" in target:
            continue
        aim = page if not target else (page.parent / target).resolve()
        assert aim.exists(), f"{target} in {_name(page)}"
        if anchor:
            assert anchor in _anchors(aim), f"{target}#{anchor} in {_name(page)}"


def _anchors(page: Path) -> set[str]:
    headings = _HEADING.findall(_CODE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DECISIONS, ids=_name)
def test_a_decision_says_what_it_has_to(page: Path) -> None:
    text = page.read_text()
    number = page.name[:3]
    assert text.startswith(f"# {number}: ")
    assert _STATUS.search(text), "a decision has a status line"
    sections = [section for section in ("## Context", "## Decision", "## Consequences") if section in text]
    assert len(sections) == len({"Context", "Decision", "Consequences"})


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:3]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


class _Published(NamedTuple):
    """What one line of a page publishes with the `nats` tool."""

    subject: str
    data: str
    headers: dict[str, str]

    @property
    def kind(self) -> str:
        return ".".join(self.subject.split(".")[2:4])


_HEADER = "-H"
# Said only by the SDK, with what it does: closed by another message, or beside the bucket of locks.
_NOT_BY_HAND = {"workflow.part", "lock.opened", "lock.acquired", "lock.released", "lock.lost"}


def _published() -> list[_Published]:
    lines = re.findall(
        r"^nats (?:pub|request) .*$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE
    )
    found = [_publishes(shlex.split(line, comments=True)[2:]) for line in lines]
    return [one for one in found if one.subject.startswith("af.")]


def _publishes(words: list[str]) -> _Published:
    headers: dict[str, str] = {}
    while words[0] == _HEADER:
        name, value = words[1].split(":", 1)
        headers[name.strip()] = value.strip()
        words = words[2:]
    subject, data = words
    return _Published(subject, data, headers)


def test_every_kind_of_a_client_is_published_somewhere() -> None:
    shown = {one.kind for one in _published()}
    assert shown == {kind for kind, role in ROLES.items() if role is Role.CLIENT} - _NOT_BY_HAND


@pytest.mark.parametrize("one", _published(), ids=lambda one: f"{one.kind} {one.data[:30]}")
def test_what_the_pages_publish_is_sound(one: _Published) -> None:
    judged = judge(one.subject, one.data.encode(), one.headers)
    assert judged.whole is None
    assert judged.items
    assert not [item for item in judged.items if isinstance(item, Bad)]


@pytest.mark.parametrize("one", _published(), ids=lambda one: f"{one.kind} {one.data[:30]}")
def test_it_names_the_level_it_needs_and_no_higher(one: _Published) -> None:
    said = judge(one.subject, one.data.encode(), {wire.VERSION: str(LEVEL)}).items
    needed = level_of([item for item in said if not isinstance(item, Bad)])
    assert one.headers.get(wire.VERSION, str(LEVEL_FIRST)) == str(needed)


def test_the_contract_says_which_level_added_what() -> None:
    text = (ROOT / "docs" / "contract.md").read_text()
    (row,) = re.findall(r"^\| 2 \| .*$", text, re.MULTILINE)
    assert {kind for kind in KINDS if f"`{kind}`" in row} == {kind for kind in KINDS if SINCE[kind] == 2}
    assert "`lock`" in row
