"""Expose LoRA in an ONNX graph: y = W0 x + (x·A)·B for each target, with A and B as inputs of the graph.

One copy of W0 serves many adapters, which can be changed between runs. One code path makes two flavours:
``ort`` gives each LoRA tensor an empty default (an initializer of rank 0 of the same name), so that the graph
without an adapter is the base, bit for bit; ``tensorrt`` makes them plain inputs, because a TensorRT parser
takes an input with an initializer for a constant and would build the base.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Adapter
from lora_export.base.lowering import Runtime
from lora_export.base.open_base import Base, open_base
from lora_export.base.pipeline_graphs import open_parts
from lora_export.base.reads import CheckpointChoice
from lora_export.base.write_options import WriteOptions
from lora_export.errors import AdapterError
from lora_export.formats.given import load_given
from lora_export.graph.exposed import ExposedModule, Flavour, LoraRecord
from lora_export.graph.onnx_file import GraphFile
from lora_export.modes.branches.bundles import Bundle, bundles_of
from lora_export.modes.branches.calls import Branch
from lora_export.modes.branches.find_branches import refuse_unsuited
from lora_export.modes.branches.fuse import fuse_calls
from lora_export.modes.branches.inputs import add_input, ir_type
from lora_export.modes.branches.output import ExposeReport, base_name, write_exposed
from lora_export.modes.branches.union import Union
from lora_export.modes.branches.write import BranchWriter, Tensors
from lora_export.modes.pipelines.division import Share
from lora_export.modes.pipelines.swap import swap_parts
from lora_export.modes.quantising.choice import choice_of
from lora_export.plan import Plan
from lora_export.sites.listing import targets_named
from lora_export.sites.naming.towers import landmarks
from lora_export.sites.resolve import Resolver
from lora_export.sites.values.ranges import cut_off
from lora_export.storage.inputs import same_inputs
from lora_export.untrusted.places import is_folder

PathLike = str | os.PathLike[str]
DEFAULT_MAX_RANK = 64
# The longest axis that TensorRT takes; each of the ranks up to it is one.
MAX_SIZE = 2**31 - 1


@same_inputs()
def swap_onnx(
    base: PathLike,
    output: PathLike,
    *,
    adapter: PathLike | Adapter | Sequence[PathLike | Adapter] | None = None,
    target_modules: str | Sequence[str] = (),
    component: str | None = None,
    max_rank: int | None = None,
    flavour: Flavour = "ort",
    dora: bool = False,
    pack: bool = False,
    fuse_base: bool = False,
    checkpoint: CheckpointChoice = None,
    dtype: str | None = None,
    kv_cache: bool = False,
    fused: bool = False,
    runtime: Runtime = "portable",
    quantize: str | None = None,
    share_base: bool = False,
    allow_unmatched: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int], None] | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> ExposeReport:
    """Write ``base`` with LoRA tensors as inputs to ``output``, ``output.data`` and ``*.lora.json``.

    Args:
        base: An ONNX file from any exporter, or a Hugging Face checkpoint folder, which is then captured.
        output: The ``.onnx`` file to write; with ``kv_cache``, the folder of the graphs of an encoder–decoder
            or a vision–language model. Of the last one, a file is its language model alone.
        adapter: Adapter, or adapters, whose targets are exposed; others of the same modules fit as well.
        target_modules: Names of further modules to expose, whose path is, or ends in, one of these (PEFT's
            ``target_modules``).
        component: The part of the adapters that belongs to the base: ``unet``, ``text_encoder``, … of files
            that serve several models, else the path of a submodel, ``model.encoder``.
        max_rank: Largest rank that an adapter may have; 64, or the adapter's if that is larger.
        flavour: ``ort`` or ``tensorrt``, see above.
        dora: Expose DoRA's factor too.
        pack: One pair of tensors for siblings that read the same activation (q, k, v; gate, up).
        fuse_base: Also compute q, k and v of the base in one product, if they are separate: faster on a GPU,
            at the cost of a second copy of these weights with ``share_base``. Implies ``pack``.
        checkpoint: Folder that ``base`` was exported from: matches by name are verified by content. None: the
            one that an adapter names as its base, if it is on this machine; False: names alone.
        dtype: Dtype of a captured folder: ``float32`` (the default), ``float16`` or ``bfloat16``.
        kv_cache: Capture a decoder with its key-value cache as inputs and outputs; an encoder–decoder as two
            graphs, a vision–language model as three, each with the modules whose weights it reads.
        fused: Capture attention, rotary embeddings and RMS norms as one node each (opset 23).
        runtime: Runtime that a captured folder is lowered for, as for `capture_onnx`.
        quantize: Quantise the written weights to ``int4`` or ``int8`` as `quantize_onnx` does by default,
            LoRA stays in float on top.
        share_base: Leave the weights in the base's own data files.
        allow_unmatched: Leave out modules that have no site.
        force: Replace existing output files.
        dry_run: Make the plan and write nothing.
        progress: Function that is called with the number of bytes just written.
        beside: Name → content of files that belong beside the graph: written with it, all or none. Existing
            ones stay.

    Returns:
        The plan, the LoRA record and the files.

    Raises:
        AdapterError: The adapter can't be read or used, or none and no ``target_modules`` are given.
        GraphError: The base can't be read, or has exposed LoRA already.
        SiteError: Modules have no site in the graph.
        OutputError: The output exists or can't be written.
    """
    out, base = Path(output), Path(base)
    choice_of(quantize)
    wanted = target_modules.split(",") if isinstance(target_modules, str) else list(target_modules)
    made_of = load_given(adapter, component)
    if not made_of and not any(wanted):
        raise AdapterError("which modules are to be exposed?", "give an adapter, or target modules, or both")
    form = _Form(dora=dora, flavour=flavour, pack=pack or fuse_base, fuse_base=fuse_base, max_rank=max_rank)
    options = WriteOptions.among(locals())
    if is_folder(base):
        _refuse_before_capture(base, made_of, max_rank, dora=dora, allow_unmatched=allow_unmatched)
    parts = open_parts(base, kv_cache, out)
    if parts is not None:
        parts.refuse_options({"--target-modules": any(wanted)})
        return swap_parts(parts, out, made_of, options, swap_one=partial(_swap_part, made_of, form))
    with open_base(base, out, made_of, options) as (opened, paths):
        union = _union(opened, made_of, wanted, dora=dora, allow_unmatched=allow_unmatched)
        plan, record = _expose_all(opened, union, form, base_name(base))
        report = ExposeReport(plan=plan, exposed=record, outputs=paths, dry_run=dry_run)
        return write_exposed(opened, report, adapters=made_of, options=options, beside=beside)


def _swap_part(
    adapters: Sequence[Adapter],
    form: _Form,
    base: Path,
    output: Path,
    options: WriteOptions,
    choose: Callable[[Base], Share],
) -> ExposeReport:
    """Expose the part of the adapters that goes into one of a folder's graphs."""
    with open_base(base, output, adapters, options) as (opened, paths):
        given, elsewhere = choose(opened)
        union = _union(opened, given, (), dora=form.dora, allow_unmatched=options.allow_unmatched)
        plan, record = _expose_all(opened, union, form, base_name(base))
        record = replace(record, elsewhere=tuple(elsewhere))
        report = ExposeReport(plan=plan, exposed=record, outputs=paths, dry_run=options.dry_run)
        return write_exposed(opened, report, adapters=given, options=options)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Form of the LoRA in a graph.

    Attributes:
        dora: Expose DoRA's factors too.
        flavour: Runtime that it is for.
        pack: One pair of tensors for siblings.
        fuse_base: Compute the base's siblings in one product, too.
        max_rank: Largest rank, if the user gives one.
    """

    dora: bool
    flavour: Flavour
    pack: bool
    fuse_base: bool
    max_rank: int | None


def _refuse_before_capture(
    base: Path, adapters: Sequence[Adapter], max_rank: int | None, *, dora: bool, allow_unmatched: bool
) -> None:
    """Refuse adapters that no graph of a folder could take, before it is captured."""
    refuse_unsuited(adapters, base, allow_unmatched=allow_unmatched, dora=dora)
    if not allow_unmatched:
        _max_rank(max_rank, [module.rank for adapter in adapters for module in adapter.modules.values()])


def _union(
    opened: Base, adapters: Sequence[Adapter], wanted: Sequence[str], *, dora: bool, allow_unmatched: bool
) -> Union:
    """Find the sites of the adapters' modules, and of those with the names in ``target_modules``."""
    resolver = Resolver(opened.graph, opened.weight_of, branches=True)
    union = Union(opened.graph, resolver, allow_unmatched=allow_unmatched, dora=dora)
    union.add_adapters(adapters, opened.identity)
    if any(wanted):
        union.add_targets(targets_named(resolver, opened.graph, wanted, allow_unmatched))
    return union


