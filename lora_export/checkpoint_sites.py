"""Where an adapter's changes lie in a checkpoint: the plan, and patches that are made when they are written.

Layouts that a stored weight can have against the module's canonical one:

- as it is (`nn.Linear`, convolutions, embeddings);
- transposed: GPT-2's Conv1D stores ``(in_dim, out_dim)``. Shapes tell; for square ones the names of
  Conv1D modules in the model families that use it, else ``fan_in_fan_out`` in the adapter's config;
- experts stacked in one tensor, or one tensor for each expert and half;
- not at all: an output head that is tied to the input embedding. PEFT's `merge_and_unload` adds the head's
  change to the one shared parameter, so that the embedding changes as well, which the trained adapter
  never did (PEFT warns of it). Here the head becomes a tensor of its own and the config says
  ``tie_word_embeddings: false``; so too when the embedding is changed, for the sake of the head. An
  adapter trained with ``ensure_weight_tying`` changes both alike, and they stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from lora_export.adapter import Adapter, Array, LoraModule
from lora_export.checkpoint import Checkpoint, StoredTensor
from lora_export.checkpoint_names import Names, Part, tied_head
from lora_export.patch import Patch, Placement, patch_from, replacement
from lora_export.plan import Plan, PlanRow, unaccounted
from lora_export.safetensors_header import FLOATS
from lora_export.sites.experts import fit_matrix, fit_parameter, is_turned, settle, unsettled

# Model families with Conv1D, and its names there (transformers ``pytorch_utils.Conv1D``).
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_HEADS = {"lm_head", "embed_out", "output_projection"}
_EMBEDDINGS = {
    *("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "tokens_embed", "shared")
}
# Classes with an output head over the vocabulary, by a part of their name.
_LANGUAGE_MODELS = ("LM", "PreTraining", "ConditionalGeneration")

MakePatch = Callable[[type[Any]], Patch]


@dataclass(frozen=True)
class Added:
    """A tensor that the output has and the base has not: a head that was tied.

    Attributes:
        name: Its name.
        source: The stored tensor that it starts from.
    """

    name: str
    source: str


@dataclass
class Placed:
    """The plan for a checkpoint.

    Attributes:
        plan: What happens to each parameter.
        changes: Name of a stored or added tensor → its patches, in the order given, made on demand.
        stacked: Names of tensors whose first two axes are rows (stacked experts).
        added: Heads that are no longer tied.
        untied: The config says that head and embedding are tied, and the output's has to say no.
        absent: Parameters without a place because the base has no such name.
    """

    plan: Plan = field(default_factory=Plan)
    changes: dict[str, list[MakePatch]] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    added: list[Added] = field(default_factory=list)
    untied: bool = False
    absent: list[str] = field(default_factory=list)


class NoPlace(Exception):
    """Why a parameter can't be placed; caught here and written into the plan."""


def place_adapters(checkpoint: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float]) -> Placed:
    """Find every change of some adapters in a checkpoint; what has no place is ``refused`` in the plan.

    Args:
        checkpoint: The base.
        adapters: What to merge.
        weights: A factor for each adapter's ΔW.
    """
    placer = _Placer(checkpoint)
    for given, weight in zip(adapters, weights, strict=True):
        adapter = placer.settled(given)
        start = len(placer.rows)
        for path, values in adapter.extras.items():
            names: tuple[str, ...] = (adapter.extra_tensors.get(path, path),)
            placer.place(adapter, path, names, "replace", partial(placer.replaced, path, values, adapter))
        for module in adapter.modules.values():
            biases = tuple(n for n in module.tensor_names if n.endswith("bias")) if _biased(module) else ()
            names = tuple(n for n in module.tensor_names if n not in biases)
            path = f"{module.path}.{module.parameter}"
            placer.place(adapter, path, names, "merge", partial(placer.merged, module, adapter, weight))
            if _biased(module):
                act = partial(placer.bias_added, module, adapter, weight)
                placer.place(adapter, f"{module.path}.bias", biases, "add to bias", act)
        lost = unaccounted(adapter.tensor_names, placer.rows[start:])
        placer.rows += [PlanRow(adapter.name, n, (n,), "refused", reason="no rule for it") for n in lost]
    return placer.finish(any(a.config.get("ensure_weight_tying") for a in adapters))


