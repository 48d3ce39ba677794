"""Run a builder in a process of its own, so that a crash of the builder does not end its caller.

``python -m lora_export.engines.builder_process JOB PARENT`` reads a job as JSON and writes lines of JSON to
the job's pipe: ``{"phase": …, "share": …}`` during the build, at the end ``{"built": {…}}`` or
``{"failed": {…}}``. The builder's own messages go to the job's log file.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from lora_export.engines import compiler_of
from lora_export.engines.backend import Compiler, TensorRT
from lora_export.engines.record import BuildOptions, Profile
from lora_export.errors import BackendUnavailable, OutputError
from lora_export.storage.commit.steps import reason_of
from lora_export.untrusted.documents import parse_json
from lora_export.untrusted.fields import from_plain

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MEMORY = {
    "weights": re.compile(r"^Total Weights Memory: ([0-9]{1,18}) bytes"),
    "activations": re.compile(r"^Total Activation Memory: ([0-9]{1,18}) bytes"),
}


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """One build.

    Attributes:
        backend: Name of the compiler.
        graph: File with the graph as the compiler reads it.
        model: The graph's own file, which its external data is relative to.
        engine: File to write.
        log: File for the builder's messages.
        compute_capabilities: Compute capabilities of the GPUs that the engine is for.
        options: Options of the compiler.
        profiles: Shapes that the engine takes.
        timings: File of measurements of earlier builds, or "".
        verbose: Keep all of the builder's messages.
        pipe: File descriptor that progress and result are written to.
    """

    backend: str
    graph: str
    model: str
    engine: str
    log: str
    compute_capabilities: tuple[str, ...]
    options: BuildOptions
    profiles: tuple[Profile, ...]
    timings: str = ""
    verbose: bool = False
    pipe: int = 1

    def to_json(self) -> str:
        """Return the job for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BuildJob:
        """Read a job."""
        return from_plain(cls, parse_json(text))


class _Failed(Exception):
    """Failure of the builder, with its stage and reasons."""

    def __init__(self, stage: str, reasons: list[dict[str, Any]]) -> None:
        super().__init__(stage)
        self.stage, self.reasons = stage, reasons


class _Messages:
    """The builder's messages: all of them go to a file, errors and memory figures are kept here too.

    Attributes:
        unwritten: Error from writing the file; raised after the builder has returned, because no exception of
            ours may pass through its C++.
    """

    def __init__(self, trt: TensorRT, file: TextIO, verbose: bool) -> None:
        self.unwritten: OSError | None = None
        self.errors: list[str] = []
        self.memory: dict[str, int] = {}
        messages = self
        severe = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity == trt.ILogger.VERBOSE and not verbose:
                    return
                try:
                    file.write(f"[{severity.name}] {message}\n")
                    if severity in severe:
                        file.flush()
                except OSError as error:
                    messages.unwritten = messages.unwritten or error
                if severity in severe:
                    messages.errors.append(message)
                for name, pattern in _MEMORY.items():
                    if found := pattern.match(message):
                        messages.memory[name] = int(found.group(1))

        self.logger = Logger()


