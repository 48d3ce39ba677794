"""Quantise a graph: rewrite the readers of its weights; the codes are made when the data file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.errors import GraphError
from lora_export.graph.exposed import KEY as LORA_KEY
from lora_export.graph.exposed import ExposedModule, lora_record_of
from lora_export.graph.external_data import InitializerChange, merged_values
from lora_export.graph.onnx_file import GraphFile
from lora_export.graph.quantised import QuantisedRecord, QuantisedWeight, add_record
from lora_export.modes.quantising.choice import QuantiseChoice, checked
from lora_export.modes.quantising.find import WeightRow, find_products, is_kept
from lora_export.modes.quantising.rewrite import Rewriter
from lora_export.modes.quantising.weight import CodedWeight
from lora_export.storage.rounding import Mode, Rounding, update
from lora_export.untrusted.places import is_folder
from lora_export.untrusted.shown import limited, shown

_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class QuantisedWeights:
    """Weights that a mode quantised and left, or with ``dry_run`` would.

    Attributes:
        choice: The user's choice, with defaults filled in.
        rows: A row for each weight of two or more axes.
        record: Record for the graph's metadata; None before the codes are written.
    """

    choice: QuantiseChoice
    rows: tuple[WeightRow, ...]
    record: QuantisedRecord | None = None

    @property
    def left(self) -> list[WeightRow]:
        """The weights that stay in float."""
        return [row for row in self.rows if row.action == "leave"]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON and manifests."""
        record = self.record
        cost = (
            {"total": record.relative, "mean": record.mean, "largest": record.worst.relative}
            if record and record.worst
            else {}
        )
        return {
            "choice": asdict(self.choice) | {"keep": list(self.choice.keep)},
            "rows": [row.as_dict() for row in self.rows],
            "relative_error": {name: float(f"{value:.6g}") for name, value in cost.items()},
            "weights": [asdict(weight) for weight in record.weights] if record else [],
        }


@dataclass(kw_only=True, eq=False)
class Quantising:
    """A graph whose readers of weights read codes that are not made yet.

    Attributes:
        graph: The graph.
        quantised: The plan.
        coded: Each weight with the name of its codes.
        roundings: Cost of rounding of the adapters that were merged into these weights, filled as they are
            written.
    """

    graph: GraphFile
    quantised: QuantisedWeights
    coded: Sequence[tuple[CodedWeight, str]]
    roundings: dict[str, Rounding] = field(default_factory=dict)

    def finished(self) -> QuantisedWeights:
        """Put the record of what was written into the graph's metadata; return it with the plan."""
        choice = self.quantised.choice
        weights = []
        for coded, codes in self.coded:
            assert coded.cost is not None
            weights.append(
                QuantisedWeight(
                    name=str(coded.product.root.name),
                    codes=codes,
                    module=coded.product.module,
                    relative=float(f"{coded.cost.relative:.6g}"),
                    norm=float(f"{coded.cost.squared**0.5:.6g}"),
                )
            )
        record = QuantisedRecord(
            to=choice.to,
            method=choice.method,
            block_size=choice.block_size,
            symmetric=choice.is_symmetric,
            accuracy_level=choice.accuracy_level,
            weights=tuple(weights),
        )
        add_record(self.graph.model.metadata_props, record)
        return replace(self.quantised, record=record)


def quantise(
    graph: GraphFile,
    choice: QuantiseChoice,
    changes: Mapping[ir.Value, InitializerChange] | None = None,
    *,
    rounding: Mode = "sample",
    scratch: Path | None = None,
) -> Quantising:
    """Let the readers of a graph's weights read codes, which are made when they are written.

    Args:
        graph: The graph, which is changed; LoRA tensors stay as they are.
        choice: The user's choice.
        changes: Changes of constants by merged adapters, which come before.
        rounding: How the cost of rounding of these is measured.
        scratch: Folder for the values of a merged weight.

    Raises:
        GraphError: The choice is not possible, or no weight can be quantised; each is listed with the reason.
        BackendUnavailable: The method needs a package that is not installed.
    """
    choice, method = checked(choice)
    products, rows = find_products(graph, choice)
    _refuse_unknown(choice.keep, rows)
    if not products:
        _refuse_nothing(graph, rows)
    changes, roundings = changes or {}, dict[str, Rounding]()
    writer, coded = Rewriter(graph, choice), []
    for product in products:
        tensor, change = product.root.const_value, changes.get(product.root)
        assert tensor is not None
        read = (
            partial(_stored, tensor)
            if change is None
            else partial(_merged, product.root, change, rounding=rounding, scratch=scratch, costs=roundings)
        )
        weight = CodedWeight(product, choice, method, read)
        coded.append((weight, writer.replace(weight)))
    writer.finish()
    _forget_stored(graph, {str(product.root.name) for product in products})
    quantised = QuantisedWeights(choice=choice, rows=tuple(rows))
    return Quantising(graph=graph, quantised=quantised, coded=coded, roundings=roundings)


def packages_of(quantised: QuantisedWeights | None) -> list[str]:
    """Return the packages whose versions determine the bytes that are written."""
    return ["numpy", "ml_dtypes", "onnx-ir", *(["onnxruntime"] if quantised else [])]


def _refuse_nothing(graph: GraphFile, rows: Sequence[WeightRow]) -> None:
    problems = [f"{row.module or row.weight}: {row.reason}" for row in rows]
    raise GraphError(
        f"{graph.path.name} has no weight that can be quantised",
        "give a graph with MatMul or Gemm of float weights, or change what is left in float "
        "(--head, --embeddings, --keep, --block-size)",
        limited(problems or ["no constant of two or more axes"], "weights", most=_SHOWN),
    )


def _refuse_unknown(kept: Sequence[str], rows: Sequence[WeightRow]) -> None:
    """Refuse names of modules to leave in float that are not in the graph: a typo would quantise one."""
    # A weight with several readers has one's path in its row.
    unknown = [
        name
        for name in kept
        if not any(is_kept(name, row.weight, row.module) or f"(--keep {name})" in row.reason for row in rows)
    ]
    if unknown:
        modules = sorted({row.module or row.weight for row in rows})
        raise GraphError(
            "the graph has no such modules to leave in float: " + ", ".join(map(shown, unknown)),
            "give --keep a module's path, or what it ends in; these are there",
            limited([shown(module) for module in modules], "modules", most=_SHOWN),
        )


def _stored(tensor: ir.TensorProtocol) -> Array:
    return np.asarray(tensor.numpy())


def _merged(
    root: ir.Value,
    change: InitializerChange,
    *,
    rounding: Mode,
    scratch: Path | None,
    costs: dict[str, Rounding],
) -> Array:
    mine: dict[str, Rounding] = {}
    if scratch and not is_folder(scratch):
        scratch = None  # small weights are made before the output's folder
    values = merged_values(root, change, rounding=rounding, scratch=scratch, costs=mine)
    update(costs, mine)
    return values


def _forget_stored(graph: GraphFile, names: set[str]) -> None:
    """Remove quantised weights from the places of W0 in a LoRA record."""
    metadata = graph.model.metadata_props
    if LORA_KEY not in metadata:
        return
    record = lora_record_of(metadata, str(graph.path))
    modules = tuple(_without_stored(module, names) for module in record.modules)
    metadata[LORA_KEY] = replace(record, modules=modules).to_json()


def _without_stored(module: ExposedModule, names: set[str]) -> ExposedModule:
    members = tuple(
        replace(member, stored=()) if names & {rows.weight for rows in member.stored} else member
        for member in module.members
    )
    return replace(module, members=members)
