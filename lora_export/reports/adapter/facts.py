"""Measure an adapter for `lora-export inspect`: an adapter in numbers, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_export.adapter import Adapter, LoraModule
from lora_export.formats.provenance import is_converted
from lora_export.machines.blas import one_blas_thread
from lora_export.reports.adapter.base_size import BaseSize, base_size
from lora_export.reports.adapter.spectrum import spectrum

PARTS = ("lora_a", "lora_b", "magnitude", "scale", "lora_bias")


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """Facts of one module. Norms and singular values are those of ΔW, scaling included, all experts together.

    Attributes:
        bias: True if the module's bias changes too.
        effective_rank_90: Number of directions that hold 90 % of ‖ΔW‖².
        entropy_rank: exp of the entropy of the normalised singular values.
    """

    module: str
    component: str | None
    kind: str
    rank: int
    alpha: float
    scaling: float
    rslora: bool
    dora: bool
    bias: bool
    experts: int
    groups: int
    weight_shape: tuple[int, ...]
    lora_a_shape: tuple[int, ...]
    lora_b_shape: tuple[int, ...]
    dtype: str
    parameters: int
    size_bytes: int
    norm: float
    spectral_norm: float
    effective_rank_90: int
    effective_rank_99: int
    entropy_rank: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class ExtraReport:
    """Whole parameter that the adapter replaces."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """Adapter in numbers.

    Attributes:
        tuner: LoRA, rsLoRA, DoRA, or a mixture.
        base_model: Base that it was trained on, or converted for, by its file.
        converted: True if it was converted for a graph.
        made_of: Name of the adapter that a converted one was made from, if the file has it.
        made_of_sha256: Hash of that adapter's file.
        parameters: Number of trained values, replaced parameters included.
        size_bytes: Size of these values in bytes.
        base: Size of the base model, if one was given.
    """

    name: str
    source: str
    format: str
    tuner: str
    base_model: str | None
    converted: bool
    made_of: str | None
    made_of_sha256: str | None
    sha256: str
    parameters: int
    size_bytes: int
    modules: tuple[ModuleReport, ...]
    extras: tuple[ExtraReport, ...]
    base: BaseSize | None
    notes: tuple[str, ...]

    @property
    def parameter_share(self) -> float | None:
        """Ratio of trained values to the base's values."""
        return self.parameters / self.base.parameters if self.base and self.base.parameters else None

    @property
    def size_share(self) -> float | None:
        """Ratio of the adapter's bytes to the base's."""
        return self.size_bytes / self.base.size_bytes if self.base and self.base.size_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            **asdict(self),
            "parameter_share": self.parameter_share,
            "size_share": self.size_share,
        }


def inspect_adapter(adapter: Adapter, base: Path | None = None) -> AdapterReport:
    """Measure an adapter.

    Args:
        adapter: The adapter to measure.
        base: Folder of a Hugging Face checkpoint, or an ONNX file; only its size is read.

    Raises:
        CheckpointError: ``base`` is not a checkpoint folder.
        GraphError: ``base`` is a damaged ONNX file.
    """
    # In hundreds of tiny decompositions threads would wait for each other (seconds on a busy machine).
    with one_blas_thread():
        modules = tuple(_module_report(module) for module in adapter.modules.values())
    extras = tuple(
        ExtraReport(
            parameter=name,
            shape=values.shape,
            dtype=values.dtype.name,
            parameters=values.size,
            size_bytes=values.nbytes,
        )
        for name, values in adapter.extras.items()
    )
    converted = is_converted(adapter.config)
    source = adapter.config if converted else {}
    return AdapterReport(
        name=adapter.name,
        source=adapter.source,
        format=adapter.format,
        tuner=_tuner(adapter),
        base_model=adapter.base_model,
        converted=converted,
        made_of=source.get("adapter"),
        made_of_sha256=source.get("adapter_sha256"),
        sha256=adapter.sha256,
        parameters=adapter.parameter_count,
        size_bytes=sum(row.size_bytes for row in modules) + sum(extra.size_bytes for extra in extras),
        modules=modules,
        extras=extras,
        base=base_size(base) if base else None,
        notes=adapter.notes,
    )


def _module_report(module: LoraModule) -> ModuleReport:
    parts = [values for part in PARTS if (values := getattr(module, part)) is not None]
    found = spectrum(module)
    return ModuleReport(
        module=module.path if module.parameter == "weight" else f"{module.path}.{module.parameter}",
        component=module.component,
        kind=module.kind,
        rank=module.rank,
        alpha=module.alpha,
        scaling=module.scaling,
        rslora=module.rslora,
        dora=module.has_dora,
        bias=module.lora_bias is not None,
        experts=module.experts,
        groups=module.groups,
        weight_shape=module.weight_shape,
        lora_a_shape=module.lora_a.shape,
        lora_b_shape=module.lora_b.shape,
        dtype=module.lora_a.dtype.name,
        parameters=sum(values.size for values in parts),
        size_bytes=sum(values.nbytes for values in parts),
        norm=found.norm,
        spectral_norm=found.spectral_norm,
        effective_rank_90=found.effective_rank(0.9),
        effective_rank_99=found.effective_rank(0.99),
        entropy_rank=found.entropy_rank,
        singular_values=tuple(found.singular_values.tolist()),
    )


def _tuner(adapter: Adapter) -> str:
    kinds = Counter(
        ("DoRA" if module.has_dora else "LoRA") + (" (rsLoRA scaling)" if module.rslora else "")
        for module in adapter.modules.values()
    )
    if len(kinds) < 2:
        return next(iter(kinds), "no LoRA modules")
    return ", ".join(f"{kind} × {count}" for kind, count in kinds.most_common())