def _monitor(trt: TensorRT, progress: Any) -> Any:
    """Return a progress monitor for the builder; the share that is done is the outermost phase's."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = (0, num_steps)
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                self._steps[phase_name] = (step + 1, self._steps[phase_name][1])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _report(self, phase: str) -> None:
            done = max((step / steps for step, steps in self._steps.values()), default=0.0)
            progress({"phase": phase, "share": round(done, 3)})

    return Monitor()


def _parse(trt: TensorRT, network: Any, job: BuildJob, messages: _Messages) -> None:
    parser = trt.OnnxParser(network, messages.logger)
    done = parser.parse(Path(job.graph).read_bytes(), job.model)
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    if done and not errors and network.num_outputs:
        _let_attention_decompose(trt, network)
        return
    reasons = [
        {"node": error.node_name(), "operator": error.node_operator(), "text": error.desc()}
        for error in errors
    ]
    # Some details, such as the name of a missing file, are only in the logger's messages.
    known = " ".join(reason["text"] for reason in reasons)
    reasons += [{"text": text} for text in messages.errors if text not in known and not reasons]
    raise _Failed("parse", reasons or [{"text": "the parser returned an empty network and no error"}])


def _let_attention_decompose(trt: TensorRT, network: Any) -> None:
    """Let the compiler write an Attention node out where it has no kernel: in float32, or for small heads.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-with-transformers.html
    """
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    if kind is None:  # an older TensorRT: its parser has no such layers
        return
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == kind:
            # The bindings return the base class.
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True


def _add_profiles(trt: TensorRT, builder: Any, config: Any, network: Any, job: BuildJob) -> None:
    inputs = {network.get_input(number).name: number for number in range(network.num_inputs)}
    reasons = [
        {"text": f"input '{name}' is a shape tensor: its values would have to be in a profile"}
        for name, number in inputs.items()
        if network.get_input(number).is_shape_tensor
    ]
    for wanted in job.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in wanted.shapes.items():
            if name not in inputs:  # the API takes it, and the build fails without saying why
                reasons.append(
                    {"text": f"input '{name}' is not an input of the network: it became a constant"}
                )
                continue
            try:
                profile.set_shape(name, low, usual, high)
            except (ValueError, RuntimeError) as error:
                reasons.append({"text": f"input '{name}': {error}"})
        if wanted.shapes:
            config.add_optimization_profile(profile)
    if reasons:
        raise _Failed("profile", reasons)


def _network_flags(trt: TensorRT) -> int:
    # The graph's own types decide what is computed in what: nothing is silently rounded.
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _port(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "dims": list(tensor.shape)}


def _build(
    compiler: Compiler, trt: TensorRT, job: BuildJob, messages: _Messages, progress: Any
) -> dict[str, Any]:
    builder = trt.Builder(messages.logger)
    network = builder.create_network(_network_flags(trt))
    progress({"phase": "Parsing ONNX", "share": 0.0})
    _parse(trt, network, job, messages)
    config = builder.create_builder_config()
    config.progress_monitor = monitor = _monitor(trt, progress)
    compiler.configure(trt, config, job.options, job.compute_capabilities)
    _add_profiles(trt, builder, config=config, network=network, job=job)
    if job.timings:
        compiler.read_timings(config, Path(job.timings))
    started = time.monotonic()
    engine = builder.build_serialized_network(network, config)
    if messages.unwritten is not None:
        raise messages.unwritten
    seconds = time.monotonic() - started
    del monitor  # the builder holds no reference of its own
    if engine is None or not engine.nbytes:
        raise _Failed("build", [{"text": text} for text in messages.errors])
    if job.timings:
        compiler.write_timings(config, Path(job.timings))
    with Path(job.engine).open("wb") as file:
        file.write(engine)
    return {
        "build_s": seconds,
        "peak_build_bytes": _peak_bytes(),
        "memory": messages.memory,
        "inputs": [_port(network.get_input(number)) for number in range(network.num_inputs)],
        "outputs": [_port(network.get_output(number)) for number in range(network.num_outputs)],
    }


def _peak_bytes() -> int:
    """Return this process's peak memory in bytes. Not from getrusage, which starts at the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def end_with_parent(parent: int) -> None:
    """Make the system end this process with its parent: nobody else would use the engine.

    Args:
        parent: Number of the process that started this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        # It may have ended before that, while this process imported its modules.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def run(job: BuildJob) -> int:
    """Do a job; return the exit code: 0 if it was built."""
    with os.fdopen(job.pipe, "w", encoding="utf-8") as pipe:

        def send(message: dict[str, Any]) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        try:
            compiler = compiler_of(job.backend)
            trt = compiler.load()
            try:
                with Path(job.log).open("w", encoding="utf-8") as log:
                    messages = _Messages(trt, log, job.verbose)
                    built = _build(compiler, trt, job=job, messages=messages, progress=send)
            except OSError as error:  # for example a full disk: such an error does not name the file
                send({"failed": {"stage": "write", "errno": error.errno, "text": reason_of(error)}})
                return 1
            send({"built": built})
        except _Failed as failed:
            send({"failed": {"stage": failed.stage, "reasons": failed.reasons}})
            return 1
        except BackendUnavailable as error:
            send({"failed": {"stage": "load", "reasons": [{"text": error.message}], "hint": error.hint}})
            return 1
        except OutputError as error:
            send({"failed": {"stage": "output", "text": error.message, "hint": error.hint}})
            return 1
    return 0


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    # Ctrl-C on a terminal goes to both processes: the parent decides what happens to this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(run(BuildJob.from_json(Path(sys.argv[1]).read_text(encoding="utf-8"))))
