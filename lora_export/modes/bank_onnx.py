"""Make N adapters resident in one ONNX graph, chosen for each row of the batch.

The graph gets an input ``lora.adapter_weights`` ``[batch, n_slots]``: a one-hot row chooses an adapter, zeros
are the base, other values blend. A module has two dense products, ``((x·A_all) · weights)·B_all``, with all A
side by side, so that mixed ranks need no padding and standard operators are enough.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_export.adapter import Adapter, LoraModule
from lora_export.base.lowering import Runtime
from lora_export.base.open_base import Base, open_base
from lora_export.base.pipeline_graphs import open_parts
from lora_export.base.reads import CheckpointChoice
from lora_export.base.write_options import WriteOptions
from lora_export.binding.cast import Caster
from lora_export.binding.pack import Rectangle, assemble, blocks_of_slot, cut_b
from lora_export.errors import AdapterError, OutputError
from lora_export.graph.exposed import ANY_RANK, UNHASHED, Flavour, LoraRecord, Resident, Slot
from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.shapes import shapes_of
from lora_export.modes.branches.bundles import Bundle, bundles_of, with_ranks
from lora_export.modes.branches.find_branches import refuse_unsuited
from lora_export.modes.branches.fuse import fuse_calls
from lora_export.modes.branches.gate import BankGate
from lora_export.modes.branches.inputs import add_initializer, add_input, ir_type
from lora_export.modes.branches.output import ExposeReport, base_name, write_exposed
from lora_export.modes.branches.union import Union
from lora_export.modes.branches.write import BranchWriter, Tensors
from lora_export.modes.quantising.choice import choice_of
from lora_export.sites.naming.towers import landmarks
from lora_export.sites.resolve import Resolver
from lora_export.sites.values.ranges import cut_off
from lora_export.storage.inputs import same_inputs
from lora_export.untrusted.places import is_folder
from lora_export.untrusted.texts import is_utf8

PathLike = str | os.PathLike[str]


@same_inputs()
def bank_onnx(
    base: PathLike,
    adapters: Mapping[str, PathLike | Adapter],
    output: PathLike,
    *,
    component: str | None = None,
    resident: Resident = "initializers",
    slot_rank: int | None = None,
    flavour: Flavour = "ort",
    pack: bool = False,
    fuse_base: bool = False,
    batch_input: str | None = None,
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
) -> ExposeReport:
    """Write ``base`` with all adapters in it to ``output``, ``output.data`` and ``*.lora.json``.

    Args:
        base: An ONNX file from any exporter, or a Hugging Face checkpoint folder, which is then captured.
        adapters: Slot's name → path for `load_adapter`, or an `Adapter`.
        output: The ``.onnx`` file to write.
        component: The part of the adapters that belongs to the base: ``unet``, ``text_encoder``, … of files
            that serve several models, else the path of a submodel, ``model.encoder``.
        resident: ``initializers``: the adapters are constants; ``inputs``: their tensors are inputs, with the
            adapters as defaults, so that slots can be replaced while it runs.
        slot_rank: With ``inputs``, the rank that each slot has room for in every module; by default that of
            its adapter.
        flavour: With ``inputs``, ``ort`` gives them defaults and ``tensorrt`` makes them plain inputs.
        pack: One product for siblings that read the same activation.
        fuse_base: Also compute q, k and v of the base in one product; see `swap_onnx`.
        batch_input: Name of the input whose first axis is the batch; the first input with a free one.
        checkpoint: Folder that ``base`` was exported from: matches by name are verified by content. None: the
            one that an adapter names as its base, if it is on this machine; False: names alone.
        dtype: Dtype of a captured folder: ``float32`` (the default), ``float16`` or ``bfloat16``.
        kv_cache: Capture a decoder with its key-value cache as inputs and outputs.
        fused: Capture attention, rotary embeddings and RMS norms as one node each (opset 23).
        runtime: Runtime that a captured folder is lowered for, as for `capture_onnx`.
        quantize: Quantise the written weights to ``int4`` or ``int8`` as `quantize_onnx` does by default,
            LoRA stays in float on top.
        share_base: Leave the weights in the base's own data files.
        allow_unmatched: Leave out parameters that have no site.
        force: Replace existing output files.
        dry_run: Make the plan and write nothing.
        progress: Function that is called with the number of bytes just written.

    Returns:
        The plan, the LoRA record and the files.

    Raises:
        AdapterError: An adapter can't be read, or holds values that are not finite; a name is not usable.
        GraphError: The base can't be read, or has exposed LoRA already.
        SiteError: Modules have no site in the graph, or rows that are not the batch's.
        OutputError: The output exists or can't be written.
    """
    out, base = Path(output), Path(base)
    choice_of(quantize)
    _refuse_room(slot_rank, resident)
    loaded = _load(adapters, component)
    form = _Form(
        resident=resident,
        slot_rank=slot_rank,
        flavour=flavour,
        pack=pack or fuse_base,
        fuse_base=fuse_base,
        batch_input=batch_input,
    )
    options = WriteOptions.among(locals())
    if is_folder(base):
        _refuse_before_capture(base, list(loaded.values()), slot_rank, allow_unmatched=allow_unmatched)
    if (parts := open_parts(base, kv_cache, out)) is not None:
        raise OutputError(
            f"{parts.described}, and bank-onnx writes one",
            "omit --kv-cache (kv_cache=True), or write all with swap-onnx",
        )
    with open_base(base, out, loaded.values(), options) as (opened, paths):
        resolver = Resolver(opened.graph, opened.weight_of, branches=True)
        union = Union(opened.graph, resolver, allow_unmatched=allow_unmatched, bank=True)
        union.add_adapters(list(loaded.values()), opened.identity)
        report = _fill(opened, union, adapters=loaded, form=form, base=base_name(base))
        report = replace(report, outputs=paths, dry_run=dry_run)
        return write_exposed(opened, report, list(loaded.values()), options)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Form of a bank.

    Attributes:
        resident: Kind of the adapters' tensors: ``initializers`` or ``inputs``.
        slot_rank: Rank that every slot has room for, if the user gives one.
        flavour: Runtime that it is for.
        pack: One product for siblings.
        fuse_base: The base's siblings are computed in one product, too.
        batch_input: Name of the input with the batch, if the user gives one.
    """

    resident: Resident
    slot_rank: int | None
    flavour: Flavour
    pack: bool
    fuse_base: bool
    batch_input: str | None


