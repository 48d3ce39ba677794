"""Compare the sizes of inputs in a LoRA record with the inputs that the graph has.

A record of a kilobyte may claim a rank of millions, and tensors made by it would take gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lora_export.graph.exposed import ExposedModule, LoraRecord
from lora_export.untrusted.shown import shown


def size_problems(record: LoraRecord, shapes: Mapping[str, Sequence[object] | None]) -> list[str]:
    """Return a line for each LoRA input whose sizes differ from the record's.

    Args:
        record: LoRA record of the graph.
        shapes: Input → its sizes, or their symbols. Missing inputs are not reported here.
    """
    if not record.input_names():
        return []
    problems = []
    for module in record.modules:
        for name, wanted in _wanted(record, module):
            found = shapes.get(name)
            if found is None:
                continue
            fits = len(found) == len(wanted) and all(
                size is None or size == dim for size, dim in zip(wanted, found, strict=True)
            )
            if not fits:
                recorded = ", ".join("rank" if size is None else str(size) for size in wanted)
                sizes = ", ".join(map(str, found))
                problems.append(f"{shown(name)}: sizes [{shown(sizes)}], but the record has [{recorded}]")
    return problems


def _wanted(record: LoraRecord, module: ExposedModule) -> Iterator[tuple[str, list[int | None]]]:
    """Yield each tensor's name and sizes; None for a rank that a request chooses."""
    is_bank, is_conv = record.mode == "bank", module.kind == "conv"
    rank = sum(sum(member.ranks) for member in module.members) if is_bank else module.rank
    is_open = rank == 0 and not is_bank
    a, b = list(module.a_shape(rank)), list(module.b_shape(rank))
    of_a, of_b = (0, 1) if is_conv else (1, 0)
    yield module.lora_a, _with_rank(a, of_a, is_open)
    for name, start, stop in module.b_parts:
        yield name, _with_rank(b if is_conv else [b[0], stop - start], of_b, is_open)
    if module.bias:
        yield module.lora_bias, [len(record.slots), module.out_dim] if is_bank else [module.out_dim]
    if record.dora:
        yield module.scale, [module.out_dim]


def _with_rank(shape: Sequence[int], axis: int, is_open: bool) -> list[int | None]:
    return [None if is_open and number == axis else size for number, size in enumerate(shape)]
