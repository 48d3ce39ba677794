"""Write a `DoctorReport` as text."""

from __future__ import annotations

from collections.abc import Iterator

from lora_export.doctor.checks import Capability, pip_name
from lora_export.doctor.doctor import DoctorReport
from lora_export.machines.local_gpus import LocalGpu
from lora_export.machines.packages import Package
from lora_export.plan import align

_GIB = 2**30
_SHOWN_PROVIDERS = {"CUDAExecutionProvider": "CUDA", "CPUExecutionProvider": "CPU"}


def doctor_lines(report: DoctorReport) -> list[str]:
    """Return the lines that a user reads."""
    lines = [f"lora-export {report.version}, Python {report.python}, {report.platform}", "", "GPUs"]
    lines += (
        [f"  {line}" for line in align([_gpu(gpu) for gpu in report.gpus.gpus])] if report.gpus.gpus else []
    )
    lines += [f"  {report.gpus.problem}"] if report.gpus.problem else []
    lines += ["", "packages"]
    lines += [f"  {line}" for line in align([_package(package) for package in report.packages])]
    lines += ["", "what works here"]
    for capability in report.capabilities:
        lines += _capability(capability)
    if report.leftovers:
        lines += ["", "left by runs that were ended", *(f"  {line}" for line in report.leftovers)]
    return lines


def _gpu(gpu: LocalGpu) -> tuple[str, ...]:
    memory = (
        "memory shared with the CPU" if gpu.memory_bytes is None else f"{gpu.memory_bytes / _GIB:.1f} GiB"
    )
    named = f"--target {gpu.target}" if gpu.target else ""
    return (
        gpu.name,
        f"compute capability {gpu.compute_capability or '?'}",
        memory,
        f"driver {gpu.driver or '?'}",
        named,
    )


def _package(package: Package) -> tuple[str, str, str]:
    name = pip_name(package.name)
    if package.status == "missing":
        return name, "–", "not installed"
    if package.status == "broken":
        return name, package.version or "?", f"broken: {package.reason}"
    return name, package.version, _details(package)


def _details(package: Package) -> str:
    if package.name == "torch":
        cuda = package.details.get("cuda")
        return f"CUDA {cuda}" if cuda else "built without CUDA"
    if package.name == "onnxruntime":
        providers = [_SHOWN_PROVIDERS.get(name, name) for name in package.details.get("providers", ())]
        return f"providers: {', '.join(providers)}"
    return ""


def _capability(capability: Capability) -> Iterator[str]:
    yield f"  {'yes' if capability.works else 'no ':3}  {capability.title}"
    yield f"         {capability.reason}"
    if capability.fix:
        yield f"         fix it: {capability.fix}"