def _refuse_room(slot_rank: int | None, resident: Resident) -> None:
    if slot_rank is not None and resident != "inputs":
        raise AdapterError(
            "slots of constants have the ranks of their adapters", "give --resident inputs too"
        )


def _refuse_before_capture(
    base: Path, adapters: Sequence[Adapter], slot_rank: int | None, *, allow_unmatched: bool
) -> None:
    """Refuse adapters that no graph of a folder could hold, before it is captured."""
    refuse_unsuited(adapters, base, allow_unmatched=allow_unmatched, bank=True)
    if not allow_unmatched:
        modules = [module for adapter in adapters for module in adapter.modules.values()]
        sizes = [(module.path, module.rank, module.groups, max(module.matrix_shape)) for module in modules]
        _refuse_ranks(sizes, slot_rank)


def _fill(
    opened: Base, union: Union, adapters: Mapping[str, Adapter], form: _Form, base: str
) -> ExposeReport:
    """Put all branches into the graph, with the adapters' tensors and the input that chooses them."""
    graph, branches, notes = opened.graph, union.branches, list[str]()
    ranks = _ranks(union, len(adapters), form.slot_rank)
    if form.fuse_base:
        branches, notes = fuse_calls(graph, branches)
    # Slots that can be replaced are rectangles of one B.
    cut = form.resident == "initializers"
    bundles = [with_ranks(bundle, ranks) for bundle in bundles_of(branches, form.pack, cut)]
    same_symbol = form.flavour == "tensorrt"
    gate = BankGate(graph, len(adapters), shapes_of(graph.model), form.batch_input, same_symbol=same_symbol)
    record = LoraRecord(
        mode="bank",
        base=base,
        base_sha256=opened.identity,
        modules=tuple(bundle.module for bundle in bundles),
        max_rank=max(rank for found in ranks.values() for rank in found),
        flavour=form.flavour,
        slots=tuple(Slot(name, adapter.sha256 or UNHASHED) for name, adapter in adapters.items()),
        resident=form.resident,
        batch_input=str(gate.batch_input.name),
        merged=opened.merged,
        landmarks=landmarks(union.known),
    )
    caster = Caster()
    tensors = _tensors(graph, record, loras=union.loras, bundles=bundles, caster=caster)
    sums = BranchWriter(graph, gate, gemm=form.pack and form.flavour == "ort").write(bundles, tensors)
    gate.refuse()
    plan = union.plan([*notes, *gate.notes, *caster.notes()])
    plan = opened.verified(replace(plan, warnings=tuple(cut_off(sums))))
    return ExposeReport(plan=plan, exposed=record, warnings=tuple(caster.warnings()))


