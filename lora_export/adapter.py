"""One adapter, whatever file it came from: what it changes, and the only place where scaling is computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lora_export.storage.inputs import FileState

Array = NDArray[Any]
Kind = Literal["linear", "conv", "embedding", "parameter"]
# What decides whether stacked experts' factors lie turned; see `formats.reading.experts`.
Layout = Literal["known", "class", "class inverted", "unknown"]
# What tells whether a module is a Linear or an Embedding; see `sites.kinds`.
KindBy = Literal["file", "name", "layers"]


@dataclass(frozen=True, eq=False)
class LoraModule:
    """The low-rank change of one module's weight.

    The *canonical weight* is the one the module holds in PyTorch: ``(out_dim, in_dim)`` for
    `nn.Linear` (also for GPT-2's Conv1D, which stores the transpose), ``(out_dim, in_dim/groups,
    *kernel)`` for a convolution, ``(num_embeddings, dim)`` for an embedding, and for a ``parameter`` the
    matrix that the module holds, of stacked experts each expert's.

    Attributes:
        path: Dotted module path in the base model, without PEFT's ``base_model.model.``. For files
            whose names were flattened (kohya) the dots are underscores; see `Adapter.flattened`.
        kind: Kind of the module, which decides how its factors multiply.
        lora_a: Factor A as in the file: linear ``(rank, in_dim)``, conv ``(rank, in_dim, *kernel)``,
            embedding ``(rank, num_embeddings)``, parameter ``(experts * rank, cols)``, expert-major.
        lora_b: Factor B as in the file: linear ``(out_dim, rank)``, conv ``(out_dim, rank/groups, 1, …)``,
            embedding ``(dim, rank)``, parameter ``(rows, rank * experts)``, rank-major; where `turned`,
            lora_a has the rows and lora_b the columns.
        alpha: Numerator of the scaling.
        rank: Rank of one product.
        rslora: Divide alpha by √rank instead of rank.
        magnitude: DoRA's magnitude vector ``(out_dim,)``, for an embedding ``(dim,)``.
        scale: In a file converted for a graph, DoRA's factor m/‖W0 + ΔW‖ ``(out_dim,)``, computed already.
        lora_bias: Bias of lora_B ``(out_dim,)``; scaled like the weight.
        parameter: Name of the changed parameter inside the module.
        experts: Number of stacked matrices.
        turned: True for a parameter whose change is ``(B·A)ᵀ``: lora_a acts on the matrices' first axis.
        layout: Source of `turned`: ``known``; or the module's class, see `formats.reading.experts`.
        groups: Groups of a convolution, when the factors tell (more than 1: cannot be merged).
        component: ``unet``, ``text_encoder``, … where one file serves several models.
        tensor_names: Names of the file's tensors that the module was made from.
        kind_by: Source of `kind`: the ``file``; or only the module's ``name``, in a format that has Linears
            and Embeddings alike; or the ``layers`` of its product, two Linears that may stand beside either.
        table_everywhere: As an embedding, its trainer adds it wherever the base uses the weight: mlx-lm's
            also in the output head that is tied to it.
    """

    path: str
    kind: Kind
    lora_a: Array
    lora_b: Array
    _: KW_ONLY
    alpha: float
    rank: int
    rslora: bool = False
    magnitude: Array | None = None
    scale: Array | None = None
    lora_bias: Array | None = None
    parameter: str = "weight"
    experts: int = 1
    turned: bool = False
    layout: Layout = "known"
    groups: int = 1
    component: str | None = None
    tensor_names: tuple[str, ...] = ()
    kind_by: KindBy = "file"
    table_everywhere: bool = False

    @property
    def key(self) -> str:
        """The changed parameter's path, the module's identity inside an adapter."""
        prefix = f"{self.component}/" if self.component else ""
        return f"{prefix}{self.path}.{self.parameter}"

    @property
    def scaling(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the canonical weight (of one expert), as far as the factors tell it."""
        if self.kind == "conv":
            return (self.lora_b.shape[0], *self.lora_a.shape[1:])
        if self.kind == "embedding" or self.turned:
            return (self.lora_a.shape[1], self.lora_b.shape[0])
        return (self.lora_b.shape[0], self.lora_a.shape[1])

    @property
    def has_dora(self) -> bool:
        """True if the module's product has a factor, to be computed or computed already."""
        return self.magnitude is not None or self.scale is not None

    @property
    def bias_tensors(self) -> tuple[str, ...]:
        """The file's tensors of the bias, which is a parameter of its own."""
        if self.lora_bias is None:
            return ()
        return tuple(name for name in self.tensor_names if name.endswith("bias"))

    @property
    def weight_tensors(self) -> tuple[str, ...]:
        """The file's tensors of the weight's change."""
        return tuple(name for name in self.tensor_names if name not in self.bias_tensors)

    @property
    def everywhere(self) -> bool:
        """True if it is added wherever the base uses the weight."""
        return self.table_everywhere and self.kind == "embedding"

    @property
    def told_shape(self) -> tuple[int, ...] | None:
        """Shape that the base's parameter must have; None where the factors alone don't tell it."""
        is_told = self.kind != "parameter" and self.experts == 1 and self.groups == 1
        return self.weight_shape if is_told else None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The canonical weight as a matrix: everything behind the first axis in one."""
        shape = self.weight_shape
        return shape[0], math.prod(shape[1:])

    def with_kernel(self, axes: int) -> LoraModule:
        """Return a linear as the convolution that it is, or a convolution of ones as a linear.

        Args:
            axes: Axes of the kernel; 0 for a linear.
        """
        ones = (1,) * axes
        return replace(
            self,
            kind="conv" if axes else "linear",
            lora_a=self.lora_a.reshape(*self.lora_a.shape[:2], *ones),
            lora_b=self.lora_b.reshape(*self.lora_b.shape[:2], *ones),
        )

    def as_head(self, path: str) -> LoraModule:
        """Return an embedding's change as that of the output head that is tied to it."""
        a, b = self.lora_b.T, self.lora_a.T
        return replace(self, path=path, kind="linear", lora_a=a, lora_b=b, table_everywhere=False)

    @property
    def is_pointwise(self) -> bool:
        """True if it computes ``W·x`` at each position: a linear, or a convolution with a kernel of ones."""
        if self.kind == "conv":
            return self.groups == 1 and all(size == 1 for size in self.lora_a.shape[2:])
        return self.kind == "linear"

    @property
    def magnitude_axis(self) -> int:
        """Axis of the canonical matrix along which `magnitude` lies (PEFT ``tuners/lora/dora.py``)."""
        return 1 if self.kind == "embedding" else 0

    def factors(self, expert: int = 0, dtype: type[np.floating[Any]] = np.float32) -> tuple[Array, Array]:
        """Return ``(left, right)`` with ``delta = left @ right``, a canonical matrix; scaling in ``left``.

        Args:
            expert: Index among the stacked matrices.
            dtype: float32 or float64; the factors are widened to it before the scaling.

        Returns:
            ``left`` of shape ``(rows, rank)`` and ``right`` of shape ``(rank, cols)``.
        """
        left, right = self.stored_factors(expert)
        left = left.astype(dtype) * dtype(self.scaling)
        return np.ascontiguousarray(left), np.ascontiguousarray(right.astype(dtype))

    def stored_factors(self, expert: int = 0) -> tuple[Array, Array]:
        """Return `factors` as they are stored, without scaling: no copies where the layout allows it."""
        a, b = self.lora_a, self.lora_b
        if self.kind == "parameter" and self.experts > 1:
            # PEFT's ParamWrapper.get_delta_weight: A is (experts, rank, in), B is (out, rank, experts).
            # Cut out before widening, or every expert's call would widen all of them.
            a = a.reshape(self.experts, self.rank, -1)[expert]
            b = b.reshape(b.shape[0], self.rank, self.experts)[:, :, expert]
        if self.kind == "embedding" or self.turned:
            return a.T, b.T
        return b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of an embedding that an adapter replaces.

    Attributes:
        indices: Numbers of the rows.
        values: The new rows ``(len(indices), dim)``.
        tensor_name: Name of the file's tensor.
    """

    indices: tuple[int, ...]
    values: Array
    tensor_name: str

    def runs(self) -> Iterator[tuple[int, Array]]:
        """Yield the rows that follow one another together: the first one's index, and their values."""
        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        start = 0
        for end in range(1, len(order) + 1):
            if end == len(order) or self.indices[order[end]] != self.indices[order[end - 1]] + 1:
                yield self.indices[order[start]], self.values[order[start:end]]
                start = end


