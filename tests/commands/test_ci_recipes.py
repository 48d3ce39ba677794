"""recipes/ci: what GitHub and GitLab want is there, and the steps, run here in order, do what they say."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import shutil
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ci_jobs
import click
import pytest
import rtx_compiler
import tiny
from ci_jobs import MAIN, Machine, Outcome

from lora_export.cli import root
from lora_export.commands import COMMANDS
from lora_export.engines.record import read_engine
from lora_export.reports.parity.baseline import FACTOR, floors

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("github.yml", "gitlab.yml")
REPORTS = ("out/parity.json", "out/parity.xml", "out/parity.html")
USERS = ("BASE", "ADAPTER", "DTYPE", "TARGET")
# Action → the inputs of its that we know.
ACTIONS = {
    "actions/checkout": {"persist-credentials", "lfs"},
    "actions/setup-python": {"python-version", "cache", "cache-dependency-path"},
    "actions/cache/restore": {"path", "key", "restore-keys"},
    "actions/cache/save": {"path", "key"},
    "actions/upload-artifact": {"name", "path", "if-no-files-found", "retention-days"},
    "mikepenz/action-junit-report": {"report_paths", "annotate_only", "detailed_summary", "include_passed"},
}


def github() -> dict[Any, Any]:
    return ci_jobs.load("github.yml")


def steps() -> list[dict[str, Any]]:
    (job,) = github()["jobs"].values()
    return job["steps"]


def gitlab() -> dict[Any, Any]:
    (job,) = ci_jobs.load("gitlab.yml").values()
    return job


def scripts(recipe: str) -> list[str]:
    if recipe == "github.yml":
        return [step["run"] for step in steps() if "run" in step]
    return [*gitlab()["before_script"], *gitlab()["script"]]


def variables(recipe: str) -> dict[str, str]:
    return github()["env"] if recipe == "github.yml" else gitlab()["variables"]


def commands(recipe: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield verb and options of each `lora-export VERB`, parsed by click with the recipe's own variables."""
    known = variables(recipe)
    for script in scripts(recipe):
        for line in script.replace("\\\n", " ").splitlines():
            words = shlex.split(string.Template(line.replace('"$@"', "")).safe_substitute(known))
            if words[:1] == ["lora-export"]:
                verb, *arguments = words[1:]
                assert verb in COMMANDS
                command = root.get_command(click.Context(root), verb)
                assert command is not None
                yield verb, command.make_context(verb, list(arguments)).params


# --- what can be seen without running anything -------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_explains_it(recipe: str) -> None:
    text = (ci_jobs.RECIPES / recipe).read_text(encoding="utf-8")
    for word in ("What:", "Needs:", "Command:", "Result:"):
        assert re.search(rf"^# {word} ", text, re.M), word
    command = re.search(r"^# Command: mkdir -p (\S+) && cp recipes/ci/(\S+) (\S+\.yml)", text, re.M)
    assert command is not None
    assert command[2] == recipe
    assert Path(command[3]).parent == Path(command[1])
    if recipe == "github.yml":
        # Steps name the file itself: it is part of the caches' keys.
        assert command[1] == ".github/workflows"
        used = set(re.findall(r"\.github/workflows/[\w.]+", text))
        assert used == {command[3]}
    else:
        assert f"include: {{local: {command[3]}}}" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_user_changes_variables_and_nothing_else(recipe: str) -> None:
    assert set(USERS) < set(variables(recipe))
    assert all(isinstance(value, str) for value in variables(recipe).values())
    used = set(re.findall(r"\$\{?([A-Z]\w*)", "\n".join(scripts(recipe))))
    assert set(USERS) <= used <= {*variables(recipe), "GITHUB_OUTPUT"}
    for script in scripts(recipe):
        # A variable is one word whatever is in it; what GitHub fills in would be code.
        assert not re.search(r'(?<!")\$[A-Z]', script), script
        assert "${{" not in script


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_are_ours_and_fit_together(recipe: str) -> None:
    (merge, merged), (build, built), (parity, checked) = commands(recipe)
    assert (merge, build, parity) == ("merge-onnx", "build-engine", "parity")
    assert merged["output"] == built["model"] == checked["candidate"]
    assert merged["base"] == checked["reference"] == Path(variables(recipe)["BASE"])
    assert [str(path) for path in merged["adapters"]] == [str(path) for path in checked["adapters"]]
    written = [*map(str, checked["reports"]), *(str(checked[kind]) for kind in ("junit", "html"))]
    assert written == list(REPORTS)
    assert "--baseline" in " ".join(scripts(recipe))


