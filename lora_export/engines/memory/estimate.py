"""Estimate the memory of an engine on a GPU before it is built, and check whether it fits.

Weights are exact to a percent: an engine holds each constant once, however many GPUs and profiles it is for.
Activations are an estimate: see `activations`. The figures that the compiler itself states after building are
in the engine record (`EngineRecord.memory`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from lora_export.engines.memory.activations import peak_activations
from lora_export.engines.memory.largest import Sized, dimensions, input_shapes, largest_values
from lora_export.engines.record import Profile
from lora_export.graph.exposed import LoraRecord
from lora_export.graph.onnx_file import FLOAT_TYPES, GraphFile, byte_size, shape_of
from lora_export.machines.targets import Gpu

Verdict = Literal["fits", "tight", "no", "unknown"]

_MIB, _GIB = 2**20, 2**30
# An empty CUDA context takes 518 MiB (measured: H100, driver 580; smaller GPUs need less). The rest is for
# the runtime and the engine's kernels, of which SmolLM2-135M with LoRA on all linears brings 51 MB.
OVERHEAD_BYTES = 640 * _MIB
# If the CPU shares the memory, the system and the application need some of it.
SHARED_SHARE = 0.75
# Above this share, the difference between a GPU's memory and what a program gets (ECC, the driver, a desktop:
# 1 to 8 %) and the estimate's own error can make it fail.
TIGHT_SHARE = 0.9
# past_key_values.0.key, past_key_values_0_key, present.0.value …; past_sequence_length has fewer dimensions.
_CACHE, _CACHE_DIMS = re.compile(r"^(past|present)[._]"), 3


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Memory of an engine at the largest shapes of its profiles, in bytes.

    Attributes:
        weights_bytes: All constants as the engine stores them; a bank's resident adapters are among them.
        activations_bytes: Intermediate values and workspaces.
        kv_cache_bytes: Keys and values, past and present.
        io_bytes: Other inputs and outputs, without an adapter's.
        adapter_bytes: One adapter of the largest rank; 0 if adapters are not inputs, and in a bank.
        overhead_bytes: CUDA's context and the runtime.
        unknown: Names of values of unknown size; they are not counted.
        rank: The largest rank; 0 without LoRA.
        slots: Number of adapters that a bank has room for.
        sizes: Largest size of each dimension that the graph's inputs name, without LoRA's ranks.
        profiles: Number of profiles that were counted.
    """

    weights_bytes: int
    activations_bytes: int
    kv_cache_bytes: int
    io_bytes: int
    adapter_bytes: int
    overhead_bytes: int = OVERHEAD_BYTES
    unknown: tuple[str, ...] = ()
    rank: int = 0
    slots: int = 0
    sizes: tuple[tuple[str, int], ...] = ()
    profiles: int = 1

    def total_bytes(self, adapters: int) -> int:
        """Return the memory of the engine together with this many adapters on the device."""
        fixed = self.weights_bytes + self.activations_bytes + self.kv_cache_bytes + self.io_bytes
        return fixed + self.overhead_bytes + adapters * self.adapter_bytes

    def most_adapters(self, available_bytes: int) -> int:
        """Return how many adapters of the largest rank fit into this much memory."""
        left = available_bytes - self.total_bytes(0)
        if left < 0:
            return 0
        return left // self.adapter_bytes if self.adapter_bytes else self.slots

    def at(self) -> str:
        """Return the sizes for people: `` at batch 4, sequence 512``."""
        if not self.sizes:
            return ""
        # With several profiles, each part is from the one that needs most.
        where = " at " if self.profiles == 1 else " at the largest of all profiles: "
        return where + ", ".join(f"{name} {size}" for name, size in self.sizes)

    def lines(self) -> list[str]:
        """Return the parts for people."""
        parts = {
            "weights": self.weights_bytes,
            "activations": self.activations_bytes,
            "key-value cache": self.kv_cache_bytes,
            "inputs and outputs": self.io_bytes,
            f"an adapter of rank {self.rank}": self.adapter_bytes,
            "CUDA and the runtime": self.overhead_bytes,
        }
        lines = ["estimated: " + ", ".join(f"{name} {as_size(size)}" for name, size in parts.items() if size)]
        if self.unknown:
            names = ", ".join(self.unknown[:3]) + (" …" if len(self.unknown) > 3 else "")
            lines.append(f"not counted, because their size is unknown: {len(self.unknown)} values ({names})")
        return lines


