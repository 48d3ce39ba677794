"""Check what a machine can do by its GPUs and packages: one function for each thing that lora-export does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_export.errors import install_line
from lora_export.machines.local_gpus import LocalGpu, LocalGpus
from lora_export.machines.packages import PACKAGES, Package
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES

_CUDA_PROVIDER = "CUDAExecutionProvider"
# Needed to run engines, in addition to the compiler's own package.
_RUNNER = "cuda.bindings"
_ALL_RTX = ", ".join(RTX_COMPUTE_CAPABILITIES)


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Something that lora-export does, and whether it works on this machine.

    Attributes:
        name: Name in JSON: ``build-tensorrt-rtx``.
        title: Text for people.
        works: True if it works here.
        reason: Text on what makes it work, or on what is missing.
        fix: The command that makes it work, or "" if none is needed or none can.
    """

    name: str
    title: str
    works: bool
    reason: str
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """GPUs and packages that the checks look at.

    Attributes:
        gpus: The driver's answer.
        packages: Name that Python imports → result of importing it.
    """

    gpus: LocalGpus
    packages: Mapping[str, Package]

    def blocked(self, names: Sequence[str], extra: str) -> tuple[str, str] | None:
        """Return (reason, command that fixes it) if packages can't be used, or None if all can.

        Args:
            names: Names that Python imports.
            extra: The extra of lora-export that installs them.
        """
        looked_at = [self.packages[name] for name in names]
        missing = [pip_name(package.name) for package in looked_at if package.status == "missing"]
        broken = [package for package in looked_at if package.status == "broken"]
        reasons = [f"{pip_name(package.name)} is broken: {package.reason}" for package in broken]
        fixes = [
            f"pip install --force-reinstall {package.distribution or pip_name(package.name)}"
            for package in broken
        ]
        if missing:
            reasons.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")
            fixes.append(install_line(extra))
        return ("; ".join(reasons), " && ".join(fixes)) if reasons else None


def pip_name(package: str) -> str:
    """Return pip's name for a package that Python imports, without the CUDA variants."""
    return PACKAGES[package][-1]


def capabilities(machine: Machine) -> tuple[Capability, ...]:
    """Return what works on a machine, in the order in which users need it."""
    return tuple(check(machine) for check in _CHECKS)


def _merge(machine: Machine) -> Capability:
    return Capability(
        name="merge",
        title="merge adapters, expose LoRA in ONNX graphs",
        works=True,
        reason="needs no other package",
    )


def _blocked(name: str, title: str, blocked: tuple[str, str]) -> Capability:
    """Return what does not work, from the answer of `Machine.blocked`."""
    reason, fix = blocked
    return Capability(name=name, title=title, works=False, reason=reason, fix=fix)


def _packages_only(
    name: str, title: str, packages: Sequence[str], extra: str
) -> Callable[[Machine], Capability]:
    """Return the check of something that needs packages and nothing else."""

    def check(machine: Machine) -> Capability:
        if blocked := machine.blocked(packages, extra):
            return _blocked(name, title, blocked)
        have = ", ".join(f"{pip_name(used)} {machine.packages[used].version}" for used in packages)
        return Capability(name=name, title=title, works=True, reason=have)

    return check


def _run_cuda(machine: Machine) -> Capability:
    name, title = "run-cuda", "run graphs on a GPU (ONNX Runtime, CUDA)"
    if not machine.gpus.gpus:
        return Capability(name=name, title=title, works=False, reason=machine.gpus.problem)
    if blocked := machine.blocked(["onnxruntime"], "gpu"):
        return _blocked(name, title, blocked)
    package = machine.packages["onnxruntime"]
    if _CUDA_PROVIDER in package.details.get("providers", ()):
        return Capability(
            name=name, title=title, works=True, reason=f"onnxruntime {package.version} with {_CUDA_PROVIDER}"
        )
    # Both wheels install a module `onnxruntime`: the old one must be removed first.
    return Capability(
        name=name,
        title=title,
        works=False,
        reason=f"onnxruntime {package.version} has no {_CUDA_PROVIDER}",
        fix=f"pip uninstall onnxruntime && {install_line('gpu')}",
    )


