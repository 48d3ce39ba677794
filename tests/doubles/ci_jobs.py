"""The CI recipes, run here: each `run:` by the shell that a runner takes, what is around them by stand-ins.

`python -m pip install` only notes what was asked for; `lora-export` is this environment's own. GitHub's
actions that keep files (cache, artifacts, the JUnit reporter) look at the files as the real ones do. Neither
GitHub's nor GitLab's runner is here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import preloaded
import yaml
from onnx import numpy_helper

from lora_export.storage.hashes import identity_of_graph

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "ci"
# What GitHub runs for `shell: bash`, and what GitLab sets in the shell that gets all of a job's lines.
BASH = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
MAIN = "refs/heads/main"
_CONDITIONS: Mapping[str, Callable[[bool, str], bool]] = {
    "success()": lambda failed, _ref: not failed,
    "always()": lambda _failed, _ref: True,
    f"github.ref == '{MAIN}'": lambda failed, ref: not failed and ref == MAIN,
}
_STAND_IN = """#!{python}
import os, sys
arguments = sys.argv[1:]
{body}
"""
_PIP = """
assert arguments[:3] == ["-m", "pip", "install"], arguments
open({log!r}, "a").write("\\n".join(arguments[3:]) + "\\n")
"""
_OURS = """
sys.path.insert(0, {tests!r})
import preloaded
if arguments[0] == "merge-onnx":
    arguments = [{exchange!r}.get(word, word) for word in arguments]
code = preloaded.asked({address!r}, arguments, os.getcwd(), os.environ)
if code == 0 and arguments[0] == "merge-onnx" and {scale!r} != 1:
    import ci_jobs
    ci_jobs.scale_logits({scale!r}, arguments[arguments.index("--output") + 1])
