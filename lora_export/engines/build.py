"""Build engines from an ONNX graph: one for each target, or one for all targets together."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_export import __version__
from lora_export.engines.backend import DTYPES, Compiler, gpu_name_here
from lora_export.engines.builder_process import BuildJob
from lora_export.engines.cache import EngineCache, default_folder, key_of
from lora_export.engines.plan import BuildPlan, BuildRequest, Group, engine_files, plan_build
from lora_export.engines.profiles import ProfileRequest, shape_text
from lora_export.engines.record import BuildOptions, EngineRecord, Profile, platform_here, record_path
from lora_export.engines.run_builder import run_worker
from lora_export.engines.source import Serialized, port_of, serialize
from lora_export.errors import BackendError, EngineBuildError, OutputError
from lora_export.graph.port import Port
from lora_export.progress import Say
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.hashes import hash_written, sha256_of
from lora_export.storage.inputs import refuse_changed_inputs, same_inputs
from lora_export.storage.outputs import (
    OutputSet,
    check_parent,
    output_errors,
    refuse_inputs,
    refuse_replacing,
)
from lora_export.untrusted.places import exists
from lora_export.untrusted.shown import shown

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class BuiltEngine:
    """One engine that was (or would be) written.

    Attributes:
        path: File of the engine.
        group: GPUs that it is for, and its memory on each.
        record: Engine record; None in a dry run.
        cached: True if it was taken from the cache.
        seconds: Seconds that it took, the cache included.
        not_kept: Reason why the cache could not keep it, or "".
    """

    path: Path
    group: Group
    record: EngineRecord | None = None
    cached: bool = False
    seconds: float = 0.0
    not_kept: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "path": str(self.path),
            "record": str(record_path(self.path)),
            "backend": self.group.compiler.name,
            "targets": [target.name for target in self.group.targets],
            "memory": [fit.as_dict() for fit in self.group.fits],
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "not_kept": self.not_kept,
            "size_bytes": self.record.size_bytes if self.record else None,
            "sha256": self.record.sha256 if self.record else None,
        }


@dataclass(frozen=True)
class BuildReport:
    """The result of `build_engine`; with ``dry_run``, what it would do.

    Attributes:
        engines: The engines, in the order of the targets.
        profiles: Shapes that they take.
        notes: Changes to the graph for the compiler, and other notes.
        dry_run: True if nothing was written.
    """

    engines: tuple[BuiltEngine, ...]
    profiles: tuple[Profile, ...]
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        """The GPUs of each engine."""
        return tuple(engine.group for engine in self.engines)

    def __str__(self) -> str:
        """Return a line for each engine and each note."""
        verb = "would write" if self.dry_run else "wrote"
        lines = [f"{verb} {shown(engine.path)} for {engine.group.label}" for engine in self.engines]
        return "\n".join([*lines, *(f"note: {shown(note)}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "dry_run": self.dry_run,
            "notes": list(self.notes),
            "profiles": [asdict(profile) for profile in self.profiles],
            "engines": [engine.as_dict() for engine in self.engines],
        }


@dataclass(frozen=True, kw_only=True)
class _Work:
    """A plan, and the settings to carry it out."""

    plan: BuildPlan
    serialized: Serialized
    scratch: Path
    cache: EngineCache
    timings: str
    verbose: bool
    force: bool
    progress: Say


def build_engine(
    model: PathLike,
    targets: str | Sequence[str],
    output: PathLike,
    *,
    name: str | None = None,
    backend: str | None = None,
    options: BuildOptions | None = None,
    shapes: Mapping[str, str | Sequence[int | Sequence[int]]] | None = None,
    profiles: Sequence[ProfileRequest] = (),
    together: bool = False,
    adapters: int = 1,
    ignore_memory: bool = False,
    cache: PathLike | bool = True,
    timing_cache: PathLike | None = None,
    verbose: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Say | None = None,
) -> BuildReport:
    """Compile an ONNX graph of any of our modes, or a plain one, for GPUs.

    Writes ``<name>.<target>.engine``, its record ``<name>.<target>.json`` and the builder's messages
    ``<name>.<target>.log`` for each target into ``output``. The engine computes in the graph's own types (a
    strongly typed network). The graph's LoRA tensors are inputs of the engine.

    Args:
        model: The ``.onnx`` file.
        targets: Names of GPUs (``rtx-4090``), compute capabilities (``sm89``), or ``all``.
        output: The folder to write into.
        name: Beginning of the files' names; by default the graph's.
        backend: ``tensorrt-rtx``, or ``tensorrt`` on the GPU that the engine is for; None: by the target.
        options: Options of the compiler.
        shapes: Dimension or input → ``MIN:OPT:MAX`` or those three, for all profiles.
        profiles: Several profiles in place of one, for instance ``prefill`` and ``decode``.
        together: Build one engine for all targets in place of one for each.
        adapters: Number of adapters of the largest rank that have to fit in memory with the engine.
        ignore_memory: Build even if the engine does not fit.
        cache: Folder of engines built before; True: the user's cache folder, False: none.
        timing_cache: File with classic TensorRT's timings of earlier builds.
        verbose: Keep all of the builder's messages in the log; cached engines are built again for them.
        force: Replace existing files.
        dry_run: Check everything, but build nothing.
        progress: Function called with the current step and the share of it that is done.

    Returns:
        The engines.

    Raises:
        BackendError: Unknown targets or shapes, options that the compiler does not have, too little memory.
        BackendUnavailable: The compiler is not installed.
        EngineBuildError: The compiler can't build the graph.
        GraphError: The graph can't be read.
        OutputError: A file exists already or can't be written.
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    typed = {key: shape_text(sizes) for key, sizes in (shapes or {}).items()}
    request = BuildRequest(
        targets=names,
        backend=backend,
        options=options or BuildOptions(),
        shapes=typed,
        profiles=profiles,
        together=together,
        adapters=adapters,
        ignore_memory=ignore_memory,
        name=name,
    )
    return carry_out(
        model,
        request,
        output,
        cache=cache,
        timing_cache=timing_cache,
        verbose=verbose,
        force=force,
        dry_run=dry_run,
        progress=progress,
    )