@dataclass(frozen=True, eq=False)
class Adapter:
    """A trained adapter.

    Attributes:
        name: Name of the adapter, by default the file's or folder's.
        source: Path it was read from.
        format: Key of the format that read it.
        modules: `LoraModule.key` → module, in the file's order.
        extras: Whole parameters that the adapter replaces (``modules_to_save``, ``bias``, embeddings that
            were resized): the parameter's path → its values. Replaced first, changed by modules after.
        extra_tensors: Path of an extra → its tensor's name in the file, where the two differ.
        token_rows: Embedding's parameter path → single rows that the adapter replaces, after ``extras``.
        flattened: True if the paths' dots are underscores (kohya); compare them flattened.
        scope: The part of the model that the user says belongs, ``model.encoder``: the paths are below it, or
            it stands in front of them in the base (`lora_export.sites.naming.renaming`).
        part: The part of its file that this is, as the user has said it: ``component``, ``:path`` that all of
            it is below, or ``component:path``; None: the whole file.
        base_model: Name of the model that it was trained on, if the file has one.
        fan_in_fan_out: True if the config says that the base stores the transposed weight (GPT-2's Conv1D).
        config: The format's own configuration, for `inspect`.
        tensor_names: Every tensor of the file; each belongs to a module or to ``extras``.
        sha256: SHA-256 of the whole weights file.
        notes: Notes for the user: shown by `inspect` and kept in manifests.
        states: States of its weights files as they were loaded, see `storage.inputs`.
    """

    name: str
    source: str
    format: str
    modules: Mapping[str, LoraModule]
    _: KW_ONLY
    extras: Mapping[str, Array] = field(default_factory=dict)
    extra_tensors: Mapping[str, str] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    flattened: bool = False
    scope: str | None = None
    part: str | None = None
    base_model: str | None = None
    fan_in_fan_out: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    tensor_names: tuple[str, ...] = ()
    sha256: str = ""
    notes: tuple[str, ...] = ()
    states: tuple[FileState, ...] = ()

    @cached_property
    def parameter_count(self) -> int:
        """Number of trained values."""
        lora = sum(
            part.size
            for module in self.modules.values()
            for part in (module.lora_a, module.lora_b, module.magnitude, module.scale, module.lora_bias)
            if part is not None
        )
        rows = sum(rows.values.size for rows in self.token_rows.values())
        return lora + rows + sum(values.size for values in self.extras.values())


# Why LoRA that is `LoraModule.everywhere` gets no branch.
EVERYWHERE = (
    "mlx-lm adds LoRA on an embedding in the output head that is tied to it as well: no branch beside one of "
    "them is known to be all of it"
)
# What to do about an adapter that replaces rows of an embedding, where that can't be done.
MERGE_ROWS = (
    "merge it into the checkpoint with `lora-export merge`, and use the result as the base, without this "
    "adapter"
)


def token_rows_problems(adapter: Adapter) -> list[tuple[str, str]]:
    """Return each embedding of which the adapter replaces rows, and that, for those who can't do it."""
    return [
        (path, f"replaces {len(rows.indices)} single rows (trainable_token_indices)")
        for path, rows in adapter.token_rows.items()
    ]