def _expose_all(opened: Base, union: Union, form: _Form, base: str) -> tuple[Plan, LoraRecord]:
    """Put all branches into the graph, with tensors as inputs; return the plan and the LoRA record."""
    graph, branches, notes = opened.graph, union.branches, list[str]()
    if form.fuse_base:
        branches, notes = fuse_calls(graph, branches)
    bundles = [_fixed(bundle, branches, form.flavour) for bundle in bundles_of(branches, form.pack)]
    record = LoraRecord(
        mode="swap",
        base=base,
        base_sha256=opened.identity,
        modules=tuple(bundle.module for bundle in bundles),
        max_rank=_max_rank(form.max_rank, [branch.rank for branch in branches]),
        flavour=form.flavour,
        dora=form.dora,
        merged=opened.merged,
        landmarks=landmarks(union.known),
    )
    plan = opened.verified(union.plan(notes))
    tensors = {bundle.module.name: _expose(graph, bundle.module, record) for bundle in bundles}
    sums = BranchWriter(graph, gemm=form.pack and form.flavour == "ort").write(bundles, tensors)
    return replace(plan, warnings=(*plan.warnings, *cut_off(sums))), record


def _max_rank(wanted: int | None, ranks: Sequence[int]) -> int:
    largest = max(ranks, default=0)
    if wanted is None:
        return max(DEFAULT_MAX_RANK, largest)
    if wanted < 1 or wanted < largest:
        raise AdapterError(
            f"max_rank is {wanted}, the adapter has rank {largest}"
            if wanted >= 1
            else f"max_rank is {wanted}; a rank is at least 1",
            f"give --max-rank {max(largest, 1)} or more",
        )
    if wanted > MAX_SIZE:
        raise AdapterError(
            f"max_rank is {wanted}, but no axis is longer than {MAX_SIZE}",
            "give the rank of your largest adapter",
        )
    return wanted