@same_inputs()
def carry_out(
    model: PathLike,
    request: BuildRequest,
    output: PathLike,
    *,
    cache: PathLike | bool = True,
    timing_cache: PathLike | None = None,
    verbose: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Say | None = None,
) -> BuildReport:
    """Carry out a build request; the other arguments are those of `build_engine`."""
    plan = plan_build(model, request)
    if timing_cache is not None:
        _check_timings([group.compiler for group in plan.groups])
    engines = [BuiltEngine(path=plan.engine_path(Path(output), group), group=group) for group in plan.groups]
    report = BuildReport(tuple(engines), plan.profiles, (*plan.admitted.notes, *plan.notes), dry_run)
    check_parent(engines[0].path)
    written = [file for engine in engines for file in engine_files(engine.path).values()]
    refuse_inputs([*written, *([Path(timing_cache)] if timing_cache is not None else [])], plan.reads)
    if dry_run:
        return report
    _refuse_existing([engine.path for engine in engines], force)
    for group in plan.groups:
        group.compiler.version()  # raises before gigabytes are hashed, if it is not installed
    with scratch_folder() as scratch:
        # Without a cache too, GPUs of one compute capability share one build.
        store = EngineCache(_cache_folder(cache, scratch))
        serialized = serialize(plan.admitted.graph, store.sha256)
        with output_errors(scratch):
            (scratch / "graph.onnx").write_bytes(serialized.data)
        work = _Work(
            plan=plan,
            serialized=serialized,
            scratch=scratch,
            cache=store,
            timings=str(timing_cache or ""),
            verbose=verbose,
            force=force,
            progress=progress or (lambda _what, _share: None),
        )
        return replace(report, engines=tuple(_build_one(work, engine) for engine in engines))


def _check_timings(compilers: Sequence[Compiler]) -> None:
    if names := sorted({compiler.name for compiler in compilers if compiler.anywhere}):
        raise BackendError(
            f"timing_cache: {', '.join(names)} measures no timings, so there is nothing to keep",
            "omit --timing-cache",
        )


def _refuse_existing(engines: Sequence[Path], force: bool) -> None:
    """Refuse to replace engines or their records. A log alone, which a failed build leaves, may go."""
    files = [engine_files(path) for path in engines]
    refuse_replacing([kinds[kind] for kinds in files for kind in ("engine", "record")], force)


def _cache_folder(cache: PathLike | bool, scratch: Path) -> Path:
    if cache is True:
        return default_folder()
    return scratch / "cache" if cache is False else Path(cache)


def _build_one(work: _Work, engine: BuiltEngine) -> BuiltEngine:
    """Build one engine, or take it from the cache, and write its three files."""
    started, not_kept = time.monotonic(), ""
    files, key = engine_files(engine.path), _key(work, engine.group)
    # The log beside an existing engine stays that engine's, even if this build fails.
    failed_log = engine.path.with_suffix(".failed.log") if exists(engine.path) else files["log"]
    with output_errors(engine.path), OutputSet(work.force, work.plan.reads) as outputs:
        # A log alone, which a failed build leaves, may be replaced.
        forces = {"log": True}
        staged = {kind: outputs.stage(path, force=forces.get(kind)) for kind, path in files.items()}
        known = None if work.verbose else work.cache.take(key, staged["engine"], staged["log"])
        if known is not None and _port_problems(work.plan, known):  # somebody else's entry, under this key
            known = None
        built = known or _compile(work, engine.group, staged, failed_log)
        if known is None:
            refuse_changed_inputs()
            not_kept = work.cache.keep(key, staged["engine"], staged["log"], built)
        written = {files[kind].name: staged[kind] for kind in ("engine", "log")}
        own = {name: hash_written(path, name) for name, path in written.items()}
        record = replace(_record(work, engine, built), files=own)
        record.save(staged["record"])
        outputs.commit()
    seconds = time.monotonic() - started
    return replace(engine, record=record, cached=known is not None, seconds=seconds, not_kept=not_kept)