def _biased(module: LoraModule) -> bool:
    return module.lora_bias is not None


class _Placer:
    """Collects rows and changes of all adapters over one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = Names(checkpoint)
        self._result = Placed()
        kinds = checkpoint.config.get("architectures") or []
        headless = bool(kinds) and not any(part in kind for kind in kinds for part in _LANGUAGE_MODELS)
        self._tied = tied_head(checkpoint.config) and not headless
        self._heads: dict[str, str] = {}
        self._notes: list[str] = []
        self.rows: list[PlanRow] = []

    def settled(self, adapter: Adapter) -> Adapter:
        """Return the adapter with the layout of its experts as this base has it."""
        adapter, notes = settle(adapter, self._names.held)
        self._notes += notes
        return adapter

    def place(
        self,
        adapter: Adapter,
        parameter: str,
        tensors: tuple[str, ...],
        action: str,
        act: Callable[[], tuple[list[str], str, str]],
    ) -> None:
        """Add one row: ``act`` registers the change and returns places, layout and reason."""
        try:
            places, layout, reason = act()
        except NoPlace as problem:
            self.rows.append(PlanRow(adapter.name, parameter, tensors, "refused", reason=str(problem)))
            return
        shown = ", ".join(places[:2]) + (f", … ({len(places)})" if len(places) > 2 else "")
        self.rows.append(PlanRow(adapter.name, parameter, tensors, action, shown, "", layout, reason))

    def finish(self, tied_adapter: bool) -> Placed:
        """Untie heads whose embedding changes, and return the whole."""
        result, notes = self._result, self._notes
        embedding = next((name for name in result.changes if self._is_tied(name, _EMBEDDINGS)), None)
        stored = next((name for name in self._checkpoint.tensors if self._is_tied(name, _HEADS)), None)
        if stored is not None and (embedding is not None or stored in result.changes):
            notes.append(self._part_stored_head(stored, embedding, tied_adapter))
        if stored is None and embedding is not None and not self._heads:
            self._heads["lm_head.weight"] = embedding
        for name, source in self._heads.items():
            if tied_adapter and source in result.changes:
                result.changes.pop(name, None)
                notes.append(f"{name} stays tied to {source}: the adapter was trained so")
                continue
            result.added.append(Added(name, source))
            result.untied = True
            notes.append(
                f"{name} was tied to {source}; the adapter changes only one of them, so the output stores "
                "both and its config says tie_word_embeddings: false"
            )
        result.plan = Plan(tuple(self.rows), tuple(notes))
        return result

    def _part_stored_head(self, head: str, embedding: str | None, tied_adapter: bool) -> str:
        """Settle a head that the file holds although the config ties it: loading would drop it."""
        if tied_adapter and embedding is not None:
            self._result.changes[head] = self._result.changes[embedding]
            return f"{head} stays tied to {embedding}: the adapter was trained so"
        self._result.untied = True
        return (
            f"{head} is stored, and tied by the config: the output's config says tie_word_embeddings: false"
        )

    def _is_tied(self, name: str, leaves: set[str]) -> bool:
        return self._tied and _leaf(name) in leaves

    # What each kind of change does.

    def replaced(self, path: str, values: Array, adapter: Adapter) -> tuple[list[str], str, str]:
        """Put whole values in place of a parameter."""
        name, reason = self._single(path, adapter.flattened, values.shape)
        tensor = self._tensor(name)
        if tensor.shape != values.shape:
            raise NoPlace(f"stored with shape {tensor.shape}, the adapter's values have {values.shape}")
        matrix = values.reshape(view_of(tensor.shape, name in self._result.stacked))
        self._add(name, lambda _: replacement(path, matrix))
        return [name], "", reason

    def bias_added(self, module: LoraModule, adapter: Adapter, weight: float) -> tuple[list[str], str, str]:
        """Add the scaled bias of lora_B to the module's own bias."""
        assert module.lora_bias is not None
        path, bias = f"{module.path}.bias", module.lora_bias
        parts = self._names.find(path, adapter.flattened)
        if isinstance(parts, str):
            raise NoPlace("lora_bias needs a bias to be added to, and the base has none here")
        name = parts[0].tensor
        if self._tensor(name).shape != bias.shape:
            raise NoPlace(f"{name} has shape {self._tensor(name).shape}, lora_bias {bias.shape}")

        def make(dtype: type[Any]) -> Patch:
            row = bias.astype(dtype)[None, :] * dtype(weight * module.scaling)
            return Patch(path, 0, 0, 1, bias.size, left=np.ones((1, 1), dtype), right=row)

        self._add(name, make)
        return [name], "", parts[0].reason

    def merged(self, module: LoraModule, adapter: Adapter, weight: float) -> tuple[list[str], str, str]:
        """Add ΔW where the module's weight, or each part of it, is stored."""
        if module.groups > 1:
            raise NoPlace(
                f"a convolution of {module.groups} groups can't be merged (PEFT refuses it, too); "
                "it can be exposed"
            )
        parts = self._parts(f"{module.path}.{module.parameter}", adapter.flattened, module.weight_shape)
        rows, _ = module.matrix_shape
        experts = {part.expert for part in parts}
        if None not in experts and len(experts) != module.experts:
            raise NoPlace(f"the base has {len(experts)} experts, the adapter {module.experts}")
        layouts = []
        for part in parts:
            index, count = part.piece
            if rows % count:
                raise NoPlace(f"{rows} rows can't be cut into {count} equal tensors")
            span = (rows // count * index, rows // count * (index + 1))
            placements, layout = self._fit(module, adapter, part, span)
            layouts.append(layout)
            for placement in placements:
                self._add(part.tensor, partial(_make, module, placement, weight))
        return [part.tensor for part in parts], layouts[0], parts[0].reason

    def _fit(
        self, module: LoraModule, adapter: Adapter, part: Part, span: tuple[int, int]
    ) -> tuple[list[Placement], str]:
        """Return where canonical rows ``span`` lie in a stored tensor; NoPlace if shapes don't allow it."""
        if module.kind == "parameter":
            return self._fit_parameter(module, part, span)
        tensor = self._tensor(part.tensor)
        wanted = (span[1] - span[0], module.matrix_shape[1])
        shape = tensor.shape
        # kohya and diffusers write a 1×1 convolution's factors as a Linear's, and the other way round.
        plain = len(shape) >= 2 and all(size == 1 for size in shape[2:])
        same = shape == module.weight_shape or (plain and shape[:2] == wanted)
        turned = module.kind == "linear" and shape == wanted[::-1]
        if not same and not turned:
            as_name = "" if tensor.name.endswith(f"{module.path}.{module.parameter}") else f" ({tensor.name})"
            raise NoPlace(
                f"stored with shape {tensor.shape}, the adapter fits {module.weight_shape}{as_name}"
            )
        transposed = turned and (not same or self._square_is_transposed(module, adapter))
        if part.transposed:
            raise NoPlace(f"{tensor.name} holds the transpose of it, by transformers' conversion")
        return [Placement(span, 0, 0, transposed)], "transposed" if transposed else ""

    def _fit_parameter(
        self, module: LoraModule, part: Part, span: tuple[int, int]
    ) -> tuple[list[Placement], str]:
        """Return where a module's own parameter, or some experts of one, lie in a stored tensor.

        PEFT adds to such a parameter as the module holds it, which is how it is stored, but where
        transformers transposes it in loading.
        """
        held = self._names.held(f"{module.path}.{module.parameter}")
        if reason := unsettled(module, held):
            raise NoPlace(reason)
        tensor, experts = self._tensor(part.tensor), module.experts
        if part.expert is not None:
            placed = fit_matrix((span[1] - span[0], module.weight_shape[1]), tensor.shape, part.transposed)
        else:
            turned = part.transposed or (held is not None and is_turned(tensor.shape, held.shape))
            placed = fit_parameter(module, tensor.shape, turned)
        if isinstance(placed, str):
            raise NoPlace(placed)
        layout = "transposed" if placed else ""
        if part.expert is not None or experts == 1:
            return [Placement(span, 0, 0, placed, expert=part.expert or 0)], layout
        self._result.stacked.add(tensor.name)
        height = tensor.shape[1]
        placements = [Placement(span, e * height, 0, placed, expert=e) for e in range(experts)]
        return placements, f"{experts} experts stacked" + (", transposed" if placed else "")

    def _square_is_transposed(self, module: LoraModule, adapter: Adapter) -> bool:
        model = self._checkpoint.config.get("model_type")
        if model in _CONV1D_MODELS:
            return module.path.rpartition(".")[2] in _CONV1D_NAMES
        # PEFT writes fan_in_fan_out only for Conv1D and corrects it for Linear (tuners/lora/model.py).
        return adapter.fan_in_fan_out

    # Names.

    def _parts(self, parameter: str, flattened: bool, shape: tuple[int, ...]) -> tuple[Part, ...]:
        parts = self._names.find(parameter, flattened)
        if not isinstance(parts, str):
            self._check(parts)
            return parts
        source = self._tied_source(parameter, shape)
        if source is None:
            if not parts.startswith("ambiguous"):
                self._result.absent.append(parameter)
            raise NoPlace(parts)
        self._heads[parameter] = source
        return (Part(parameter, reason=f"tied to {source}"),)

    def _check(self, parts: Sequence[Part]) -> None:
        """Refuse what can't be merged into: other dtypes than floats, and embeddings tied in unknown ways."""
        for part in parts:
            tensor = self._checkpoint.tensors[part.tensor]
            if tensor.code not in FLOATS:
                raise NoPlace(
                    f"{tensor.name} is stored as {tensor.code}: a quantised weight can't be merged into"
                )
            if self._is_tied(part.tensor, _EMBEDDINGS | _HEADS) and not self._causal():
                raise NoPlace(
                    "embedding and output head are tied: both would change; save the base without its "
                    "head, or with tie_word_embeddings=False"
                )

    def _single(self, path: str, flattened: bool, shape: tuple[int, ...]) -> tuple[str, str]:
        parts = self._parts(path, flattened, shape)
        (first, *more) = parts
        if more or first.piece != (0, 1) or first.expert is not None or first.transposed:
            raise NoPlace(f"the base stores it as {len(parts)} tensors: replacing it whole is not possible")
        return parts[0].tensor, parts[0].reason

    def _tied_source(self, parameter: str, shape: tuple[int, ...]) -> str | None:
        if not self._tied or _leaf(parameter) not in _HEADS or not self._causal():
            return None
        found = [t.name for t in self._checkpoint.tensors.values() if _leaf(t.name) in _EMBEDDINGS]
        fitting = [name for name in found if self._checkpoint.tensors[name].shape == shape]
        return fitting[0] if len(fitting) == 1 else None

    def _causal(self) -> bool:
        """Whether the output head is known to be a plain Linear beside the embedding.

        Others do more where tied: T5 scales its output then, BERT has a transform and a bias before it.
        """
        kinds = self._checkpoint.config.get("architectures") or []
        return any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)

    def _tensor(self, name: str) -> StoredTensor:
        """Return a stored tensor, or for a head that is tied its source under the head's name."""
        if name in self._heads and name not in self._checkpoint.tensors:
            return replace(self._checkpoint.tensors[self._heads[name]], name=name)
        return self._checkpoint.tensors[name]

    def _add(self, name: str, make: MakePatch) -> None:
        self._result.changes.setdefault(name, []).append(make)


def _make(module: LoraModule, placement: Placement, weight: float, dtype: type[Any]) -> Patch:
    return patch_from(module, placement, weight, dtype)


def _leaf(name: str) -> str:
    """Return ``embed_tokens`` for ``model.embed_tokens.weight``."""
    module, _, leaf = name.rpartition(".")
    return module.rpartition(".")[2] if leaf == "weight" else ""


def view_of(shape: tuple[int, ...], stacked: bool) -> tuple[int, int]:
    """Return a shape as a matrix: the first axis are the rows, of stacked experts the first two.

    A vector or a scalar is one row.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if len(shape) < 2:
        return 1, size
    rows = shape[0] * shape[1] if stacked else shape[0]
    return rows, size // rows if rows else 0
