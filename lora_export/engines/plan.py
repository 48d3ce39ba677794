"""Plan engines and check the plan before a compiler runs: for `build`, and for kits built elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.base.reads import graph_files
from lora_export.engines import compiler_of
from lora_export.engines.backend import Compiler
from lora_export.engines.memory.fit import Fit, check_fits
from lora_export.engines.prepare.prepare import Admitted, admit
from lora_export.engines.profiles import ProfileRequest, make_profiles
from lora_export.engines.record import BuildOptions, EngineRecord, EngineSource, Profile, record_path
from lora_export.engines.source import largest_sizes, ports_of
from lora_export.errors import BackendError, GraphError
from lora_export.graph.exposed import KEY
from lora_export.graph.onnx_file import load_graph
from lora_export.graph.port import Port
from lora_export.graph.roles import role_of
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES, Gpu, find_target
from lora_export.untrusted.texts import is_utf8

PathLike = str | os.PathLike[str]
# Every GPU that TensorRT-RTX builds for, by compute capability.
ALL = "all"
# With more GPUs, file names list compute capabilities instead: a name has at most 255 bytes.
_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """A build request: what the user asked for, in the words of `build.build_engine`.

    Attributes:
        targets: Names of GPUs.
        backend: Name of the compiler; None: the one for the target.
        options: Options of the compiler.
        shapes: Dimension or input → ``MIN:OPT:MAX``, for all profiles.
        profiles: Several profiles in place of one.
        together: Build one engine for all targets.
        adapters: Number of adapters that have to fit in memory.
        ignore_memory: Go on even if the engine doesn't fit.
        name: Beginning of the files' names.
    """

    targets: Sequence[str]
    backend: str | None = None
    options: BuildOptions = field(default_factory=BuildOptions)
    shapes: Mapping[str, str] = field(default_factory=dict)
    profiles: Sequence[ProfileRequest] = ()
    together: bool = False
    adapters: int = 1
    ignore_memory: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Group:
    """The GPUs that one engine is for.

    Attributes:
        targets: The GPUs, at least one.
        compiler: Compiler that builds the engine.
        fits: How the engine fits in each GPU's memory.
    """

    targets: tuple[Gpu, ...]
    compiler: Compiler
    fits: tuple[Fit, ...] = ()

    @property
    def label(self) -> str:
        """Name of these GPUs in file names."""
        if set(self.compute_capabilities) == set(RTX_COMPUTE_CAPABILITIES):
            return ALL
        named = [target.name for target in self.targets]
        return "+".join(named if len(named) <= _NAMED else dict.fromkeys(t.sm for t in self.targets))

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of the GPUs, each once."""
        return tuple(dict.fromkeys(target.compute_capability for target in self.targets))


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Everything that is known before a compiler runs.

    Attributes:
        name: Beginning of the files' names.
        groups: The GPUs of each engine.
        admitted: The graph as the compiler gets it.
        inputs: Its inputs.
        outputs: Its outputs.
        profiles: Shapes that the engines take.
        options: Options of the compiler.
        notes: Notes on the shapes.
        reads: Files that the graph was read from: no output may be one of them.
    """

    name: str
    groups: tuple[Group, ...]
    admitted: Admitted
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    profiles: tuple[Profile, ...]
    options: BuildOptions
    notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()

    def engine_path(self, folder: Path, group: Group) -> Path:
        """Return the path of a group's engine."""
        return folder / f"{self.name}.{group.label}.engine"

    def record(self, group: Group, source: EngineSource) -> EngineRecord:
        """Return a group's engine record without the facts that only the build itself provides.

        Args:
            group: GPUs that the engine is for.
            source: The graph's identity.
        """
        metadata = self.admitted.graph.model.metadata_props
        return EngineRecord(
            name=self.engine_path(Path(), group).name,
            sha256="",
            size_bytes=0,
            backend=group.compiler.name,
            builder_version="",
            targets=tuple(target.name for target in group.targets),
            compute_capabilities=group.compute_capabilities,
            platform="",
            options=self.options,
            inputs=self.inputs,
            outputs=self.outputs,
            profiles=self.profiles,
            source=source,
            exposed=self.admitted.exposed,
            metadata={key: text for key, text in metadata.items() if key != KEY},
            notes=self.admitted.notes,
        )


def engine_files(engine: Path) -> dict[str, Path]:
    """Return the files of one engine; the record is the last that is written."""
    return {"engine": engine, "log": engine.with_suffix(".log"), "record": record_path(engine)}


