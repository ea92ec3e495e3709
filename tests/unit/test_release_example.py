"""The release example: its files are sound, and each of its functions works when called as one."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import agentflow
from agentflow.client.files import Argv, Function, Shell, WorkflowFile, load_workflow
from agentflow.domain import dag

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
WIDGET = EXAMPLES / "release" / "widget"
TESTS = 18


@pytest.fixture(scope="module")
def release() -> WorkflowFile:
    return load_workflow(EXAMPLES / "release.yaml")


@pytest.fixture(scope="module")
def tasks(release: WorkflowFile) -> ModuleType:
    """The module that the workflow names."""
    assert release.app is not None
    spec = importlib.util.spec_from_file_location("release_example_tasks", release.app)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    folder.mkdir()
    return folder


def output_of(*words: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=cwd).stdout.strip()


def run_shard(tests: list[str], result: Path) -> int:
    """Run tests of the widget as the workflow does; the exit code."""
    env = os.environ | {"TESTS": json.dumps(tests), "AGENTFLOW_RESULT": str(result)}
    words: list[str | Path] = [sys.executable, "-B", EXAMPLES / "release" / "run_shard.py"]
    return subprocess.run(words, env=env, cwd=WIDGET, capture_output=True, check=False).returncode


class TestWorkflows:
    def test_the_release_mixes_functions_scripts_and_programs(self, release: WorkflowFile) -> None:
        assert {type(task.run) for task in release.tasks} == {Function, Shell, Argv}
        assert len(release.tasks) == 16

    def test_the_shards_run_side_by_side(self, release: WorkflowFile) -> None:
        levels = dag.levels({task.task_id: task.dependencies for task in release.tasks})

        assert any({"test-1", "test-2", "test-3", "test-4"} <= set(level) for level in levels)

    def test_the_report_waits_for_everything(self, release: WorkflowFile) -> None:
        graph = {task.task_id: task.dependencies for task in release.tasks}

        assert {*dag.dependency_chain(graph, "report"), "report"} == set(graph)

    def test_every_function_it_names_is_in_its_app(self, release: WorkflowFile, tasks: ModuleType) -> None:
        named = {task.run.name for task in release.tasks if isinstance(task.run, Function)}

        assert named == {
            value.name for value in vars(tasks).values() if isinstance(value, agentflow.Function)
        }

    def test_the_plain_workflow_is_a_diamond_and_a_tail(self) -> None:
        plain = load_workflow(EXAMPLES / "workflow.json")

        graph = {task.task_id: task.dependencies for task in plain.tasks}
        assert dag.levels(graph) == [["fetch"], ["count", "sort"], ["join"], ["check"]]


class TestPrepare:
    def test_makes_a_repository_with_a_history(
        self, tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        work = tasks.prepare()

        repository = Path(work["repository"])
        assert output_of("git", "rev-parse", "HEAD", cwd=repository) == work["commit"]
        assert output_of("git", "rev-list", "--count", "HEAD", cwd=repository) == "3"
        assert output_of("git", "status", "--porcelain", cwd=repository) == ""
        assert work["version"] == "1.2.0"

    def test_makes_the_same_commit_every_time(
        self, tasks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        first, second = tasks.prepare(), tasks.prepare()

        assert first["commit"] == second["commit"]
        assert first["repository"] != second["repository"]


class TestShards:
    def test_every_test_is_in_one_of_them(self, tasks: ModuleType) -> None:
        planned = tasks.plan_shards(str(WIDGET), 4)

        dealt = [test for shard in planned["shards"] for test in shard]
        assert planned["tests"] == len(dealt) == len(set(dealt)) == TESTS
        assert [len(shard) for shard in planned["shards"]] == [5, 5, 4, 4]

    def test_a_shard_tells_what_it_ran(self, tasks: ModuleType, tmp_path: Path) -> None:
        result = tmp_path / "result.json"
        tests = [test for test in tasks.plan_shards(str(WIDGET), 1)["shards"][0] if "Adding" not in test]

        assert run_shard(tests, result) == 0

        counts = json.loads(result.read_text())
        assert (counts["ran"], counts["failed"]) == (len(tests), 0)

    def test_a_shard_with_a_failing_test_fails(self, tmp_path: Path) -> None:
        result = tmp_path / "result.json"

        assert run_shard(["tests.test_cli.Answers.test_nothing_like_this"], result) == 1

        assert json.loads(result.read_text())["failed"] == 1


class TestWheel:
    def test_can_be_imported_from(self, tasks: ModuleType, dist: Path) -> None:
        wheel = tasks.build_wheel(str(WIDGET), str(dist))

        program = "import sys; sys.path.insert(0, sys.argv[1]); import widget; print(widget.to_roman(1994))"
        assert output_of(sys.executable, "-I", "-c", program, wheel) == "MCMXCIV"

    def test_is_the_same_every_time(self, tasks: ModuleType, dist: Path) -> None:
        wheel = Path(tasks.build_wheel(str(WIDGET), str(dist)))
        first = wheel.read_bytes()

        assert Path(tasks.build_wheel(str(WIDGET), str(dist))).read_bytes() == first

    def test_records_every_file_with_its_digest(self, tasks: ModuleType, dist: Path) -> None:
        with zipfile.ZipFile(tasks.build_wheel(str(WIDGET), str(dist))) as wheel:
            record = wheel.read("widget-1.2.0.dist-info/RECORD").decode().splitlines()
            names = wheel.namelist()
            digests = [base64.urlsafe_b64encode(hashlib.sha256(wheel.read(name)).digest()) for name in names]

        assert [line.split(",")[0] for line in record] == names
        for line, digest in zip(record[:-1], digests, strict=False):
            assert line.split(",")[1] == f"sha256={digest.decode().rstrip('=')}"
        assert record[-1] == "widget-1.2.0.dist-info/RECORD,,"


class TestChecksum:
    def test_writes_what_sha256sum_reads(self, tasks: ModuleType, dist: Path) -> None:
        (dist / "a.bin").write_bytes(b"a")
        digest = hashlib.sha256(b"a").hexdigest()

        assert tasks.checksum([str(dist / "a.bin")], str(dist)) == {"a.bin": digest}

        assert (dist / "SHA256SUMS").read_text() == f"{digest}  a.bin\n"


class TestLines:
    def test_counts_those_that_are_not_blank(self, tasks: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "one.py").write_text("a = 1\n\n  \nb = 2\n")

        assert tasks.count_lines(str(tmp_path)) == {"total": 2, "by_folder": {"src": 2, "tests": 0}}


class TestReport:
    def arguments(self, dist: Path) -> dict[str, object]:
        return {
            "work": {"dist": str(dist), "version": "1.2.0", "commit": "0123456789abcdef"},
            "planned": 5,
            "shards": [{"ran": 3, "failed": 0, "seconds": 0.5}, {"ran": 2, "failed": 0, "seconds": 0.25}],
            "lines": {"total": 150, "by_folder": {}},
            "digests": {"widget.whl": "abc"},
            "changelog": "- Test it",
            "smoke": {"version": "1.2.0", "answer": "MCMXCIV"},
            "archive": "/somewhere/widget.tar",
        }

    def test_gathers_what_the_other_tasks_said(self, tasks: ModuleType, dist: Path) -> None:
        summary = tasks.report(**self.arguments(dist))

        assert summary == {
            "version": "1.2.0",
            "tests": 5,
            "archive": "/somewhere/widget.tar",
            "report": str(dist / "report.md"),
        }
        text = (dist / "report.md").read_text()
        for said in (
            "# widget 1.2.0",
            "| 2 | 2 | 0.25 |",
            "- Test it",
            "`widget.whl` abc",
            "1994 is MCMXCIV",
        ):
            assert said in text

    def test_refuses_a_release_with_tests_that_were_not_run(self, tasks: ModuleType, dist: Path) -> None:
        with pytest.raises(ValueError, match="expected all 6 tests to be run, found 5"):
            tasks.report(**self.arguments(dist) | {"planned": 6})
