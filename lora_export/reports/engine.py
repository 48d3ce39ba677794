"""Write engines as text: the built files, their profiles and memory, and whether they fit the GPU."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.plan import align
from lora_export.reports.merge import size_text
from lora_export.untrusted.places import exists
from lora_export.untrusted.shown import MAX_LINE

if TYPE_CHECKING:
    from lora_export.engines.build import BuildReport, BuiltEngine
    from lora_export.engines.plan import Group
    from lora_export.engines.record import EngineRecord, Profile, ShapeRange
    from lora_export.graph.exposed import LoraRecord
    from lora_export.graph.port import Port
    from lora_export.packages.build_kit import KitReport

_LORA = ".lora_"
# Number of inputs that a table names one by one; the others (a cache's layers) are summed up.
_LISTED = 8


def build_lines(report: BuildReport, seconds: float) -> list[str]:
    """Return the lines that a user reads after building, or that a dry run prints."""
    lines = [_engine_line(engine) for engine in report.engines]
    lines += fit_lines(report.groups)
    lines += profile_lines(report.profiles)
    lines += [f"note: {note}" for note in report.notes]
    if report.dry_run:
        existing = [str(engine.path) for engine in report.engines if exists(engine.path)]
        lines += [f"would write {engine.path}" for engine in report.engines]
        if existing:
            lines.append(f"note: --force would be needed, there is already: {', '.join(existing)}")
        return lines
    lines += [f"wrote {engine.path}" for engine in report.engines]
    count = len(report.engines)
    what = f"{count} engine{'s' if count > 1 else ''}"
    return [*lines, f"{what} in {seconds:.1f} s; beside each: its record (.json) and the builder's log"]


def _engine_line(engine: BuiltEngine) -> str:
    group, record = engine.group, engine.record
    what = f"{group.label} ({', '.join(group.compute_capabilities)}, {group.compiler.name})"
    if record is not None:
        how = "from the cache" if engine.cached else "built"
        what += f": {size_text(record.size_bytes)}, {how} in {engine.seconds:.1f} s"
        if not engine.cached:
            what += f" with {size_text(record.peak_build_bytes)} of memory"
    return what


def fit_lines(groups: Iterable[Group]) -> Iterator[str]:
    """Yield lines on how an engine fits into the memory of its GPUs; GPUs with equal lines share them."""
    fits = [fit for group in groups for fit in group.fits]
    together: dict[str, list[str]] = {}
    for fit in fits:
        # "rtx-4090: fits in …"
        together.setdefault(fit.lines[0].partition(": ")[2], []).append(fit.target.name)
    for text, names in together.items():
        yield f"{', '.join(names)}: {text}"
    yield from dict.fromkeys(line for fit in fits for line in fit.lines[1:])


def warning_lines(report: BuildReport | KitReport) -> Iterator[str]:
    """Yield the warnings that are printed even with ``--quiet``."""
    for group in report.groups:
        for fit in group.fits:
            if fit.verdict in ("tight", "no"):
                yield f"warning: {fit.lines[0]}"


def uncached_lines(report: BuildReport) -> Iterator[str]:
    """Yield the reasons why engines will be built again the next time, each once."""
    reasons = dict.fromkeys(engine.not_kept for engine in report.engines if engine.not_kept)
    yield from (f"warning: not kept for the next time: {reason}" for reason in reasons)


def kit_lines(report: KitReport) -> list[str]:
    """Return the lines that a user reads after kits were written."""
    lines = [*fit_lines(report.groups), *profile_lines(report.profiles)]
    lines += [f"note: {note}" for note in report.notes]
    existing = [str(path) for path in report.kits if report.dry_run and exists(path)]
    if existing:
        lines.append(f"note: --force would be needed, there is already: {', '.join(existing)}")
    verb = "would write" if report.dry_run else "wrote"
    for path in report.kits:
        line = f"{verb} {path} (copy it to the device, then: {build_line(path)})"
        # Cut in the middle, the command would be another one.
        lines.append(line if len(line) <= MAX_LINE else f"{verb} {path}")
    return lines


def build_line(kit: Path) -> str:
    """Return the command that builds a kit, from the folder that it lies in on the device."""
    # A name that begins with a dash would be read as an option.
    folder = f"./{kit.name}" if kit.name.startswith("-") else kit.name
    return shlex.join(["sh", f"{folder}/build.sh"])


def profile_lines(profiles: Sequence[Profile]) -> list[str]:
    """Return the shapes that an engine takes, LoRA's inputs summed up."""
    lines: list[str] = []
    for profile in profiles[:_LISTED]:
        rows = [("profile " + profile.name, "smallest", "usual", "largest")]
        plain = {name: shapes for name, shapes in profile.shapes.items() if _LORA not in name}
        rows += [_row(name, shapes) for name, shapes in list(plain.items())[:_LISTED]]
        if len(plain) > _LISTED:
            rows.append((f"… and {len(plain) - _LISTED} more", "", "", ""))
        lora = {name: shapes for name, shapes in profile.shapes.items() if _LORA in name}
        if ranks := _ranks(lora.values()):
            rows.append((f"rank of {len(lora)} LoRA inputs", *ranks))
        lines += align(rows)
    if len(profiles) > _LISTED:
        lines.append(f"… and {len(profiles) - _LISTED} more profiles")
    return lines


