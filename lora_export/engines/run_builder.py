"""Run a builder in a process of its own, and turn its messages into progress, a result or an error."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export.engines.builder_process import BuildJob
from lora_export.errors import BackendUnavailable, EngineBuildError, LoraExportError, OutputError
from lora_export.graph.onnx_file import GraphFile
from lora_export.progress import Say
from lora_export.sites.node_text import find_node, node_text
from lora_export.storage.outputs import output_errors
from lora_export.untrusted.documents import DocumentError, parse_json

_STAGES = {
    "parse": "TensorRT's parser refuses",
    "profile": "TensorRT refuses these shapes for",
    "build": "TensorRT can't build",
}
# "ITopKLayer NAME: NAME: K exceeds …"
_LAYER = re.compile(r"\bI\w+Layer ([^\s:]+)")
# The builder's later errors are consequences of the first ones.
_SHOWN = 5
# Characters of each line that a dying builder wrote to stderr.
_LINE = 300
# Time between two checks whether the builder has ended.
_PAUSE_MS = 200


def run_worker(
    job: BuildJob, graph: GraphFile, scratch: Path, kept_log: Path, progress: Say
) -> dict[str, Any]:
    """Build an engine.

    Args:
        job: The build.
        graph: The graph as the compiler gets it, for messages.
        scratch: A folder for the job's own file.
        kept_log: Path of the builder's log for messages.
        progress: Function called with the current phase and the share that is done.

    Returns:
        The builder's result.

    Raises:
        BackendUnavailable: The compiler can't be loaded.
        EngineBuildError: The builder refused the graph, or crashed.
        OSError: The builder could not read or write a file.
        OutputError: The builder could not keep its timings.
    """
    path = scratch / "job.json"
    reader, writer = os.pipe()
    try:
        with output_errors(path):
            path.write_text(replace(job, pipe=writer).to_json(), encoding="utf-8")
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    # -P: a script of the user called "tensorrt.py" must not be imported as the package.
    command = [sys.executable, "-P", "-m", "lora_export.engines.builder_process", str(path), str(os.getpid())]
    # A file, not a pipe: nobody reads stderr until the builder ends, and a full pipe would stop it.
    with (scratch / "stderr").open("wb+") as errors:
        with subprocess.Popen(
            command, pass_fds=[writer], stdout=subprocess.DEVNULL, stderr=errors, env=_environment()
        ) as process:
            os.close(writer)
            try:
                last = _follow(reader, process, progress)
            except BaseException:
                process.kill()
                raise
            finally:
                os.close(reader)
        errors.seek(0)
        stderr = errors.read()
    if built := last.get("built"):
        return dict(built)
    if failed := last.get("failed"):
        raise _failure(failed, graph, kept_log)
    raise _died(process.returncode, stderr.decode(errors="replace"), graph, kept_log)


def _environment() -> dict[str, str]:
    """Return an environment in which the process finds this very package, installed or not."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    return os.environ | {"PYTHONPATH": path}


def _follow(reader: int, process: subprocess.Popen[bytes], progress: Say) -> dict[str, Any]:
    """Return the builder's last message, a result or a failure; an empty one if it ends without."""
    for line in _lines(reader, process):
        try:
            message = parse_json(line)
        except DocumentError:
            return {}
        if "phase" not in message:
            return dict(message)
        progress(str(message["phase"]), float(message["share"]))
    return {}


def _lines(reader: int, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield the lines that the builder sends, until it ends.

    The pipe may end later than the builder: a process that our program forks while it starts the builder
    (multiprocessing in another thread) holds the other end, too.
    """
    waiting, pending = select.poll(), b""
    waiting.register(reader, select.POLLIN)
    while True:
        ended = process.poll() is not None
        if not waiting.poll(0 if ended else _PAUSE_MS):
            if ended:
                return
            continue
        block = os.read(reader, 1 << 16)
        if not block:
            return
        *lines, pending = (pending + block).split(b"\n")
        yield from lines


def _failure(failed: dict[str, Any], graph: GraphFile, log: Path) -> LoraExportError | OSError:
    if failed["stage"] == "write":
        return OSError(failed["errno"], failed["text"])
    if failed["stage"] == "output":
        return OutputError(failed["text"], failed["hint"])
    reasons = failed["reasons"]
    if failed["stage"] == "load":
        return BackendUnavailable(reasons[0]["text"], failed["hint"])
    shown = [_reason(reason, graph) for reason in reasons[:_SHOWN]]
    if len(reasons) > _SHOWN:
        shown.append(f"… and {len(reasons) - _SHOWN} more")
    return EngineBuildError(
        f"{_STAGES[failed['stage']]} {graph.path}",
        f"the builder's own messages are in {log}",
        shown or ["the builder gave no reason"],
    )


def _reason(reason: dict[str, Any], graph: GraphFile) -> str:
    text = " ".join(str(reason["text"]).split())
    node = find_node(graph, str(reason.get("node") or "")) or _named_in(text, graph)
    if node is not None:
        return f"{node_text(node)}: {text}"
    name, operator = reason.get("node"), reason.get("operator")
    return f"node '{name}' ({operator}): {text}" if name else text


def _named_in(text: str, graph: GraphFile) -> ir.Node | None:
    """Return the node that an error of the builder names: a layer has its node's name."""
    named = _LAYER.search(text)
    return find_node(graph, named.group(1)) if named else None


def _died(code: int, stderr: str, graph: GraphFile, log: Path) -> EngineBuildError:
    lines: Sequence[str] = [line[:_LINE] for line in stderr.strip().splitlines() if line.strip()]
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    what, hint = f"ended with {name}", f"the builder's own messages are in {log}"
    if code == -signal.SIGKILL:
        what = "was killed: the machine has probably run out of memory"
        hint = "build on a larger machine, or with a smaller --shape"
    return EngineBuildError(f"TensorRT's builder {what} while it built {graph.path}", hint, list(lines[-3:]))