def _load(adapters: Mapping[str, PathLike | Adapter], component: str | None) -> dict[str, Adapter]:
    from lora_export.formats import as_adapter

    if not isinstance(adapters, Mapping):
        raise AdapterError("a bank needs adapters with names", "give a mapping of names to adapters")
    problems = [
        f"{name!r}: a slot's name is a word in UTF-8, without commas or spaces"
        for name in adapters
        if not name or any(c in name for c in ", \t\n=") or not is_utf8(name)
    ]
    if problems or not adapters:
        raise AdapterError("a bank needs adapters with names", "give --adapter NAME=PATH for each", problems)
    return {name: as_adapter(given, component) for name, given in adapters.items()}


def _ranks(union: Union, slots: int, room: int | None) -> dict[str, tuple[int, ...]]:
    """Return path of a module → rank of each slot.

    Args:
        union: The branches and each slot's factors.
        slots: Number of slots.
        room: Rank of every slot, if it is not that of its adapter.
    """
    found, largest = {}, []
    for branch in union.branches:
        own = [mine[branch.path].rank if branch.path in mine else 0 for mine in union.loras]
        side = max(branch.in_dim * math.prod(branch.kernel), branch.out_dim)
        largest.append((branch.path, max(own), branch.groups, side))
        found[branch.path] = tuple(own) if room is None else (room,) * slots
    _refuse_ranks(largest, room)
    return found


def _refuse_ranks(modules: Sequence[tuple[str, int, int, int]], room: int | None) -> None:
    """Raise `AdapterError` if slots of a rank don't fit modules: path, rank, groups, largest side each."""
    if room is None:
        return
    if modules and room > (most := max(ANY_RANK, *(side for *_, side in modules))):
        raise AdapterError(
            f"the slots are to have rank {room}, but no module needs more than {most}",
            f"give --slot-rank {max(rank for _, rank, *_ in modules)} or more, up to {most}",
        )
    problems = [
        f"{path} has rank {rank}, the slots are to have {room}" for path, rank, *_ in modules if rank > room
    ]
    problems += [
        f"{path} has {groups} groups, which ranks of {room} can't be shared to"
        for path, _, groups, _ in modules
        if room % groups
    ]
    if problems:
        largest = max(rank for _, rank, *_ in modules)
        groups = math.lcm(*(groups for _, _, groups, _ in modules))
        shared = f", a multiple of {groups}" if groups > 1 else ""
        hint = f"give --slot-rank {largest} or more{shared}"
        raise AdapterError("the slots don't fit their adapters", hint, list(dict.fromkeys(problems)))


def _tensors(
    graph: GraphFile,
    record: LoraRecord,
    loras: Sequence[dict[str, LoraModule]],
    bundles: Sequence[Bundle],
    caster: Caster,
) -> dict[str, Tensors]:
    """Make each module's A_all and B_all; refuse NaN, which would reach rows that don't use its slot."""
    blocks: dict[str, list[Rectangle]] = defaultdict(list)
    for slot, mine in enumerate(loras):
        for block in blocks_of_slot(record, slot, mine, caster):
            blocks[block.tensor].append(block)
    if caster.problems:
        raise AdapterError(
            "adapters have values that can't be used", "train or save them again", caster.problems
        )
    made = {}
    for bundle in bundles:
        module = bundle.module
        total = sum(sum(member.ranks) for member in module.members)
        dtype = ir_type(module)
        a, b = assemble(module, total, blocks[module.lora_a] + blocks[module.lora_b])
        parts = cut_b(module, b)
        arrays = {module.lora_a: a} | parts
        if module.bias:
            arrays[module.lora_bias] = np.concatenate([block.values for block in blocks[module.lora_bias]])
        values = {}
        for name, array in arrays.items():
            if record.resident == "initializers":
                values[name] = add_initializer(graph, name, array)
            else:
                default = array if record.flavour == "ort" else None
                values[name] = add_input(graph, name, dims=list(array.shape), dtype=dtype, default=default)
        made[module.name] = Tensors(
            values[module.lora_a], tuple(values[name] for name in parts), bias=values.get(module.lora_bias)
        )
    return made