def _row(name: str, shapes: ShapeRange) -> tuple[str, str, str, str]:
    low, usual, high = ("x".join(map(str, shape)) for shape in shapes)
    return name, low, usual, high


def _ranks(shapes: Iterable[ShapeRange]) -> tuple[str, str, str] | None:
    """Return the ranges of the sizes that vary; None if no size varies."""
    varying = [
        sizes
        for low, usual, high in shapes
        for sizes in zip(low, usual, high, strict=True)
        if len(set(sizes)) > 1
    ]
    if not varying:
        return None
    spread = [sorted(set(column)) for column in zip(*varying, strict=True)]
    low, usual, high = (str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}" for sizes in spread)
    return low, usual, high


def record_lines(record: EngineRecord) -> list[str]:
    """Return the lines that `inspect` prints for an engine."""
    options = {name: value for name, value in vars(record.options).items() if value not in (False, None)}
    # A kit's record has neither version and size nor platform until the device has built the engine.
    built = (
        f" {record.builder_version}, {size_text(record.size_bytes)}" if record.size_bytes else ", not built"
    )
    targets = f"{', '.join(record.targets)} (compute capability {', '.join(record.compute_capabilities)})"
    lines = [
        f"{record.name}: {record.backend}{built}",
        f"for {targets}" + (f", {record.platform}" if record.platform else ""),
        f"from {record.source.name} (sha256 {record.source.sha256[:16]}…)",
        "options: " + (", ".join(f"{name}={value}" for name, value in options.items()) or "none"),
    ]
    # The trtexec of a build kit reports neither, or not all.
    if record.memory:
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in sorted(record.memory.items()))
        lines.append(f"memory, as the builder says: {sizes}")
    if record.build_s:
        most = size_text(record.peak_build_bytes)
        lines.append(f"built in {record.build_s:.1f} s, at most {most} of memory")
    lines += exposed_lines(record.exposed)
    lines += _port_lines("inputs", record.inputs) + _port_lines("outputs", record.outputs)
    return [*lines, *profile_lines(record.profiles), *(f"note: {note}" for note in record.notes)]


def exposed_lines(exposed: LoraRecord | None) -> list[str]:
    """Return one line with the LoRA that an engine or a graph takes."""
    if exposed is None:
        return ["LoRA: none exposed (a base or merged model)"]
    modules = sum(len(module.members) for module in exposed.modules)
    if exposed.mode == "swap":
        return [f"LoRA: swap, {modules} modules, rank up to {exposed.max_rank}"]
    slots = ", ".join(slot.name for slot in exposed.slots)
    return [f"LoRA: bank of {len(exposed.slots)} ({slots}; {exposed.resident}), {modules} modules"]


def _port_lines(kind: str, ports: Sequence[Port]) -> list[str]:
    plain = [port for port in ports if _LORA not in port.name]
    rows = [(kind, "dtype", "shape")]
    rows += [(port.name, port.dtype, f"[{', '.join(map(str, port.dims))}]") for port in plain[:_LISTED]]
    lines = align(rows)
    if len(plain) > _LISTED:
        lines.append(f"… and {len(plain) - _LISTED} more {kind}")
    if len(ports) > len(plain):
        dtypes = sorted({port.dtype for port in ports if _LORA in port.name})
        lines.append(f"and {len(ports) - len(plain)} LoRA {kind} ({', '.join(dtypes)})")
    return lines