@pytest.mark.parametrize("recipe", RECIPES)
def test_comments_name_options_that_exist(recipe: str) -> None:
    text = (ci_jobs.RECIPES / recipe).read_text(encoding="utf-8")
    said = re.findall(r"`([^`\n]*--[^`\n]*)`", text)
    assert said
    known = {
        option
        for verb in ("merge-onnx", "parity")
        for parameter in root.get_command(click.Context(root), verb).params
        for option in parameter.opts
    }
    assert {word for part in said for word in part.split() if word.startswith("--")} <= known


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_installed_exists(recipe: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (line,) = (line for script in scripts(recipe) for line in script.splitlines() if "pip install" in line)
    name, extras = re.fullmatch(r"(\S+)\[(\S+)\]", shlex.split(line)[-1]).groups()
    assert name == project["name"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    wanted = project["requires-python"].removeprefix(">=")
    used = (
        gitlab()["image"].partition(":")[2]
        if recipe == "gitlab.yml"
        else steps()[1]["with"]["python-version"]
    )
    assert [int(part) for part in used.split(".")] >= [int(part) for part in wanted.split(".")]


def test_github_has_what_github_needs() -> None:
    recipe = github()
    # YAML 1.1 reads the key `on` as true.
    assert set(recipe) == {"name", True, "permissions", "concurrency", "env", "jobs"}
    assert set(recipe[True]) == {"push", "pull_request", "workflow_dispatch"}
    assert f"refs/heads/{recipe[True]['push']['branches'][0]}" == MAIN
    assert recipe["permissions"] == {"contents": "read"}
    assert set(recipe["concurrency"]) == {"group", "cancel-in-progress"}
    (job,) = recipe["jobs"].values()
    assert set(job) == {"runs-on", "timeout-minutes", "defaults", "steps"}
    # Only a shell that is named gets -o pipefail.
    assert job["defaults"] == {"run": {"shell": "bash"}}
    names = [step["name"] for step in job["steps"]]
    assert len(set(names)) == len(names)


def test_github_steps_are_known_and_pinned() -> None:
    for step in steps():
        assert set(step) <= {"name", "id", "if", "uses", "with", "run"}
        assert ("uses" in step) != ("run" in step)
        if "uses" not in step:
            continue
        action, _, version = step["uses"].partition("@")
        assert set(step.get("with", {})) <= ACTIONS[action]
        # GitHub's own by major version, everybody else's by commit.
        assert re.fullmatch(r"v\d+" if action.startswith("actions/") else r"[0-9a-f]{40}", version)


def test_github_keeps_reports_of_what_failed_and_models_of_what_passed() -> None:
    by_name = {step["name"]: step for step in steps()}
    order = list(by_name)
    reports, reporter, model = (
        by_name[f"{name}"] for name in ("Keep the reports", "Show the verdicts", "Keep the model")
    )
    assert reports["with"]["path"].split() == list(REPORTS)
    assert reporter["with"]["report_paths"] == "out/parity.xml"
    assert reports["if"] == reporter["if"] == "always()"
    assert "if" not in model
    assert model["with"]["if-no-files-found"] == "error"
    becomes = "Without a baseline this run becomes it"
    for name in ("Keep the reports", "Show the verdicts", "Keep the model", becomes):
        assert order.index(name) > order.index("Parity")
    assert order.index("Keep the baseline") == order.index(becomes) + 1
    restore, save = by_name["Baseline of main"]["with"], by_name["Keep the baseline"]["with"]
    assert (restore["path"], restore["key"]) == (save["path"], save["key"])
    assert restore["key"].startswith(restore["restore-keys"])


def test_gitlab_has_what_gitlab_needs() -> None:
    job = gitlab()
    assert set(job) == {
        *("stage", "image", "timeout", "interruptible", "rules", "variables", "cache"),
        *("before_script", "script", "artifacts"),
    }
    assert all(isinstance(line, str) for line in [*job["before_script"], *job["script"]])
    assert [set(rule) for rule in job["rules"]] == [{"if"}, {"if"}]
    assert job["interruptible"] is True
    # What is cached is below the project, where GitLab takes it from.
    assert job["variables"]["PIP_CACHE_DIR"] == f"$CI_PROJECT_DIR/{job['cache']['paths'][0]}"
    artifacts = job["artifacts"]
    assert set(artifacts) == {"when", "expire_in", "paths", "reports"}
    assert artifacts["when"] == "always"
    assert artifacts["reports"] == {"junit": "out/parity.xml"}
    assert artifacts["paths"][:3] == list(REPORTS)


# --- run ---------------------------------------------------------------------------------------------

OTHER = "adapters/other one"
USER = {
    "BASE": "models/tiny base",
    "ADAPTER": "adapters/my adapter",
    "DTYPE": "float16",
    "TARGET": "rtx-4090",
}
run_for_real = [
    pytest.mark.slow,
    pytest.mark.skipif(not rtx_compiler.INSTALLED, reason="tensorrt-rtx-cu13 is not installed"),
]


def of_recipe(name: str) -> Any:
    return pytest.param(name, marks=[*run_for_real, pytest.mark.xdist_group(name)])


platforms = pytest.mark.parametrize("recipe", [of_recipe(name) for name in RECIPES])


def checked_out(folder: Path, recipe: str) -> Machine:
    """Return a machine with a user's repository: model, adapters, the recipe where its header says."""
    repository = folder / "repository"
    shutil.copytree(tiny.checkpoint("llama"), repository / USER["BASE"])
    shutil.copytree(tiny.adapter("llama"), repository / USER["ADAPTER"])
    shutil.copytree(tiny.adapter("llama", seed=1), repository / OTHER)
    if recipe == "github.yml":
        (repository / ".github" / "workflows").mkdir(parents=True)
        shutil.copy(ci_jobs.RECIPES / recipe, repository / ".github" / "workflows" / "parity.yml")
    return Machine(repository, folder / "tools", folder / "cache")


def run(machine: Machine, recipe: str, ref: str = MAIN, run_id: int = 1) -> Outcome:
    if recipe == "github.yml":
        return ci_jobs.run_github(machine, USER, ref, run_id)
    return ci_jobs.run_gitlab(machine, USER)


@functools.cache
def first_run(recipe: str) -> tuple[Machine, Outcome]:
    """Return what the job on main leaves when it runs for the first time; do not change it."""
    machine = checked_out(tiny.cache_folder() / f"ci-{recipe}", recipe)
    return machine, run(machine, recipe)


def again(folder: Path, recipe: str) -> Machine:
    """Return a fresh machine for the next job: the same repository, what was cached, the report committed."""
    before, outcome = first_run(recipe)
    assert outcome.code == 0, outcome.said
    machine = checked_out(folder, recipe)
    if recipe == "github.yml":
        shutil.copytree(before.cache, machine.cache)
    else:
        baseline = machine.repository / variables(recipe)["BASELINE"]
        baseline.parent.mkdir()
        shutil.copy(before.repository / "out" / "parity.json", baseline)
    return machine


def report(machine: Machine) -> dict[str, Any]:
    return json.loads((machine.repository / "out" / "parity.json").read_text())


def failures(outcome: Outcome) -> list[str]:
    assert outcome.junit is not None
    return [
        case.get("name", "") for case in outcome.junit.iter("testcase") if case.find("failure") is not None
    ]


def kept(outcome: Outcome) -> set[str]:
    return {path.name for files in outcome.kept.values() for path in files}


@platforms
def test_a_good_export_passes_and_is_kept(recipe: str) -> None:
    machine, outcome = first_run(recipe)
    assert outcome.code == 0, outcome.said
    assert "baseline" not in outcome.said
    assert machine.installed == ["lora-export[hf,cpu,rtx]"]
    assert {Path(path).name for path in REPORTS} <= kept(outcome)
    assert {"model.onnx", "model.onnx.data", "model.lora.json", "model.rtx-4090.engine"} <= kept(outcome)
    assert outcome.junit is not None
    assert int(outcome.junit.get("tests", "0")) > 5
    assert not failures(outcome)
    assert report(machine)["passed"] is True
    assert report(machine)["candidate"]["dtype"] == "float16"
    assert "<html" in (machine.repository / "out" / "parity.html").read_text()
    out = machine.repository / "out"
    assert read_engine(out / "engines" / "model.rtx-4090.engine").source.files
    got = tiny.run(out / "model.onnx", tiny.feeds("llama", out / "model.onnx"))
    assert tiny.relative_error(got, tiny.reference("llama", tiny.adapter("llama"))) < 4 * 2**-10
    assert tiny.relative_error(got, tiny.base_reference("llama")) > 0.05


@platforms
def test_the_same_again_is_not_worse_than_the_baseline(recipe: str, tmp_path: Path) -> None:
    machine = again(tmp_path, recipe)
    outcome = run(machine, recipe, ref="refs/pull/7/merge", run_id=2)
    assert outcome.code == 0, outcome.said
    assert "PASSED: nothing is worse than the baseline" in outcome.said
    # A pull request leaves main's baseline alone.
    before, _ = first_run(recipe)
    if recipe == "github.yml":
        assert [path.name for path in machine.cache.iterdir()] == [
            path.name for path in before.cache.iterdir()
        ]


@platforms
def test_what_passes_but_is_worse_than_the_baseline_fails(recipe: str, tmp_path: Path) -> None:
    machine = again(tmp_path, recipe)
    limit = next(
        row["limit"] for row in report(first_run(recipe)[0])["verdicts"] if row["name"] == "relative error"
    )
    worst = FACTOR * floors("float16").relative
    assert limit > 1.1 * worst, "no error is between noise and what is allowed"
    machine.scale = 1 + math.sqrt(limit * worst)
    outcome = run(machine, recipe, run_id=2)
    assert outcome.code == 3, outcome.said
    assert "lora-export parity" in outcome.failed or outcome.failed == "Parity"
    assert report(machine)["passed"] is True
    assert not failures(outcome)
    assert "WORSE  relative, my adapter, logits" in outcome.said
    if recipe == "github.yml":
        assert len(list(machine.cache.iterdir())) == 1


def test_a_baseline_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    """Each run may be a bit worse than its baseline: one that moved along would let that add up."""
    machine = checked_out(tmp_path, "github.yml")
    (script,) = (step["run"] for step in steps() if step["name"].startswith("Without a baseline"))
    report_file, baseline = (machine.repository / name for name in ("out/parity.json", "baseline.json"))
    report_file.parent.mkdir()
    for text in ("first", "second"):
        report_file.write_text(text)
        done = machine.shell(script, {"BASELINE": "baseline.json"})
        assert done.returncode == 0, done.stdout
        assert baseline.read_text() == "first"


@pytest.mark.parametrize("recipe", [of_recipe("github.yml")])
def test_the_next_run_of_main_keeps_the_baseline(recipe: str, tmp_path: Path) -> None:
    machine = again(tmp_path, recipe)
    (first,) = machine.cache.iterdir()
    machine.scale = 1 + floors("float16").relative / 4
    outcome = run(machine, recipe, run_id=2)
    assert outcome.code == 0, outcome.said
    assert len(list(machine.cache.iterdir())) == 2
    assert {path.read_bytes() for path in machine.cache.iterdir()} == {first.read_bytes()}
    assert (machine.repository / "out" / "parity.json").read_bytes() != first.read_bytes()


@platforms
def test_a_wrong_export_fails_and_its_reports_are_kept(recipe: str, tmp_path: Path) -> None:
    machine = checked_out(tmp_path, recipe)
    machine.exchange = {USER["ADAPTER"]: OTHER}
    outcome = run(machine, recipe)
    assert outcome.code == 3, outcome.said
    assert "lora-export parity" in outcome.failed or outcome.failed == "Parity"
    assert {"relative error [logits]", "adapter applied [logits]"} <= set(failures(outcome))
    assert {Path(path).name for path in REPORTS} <= kept(outcome)
    assert report(machine)["passed"] is False
    if recipe == "github.yml":
        assert set(outcome.kept) == {"parity"}
        assert not machine.cache.exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_after_a_failure_nothing_else_is_run(recipe: str, tmp_path: Path) -> None:
    machine = checked_out(tmp_path, recipe)
    shutil.rmtree(machine.repository / USER["BASE"])
    outcome = run(machine, recipe)
    assert outcome.code == 1
    assert "lora-export merge-onnx" in outcome.failed or outcome.failed == "Merge"
    assert outcome.said.count("Error:") == 1
    assert not kept(outcome)
    assert outcome.junit is None


def test_a_baseline_is_of_the_same_files_and_version(tmp_path: Path) -> None:
    machine = checked_out(tmp_path, "github.yml")
    (script,) = (step["run"] for step in steps() if step.get("id") == "match")

    def key(number: str = "1") -> str:
        output = tmp_path / "output"
        output.write_text("")
        done = machine.shell(script, USER | {"GITHUB_OUTPUT": str(output), "BASELINE_NUMBER": number})
        assert done.returncode == 0, done.stdout
        (line,) = output.read_text().splitlines()
        assert re.fullmatch(r"key=parity-[0-9a-f]{64}", line)
        return line

    keys = [key(), key()]
    assert keys[0] == keys[1]
    # One more, and the next run is a baseline.
    assert key("2") != keys[0]
    repository = machine.repository
    for changed in (
        repository / USER["BASE"] / "model.safetensors",
        repository / USER["ADAPTER"] / "adapter_config.json",
        repository / ".github" / "workflows" / "parity.yml",
    ):
        changed.write_bytes(changed.read_bytes() + b"\n")
        keys.append(key())
    (repository / OTHER / "adapter_config.json").unlink()
    assert key() == keys[-1]
    assert len(set(keys)) == 4
    shutil.rmtree(repository / USER["ADAPTER"])
    without = USER | {"GITHUB_OUTPUT": "/dev/null", "BASELINE_NUMBER": "1"}
    assert machine.shell(script, without).returncode != 0
