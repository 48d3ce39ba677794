"""Write a folder from which ``sh build.sh`` builds an engine on the device that it is for.

It holds the graph prepared for the compiler, a shell script with every flag, checksums, and the engine record
without the fields that only the device knows. If lora-export is installed on the device, the script uses it;
otherwise it calls TensorRT's own ``trtexec``. ``begin.py`` then names and locks the temporary files, and
``finish.py`` completes the record; both need the standard library only.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from lora_export.engines.plan import BuildPlan, BuildRequest, Group, plan_build
from lora_export.engines.profiles import ProfileRequest
from lora_export.engines.record import EngineSource, Profile
from lora_export.engines.source import serialize
from lora_export.errors import BackendError
from lora_export.graph.data_identity import mark_data
from lora_export.graph.external_data import plan_data, write_data
from lora_export.graph.onnx_file import save_graph
from lora_export.storage.folders import refuse_strangers
from lora_export.storage.hashes import hash_written, sha256_of
from lora_export.storage.inputs import same_inputs
from lora_export.storage.outputs import OutputSet, check_parent, output_errors, refuse_existing, refuse_inputs
from lora_export.storage.sums.listed import NAME as SUMS
from lora_export.storage.sums.listed import read_sums
from lora_export.untrusted.places import is_folder, is_link
from lora_export.untrusted.shown import shown

PathLike = str | os.PathLike[str]
_MIB = 1 << 20
_TEMPLATES = "kit"
_OF_A_KIT = {"build.sh", "finish.py", "record.json"}
_KEY = re.compile("@([A-Z]+)@")
# In an input's name, trtexec splits at a comma, drops an apostrophe, and reads an asterisk as any name. A
# null character can't be in an argument of any program.
_SPLIT = frozenset(",'*\0")


@dataclass(frozen=True, kw_only=True)
class KitReport:
    """Result of `write_kits`, or its plan.

    Attributes:
        kits: The folders.
        groups: The GPUs of each folder.
        profiles: Shapes that the engines will take.
        notes: Changes to the graph for the compiler.
        dry_run: True if nothing was written.
    """

    kits: tuple[Path, ...]
    groups: tuple[Group, ...]
    profiles: tuple[Profile, ...]
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    def __str__(self) -> str:
        """Return a line for each kit and each note."""
        verb = "would write" if self.dry_run else "wrote"
        lines = [f"{verb} {shown(kit)}" for kit in self.kits]
        return "\n".join([*lines, *(f"note: {shown(note)}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "dry_run": self.dry_run,
            "notes": list(self.notes),
            "profiles": [asdict(profile) for profile in self.profiles],
            "kits": [
                {
                    "path": str(path),
                    "backend": group.compiler.name,
                    "targets": [target.name for target in group.targets],
                    "memory": [fit.as_dict() for fit in group.fits],
                }
                for path, group in zip(self.kits, self.groups, strict=True)
            ],
        }


@same_inputs()
def write_kits(
    model: PathLike, request: BuildRequest, output: PathLike, *, force: bool = False, dry_run: bool = False
) -> KitReport:
    """Write a folder ``<name>.<target>.kit`` for each target.

    Args:
        model: The ``.onnx`` file.
        request: The build request; this machine need not be able to build it.
        output: The folder to write into.
        force: Replace existing kits, if nothing was added to them.
        dry_run: Check everything and write nothing.

    Raises:
        LoraExportError: As for `engines.build.build_engine`, except problems of the machine that builds.
    """
    plan = plan_build(model, request, here=False)
    _check_inputs(plan.profiles)
    kits = tuple(Path(output) / f"{plan.name}.{group.label}.kit" for group in plan.groups)
    report = KitReport(
        kits=kits,
        groups=plan.groups,
        profiles=plan.profiles,
        notes=(*plan.admitted.notes, *plan.notes),
        dry_run=dry_run,
    )
    check_parent(kits[0])
    refuse_inputs(kits, plan.reads)
    if not dry_run:
        refuse_existing(list(kits), force)
        for path in kits:
            _check_kit(path)
        source = serialize(plan.admitted.graph, sha256_of).source
        for path, group in zip(kits, plan.groups, strict=True):
            with output_errors(path), OutputSet(force, plan.reads) as outputs:
                _write(plan, group, source, outputs.stage(path, folder=True))
                outputs.commit(partial(_check_kit, path))
    return report


def _check_kit(path: Path) -> None:
    """Refuse to replace a folder that is not a kit, or in which anything else lies, such as an engine."""
    if not is_folder(path) or is_link(path):
        refuse_strangers(path, (), "kit")
        return
    try:
        listed = {name for name, _ in read_sums(path / SUMS).files}
    except OSError:
        listed = set()
    refuse_strangers(path, {SUMS, *listed} if listed >= _OF_A_KIT else (), "kit")


def _check_inputs(profiles: Iterable[Profile]) -> None:
    names = sorted({name for profile in profiles for name in profile.shapes if _SPLIT & set(name)})
    if names:
        raise BackendError(
            "trtexec can't be told the shapes of some inputs",
            "give these inputs names without comma, apostrophe, asterisk and null character",
            names,
        )


def _write(plan: BuildPlan, group: Group, source: EngineSource, folder: Path) -> None:
    folder.mkdir()
    graph, record = plan.admitted.graph, plan.record(group, source)
    onnx, data = folder / f"{plan.name}.onnx", folder / f"{plan.name}.onnx.data"
    kept = {value: value.const_value for value in graph.initializers()}
    try:
        slots, size, _ = plan_data(graph, {}, onnx, frozenset())
        write_data(data, data.name, slots=slots, size=size, changes={}, rounding="sample", progress=None)
        mark_data(graph.model, {data.name: hash_written(data, data.name)})
        save_graph(graph.model, onnx)
    finally:
        for value, tensor in kept.items():  # the next kit is written from the same graph
            value.const_value = tensor
    record.save(folder / "record.json")
    for name in ("begin.py", "finish.py"):
        shipped = (files("lora_export.packages") / _TEMPLATES / name).read_text(encoding="utf-8")
        (folder / name).write_text(shipped, encoding="utf-8")
    (folder / "build.sh").write_text(_script(plan, group, record.name), encoding="utf-8")
    (folder / "build.sh").chmod(0o755)
    listed = sorted(path for path in folder.iterdir())
    sums = "".join(f"{sha256_of(path)}  {path.name}\n" for path in listed)
    (folder / SUMS).write_text(sums, encoding="utf-8")


def _script(plan: BuildPlan, group: Group, engine: str) -> str:
    template = (files("lora_export.packages") / _TEMPLATES / "build.sh").read_text(encoding="utf-8")
    filled = {
        # Goes into a comment, which ends with its line.
        "TARGET": _one_line(", ".join(target.label for target in group.targets)),
        "MODEL": shlex.quote(f"{plan.name}.onnx"),
        "ENGINE": shlex.quote(engine),
        "TOOL": group.compiler.tool,
        "OURS": _lines(_own_flags(plan, group)),
        "FLAGS": _lines(_trtexec_flags(plan, group)),
    }
    return fill(template, filled)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with each ``@KEY@`` replaced, in one pass: text in a value is never read as a key.

    Args:
        template: Text of the shipped file.
        values: Key → text, quoted as the line around the key needs it.
    """
    return _KEY.sub(lambda found: values[found[1]], template)


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _lines(flags: Iterator[str]) -> str:
    return " \\\n    ".join(shlex.quote(flag) for flag in flags)


