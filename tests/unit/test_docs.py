"""The documentation: what is rendered from the code is in step, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from agentflow.checks import Bad
from agentflow.events import KINDS, ROLES, Role
from agentflow.frames import judge
from agentflow.limits import LEVEL
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
    assert f"level {LEVEL}." in text
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


def _published() -> list[tuple[str, str]]:
    """Subject and data of every event that the pages publish with the `nats` tool."""
    lines = re.findall(
        r"^nats (?:pub|request) .*$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE
    )
    words = [shlex.split(line, comments=True) for line in lines]
    return [(subject, data) for _, _, subject, data in words if subject.startswith("af.")]


def test_every_kind_of_a_client_is_published_somewhere() -> None:
    shown = {".".join(subject.split(".")[2:4]) for subject, _ in _published()}
    assert shown == {kind for kind, role in ROLES.items() if role is Role.CLIENT} - {"workflow.part"}


@pytest.mark.parametrize(("subject", "data"), _published())
def test_what_the_pages_publish_is_sound(subject: str, data: str) -> None:
    judged = judge(subject, data.encode(), None)
    assert judged.whole is None
    assert judged.items
    assert not [item for item in judged.items if isinstance(item, Bad)]