def _fixed(bundle: Bundle, branches: Sequence[Branch], flavour: Flavour) -> Bundle:
    """Fix the rank of a convolution for TensorRT, which can't have a dynamic number of channels."""
    if flavour == "ort" or bundle.module.kind != "conv":
        return bundle
    rank = next(branch.rank for branch in branches if branch.path == bundle.module.name)
    if not rank:
        raise AdapterError(
            f"{bundle.module.name}: TensorRT needs a convolution's rank when the graph is made",
            "give --adapter instead of --target-modules",
        )
    return replace(bundle, module=replace(bundle.module, rank=rank))


def _expose(graph: GraphFile, module: ExposedModule, record: LoraRecord) -> Tensors:
    """Add a module's tensors to the graph's inputs."""
    dtype = ir_type(module)
    convolution = module.kind == "conv"
    a = _low_rank(
        graph,
        record,
        module=module,
        name=module.lora_a,
        shape=module.a_shape(0),
        axis=0 if convolution else 1,
    )
    b = []
    for name, start, stop in module.b_parts:
        shape = module.b_shape(0) if convolution else (0, stop - start)
        b.append(
            _low_rank(graph, record, module=module, name=name, shape=shape, axis=1 if convolution else 0)
        )
    with_default = record.flavour == "ort"
    scale = bias = None
    if record.dora:
        ones = np.ones(module.out_dim) if with_default else None
        scale = add_input(graph, module.scale, dims=[module.out_dim], dtype=dtype, default=ones)
    if module.bias:
        zeros = np.zeros(module.out_dim) if with_default else None
        bias = add_input(graph, module.lora_bias, dims=[module.out_dim], dtype=dtype, default=zeros)
    return Tensors(a, tuple(b), scale, bias)


def _low_rank(
    graph: GraphFile,
    record: LoraRecord,
    module: ExposedModule,
    name: str,
    shape: Sequence[int],
    axis: int,
) -> ir.Value:
    """Add A or (a part of) B, with the rank along ``axis``: a symbol, and 0 in the default."""
    # B of a grouped convolution has rank/groups channels.
    groups = module.groups if name != module.lora_a else 1
    symbol = module.rank_symbol if groups == 1 else f"{module.rank_symbol}/{groups}"
    rank: int | str = module.rank // groups if module.rank else symbol
    dims = [rank if number == axis else size for number, size in enumerate(shape)]
    default = np.zeros([0 if isinstance(size, str) else size for size in dims])
    dtype = ir_type(module)
    return add_input(
        graph, name, dims=dims, dtype=dtype, default=default if record.flavour == "ort" else None
    )