def plan_build(model: PathLike, request: BuildRequest, *, here: bool = True) -> BuildPlan:
    """Read the graph and check everything that needs no compiler.

    Args:
        model: The ``.onnx`` file.
        request: The build request.
        here: True if this machine builds it.

    Raises:
        BackendError: Unknown targets or shapes, options that the compiler does not have, too little memory.
        EngineBuildError: The compiler can't build the graph.
        GraphError: The graph can't be read.
    """
    groups = _groups(request)
    _check_options(groups, request, here)
    graph = load_graph(model, portable=True)
    reads = tuple(graph_files(graph))
    if not is_utf8(graph.path.name):
        # The record holds it.
        raise GraphError(f"the name of the graph {graph.path} is not UTF-8", "rename it")
    name = request.name or graph.path.stem
    _check_name(name)
    admitted = admit(graph, _capabilities(groups))
    inputs, outputs = ports_of(admitted.graph)
    requests = [
        ProfileRequest(profile.name, {**request.shapes, **profile.shapes})
        for profile in request.profiles or [ProfileRequest()]
    ]
    largest = largest_sizes(admitted.graph)
    profiles = make_profiles(inputs, admitted.exposed, largest, requests)
    targets = [target for group in groups for target in group.targets]
    fits = check_fits(
        admitted,
        profiles,
        targets=targets,
        adapters=request.adapters,
        options=request.options,
        ignore_memory=request.ignore_memory,
    )
    return BuildPlan(
        name=name,
        groups=tuple(
            Group(group.targets, group.compiler, tuple(fits[target.name] for target in group.targets))
            for group in groups
        ),
        admitted=admitted,
        inputs=inputs,
        outputs=outputs,
        profiles=profiles,
        options=request.options,
        notes=tuple(_beyond(inputs, profiles, largest)),
        reads=reads,
    )


def _beyond(inputs: Sequence[Port], profiles: Sequence[Profile], largest: Mapping[str, int]) -> Iterator[str]:
    """Yield a note for each size that an engine takes but the model has no positions for."""
    for profile in profiles:
        sizes = {
            role: profile.shapes[port.name][2][axis]
            for port in inputs
            if port.name in profile.shapes
            for axis in range(len(port.shape))
            if (role := role_of(port.name, port.dims, axis)) is not None
        }
        for role, most in largest.items():
            if sizes.get(role, 0) > most:
                yield f"profile '{profile.name}': {role} to {sizes[role]}, but the model has {most} positions"


def _groups(request: BuildRequest) -> list[Group]:
    targets = find_targets(request.targets)
    compilers = [compiler_of(request.backend or target.compilers[0]) for target in targets]
    if not request.together:
        return [Group((target,), compiler) for target, compiler in zip(targets, compilers, strict=True)]
    if len({compiler.name for compiler in compilers}) > 1 or not compilers[0].anywhere:
        raise BackendError(
            "only TensorRT-RTX builds one engine for several GPUs (together), and not all targets use it",
            "omit --together",
            [f"{target.name}: {', '.join(target.compilers)}" for target in targets],
        )
    return [Group(tuple(targets), compilers[0])]


def find_targets(names: Sequence[str]) -> list[Gpu]:
    """Return the targets by name, each once.

    Args:
        names: Names; one may be several with commas between them, or ``all``.

    Raises:
        BackendError: There are none, or some are unknown; all are listed.
    """
    singles = [single.strip() for given in names for single in given.split(",") if single.strip()]
    if not singles:
        raise BackendError(
            "no target is given: which GPUs is the engine for?",
            "give --target NAME; lora-export targets lists the names",
        )
    found: dict[str, Gpu] = {}
    problems, hint = [], ""
    for name in singles:
        for single in RTX_COMPUTE_CAPABILITIES if name.lower() == ALL else [name]:
            try:
                target = find_target(single)
            except BackendError as error:
                problems += [error.message, *error.problems]
                hint = error.hint
            else:
                found[target.name] = target
    if problems:
        raise BackendError("some of the targets are unknown", hint, problems)
    return list(found.values())


def _capabilities(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Return the compute capabilities that each compiler builds for, each once."""
    found: dict[str, dict[str, None]] = {}
    for group in groups:
        found.setdefault(group.compiler.name, {}).update(dict.fromkeys(group.compute_capabilities))
    return {compiler: list(names) for compiler, names in found.items()}


def _check_name(name: str) -> None:
    if Path(name).name != name or not name.isprintable():
        raise BackendError(
            f"the name {name!r} can't begin a file's name",
            "give another --name; folders go into --output",
        )


def _check_options(groups: Sequence[Group], request: BuildRequest, here: bool) -> None:
    problems: list[str] = []
    hints: list[str] = []
    # A compiler that builds anywhere builds for the same GPUs on every machine.
    for group in (group for group in groups if here or group.compiler.anywhere):
        for target in group.targets:
            if problem := group.compiler.target_problem(target.compute_capability):
                problems.append(f"{target.name}: {problem}")
                hints.append(
                    f"omit --backend {group.compiler.name}"
                    if group.compiler.anywhere
                    else "for a GPU of another machine, make a build kit and run it there: --kit"
                )
    if refused := [
        problem
        for compiler in {group.compiler.name: group.compiler for group in groups}.values()
        for problem in compiler.option_problems(request.options, here)
    ]:
        problems += refused
        hints.append("omit these options")
    known = len(problems)
    level, workspace = request.options.optimization_level, request.options.workspace_bytes
    if level is not None and not 0 <= level <= 5:
        problems.append(f"optimization_level is {level}, wanted 0 to 5")
    if workspace is not None and workspace < 1:
        problems.append(f"workspace_bytes is {workspace}, wanted at least 1")
    if request.adapters < 0:
        problems.append(f"adapters is {request.adapters}, wanted 0 or more")
    if len(problems) > known:
        hints.append("give numbers within these limits")
    if problems:
        hint = "; ".join(dict.fromkeys(hints))
        raise BackendError("this can't be built here" if here else "this can't be built", hint, problems)