def _key(work: _Work, group: Group) -> str:
    return key_of(
        {
            "source": work.serialized.source.sha256,
            "backend": group.compiler.name,
            "version": group.compiler.version(),
            "lora_export": __version__,
            "platform": platform_here(),
            # Classic TensorRT measures on this very GPU: another model of its compute capability differs.
            "gpu": "" if group.compiler.anywhere else gpu_name_here(),
            "compute_capabilities": list(group.compute_capabilities),
            "options": asdict(work.plan.options),
            "profiles": [asdict(profile) for profile in work.plan.profiles],
        }
    )


def _compile(work: _Work, group: Group, staged: Mapping[str, Path], log: Path) -> dict[str, Any]:
    graph = work.plan.admitted.graph
    job = BuildJob(
        backend=group.compiler.name,
        graph=str(work.scratch / "graph.onnx"),
        # Not resolved: if the file is a link, its data lies beside the link, for us as for other tools.
        model=str(graph.path.absolute()),
        engine=str(staged["engine"].resolve()),
        log=str(staged["log"].resolve()),
        compute_capabilities=group.compute_capabilities,
        options=work.plan.options,
        profiles=work.plan.profiles,
        timings=work.timings,
        verbose=work.verbose,
    )

    def progress(_phase: str, share: float) -> None:
        # A log gets one line for each engine, not one for each of the builder's many phases.
        work.progress(f"building for {group.label}", share)

    try:
        built = run_worker(job, graph, scratch=work.scratch, kept_log=log, progress=progress)
        _check_ports(work.plan, built, log)
    except EngineBuildError as error:
        try:
            _keep_log(staged["log"], log, work.plan.reads)
        except OutputError as unkept:
            error.hint = f"the builder's own messages could not be kept: {unkept.message}"
        raise
    return built | {"size_bytes": staged["engine"].stat().st_size, "sha256": sha256_of(staged["engine"])}


def _keep_log(staged: Path, log: Path, reads: Sequence[Path]) -> None:
    """Write the builder's messages to their file, the only one that a failed build leaves."""
    if exists(staged):
        with output_errors(log), OutputSet(True, reads, listed=False) as outputs:
            shutil.copyfile(staged, outputs.stage(log))
            outputs.commit()


def _check_ports(plan: BuildPlan, built: Mapping[str, Any], log: Path) -> None:
    """Refuse an engine whose inputs or outputs differ from the graph's (one may become a constant)."""
    if problems := _port_problems(plan, built):
        raise EngineBuildError(
            f"the engine built from {plan.admitted.graph.path} does not have the graph's inputs and outputs",
            f"the builder's own messages are in {log}",
            problems,
        )


def _port_problems(plan: BuildPlan, built: Mapping[str, Any]) -> list[str]:
    """Return the differences between an engine's inputs and outputs and the graph's."""
    problems = []
    for kind, ports in (("inputs", plan.inputs), ("outputs", _outputs(plan, built))):
        actual = {port["name"]: port for port in built[kind]}
        for port in ports:
            found = actual.pop(port.name, None)
            if found is None:
                problems.append(f"{port.name}: not among the engine's {kind}")
                continue
            dtype = DTYPES.get(found["dtype"], found["dtype"].lower())
            if dtype != port.dtype:
                problems.append(f"{port.name}: {dtype} in the engine, {port.dtype} in the graph")
            if len(found["dims"]) != len(port.dims):
                problems.append(f"{port.name}: {found['dims']} in the engine, {list(port.dims)} in the graph")
        problems += [f"{name}: in the engine, but not in the graph" for name in actual]
    return problems


def _outputs(plan: BuildPlan, built: Mapping[str, Any]) -> tuple[Port, ...]:
    """Return the graph's outputs, with the engine's shape for an output whose shape the graph omits."""
    shapes = {port["name"]: tuple(port["dims"]) for port in built["outputs"]}
    silent = {str(value.name) for value in plan.admitted.graph.graph.outputs if value.shape is None}
    return tuple(
        port_of(port.name, port.dtype, shapes[port.name]) if port.name in silent & set(shapes) else port
        for port in plan.outputs
    )


def _record(work: _Work, engine: BuiltEngine, built: Mapping[str, Any]) -> EngineRecord:
    return replace(
        work.plan.record(engine.group, work.serialized.source),
        sha256=built["sha256"],
        size_bytes=built["size_bytes"],
        builder_version=engine.group.compiler.version(),
        platform=platform_here(),
        outputs=_outputs(work.plan, built),
        memory=built["memory"],
        build_s=round(built["build_s"], 3),
        peak_build_bytes=built["peak_build_bytes"],
    )