def _own_flags(plan: BuildPlan, group: Group) -> Iterator[str]:
    """Yield the options of ``lora-export build-engine`` that build the same engine."""
    for target in group.targets:
        yield from ("--target", target.name)
    yield from ("--backend", group.compiler.name, "--name", plan.name)
    if len(group.targets) > 1:
        yield "--together"
    # The memory was checked when the kit was made.
    yield "--ignore-memory"
    for name, value in asdict(plan.options).items():
        if name == "workspace_bytes":
            if value is not None:
                yield from ("--workspace", str(-(-value // _MIB)))
        elif value not in (False, None):
            flag = f"--{name.replace('_', '-')}"
            yield from ((flag,) if value is True else (flag, str(value)))
    # A profile without shapes (all sizes of the graph are fixed) needs no option.
    for profile in (profile for profile in plan.profiles if profile.shapes):
        shapes = {name: ":".join(map(_size, sizes)) for name, sizes in profile.shapes.items()}
        yield from ("--profile", ProfileRequest(profile.name, shapes).text())


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _trtexec_flags(plan: BuildPlan, group: Group) -> Iterator[str]:
    """Yield the flags of trtexec (its ``--help``, its source) or of TensorRT-RTX's tool of the same kind."""
    profiles, options = plan.profiles, plan.options
    yield from group.compiler.tool_flags(group.compute_capabilities)
    yield "--skipInference"
    for number, profile in enumerate(profiles):
        if not profile.shapes:
            continue
        if len(profiles) > 1:
            yield f"--profile={number}"
        for at, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            # Not quoted: quotes would be part of the name. trtexec splits at the last ':'.
            shapes = (f"{name}:{_size(sizes[at])}" for name, sizes in profile.shapes.items())
            yield f"{flag}={','.join(shapes)}"
    switches = {
        "--noTF32": not options.tf32,
        "--allowWeightStreaming": options.weight_streaming,
        "--refit": options.refit,
        "--stripWeights": options.strip_weights,
        "--versionCompatible": options.version_compatible,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
    }
    yield from (flag for flag, is_on in switches.items() if is_on)
    if options.optimization_level is not None:
        yield f"--builderOptimizationLevel={options.optimization_level}"
    if options.workspace_bytes is not None:
        yield f"--memPoolSize=workspace:{-(-options.workspace_bytes // _MIB)}M"