def _build_rtx(machine: Machine) -> Capability:
    name, title = "build-tensorrt-rtx", "build engines with TensorRT-RTX"
    if blocked := machine.blocked(["tensorrt_rtx"], "rtx"):
        return _blocked(name, title, blocked)
    package = machine.packages["tensorrt_rtx"]
    targets = ", ".join(package.details.get("compute_capabilities", ()))
    return Capability(
        name=name,
        title=title,
        works=True,
        reason=f"tensorrt-rtx {package.version}, for compute capabilities {targets}; needs no GPU",
    )


def _run_rtx(machine: Machine) -> Capability:
    name, title = "run-tensorrt-rtx", "run engines of TensorRT-RTX"
    gpus = machine.gpus.gpus
    if not gpus:
        return Capability(name=name, title=title, works=False, reason=machine.gpus.problem)
    supported = [gpu for gpu in gpus if gpu.compute_capability in RTX_COMPUTE_CAPABILITIES]
    if not supported:
        here = ", ".join(f"{gpu.name} has {gpu.compute_capability or 'an unknown one'}" for gpu in gpus)
        return Capability(
            name=name,
            title=title,
            works=False,
            reason=f"TensorRT-RTX runs on compute capabilities {_ALL_RTX}; {here}: use classic TensorRT here",
        )
    if blocked := machine.blocked(["tensorrt_rtx", _RUNNER], "rtx"):
        return _blocked(name, title, blocked)
    return Capability(name=name, title=title, works=True, reason=f"on {_listed(supported)}")


def _build_tensorrt(machine: Machine) -> Capability:
    name, title = "build-tensorrt", "build engines with classic TensorRT"
    return _on_this_gpu(machine, name, title=title, works="for this machine's {}", packages=["tensorrt"])


def _run_tensorrt(machine: Machine) -> Capability:
    name, title = "run-tensorrt", "run engines of classic TensorRT"
    return _on_this_gpu(
        machine,
        name,
        title=title,
        works="on {}, those that were built for it",
        packages=["tensorrt", _RUNNER],
    )


def _on_this_gpu(machine: Machine, name: str, title: str, works: str, packages: Sequence[str]) -> Capability:
    if not machine.gpus.gpus:
        return Capability(
            name=name,
            title=title,
            works=False,
            reason=f"classic TensorRT builds and runs on the GPU itself: {machine.gpus.problem}",
        )
    if blocked := machine.blocked(packages, "tensorrt"):
        return _blocked(name, title, blocked)
    return Capability(name=name, title=title, works=True, reason=works.format(_listed(machine.gpus.gpus)))


def _listed(gpus: Sequence[LocalGpu]) -> str:
    return ", ".join(f"{gpu.name} ({gpu.compute_capability or 'unknown'})" for gpu in gpus)


_CHECKS: tuple[Callable[[Machine], Capability], ...] = (
    _merge,
    _packages_only("read-pickles", "read .pt, .pth, .bin, .ckpt adapters", ["torch"], "hf"),
    _packages_only(
        "capture", "capture Hugging Face folders as ONNX", ["torch", "transformers", "onnxscript"], "hf"
    ),
    _packages_only("run-cpu", "run graphs on the CPU (ONNX Runtime)", ["onnxruntime"], "cpu"),
    _run_cuda,
    _packages_only(
        "genai", "generate text with onnxruntime-genai", ["onnxruntime_genai", "onnxruntime"], "genai"
    ),
    _packages_only("demo", "train the demo's adapters", ["torch", "transformers", "peft"], "demo"),
    _build_rtx,
    _run_rtx,
    _build_tensorrt,
    _run_tensorrt,
)
