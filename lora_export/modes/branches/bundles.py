"""Group modules that share a pair of LoRA tensors: each alone, or siblings of one activation as a pack.

A pack computes one down- and one up-projection for q, k and v (or gate and up): three kernels instead of nine
on a GPU. Its B is block-diagonal, which adds a little arithmetic; `convert-adapter` makes its tensors from
the same adapters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from lora_export.graph.exposed import ExposedModule, Member
from lora_export.modes.branches.calls import Branch, Piece, covers_outputs

_PACKS = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


@dataclass(frozen=True, eq=False)
class Bundle:
    """Pair of LoRA tensors, and the pieces of outputs that its product is added to.

    Attributes:
        module: Its entry in the LoRA record.
        pieces: Pieces of its outputs.
    """

    module: ExposedModule
    pieces: tuple[Piece, ...]


def bundles_of(branches: Sequence[Branch], pack: bool, cut: bool = True) -> list[Bundle]:
    """Return a bundle for each branch, or for each set of siblings, in the order of the branches.

    Args:
        branches: The branches.
        pack: Let siblings share a pair of tensors.
        cut: Make a pack's B a tensor for each call, so that no result needs to be split.
    """
    groups: dict[object, list[Branch]] = defaultdict(list)
    for branch in branches:
        groups[pack_key(branch) if pack else id(branch)].append(branch)
    return [
        _single(group[0]) if len(group) == 1 else _packed(group, branches, cut) for group in groups.values()
    ]


def pack_key(branch: Branch) -> object:
    """Return a key that is equal for siblings: linears of one activation, each in one call, unscaled."""
    (first, *more) = branch.pieces
    plain = branch.kind == "linear" and not more and first.row_scale is None
    if not plain or first.rows != (0, branch.out_dim):
        return id(branch)
    return id(first.call.x), first.call.dtype, branch.in_dim, branch.path.rpartition(".")[0]


def _single(branch: Branch) -> Bundle:
    member = Member(
        path=branch.path,
        start=0,
        out_dim=branch.out_dim,
        ranks=(),
        stored=branch.stored,
        stored_bias=branch.stored_bias,
        held_turned=branch.held_turned,
    )
    return Bundle(_module(branch.path, [branch], [member], branch.out_dim), branch.pieces)


def _packed(group: list[Branch], everything: Iterable[Branch], cut: bool) -> Bundle:
    """Return a pack with its calls side by side, each in its full width: gaps become zeros of B."""
    group = sorted(group, key=place_in_pack)
    starts: dict[int, int] = {}
    pieces: list[Piece] = []
    total = 0
    for branch in group:
        call = branch.pieces[0].call
        if id(call) not in starts:
            starts[id(call)] = total
            pieces.append(Piece(call, (total, total + call.width)))
            total += call.width
    members = [
        Member(
            path=branch.path,
            start=starts[id(branch.pieces[0].call)] + branch.pieces[0].offset,
            out_dim=branch.out_dim,
            ranks=(),
            stored=branch.stored,
            stored_bias=branch.stored_bias,
            held_turned=branch.held_turned,
        )
        for branch in group
    ]
    members.sort(key=lambda member: member.start)
    taken = {branch.path for branch in everything}
    module = _module(_pack_name(members, taken), group, members, total)
    cuts = tuple(piece.rows[0] for piece in pieces[1:]) if cut else ()
    return Bundle(replace(module, cuts=cuts), tuple(pieces))


def place_in_pack(branch: Branch) -> int:
    """Return the position of a branch in its pack: q before k before v, whatever the order in the file."""
    leaf = branch.path.rpartition(".")[2]
    return next((names.index(leaf) for names in _PACKS if leaf in names), 0)


def _pack_name(members: Sequence[Member], taken: set[str]) -> str:
    parent = members[0].path.rpartition(".")[0]
    leaves = tuple(member.path.rpartition(".")[2] for member in members)
    leaf = _PACKS.get(leaves, "_".join(leaves))
    name = f"{parent}.{leaf}" if parent else leaf
    return name if name not in taken else f"{name}_pack"


def _module(name: str, group: Sequence[Branch], members: Sequence[Member], out_dim: int) -> ExposedModule:
    first = group[0]
    return ExposedModule(
        name=name,
        kind=first.kind,
        in_dim=first.in_dim,
        out_dim=out_dim,
        dtype=_common_dtype([piece.call.dtype for branch in group for piece in branch.pieces]).numpy().name,
        members=tuple(members),
        kernel=first.kernel,
        groups=first.groups,
        bias=any(branch.bias for branch in group),
    )


def _common_dtype(dtypes: Sequence[ir.DataType]) -> ir.DataType:
    """Return the dtype of a module's tensors for all its calls; a tool may leave one call in float32."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return ir.DataType.DOUBLE if ir.DataType.DOUBLE in dtypes else ir.DataType.FLOAT


def partly_covered(bundles: Iterable[Bundle]) -> set[int]:
    """Return the ids of calls with outputs that no branch covers."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for bundle in bundles:
        for piece in bundle.pieces:
            pieces[id(piece.call)].append(piece)
    return {key for key, found in pieces.items() if not covers_outputs(found[0].call, found)}


def with_ranks(bundle: Bundle, ranks: dict[str, tuple[int, ...]]) -> Bundle:
    """Return the bundle for a bank; ``ranks`` holds the rank of each slot, by module path."""
    members = tuple(replace(member, ranks=ranks[member.path]) for member in bundle.module.members)
    return replace(bundle, module=replace(bundle.module, members=members))
