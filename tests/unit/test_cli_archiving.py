"""What `agentflow up` is told of archiving is what the archiver it starts is told."""

from __future__ import annotations

import pytest

from agentflow_nodes.cli.cluster import ArchiveConfig
from agentflow_nodes.cli.errors import CliError
from agentflow_nodes.cli.up import _archive


def test_without_a_place_nothing_is_archived() -> None:
    assert _archive("", "", "", "1h") is None


def test_what_was_given_is_handed_on() -> None:
    found = _archive("s3://bucket/logs", "7d", "20GiB", "10m")
    assert found is not None
    assert found.options() == [
        *("--dir", "s3://bucket/logs", "--keep-age", "7d", "--keep-bytes", "20GiB", "--seal-after", "10m")
    ]
    assert ArchiveConfig(where="archive").options() == ["--dir", "archive"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("", "7d", "", "1h"), "expected --archive, too"),
        (("", "", "1GB", "1h"), "expected --archive, too"),
        (("archive", "7 parsecs", "", "1h"), "--keep-age: expected an age"),
        (("archive", "", "much", "1h"), "--keep-bytes: expected a size"),
        (("archive", "", "", "soon"), "--seal-after: expected an age"),
    ],
)
def test_what_is_not_understood_is_told_before_anything_starts(
    given: tuple[str, str, str, str], said: str
) -> None:
    with pytest.raises(CliError, match=said):
        _archive(*given)