def as_size(size: int) -> str:
    """Return a number of bytes as text for people."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"


# --- the estimate --------------------------------------------------------------------------------------


def estimate_memory(
    graph: GraphFile,
    exposed: LoraRecord | None,
    profiles: Sequence[Profile],
    bindings: Mapping[str, int] | None = None,
) -> MemoryEstimate:
    """Return the memory that an engine of a graph will take. No weights are read, the graph is unchanged.

    Args:
        graph: Graph as the compiler will get it.
        exposed: Its LoRA record.
        profiles: Shapes that the engine takes; for each part, the profile that needs most counts.
        bindings: Sizes of dimensions that no input names.
    """
    parts = [
        _of_profile(graph, exposed, profile, bindings or {}) for profile in profiles or [Profile("", {})]
    ]
    return MemoryEstimate(
        weights_bytes=_weights_bytes(graph),
        activations_bytes=max(part.activations for part in parts),
        kv_cache_bytes=max(part.cache for part in parts),
        io_bytes=max(part.io for part in parts),
        adapter_bytes=max(part.adapter for part in parts),
        unknown=tuple(sorted({name for part in parts for name in part.unknown})),
        rank=max(_rank(exposed, part.dims) for part in parts),
        slots=len(exposed.slots) if exposed else 0,
        sizes=_named_sizes(part.dims for part in parts),
        profiles=len(parts),
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    activations: int
    cache: int
    io: int
    adapter: int
    unknown: tuple[str, ...]
    dims: Mapping[str, int]


def _of_profile(
    graph: GraphFile, exposed: LoraRecord | None, profile: Profile, bindings: Mapping[str, int]
) -> _Parts:
    inputs = input_shapes(graph, profile)
    dims = dict(bindings) | dimensions(graph, inputs)
    values = largest_values(graph, inputs, dims)
    activations = peak_activations(graph, values)
    lora = set(exposed.tensor_names()) if exposed and exposed.mode == "swap" else set()
    sizes = {"cache": 0, "io": 0, "adapter": 0}
    unknown = list(activations.unknown)
    for value in _ports(graph):
        sized = values.get(str(value.name))
        if sized is None:
            unknown.append(str(value.name))
            continue
        part = "adapter" if value.name in lora else "cache" if _is_cache(str(value.name), sized) else "io"
        sizes[part] += sized.bytes
    return _Parts(activations=activations.bytes, **sizes, unknown=tuple(unknown), dims=dims)


def _ports(graph: GraphFile) -> Iterator[ir.Value]:
    """Yield the inputs that the caller gives and the outputs, each once."""
    given = [value for value in graph.graph.inputs if value.const_value is None]
    yield from dict.fromkeys([*given, *graph.graph.outputs])


def _is_cache(name: str, sized: Sized) -> bool:
    return bool(_CACHE.match(name)) and len(sized.shape) >= _CACHE_DIMS and sized.dtype in FLOAT_TYPES


def _weights_bytes(graph: GraphFile) -> int:
    constants: dict[ir.Value, None] = dict.fromkeys(graph.initializers())
    for node in graph.model.graph.all_nodes():
        if node.op_type == "Constant" and node.outputs[0].const_value is not None:
            constants[node.outputs[0]] = None
    return sum(_stored_bytes(value) for value in constants)


def _stored_bytes(value: ir.Value) -> int:
    """Return the bytes that the engine stores of a constant: 0 if unread, its cast if only Casts read it."""
    tensor, readers = value.const_value, list(value.consumers())
    assert tensor is not None
    size = byte_size(tensor)
    if not readers:
        return size if value.is_graph_output() else 0
    if all(reader.op_type == "Cast" for reader in readers):
        widths = [ir.DataType(reader.attributes.get_int("to", tensor.dtype)).bitwidth for reader in readers]
        return size * max(widths) // tensor.dtype.bitwidth
    # A lookup reads it unchanged, a product padded to even sizes (GPT-2's 50257 tokens): two copies.
    looked_up = {reader.op_type == "Gather" for reader in readers}
    return size * len(looked_up) if any(dim % 2 for dim in shape_of(tensor)) else size


def _rank(exposed: LoraRecord | None, dims: Mapping[str, int]) -> int:
    """Return the largest rank of one module: a pack's tensors have the ranks of all its members."""
    modules = exposed.modules if exposed else ()
    return max(
        (dims.get(module.rank_symbol, module.rank) // len(module.members) for module in modules), default=0
    )


def _named_sizes(profiles: Iterable[Mapping[str, int]]) -> tuple[tuple[str, int], ...]:
    """Return the sizes that users know, without expressions and LoRA's ranks (named by a module's path)."""
    sizes: dict[str, int] = {}
    for dims in profiles:
        for name, size in dims.items():
            if name.isidentifier():
                sizes[name] = max(size, sizes.get(name, 0))
    return tuple(sizes.items())


# --- the device ----------------------------------------------------------------------------------------


def check_fit(
    estimate: MemoryEstimate, target: Gpu, adapters: int, *, weight_streaming: bool = False
) -> tuple[Verdict, list[str]]:
    """Return whether an engine fits on a GPU together with this many adapters, and lines with the reasons.

    ``fits``; ``tight``: above 90 % of the memory, or only with weights streamed from the host; ``no``;
    ``unknown``: the GPU's memory is not known, or the sizes of some values are not.

    Args:
        estimate: Memory of the engine.
        target: The GPU.
        adapters: Number of adapters of the largest rank that have to be on it; at least one is counted.
        weight_streaming: Allow the weights to stay in host memory.
    """
    usable = _usable(target)
    if usable is None:
        reason = f"its memory is unknown; {_needed(estimate, adapters)}{estimate.at()}"
        return "unknown", [f"{target.name}: {reason}", *estimate.lines()]
    if estimate.total_bytes(max(adapters, 1)) > usable or not _takes(estimate, adapters):
        # Streaming from the host saves nothing if host and GPU share their memory.
        streamable = not target.shared_memory and _streamed(estimate, adapters) <= usable
        verdict, reason = _too_large(
            estimate, usable, adapters=adapters, streaming=weight_streaming, streamable=streamable
        )
    else:
        verdict, reason = _small_enough(estimate, usable, adapters)
    lines = [f"{target.name}: {reason}", *estimate.lines()]
    if target.shared_memory:
        lines.append(f"the CPU uses the same memory: {SHARED_SHARE:.0%} of it counts")
    return verdict, lines


def _usable(target: Gpu) -> int | None:
    if target.memory_bytes is None or not target.shared_memory:
        return target.memory_bytes
    return int(target.memory_bytes * SHARED_SHARE)


def _takes(estimate: MemoryEstimate, adapters: int) -> bool:
    """Return whether the engine can take this many adapters, whatever the memory."""
    return bool(estimate.adapter_bytes) or adapters <= max(estimate.slots, 1)


def _streamed(estimate: MemoryEstimate, adapters: int) -> int:
    return estimate.total_bytes(max(adapters, 1)) - estimate.weights_bytes


def _small_enough(estimate: MemoryEstimate, usable: int, adapters: int) -> tuple[Verdict, str]:
    needed = estimate.total_bytes(max(adapters, 1))
    held = ""
    if estimate.adapter_bytes:
        held = f": {_count(estimate.most_adapters(usable))} of rank {estimate.rank}"
    elif estimate.slots:
        held = f": {_count(estimate.slots)} in the engine"
    where = f"{as_size(usable)}{held}{estimate.at()}"
    if estimate.unknown:
        return "unknown", f"may fit in {where}, if the values of unknown size are small"
    if needed > TIGHT_SHARE * usable:
        return "tight", f"only just fits in {where} ({as_size(needed)} needed)"
    return "fits", f"fits in {where}"


def _too_large(
    estimate: MemoryEstimate, usable: int, adapters: int, streaming: bool, streamable: bool
) -> tuple[Verdict, str]:
    if not _takes(estimate, adapters):
        held = f"is a bank of {estimate.slots}" if estimate.slots else "has no LoRA inputs"
        return "no", f"no room for {_count(adapters)}: the graph {held}"
    what = f"{_needed(estimate, adapters)}{estimate.at()}, {as_size(usable)} available"
    if streaming and streamable:
        return "tight", f"fits only with --weight-streaming, at a cost in speed: {what}"
    most = estimate.most_adapters(usable)
    hint = f"; {_count(most)} would fit" if most else ""
    if streamable:
        hint += (
            f"; with --weight-streaming, {as_size(_streamed(estimate, adapters))} and some weights are enough"
        )
    return "no", f"does not fit: {what}{hint}"


def _needed(estimate: MemoryEstimate, adapters: int) -> str:
    beside = f" with {_count(max(adapters, 1))} of rank {estimate.rank}" if estimate.adapter_bytes else ""
    return f"{as_size(estimate.total_bytes(max(adapters, 1)))} needed{beside}"


def _count(adapters: int) -> str:
    return f"{adapters} adapter" + ("s" if adapters != 1 else "")
