"""Workflow files: what is read, and what people are told when it is not."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from agentflow.client.files import (
    FILE_BYTES_MAX,
    PROBLEMS_MAX,
    Argv,
    Function,
    Needs,
    Retry,
    Shell,
    TaskFile,
    WorkflowFile,
    load_workflow,
    parse_workflow,
    references,
)
from agentflow.errors import InvalidRequest

TASK = "workflow: {tasks: [{task_id: a, shell: 'true', %s}]}"


def parsed(text: str) -> WorkflowFile:
    return parse_workflow(textwrap.dedent(text), "flow.yaml")


def only_task(keys: str) -> TaskFile:
    (task,) = parsed(TASK % keys).tasks
    return task


def refusal(text: str) -> str:
    """What is said about a file that is refused."""
    with pytest.raises(InvalidRequest) as caught:
        parsed(text)
    return str(caught.value)


def json_refusal(text: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parse_workflow(text, "flow.json", "json")
    return str(caught.value)


class TestPlainShape:
    """The shape that other tools write, with what to run added."""

    PLAIN = """\
        workflow:
          id: nightly
          name: Nightly
          description: Every night
          tasks:
            - task_id: fetch
              title: Fetch the sources
              dependencies: []
              priority: high
              shell: git fetch
            - task_id: build
              title: Build
              dependencies: [fetch]
              priority: 10
              argv: [make, all]
        """

    def test_is_read_as_it_is(self) -> None:
        assert parsed(self.PLAIN) == WorkflowFile(
            source="flow.yaml",
            id="nightly",
            name="Nightly",
            description="Every night",
            tasks=(
                TaskFile(
                    task_id="fetch", run=Shell("git fetch"), title="Fetch the sources", priority=750, line=6
                ),
                TaskFile(
                    task_id="build",
                    run=Argv(["make", "all"]),
                    title="Build",
                    dependencies=("fetch",),
                    priority=10,
                    line=11,
                ),
            ),
        )

    def test_means_the_same_in_json(self) -> None:
        as_json = json.dumps(yaml.safe_load(textwrap.dedent(self.PLAIN)))

        from_json = parse_workflow(as_json, "flow.json", "json")

        assert [task.task_id for task in from_json.tasks] == ["fetch", "build"]
        assert from_json.tasks[1].dependencies == ("fetch",)

    def test_only_ids_and_what_to_run_are_needed(self) -> None:
        assert parsed("workflow: {tasks: [{task_id: a, shell: 'true'}]}").tasks == (
            TaskFile(task_id="a", run=Shell("true"), line=1),
        )


class TestWhatToRun:
    def test_a_function_with_its_arguments(self) -> None:
        text = "workflow: {tasks: [{task_id: a, function: mail.send, args: [1, [x]], kwargs: {to: me}}]}"

        assert parsed(text).tasks[0].run == Function("mail.send", [1, ["x"]], {"to": "me"})

    def test_nothing_is_refused_with_what_to_add(self) -> None:
        message = refusal("workflow: {tasks: [{task_id: a, title: Later}]}")

        assert "flow.yaml:1: task 'a': has nothing to run; add one of" in message
        assert "shell: " in message
        assert "argv: " in message
        assert "function: " in message

    def test_two_things_are_refused(self) -> None:
        assert "expected one thing to run, found shell and argv; keep one" in refusal(TASK % "argv: [ls]")

    def test_arguments_of_a_script_are_refused_with_where_they_go(self) -> None:
        assert "args: only a function takes them; give a script its values in `env:`" in refusal(
            TASK % "args: [1]"
        )

    def test_environment_of_a_function_is_refused_with_where_it_goes(self) -> None:
        message = refusal("workflow: {tasks: [{task_id: a, function: m.f, env: {A: b}}]}")

        assert "env: only shell and argv have it; give a function its values in `kwargs:`" in message

    def test_a_function_name_has_no_spaces(self) -> None:
        assert "found 'rm -rf'" in refusal("workflow: {tasks: [{task_id: a, function: rm -rf}]}")


class TestOptions:
    def test_everything_at_once(self) -> None:
        task = only_task(
            "cwd: /tmp, env: {A: b}, timeout_s: 1.5, queue_timeout_s: 60, priority: urgent, "
            "needs: {cpu: 0.5, memory_mb: 512, gpus: 1, group: big, labels: {disk: ssd}}, "
            "retry: {max_attempts: 5, backoff_s: 0.5, backoff_factor: 3, backoff_s_max: 9, jitter: 0, "
            "non_retryable: [ValueError]}"
        )

        assert task == TaskFile(
            task_id="a",
            run=Shell("true"),
            cwd="/tmp",
            env={"A": "b"},
            timeout_s=1.5,
            queue_timeout_s=60.0,
            priority=1000,
            needs=Needs(cpu=0.5, memory_mb=512, gpus=1, group="big", labels={"disk": "ssd"}),
            retry=Retry(5, 0.5, 3.0, 9.0, 0.0, ["ValueError"]),
            line=1,
        )

    def test_a_key_with_nothing_after_it_is_left_out(self) -> None:
        task = only_task("title: , dependencies: , retry: , needs: {gpus: , cpu: 1}")

        assert task == TaskFile(task_id="a", run=Shell("true"), needs=Needs(cpu=1.0), line=1)

    def test_the_file_with_the_functions_is_named(self) -> None:
        assert parsed("app: tasks.py\n" + TASK % "").app == "tasks.py"

    @pytest.mark.parametrize(
        ("name", "value"), [("urgent", 1000), ("high", 750), ("medium", 500), ("low", 250)]
    )
    def test_priorities_have_names(self, name: str, value: int) -> None:
        assert only_task(f"priority: {name}").priority == value

    @pytest.mark.parametrize("value", ["-1", "1001", "hihg", "2.5", "[1]", "true"])
    def test_other_priorities_are_refused(self, value: str) -> None:
        assert "task 'a': priority: expected" in refusal(TASK % f"priority: {value}")

    def test_a_misspelt_priority_is_recognized(self) -> None:
        assert "did you mean 'high'?" in refusal(TASK % "priority: hihg")

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ("timeout_s: soon", "task 'a': timeout_s: expected a number, found 'soon'"),
            ("timeout_s: -1", "task 'a': timeout_s: expected a number >= 0.0, found -1"),
            ("title: 5", "task 'a': title: expected text, found 5; put it in quotes"),
            ("dependencies: b", "task 'a': dependencies: expected a list, found 'b'; write [b]"),
            ("dependencies: [b, 7]", "task 'a': dependencies[1]: expected text, found 7; put it in quotes"),
            ("retry: 3", "task 'a': retry: expected a mapping, found 3"),
            (
                "retry: {max_attempts: 0}",
                "task 'a': retry: max_attempts: expected a whole number >= 1, found 0",
            ),
            ("needs: {gpus: 0.5}", "task 'a': needs: gpus: expected a whole number, found 0.5"),
            ("needs: {labels: {zone: 3}}", "task 'a': needs: labels[...]: expected text, found {'zone': 3}"),
        ],
    )
    def test_a_wrong_value_is_refused_with_what_was_expected(self, keys: str, message: str) -> None:
        assert f"flow.yaml:1: {message}" in refusal(TASK % keys)


class TestText:
    """What ends up in the environment or on a command line."""

    def test_whole_numbers_are_taken_as_written(self) -> None:
        assert only_task("env: {PORT: 8080, MODE: 0644}").env == {"PORT": "8080", "MODE": "0644"}

    @pytest.mark.parametrize("value", ["1.10", "true", "null"])
    def test_what_might_come_out_otherwise_is_refused(self, value: str) -> None:
        assert "env: A: expected text" in refusal(TASK % f"env: {{A: {value}}}")
        assert "put it in quotes" in refusal(TASK % f"env: {{A: {value}}}")

    def test_a_list_stays_one_for_it_may_hold_results(self) -> None:
        task = parsed(
            "workflow: {tasks: [{task_id: a, shell: x}, {task_id: b, argv: [x, [{$result: a}]]}]}"
        ).tasks[1]

        assert task.run == Argv(["x", [{"$result": "a"}]])

    def test_a_variable_has_no_equals_sign_in_its_name(self) -> None:
        assert "env: expected names without '=', found 'A=B'" in refusal(TASK % "env: {A=B: c}")


class TestReferences:
    def test_who_uses_a_result_waits_for_it(self) -> None:
        workflow = parsed("""\
            workflow:
              tasks:
                - {task_id: a, shell: x}
                - {task_id: b, shell: x}
                - {task_id: c, shell: x}
                - task_id: d
                  dependencies: [c]
                  function: m.f
                  args: [[{$result: b, at: /x/0}]]
                  kwargs: {deep: {er: {$result: a}}, again: {$result: b}}
                - {task_id: e, shell: x, env: {A: {$result: a}}}
                - {task_id: f, argv: [x, {$result: e}]}
            """)

        assert [task.dependencies for task in workflow.tasks[3:]] == [("c", "b", "a"), ("a",), ("e",)]

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ("{$result: b, att: /x}", "expected only `at` beside `$result`, found $result, att"),
            ("{$result: 7}", "expected a task id after `$result`, found 7"),
            ("{$result: }", "expected a task id after `$result`, found nothing"),
            ("{$result: b, at: x}", "at: expected a JSON pointer like /wheel/path, found 'x'"),
            ("{$result: b, at: /~2}", "at: expected a JSON pointer"),
        ],
    )
    def test_a_malformed_one_is_refused(self, reference: str, message: str) -> None:
        assert message in refusal(TASK % f"env: {{A: {reference}}}")

    def test_one_to_nobody_is_refused_with_who_was_meant(self) -> None:
        message = refusal(
            "workflow: {tasks: [{task_id: build, shell: x}, {task_id: b, argv: [{$result: biuld}]}]}"
        )

        assert message.endswith("not a task of this workflow; did you mean 'build'?")

    def test_one_to_the_task_itself_is_refused(self) -> None:
        assert "task 'a' depends on itself" in refusal(TASK % "env: {A: {$result: a}}")

    def test_they_are_found_in_the_order_written(self) -> None:
        assert list(references([{"$result": "b"}, {"x": [{"$result": "a", "at": "/b"}]}, "c"])) == ["b", "a"]


class TestDefaults:
    def test_hold_where_a_task_says_nothing_else(self) -> None:
        first, second, third = parsed("""\
            defaults:
              retry: {max_attempts: 4, backoff_s: 0.5}
              env: {LANG: C, TZ: UTC}
              cwd: /work
              timeout_s: 60
              priority: low
            workflow:
              tasks:
                - {task_id: a, shell: x}
                - {task_id: b, shell: x, env: {TZ: CET}, retry: {max_attempts: 1}, cwd: /, priority: 7}
                - {task_id: c, function: m.f}
            """).tasks

        assert (first.env, first.cwd, first.timeout_s, first.priority) == (
            {"LANG": "C", "TZ": "UTC"},
            "/work",
            60.0,
            250,
        )
        assert (second.env, second.cwd, second.priority) == ({"LANG": "C", "TZ": "CET"}, "/", 7)
        assert second.retry == Retry(max_attempts=1, backoff_s=0.5)
        assert (third.env, third.cwd, third.retry) == ({}, "", Retry(max_attempts=4, backoff_s=0.5))

    def test_a_wrong_one_is_refused_where_it_stands(self) -> None:
        message = refusal("defaults:\n  retry:\n    max_attempts: none\n" + TASK % "")

        assert message == "flow.yaml:3: defaults: retry: max_attempts: expected a whole number, found 'none'"

    def test_cannot_say_what_to_run(self) -> None:
        assert "defaults: unknown key 'argv'" in refusal("defaults: {argv: [x]}\n" + TASK % "")

    def test_cannot_use_a_result(self) -> None:
        assert "defaults: env: `$result` belongs into a task" in refusal(
            "defaults: {env: {A: {$result: a}}}\n" + TASK % ""
        )


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ("prioritiy: 5", "unknown key 'prioritiy'; did you mean 'priority'?"),
            ("depends_on: [b]", "unknown key 'depends_on'; did you mean 'dependencies'?"),
            (
                "retry: {retries: 5, max_atempts: 2}",
                "retry: unknown key 'retries'; expected one of max_attempts",
            ),
            ("retry: {max_atempts: 2}", "retry: unknown key 'max_atempts'; did you mean 'max_attempts'?"),
            ("needs: {memory: 2}", "needs: unknown key 'memory'; did you mean 'memory_mb'?"),
            ("colour: red", "unknown key 'colour'; expected one of "),
        ],
    )
    def test_are_refused_with_what_was_meant(self, keys: str, message: str) -> None:
        assert f"task 'a': {message}" in refusal(TASK % keys)

    def test_at_the_top_too(self) -> None:
        assert "flow.yaml:2: unknown key 'default'; did you mean 'defaults'?" in refusal(
            f"{TASK % ''}\ndefault: {{}}"
        )

    def test_a_file_without_the_outer_key_is_told_so(self) -> None:
        assert "flow.yaml:2: expected `workflow:`" in refusal("name: x\ntasks: [{task_id: a, shell: x}]")


class TestGraph:
    def test_faults_are_told_where_they_are(self) -> None:
        message = refusal("""\
            workflow:
              tasks:
                - {task_id: a, shell: x, dependencies: [b]}
                - {task_id: b, shell: x, dependencies: [a]}
                - {task_id: c, shell: x, dependencies: [aa]}
                - {task_id: c, shell: x}
            """)

        assert message.splitlines() == [
            "flow.yaml:6: more than one task has the id 'c'; give each task its own",
            "flow.yaml:6: task 'c' depends on 'aa', which is not a task of this workflow; did you mean 'a'?",
            "flow.yaml:3: tasks wait for each other in a circle: a -> b -> a; break it at one of them",
        ]

    def test_all_tasks_with_problems_are_named_up_to_a_limit(self) -> None:
        tasks = ", ".join(f"{{task_id: t{index}}}" for index in range(PROBLEMS_MAX + 5))

        assert refusal(f"workflow: {{tasks: [{tasks}]}}").count("has nothing to run") == PROBLEMS_MAX

    @pytest.mark.parametrize("task_id", ["a.b", "a b", "a/b", "at-1-2", "x" * 129, "'*'"])
    def test_an_id_the_contract_does_not_know_is_refused(self, task_id: str) -> None:
        assert "task_id: expected 1 to 128 of A-Z" in refusal(
            f"workflow: {{tasks: [{{task_id: {task_id}, shell: x}}]}}"
        )

    def test_a_task_without_an_id_is_named_by_number(self) -> None:
        assert "task number 1: expected `task_id:`" in refusal("workflow: {tasks: [{shell: x}]}")

    @pytest.mark.parametrize(
        "text", ["", "workflow:", "workflow: {name: x}", "workflow: {tasks: []}", "[]", "5"]
    )
    def test_a_file_with_nothing_in_it_is_refused(self, text: str) -> None:
        assert "expected" in refusal(text)

    def test_many_tasks_are_read(self) -> None:
        tasks = [
            {"task_id": f"t{n}", "shell": "x", "dependencies": [f"t{n - 1}"] if n else []}
            for n in range(10_000)
        ]

        workflow = parse_workflow(json.dumps({"workflow": {"tasks": tasks}}), "flow.json", "json")

        assert len(workflow.tasks) == 10_000


class TestYaml:
    def test_a_key_given_twice_is_refused(self) -> None:
        message = refusal("""\
            workflow:
              tasks:
                - task_id: a
                  shell: x
                  shell: y
            """)

        assert message == "flow.yaml:5: key 'shell' is given twice, first on line 4; keep one of them"

    def test_text_is_what_it_looks_like(self) -> None:
        run = (
            parsed(
                "workflow: {tasks: [{task_id: a, function: m.f, kwargs: {"
                "no: no, on: 12:30, 1: 010, d: 2024-01-31, n: , f: 1.5, i: -3, b: true, s: '5', e: 1e3}}]}"
            )
            .tasks[0]
            .run
        )

        assert isinstance(run, Function)
        assert run.kwargs == {
            "no": "no",
            "on": "12:30",
            "1": "010",
            "d": "2024-01-31",
            "n": None,
            "f": 1.5,
            "i": -3,
            "b": True,
            "s": "5",
            "e": "1e3",
        }

    def test_anchors_and_merge_keys_work(self) -> None:
        first, second = parsed("""\
            workflow:
              tasks:
                - &shard
                  task_id: one
                  shell: run
                  env: &env {A: "1"}
                - <<: *shard
                  task_id: two
                  env: {<<: *env, B: "2"}
            """).tasks

        assert (first.run, first.env) == (Shell("run"), {"A": "1"})
        assert (second.run, second.env) == (Shell("run"), {"A": "1", "B": "2"})

    def test_aliases_that_explode_are_refused(self) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]

        assert re.search(
            r"flow.yaml:\d+: aliases make this file larger than 64 MiB", refusal("\n".join(lines))
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [1,\n2", "flow.yaml:3: expected YAML: while parsing a flow"),
            ("a: b\n c: d", "flow.yaml:2: expected YAML:"),
            ("a: !!python/object:os.system x", "has no meaning here; leave it out"),
            ("a: 1\n---\nb: 2", "flow.yaml:2: expected one document, found a second one"),
            ("a: &a [*a]", "alias *a stands before the end of its anchor"),
            ("{a: b}: c", "expected a key, found a list or mapping"),
            ("a: 99999999999999999999999", "is too large; put it in quotes"),
            ("a: 9223372036854775808", "is too large; write it as text"),
            (f"a: {'9' * 400}.5", "expected a finite number, found inf"),
            ('a: "\\0"', "has a NUL or half a surrogate pair in it"),
            ("a: \x07", "flow.yaml: expected YAML:"),
            ("[" * 100_000, "expected at most 64 levels of nesting"),
            ("- " * 100_000, "expected at most 64 levels of nesting"),
            ("<<: 5", "expected a mapping after '<<'"),
        ],
    )
    def test_what_is_not_sound_is_refused(self, text: str, message: str) -> None:
        assert message in refusal(text)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(st.characters(codec="ascii")),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
            ),
            max_leaves=10,
        )
    )
    def test_what_a_yaml_library_writes_is_read_alike(self, value: object) -> None:
        document = {"workflow": {"tasks": [{"task_id": "a", "function": "m.f", "args": [value]}]}}
        if "\\0" in (text := yaml.safe_dump(document)):
            return

        run = parse_workflow(text, "flow.yaml").tasks[0].run

        assert isinstance(run, Function)
        assert run.args == [value]


class TestJson:
    def test_a_key_given_twice_is_refused(self) -> None:
        assert "key 'a' is given twice" in json_refusal('{"a": 1, "a": 2}')

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{\n"a": }', "flow.json:2: expected JSON: Expecting value"),
            ('{"a": NaN}', "flow.json: expected a finite number, found nan"),
            ('{"a": 1e400}', "flow.json: expected a finite number, found inf"),
            ('{"a": "\\ud800"}', "flow.json: text '\\ud800' has a NUL or half a surrogate pair in it"),
            ('{"a": "\\u0000"}', "has a NUL"),
            ('{"a": 9223372036854775808}', "is too large; write it as text"),
            ("[" * 100 + "]" * 100, "expected at most 64 levels of nesting"),
            ("[" * 100_000, "nested too deeply"),
            (f'{{"a": {"9" * 5_000}}}', "a number too long"),
        ],
    )
    def test_what_is_not_sound_is_refused(self, text: str, message: str) -> None:
        assert message in json_refusal(text)

    def test_problems_name_the_task_though_not_the_line(self) -> None:
        text = json.dumps({"workflow": {"tasks": [{"task_id": "a", "shel": "x"}]}})

        assert json_refusal(text) == "flow.json: task 'a': unknown key 'shel'; did you mean 'shell'?"

    def test_values_nested_deeper_than_the_contract_allows_are_refused(self) -> None:
        deep: list[Any] = []
        for _ in range(40):
            deep = [deep]
        text = json.dumps({"workflow": {"tasks": [{"task_id": "a", "function": "f", "args": deep}]}})

        assert "task 'a': args: expected at most 29 levels of nesting" in json_refusal(text)


class TestLoading:
    def test_the_name_says_the_format(self, tmp_path: Path) -> None:
        (tmp_path / "flow.json").write_text('{"workflow": {"tasks": [{"task_id": "a", "shell": "x"}]}}')
        (tmp_path / "flow.yml").write_text("workflow:\n  tasks:\n  - task_id: a\n    shell: x\n")

        from_json, from_yaml = (load_workflow(tmp_path / name) for name in ("flow.json", "flow.yml"))

        assert (
            [task.run for task in from_json.tasks] == [task.run for task in from_yaml.tasks] == [Shell("x")]
        )

    def test_functions_in_a_file_are_looked_for_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "tasks.py").touch()
        (tmp_path / "flow.yaml").write_text("app: app/tasks.py\n" + TASK % "")

        assert load_workflow(tmp_path / "flow.yaml").app == str((tmp_path / "app" / "tasks.py").resolve())

    def test_functions_in_a_module_are_left_to_python(self, tmp_path: Path) -> None:
        (tmp_path / "flow.yaml").write_text("app: package.tasks\n" + TASK % "")

        assert load_workflow(tmp_path / "flow.yaml").app == "package.tasks"

    def test_a_missing_file_of_functions_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "flow.yaml").write_text("app: tasks.py\n" + TASK % "")

        with pytest.raises(InvalidRequest, match=r"app: expected a Python file .* found no file .*tasks.py"):
            load_workflow(tmp_path / "flow.yaml")

    def test_a_missing_file_is_refused_with_the_one_that_was_meant(self, tmp_path: Path) -> None:
        (tmp_path / "release.yaml").touch()

        with pytest.raises(InvalidRequest, match=r"No such file or directory; did you mean 'release.yaml'"):
            load_workflow(tmp_path / "relase.yaml")

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="cannot be read: Is a directory"):
            load_workflow(tmp_path)

    def test_another_encoding_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "flow.yaml").write_bytes(b"name: caf\xe9")

        with pytest.raises(InvalidRequest, match="expected UTF-8"):
            load_workflow(tmp_path / "flow.yaml")

    def test_a_byte_order_mark_is_no_matter(self, tmp_path: Path) -> None:
        (tmp_path / "flow.yaml").write_bytes(b"\xef\xbb\xbf" + (TASK % "").encode())

        assert load_workflow(tmp_path / "flow.yaml").tasks[0].task_id == "a"

    def test_a_file_too_large_is_refused(self, tmp_path: Path) -> None:
        with (tmp_path / "flow.yaml").open("wb") as file:
            file.truncate(FILE_BYTES_MAX + 1)

        with pytest.raises(InvalidRequest, match="expected at most 32 MiB"):
            load_workflow(tmp_path / "flow.yaml")