sys.exit(code)
"""


@dataclass
class Outcome:
    """What a job left.

    Attributes:
        code: Exit code of the step that failed, else 0.
        failed: Its name (GitHub) or its command line (GitLab); "" if none did.
        said: All that was written to stdout and stderr.
        kept: Artifact → its files.
        junit: What the reporter was given; None if it found no file.
    """

    code: int = 0
    failed: str = ""
    said: str = ""
    kept: dict[str, list[Path]] = field(default_factory=dict)
    junit: ElementTree.Element | None = None


def load(name: str) -> dict[Any, Any]:
    """Return a recipe as plain data, a key that stands twice refused."""
    text = (RECIPES / name).read_text(encoding="utf-8")
    return yaml.load(text, _Strict)


class _Strict(yaml.SafeLoader):
    pass


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: a key stands twice in {keys}"
    return dict(
        zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True)
    )


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@dataclass
class Machine:
    """A runner's machine with a repository checked out on it.

    Attributes:
        repository: Where steps run.
        tools: Folder of the stand-ins, first on the path.
        cache: What outlives a job.
        exchange: Words that `merge-onnx` gets in place of others: an exporter that is wrong.
        scale: Its graph's logits come out multiplied with this: one that is a bit wrong.
    """

    repository: Path
    tools: Path
    cache: Path
    exchange: Mapping[str, str] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def installed(self) -> list[str]:
        """What pip was asked for."""
        log = self.tools / "pip.log"
        return log.read_text().split() if log.exists() else []

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Put the stand-ins in place; return a step's environment: nothing of ours but what tests need."""
        self.tools.mkdir(exist_ok=True)
        bodies = {
            "python": _PIP.format(log=str(self.tools / "pip.log")),
            "lora-export": _OURS.format(
                address=preloaded.process(),
                exchange=dict(self.exchange),
                scale=self.scale,
                tests=str(Path(__file__).parent),
            ),
        }
        for name, body in bodies.items():
            path = self.tools / name
            path.write_text(_STAND_IN.format(python=sys.executable, body=body))
            path.chmod(0o755)
        ours = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "ORT_DISABLE_TELEMETRY", "LORA_EXPORT_CACHE")
        own = {"PATH": f"{self.tools}:/usr/bin:/bin", "HOME": str(self.tools.parent)}
        return {name: os.environ[name] for name in ours if name in os.environ} | own | dict(variables)

    def shell(self, script: str, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a script as a runner does."""
        file = self.tools.parent / "script.sh"
        file.write_text(script)
        return subprocess.run(
            [*BASH, file],
            cwd=self.repository,
            env=self.environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def files(self, patterns: str | list[str]) -> list[Path]:
        """Return the files that artifact paths mean."""
        listed = patterns.split() if isinstance(patterns, str) else patterns
        found = [path for pattern in listed for path in self.repository.glob(pattern.rstrip("/"))]
        below = [inner for path in found for inner in (path.rglob("*") if path.is_dir() else [path])]
        return sorted(path for path in below if path.is_file())


def run_github(machine: Machine, variables: Mapping[str, str], ref: str, run_id: int) -> Outcome:
    """Run the workflow's job; ``variables`` are what a user changes in its ``env``."""
    recipe = load("github.yml")
    (job,) = recipe["jobs"].values()
    env = recipe["env"] | variables
    known = {"github.run_id": str(run_id)} | {f"env.{name}": value for name, value in env.items()}
    outcome = Outcome()
    for step in job["steps"]:
        if not _CONDITIONS[step.get("if", "success()")](bool(outcome.failed), ref):
            continue
        if "uses" in step:
            given = {key: _filled(value, known) for key, value in step.get("with", {}).items()}
            code = _action(machine, step["uses"].partition("@")[0], given, outcome)
        else:
            output = machine.tools.parent / "output"
            output.write_text("")
            done = machine.shell(step["run"], env | {"GITHUB_OUTPUT": str(output)})
            code, outcome.said = done.returncode, outcome.said + done.stdout
            for line in output.read_text().splitlines():
                name, _, value = line.partition("=")
                known[f"steps.{step['id']}.outputs.{name}"] = value
        if code:
            outcome.code, outcome.failed = code, step["name"]
    return outcome


def _filled(value: Any, known: Mapping[str, str]) -> Any:
    """Replace expressions; one that is not known is a KeyError."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: known[found[1]], value)


def _action(machine: Machine, action: str, given: Mapping[str, Any], outcome: Outcome) -> int:
    """Do what an action does with files; return its exit code."""
    if action == "actions/cache/restore":
        saved = [machine.cache / given["key"], *machine.cache.glob(given["restore-keys"].strip() + "*")]
        if found := [path for path in saved if path.exists()]:
            newest = max(found, key=lambda path: path.stat().st_mtime_ns)
            (machine.repository / given["path"]).write_bytes(newest.read_bytes())
    elif action == "actions/cache/save":
        machine.cache.mkdir(exist_ok=True)
        (machine.cache / given["key"]).write_bytes((machine.repository / given["path"]).read_bytes())
    elif action == "actions/upload-artifact":
        outcome.kept[given["name"]] = found = machine.files(given["path"])
        return int(given.get("if-no-files-found") == "error" and not found)
    elif action == "mikepenz/action-junit-report":
        for path in machine.files(given["report_paths"]):
            outcome.junit = ElementTree.parse(path).getroot()
    else:
        assert action in ("actions/checkout", "actions/setup-python"), action
    return 0


def run_gitlab(machine: Machine, variables: Mapping[str, str]) -> Outcome:
    """Run the job; ``variables`` are what a user changes in its ``variables``. One shell gets all lines."""
    (job,) = load("gitlab.yml").values()
    lines = [*job["before_script"], *job["script"]]
    reached = machine.tools.parent / "reached"
    reached.write_text("")
    script = "\n".join(f"echo {number} > '{reached}'\n{line}" for number, line in enumerate(lines))
    env = {
        name: value.replace("$CI_PROJECT_DIR", str(machine.repository))
        for name, value in job["variables"].items()
    }
    done = machine.shell(script, env | variables)
    failed = lines[int(reached.read_text())] if done.returncode else ""
    outcome = Outcome(done.returncode, failed, done.stdout)
    artifacts = job["artifacts"]
    if artifacts["when"] == "always" or not failed:
        outcome.kept["parity"] = machine.files(artifacts["paths"])
        for path in machine.files(artifacts["reports"]["junit"]):
            outcome.junit = ElementTree.parse(path).getroot()
    return outcome


def scale_logits(factor: float, path: str) -> None:
    """Multiply the last weight of a float16 Llama: the logits' relative error is ``factor`` - 1."""
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "lm_head.weight")
    scaled = numpy_helper.to_array(weight).astype(np.float32) * factor
    weight.CopyFrom(numpy_helper.from_array(scaled.astype(np.float16), weight.name))
    onnx.save(model, path)
    # An exporter that is a bit wrong knows nothing of it: its manifest is its own graph's.
    manifest = Path(path).with_suffix(".lora.json")
    said = json.loads(manifest.read_text(encoding="utf-8"))
    said["outputs"]["identity"] = identity_of_graph(Path(path), Path(path).parent / said["outputs"]["data"])
    manifest.write_text(json.dumps(said), encoding="utf-8")
