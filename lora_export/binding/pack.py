"""Compute the positions of modules' factors in the tensors of a pack or of a bank.

A pack holds its members' A side by side and their B on the diagonal; a bank the same of every slot, member
after member. Of a grouped convolution the rank's channels belong to groups, group after group, and each group
holds its share of every factor in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_export.adapter import Array, LoraModule
from lora_export.binding.cast import Caster, dtype_of
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member


@dataclass(frozen=True, eq=False)
class Rectangle:
    """Rectangle of a graph's tensor and its values.

    Attributes:
        tensor: Name of A or B.
        index: One slice for each axis.
        values: Values of the rectangle's shape, in the tensor's dtype.
    """

    tensor: str
    index: tuple[slice, ...]
    values: Array


def blocks_of_factors(
    module: ExposedModule, member: Member, factors: tuple[Array, Array], offset: int, total: int
) -> list[Rectangle]:
    """Return a member's factors as blocks of tensors of rank ``total``, with columns from ``offset`` on."""
    a, b = factors
    outputs = slice(member.start, member.start + member.out_dim)
    if module.kind != "conv":
        columns = slice(offset, offset + a.shape[1])
        return [
            Rectangle(module.lora_a, (slice(0, module.in_dim), columns), a),
            Rectangle(module.lora_b, (columns, outputs), b),
        ]
    ones = tuple(slice(0, 1) for _ in module.kernel)
    kernel = tuple(slice(0, size) for size in module.kernel)
    share, first = a.shape[0] // module.groups, offset // module.groups
    blocks = [Rectangle(module.lora_b, (outputs, slice(first, first + share), *ones), b)]
    for group in range(module.groups):
        start = group * (total // module.groups) + first
        rows = (slice(start, start + share), slice(0, module.in_dim), *kernel)
        blocks.append(Rectangle(module.lora_a, rows, a[group * share : (group + 1) * share]))
    return blocks


def assemble(module: ExposedModule, rank: int, blocks: Sequence[Rectangle]) -> tuple[Array, Array]:
    """Return A and B of rank ``rank`` with the blocks in them; one that fills its tensor is not copied."""
    made = []
    for name, shape in ((module.lora_a, module.a_shape(rank)), (module.lora_b, module.b_shape(rank))):
        own = [block for block in blocks if block.tensor == name]
        if len(own) == 1 and own[0].values.shape == shape:
            made.append(own[0].values)
            continue
        tensor = np.zeros(shape, dtype_of(module.dtype))
        for block in own:
            tensor[block.index] = block.values
        made.append(tensor)
    return made[0], made[1]


def joined_bias(module: ExposedModule, parts: Sequence[tuple[Member, LoraModule]], caster: Caster) -> Array:
    """Return the bias of a pair's product, ``(out_dim,)``: zeros for members without a bias."""
    dtype = dtype_of(module.dtype)
    bias = np.zeros(module.out_dim, dtype)
    for member, lora in parts:
        if lora.lora_bias is not None:
            rows = slice(member.start, member.start + member.out_dim)
            label = f"{lora.path} lora_B.bias"
            bias[rows] = caster.vector(lora.lora_bias, dtype, label, lora.scaling)
    return bias


def cut_b(module: ExposedModule, b: Array) -> dict[str, Array]:
    """Return name → values of each tensor that B consists of."""
    if not module.cuts:
        return {module.lora_b: b}
    return {name: np.ascontiguousarray(b[:, start:stop]) for name, start, stop in module.b_parts}


def blocks_of_slot(
    exposed: LoraRecord, slot: int, loras: Mapping[str, LoraModule], caster: Caster
) -> tuple[Rectangle, ...]:
    """Return every rectangle that a slot of a bank owns.

    Args:
        exposed: The bank's LoRA record.
        slot: Number of the slot.
        loras: `Member.path` → factors; zeros for members without any, and below those of a lower rank.
        caster: Converter, which remembers conversions and problems.
    """
    blocks: list[Rectangle] = []
    for module in exposed.modules:
        if module.bias:
            own_row = (slice(slot, slot + 1), slice(0, module.out_dim))
            parts = [(member, lora) for member in module.members if (lora := loras.get(member.path))]
            blocks.append(Rectangle(module.lora_bias, own_row, joined_bias(module, parts, caster)[None]))
        total, offset = sum(sum(member.ranks) for member in module.members), 0
        for member in module.members:
            room, start = member.ranks[slot], offset + sum(member.ranks[:slot])
            offset += sum(member.ranks)
            if not room:
                continue
            lora = loras.get(member.path)
            if lora is None or lora.rank < room:
                # One number, however much room the record claims.
                alone, zero = replace(module, out_dim=member.out_dim), np.zeros((), dtype_of(module.dtype))
                a, b = (np.broadcast_to(zero, shape) for shape in (alone.a_shape(room), alone.b_shape(room)))
                blocks += blocks_of_factors(module, member, factors=(a, b), offset=start, total=total)
            if lora is not None:
                a, b = caster.factors(lora, dtype_of(module.dtype))
                # An embedding's A is looked up, not multiplied.
                if module.kind != "embedding":
                    caster.refuse_overflow(lora, a)
                blocks += blocks_of_factors(module, member, factors=(a, b), offset=start, total=total)
    return tuple(blocks)
