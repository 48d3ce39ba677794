"""The LoRA record of a graph with exposed LoRA: its modules, their tensors, its base.

The record is JSON in the model's own metadata (`KEY`), so that the graph alone is enough for a runtime, for
`convert-adapter`, and for readers without lora-export.

The tensors are named by module path (the names that ONNX Runtime, Olive and TensorRT-Edge-LLM share), with
the scaling folded into B:

========== ============================ =============================== ======================
kind       ``<name>.lora_A.weight``     ``<name>.lora_B.weight``        what the graph adds
========== ============================ =============================== ======================
linear     ``(in_dim, rank)``           ``(rank, out_dim)``             ``(x·A)·B``
embedding  ``(num_embeddings, rank)``   ``(rank, dim)``                 ``A[ids]·B``
conv       ``(rank, in_dim, *kernel)``  ``(out_dim, rank/groups, 1…)``  ``conv(conv(x, A), B)``
========== ============================ =============================== ======================

A module whose bias adapters change has ``<name>.lora_B.bias`` ``(out_dim,)`` as well, in a bank
``(n_slots, out_dim)``; it is added to the product. With DoRA there is ``<name>.lora_scale.weight``
``(out_dim,)``, m/‖W0 + ΔW‖ (arXiv:2402.09353), which multiplies the module's whole product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Literal

from lora_export.errors import GraphError
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.fields import Count, FieldError, Size, from_plain, seen

KEY = "lora_export.exposed"
FORMAT = 2
UNHASHED = "unhashed"
WEIGHTS_INPUT = "lora.adapter_weights"
ExposedKind = Literal["linear", "conv", "embedding"]
Mode = Literal["swap", "bank"]
Flavour = Literal["ort", "tensorrt"]
Resident = Literal["initializers", "inputs"]
# Ranks up to here may be larger than a module.
ANY_RANK = 1024
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_AGAIN = "make the graph again with swap-onnx or bank-onnx"


def path_of(parameter: str) -> str:
    """Return the path under which a graph exposes a parameter: its module's, if it is the ``weight``."""
    return parameter.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """The place of rows of a module's W0 in the graph, from which DoRA's norm is computed.

    Attributes:
        weight: Name of the initializer.
        rows: Range of the canonical weight's rows: outputs, or an embedding's entries.
        row: First stored row.
        col: First stored column.
        transposed: True if it is stored as ``(in_dim, out_dim)``.
    """

    weight: str
    rows: tuple[Count, Count]
    row: Count = 0
    col: Count = 0
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Member:
    """One module of the base model that a pair of tensors changes.

    Attributes:
        path: Module path.
        start: Index of its first output among the pair's.
        out_dim: Number of its outputs.
        ranks: In a bank, the rank of each slot for this module (0: the slot doesn't change it).
        stored: Places of its W0; empty if the weight is quantised or was rescaled.
        stored_bias: Places of its bias, as one row; empty if it has none or it is a part of another.
        held_turned: True if the base's module holds the transpose of the canonical weight (a matrix of its
            own, used as ``x @ W``, or a square Conv1D's); None if nothing tells, or a shape does.
    """

    path: str
    start: Count
    out_dim: Size
    ranks: tuple[Count, ...] = ()
    stored: tuple[StoredRows, ...] = ()
    stored_bias: tuple[StoredRows, ...] = ()
    held_turned: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ExposedModule:
    """A pair of LoRA tensors of a graph and its modules: one, or siblings packed into one product.

    A pack's A holds its members' A side by side, its B theirs on the diagonal. In a bank the columns of A
    (rows of B) are those of the first member's slots, in order, then of the next member's.

    Attributes:
        name: First part of the tensors' names: the module's path.
        kind: Kind of the branch.
        in_dim: Number of inputs; rows of an embedding, or a convolution's channels (per group of A: all).
        out_dim: Number of outputs of all members.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``.
        members: The modules, in the order of their outputs.
        kernel: Kernel of a convolution.
        groups: Groups of a convolution's B.
        rank: The rank if the graph fixes it, else 0.
        bias: True if the branch has a bias.
        cuts: For a pack whose members' products are added in several places: outputs at which B is cut into
            tensors of their own, ``<name>.lora_B.<number>.weight``.
    """

    name: str
    kind: ExposedKind
    in_dim: Size
    out_dim: Size
    dtype: str
    members: tuple[Member, ...]
    kernel: tuple[Size, ...] = ()
    groups: Size = 1
    rank: Count = 0
    bias: bool = False
    cuts: tuple[Size, ...] = ()

    @property
    def lora_a(self) -> str:
        """Name of A."""
        return f"{self.name}.lora_A.weight"

    @property
    def lora_b(self) -> str:
        """Name of B."""
        return f"{self.name}.lora_B.weight"

    @property
    def b_parts(self) -> tuple[tuple[str, int, int], ...]:
        """Name, first and last output of each tensor of B: one, except for a pack with cuts."""
        if not self.cuts:
            return ((self.lora_b, 0, self.out_dim),)
        bounds = (0, *self.cuts, self.out_dim)
        return tuple(
            (f"{self.name}.lora_B.{number}.weight", start, stop)
            for number, (start, stop) in enumerate(pairwise(bounds))
        )

    @property
    def scale(self) -> str:
        """Name of DoRA's factor."""
        return f"{self.name}.lora_scale.weight"

    @property
    def lora_bias(self) -> str:
        """Name of the branch's bias."""
        return f"{self.name}.lora_B.bias"

    @property
    def largest_rank(self) -> int:
        """Largest rank of a member that room is made for: with more, A is larger than any change needs."""
        return max(self.in_dim * math.prod(self.kernel), self.out_dim, ANY_RANK)

    @property
    def rank_symbol(self) -> str:
        """The module's own symbolic dimension, as modules of one adapter may have different ranks."""
        return f"{self.name}.rank"

    def a_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of A."""
        return (rank, self.in_dim, *self.kernel) if self.kind == "conv" else (self.in_dim, rank)

    def b_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of B."""
        if self.kind == "conv":
            return (self.out_dim, rank // self.groups, *(1 for _ in self.kernel))
        return rank, self.out_dim


@dataclass(frozen=True)
class Slot:
    """One resident adapter of a bank.

    Attributes:
        name: Name in requests.
        adapter: Identity of its file (sha256), `UNHASHED` if it came from no file, or "" for an empty slot.
    """

    name: str
    adapter: str = ""


@dataclass(frozen=True, kw_only=True)
class LoraRecord:
    """The LoRA record of a graph.

    Attributes:
        mode: ``swap`` (one adapter per run) or ``bank`` (one per row).
        base: File name of the base graph.
        base_sha256: Identity of the base graph, see `manifest.identity_of`.
        modules: The pairs of tensors.
        max_rank: Largest rank that a converted adapter may have.
        flavour: ``ort``: tensors are inputs with an empty default; ``tensorrt``: plain inputs.
        dora: True if there are DoRA's factors.
        slots: Slots of a bank.
        resident: True if a bank's tensors are constants, False if they are inputs.
        batch_input: The graph input whose first dimension is the batch, in a bank.
        merged: Record of the merges into its weights, see `base.in_graph`.
        landmarks: Parameters of the base that show its kind of model (`sites.towers`): the graph itself may
            have lost their names, and an engine has none.
        elsewhere: Paths of modules that the other graph of the same model exposes, and this one lacks.
    """

    mode: Mode
    base: str
    base_sha256: str
    modules: tuple[ExposedModule, ...]
    max_rank: Count
    flavour: Flavour = "ort"
    dora: bool = False
    slots: tuple[Slot, ...] = ()
    resident: Resident = "initializers"
    batch_input: str = ""
    merged: str = ""
    landmarks: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    format: int = field(default=FORMAT)

    def members(self) -> Iterator[tuple[ExposedModule, Member]]:
        """Yield every module of the base with the pair that it belongs to."""
        for module in self.modules:
            for member in module.members:
                yield module, member

    def tensor_names(self) -> list[str]:
        """Return the names of all LoRA tensors, in the graph's order."""
        return [name for module in self.modules for name in self.names_of(module)]

    def names_of(self, module: ExposedModule) -> list[str]:
        """Return the names of one module's tensors."""
        names = [module.lora_a, *(name for name, _, _ in module.b_parts)]
        return names + [module.lora_bias] * module.bias + [module.scale] * self.dora

    def input_names(self) -> list[str]:
        """Return the names of the LoRA tensors that are inputs of the graph; a bank's may be constants."""
        constant = self.mode == "bank" and self.resident == "initializers"
        return [] if constant else self.tensor_names()

    def to_json(self) -> str:
        """Return the record as one line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> LoraRecord:
        """Read the record that `to_json` wrote.

        Raises:
            GraphError: The record is damaged, or of another version.
        """
        data = json_of(text, "the graph's LoRA record", GraphError, _AGAIN)
        if isinstance(data, dict) and "format" in data and data["format"] != FORMAT:
            found = seen(data["format"])
            raise GraphError(
                f"the graph's LoRA record has format {found}, but this version reads {FORMAT}", _AGAIN
            )
        try:
            return cls.from_data(data)
        except FieldError as error:
            raise GraphError("the graph's LoRA record is damaged", _AGAIN, error.problems) from error

    @classmethod
    def from_data(cls, data: object) -> LoraRecord:
        """Make the record from plain data.

        Raises:
            FieldError: A field has a wrong type, or two fields contradict each other.
        """
        record = from_plain(cls, data)
        if problems := list(_contradictions(record)):
            raise FieldError(problems)
        return record


def _contradictions(record: LoraRecord) -> Iterator[str]:
    """Yield the contradictions between parts of a record."""
    if record.format != FORMAT:
        yield f"format: {record.format}, but this version reads {FORMAT}"
    if not all(letter in "0123456789abcdef" for letter in record.base_sha256):
        yield f"base_sha256: {seen(record.base_sha256)}, wanted hexadecimal digits"
    first: dict[str, int] = {}
    for i, module in enumerate(record.modules):
        where = f"modules[{i}]"
        if first.setdefault(module.name, i) != i:
            yield f"{where}.name: {seen(module.name)} is already the name of modules[{first[module.name]}]"
        if module.dtype not in _DTYPES:
            yield f"{where}.dtype: {seen(module.dtype)}, wanted one of {', '.join(_DTYPES)}"
        if not module.members:
            yield f"{where}.members: none, wanted at least one"
        if module.rank > (most := module.largest_rank * len(module.members)):
            yield f"{where}.rank: {module.rank}, more than the module's sizes: at most {most}"
        # The sizes of a group's tensors can't be compared with the graph where its rank is open.
        if module.groups > 1 and (module.kind != "conv" or module.out_dim % module.groups):
            yield f"{where}.groups: {module.groups}, for {module.kind} of {module.out_dim} outputs"
        cuts = list(module.cuts)
        if cuts != sorted(set(cuts)) or (module.cuts and module.cuts[-1] >= module.out_dim):
            yield f"{where}.cuts: {cuts}, wanted rising numbers below out_dim {module.out_dim}"
        for j, member in enumerate(module.members):
            if member.start + member.out_dim > module.out_dim:
                outputs = f"start {member.start} and out_dim {member.out_dim}"
                yield f"{where}.members[{j}]: {outputs}, but the module has {module.out_dim} outputs"
            if large := [rank for rank in member.ranks if rank > module.largest_rank]:
                ranks = f"{large[0]}, more than the module's sizes: at most {module.largest_rank}"
                yield f"{where}.members[{j}].ranks: {ranks}"
            if len(member.ranks) != len(record.slots):
                ranks = f"{len(member.ranks)} numbers"
                yield f"{where}.members[{j}].ranks: {ranks}, but the record has {len(record.slots)} slots"


def lora_record_of(metadata: Mapping[str, str], where: str) -> LoraRecord:
    """Return the LoRA record in a model's metadata.

    Args:
        metadata: ``metadata_props`` of an ONNX file, or ONNX Runtime's ``custom_metadata_map``.
        where: The file, for messages.

    Raises:
        GraphError: The record is missing or damaged.
    """
    text = metadata.get(KEY)
    if text is None:
        raise GraphError(
            f"{where} has no exposed LoRA: its metadata lack {KEY!r}",
            "make it with: lora-export swap-onnx --base BASE.onnx --adapter ADAPTER -o OUT.onnx",
        )
    return LoraRecord.from_json(text)
