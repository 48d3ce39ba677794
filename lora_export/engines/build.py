"""Build engines from an ONNX graph: one for each target, or one for several together."""

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
from lora_export.engines.builder_process import Job
from lora_export.engines.cache import EngineCache, default_folder, key_of
from lora_export.engines.plan import BuildPlan, Group, Wish, engine_files, plan_build
from lora_export.engines.profiles import ProfileRequest, shape_text
from lora_export.engines.record import (
    BuildOptions,
    EngineRecord,
    Port,
    Profile,
    platform_here,
    record_path,
    sha256_of,
)
from lora_export.engines.run_builder import run_worker
from lora_export.engines.source import Serialized, port_of, serialize
from lora_export.errors import BackendError, EngineBuildError, OutputError
from lora_export.progress import Say
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.inputs import refuse_changed_inputs, same_inputs
from lora_export.storage.manifest import hash_written
from lora_export.storage.outputs import (
    OutputSet,
    check_parent,
    output_errors,
    refuse_inputs,
    refuse_replacing,
)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class BuiltEngine:
    """One engine that was (or would be) written.

    Attributes:
        path: Its file.
        group: Which GPUs it is for, and its memory on each.
        record: What it is; None in a dry run.
        cached: It was built before.
        seconds: What it took, the cache included.
        not_kept: Why the cache does not have it now, or "".
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
    """What `build_engine` did, or with ``dry_run`` would do.

    Attributes:
        engines: In the order of the targets.
        profiles: Which shapes they take.
        notes: What was changed in the graph for the compiler, and what to know.
        dry_run: Nothing was written.
    """

    engines: tuple[BuiltEngine, ...]
    profiles: tuple[Profile, ...]
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def groups(self) -> tuple[Group, ...]:
        """The GPUs of each engine."""
        return tuple(engine.group for engine in self.engines)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "dry_run": self.dry_run,
            "notes": list(self.notes),
            "profiles": [asdict(profile) for profile in self.profiles],
            "engines": [engine.as_dict() for engine in self.engines],
        }


@dataclass(frozen=True)
class _Work:
    """A plan, and how it is carried out."""

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
    ``<name>.<target>.log`` for each target into ``output``. The graph's own types decide what is computed in
    what (a strongly typed network). Its LoRA tensors are inputs of the engine.

    Args:
        model: The ``.onnx`` file.
        targets: Names of GPUs (``rtx-4090``), compute capabilities (``sm89``), or ``all``.
        output: The folder to write into.
        name: Beginning of the files' names; by default the graph's.
        backend: ``tensorrt-rtx``, or ``tensorrt`` on the GPU that the engine is for; None: by the target.
        options: What the compiler is told.
        shapes: Dimension or input → ``MIN:OPT:MAX`` or those three, for all profiles.
        profiles: Several profiles in place of one, for instance ``prefill`` and ``decode``.
        together: One engine for all targets in place of one for each.
        adapters: How many adapters of the largest rank have to fit beside it.
        ignore_memory: Build also what does not fit.
        cache: Folder of engines built before; True: the user's cache folder, False: none.
        timing_cache: File of what classic TensorRT measured in earlier builds.
        verbose: Keep all of the builder's messages in the log; what was built before is built again for them.
        force: Replace existing files.
        dry_run: Check everything, and build nothing.
        progress: Called with what is being done and the share of it that is done.

    Returns:
        The engines.

    Raises:
        BackendError: Unknown targets or shapes, options that the compiler hasn't, too little memory.
        BackendUnavailable: The compiler is not installed.
        EngineBuildError: The compiler can't build the graph.
        GraphError: The graph can't be read.
        OutputError: A file exists already or can't be written.
    """
    names = [targets] if isinstance(targets, str) else list(targets)
    typed = {key: shape_text(sizes) for key, sizes in (shapes or {}).items()}
    wish = Wish(
        names,
        backend,
        options or BuildOptions(),
        typed,
        profiles,
        together,
        adapters,
        ignore_memory,
        name,
    )
    return carry_out(
        model,
        wish,
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
    wish: Wish,
    output: PathLike,
    *,
    cache: PathLike | bool = True,
    timing_cache: PathLike | None = None,
    verbose: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Say | None = None,
) -> BuildReport:
    """Do what `build_engine` does, for a wish; the other arguments are the same."""
    plan = plan_build(model, wish)
    if timing_cache is not None:
        _check_timings([group.compiler for group in plan.groups])
    engines = [BuiltEngine(plan.engine_path(Path(output), group), group) for group in plan.groups]
    report = BuildReport(tuple(engines), plan.profiles, (*plan.admitted.notes, *plan.notes), dry_run)
    check_parent(engines[0].path)
    written = [file for engine in engines for file in engine_files(engine.path).values()]
    refuse_inputs([*written, *([Path(timing_cache)] if timing_cache is not None else [])], plan.reads)
    if dry_run:
        return report
    _refuse_existing([engine.path for engine in engines], force)
    for group in plan.groups:
        group.compiler.version()  # not installed: say so before hashing gigabytes
    with scratch_folder() as scratch:
        # Without a cache too, GPUs of one compute capability share one build.
        store = EngineCache(_cache_folder(cache, scratch))
        serialized = serialize(plan.admitted.graph, store.sha256)
        with output_errors(scratch):
            (scratch / "graph.onnx").write_bytes(serialized.data)
        work = _Work(
            plan,
            serialized,
            scratch,
            store,
            str(timing_cache or ""),
            verbose,
            force,
            progress or (lambda _what, _share: None),
        )
        return replace(report, engines=tuple(_build_one(work, engine) for engine in engines))


def _check_timings(compilers: Sequence[Compiler]) -> None:
    if names := sorted({compiler.name for compiler in compilers if compiler.anywhere}):
        raise BackendError(
            f"timing_cache: {', '.join(names)} measures nothing, so that there is nothing to keep",
            "leave out --timing-cache",
        )


def _refuse_existing(engines: Sequence[Path], force: bool) -> None:
    """Refuse to replace engines. A log alone is what a build that failed has left: that is no reason."""
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
    # A log that stands beside an engine is that engine's, also where the next build fails.
    failed_log = engine.path.with_suffix(".failed.log") if engine.path.exists() else files["log"]
    with output_errors(engine.path), OutputSet(work.force, work.plan.reads) as outputs:
        # A log alone is what a build that failed has left: that is no reason to refuse.
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
            # Classic TensorRT measures on the very GPU: others of its compute capability are not the same.
            "gpu": "" if group.compiler.anywhere else gpu_name_here(),
            "compute_capabilities": list(group.compute_capabilities),
            "options": asdict(work.plan.options),
            "profiles": [asdict(profile) for profile in work.plan.profiles],
        }
    )


def _compile(work: _Work, group: Group, staged: Mapping[str, Path], log: Path) -> dict[str, Any]:
    graph = work.plan.admitted.graph
    job = Job(
        group.compiler.name,
        str(work.scratch / "graph.onnx"),
        # Not resolved: where the file is a link, its data lies beside the link, for us and for all others.
        str(graph.path.absolute()),
        str(staged["engine"].resolve()),
        str(staged["log"].resolve()),
        group.compute_capabilities,
        work.plan.options,
        work.plan.profiles,
        work.timings,
        work.verbose,
    )

    def progress(_phase: str, share: float) -> None:
        # One line for each engine in a log, and not one for each of the builder's many phases.
        work.progress(f"building for {group.label}", share)

    try:
        built = run_worker(job, graph, work.scratch, log, progress)
        _check_ports(work.plan, built, log)
    except EngineBuildError as error:
        try:
            _leave_log(staged["log"], log, work.plan.reads)
        except OutputError as unkept:
            error.hint = f"the builder's own messages could not be kept: {unkept.message}"
        raise
    return built | {"size_bytes": staged["engine"].stat().st_size, "sha256": sha256_of(staged["engine"])}


def _leave_log(staged: Path, log: Path, reads: Sequence[Path]) -> None:
    """Give the builder's messages their name: the one thing that a failed build leaves."""
    if staged.exists():
        with output_errors(log), OutputSet(True, reads, listed=False) as outputs:
            shutil.copyfile(staged, outputs.stage(log))
            outputs.commit()


def _check_ports(plan: BuildPlan, built: Mapping[str, Any], log: Path) -> None:
    """Refuse an engine whose inputs and outputs are not the graph's: an input that became a constant, say."""
    if problems := _port_problems(plan, built):
        raise EngineBuildError(
            f"the engine built from {plan.admitted.graph.path} is not the graph's",
            f"the builder's own messages are in {log}",
            problems,
        )


def _port_problems(plan: BuildPlan, built: Mapping[str, Any]) -> list[str]:
    """Return in what an engine's inputs and outputs are not the graph's."""
    problems = []
    for kind, ports in (("inputs", plan.inputs), ("outputs", _outputs(plan, built))):
        got = {port["name"]: port for port in built[kind]}
        for port in ports:
            found = got.pop(port.name, None)
            if found is None:
                problems.append(f"{port.name}: not among the engine's {kind}")
                continue
            dtype = DTYPES.get(found["dtype"], found["dtype"].lower())
            if dtype != port.dtype:
                problems.append(f"{port.name}: {dtype} in the engine, {port.dtype} in the graph")
            if len(found["shape"]) != len(port.shape):
                problems.append(
                    f"{port.name}: {found['shape']} in the engine, {list(port.dims)} in the graph"
                )
        problems += [f"{name}: the engine has it and the graph doesn't" for name in got]
    return problems


def _outputs(plan: BuildPlan, built: Mapping[str, Any]) -> tuple[Port, ...]:
    """Return the graph's outputs; where it does not tell a shape, the engine's."""
    shapes = {port["name"]: tuple(port["shape"]) for port in built["outputs"]}
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
