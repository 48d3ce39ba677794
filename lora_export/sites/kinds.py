"""Settle whether a module is a Linear or an Embedding, if its file doesn't say so (`LoraModule.kind_by`).

The factors of both lie alike in such a file, but the change of an Embedding is ``(B·A)ᵀ``. Rules:

1. The base decides: its PyTorch module's class, or the operator that reads the weight in a graph.
2. Without these, a matrix that is not square fits in one way only.
3. Else a bias beside the weight is a Linear's.
4. Else the name decides. A square matrix whose name has only a word of embeddings' names is refused.
5. Two hand-written Linears beside a square table don't say whether they change it by ``B·A`` or its
   transpose: they are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter, Kind, LoraModule
from lora_export.formats.reading.embedding_names import may_be_embedding
from lora_export.plan import Refusal
from lora_export.sites.experts import ExpertLayout

if TYPE_CHECKING:
    from lora_export.sites.target import Target

AS_PEFT = (
    "save the adapter as PEFT does, which says it: lora_embedding_A (rank, num_embeddings) and "
    "lora_embedding_B (dim, rank) of an Embedding, lora_A.weight and lora_B.weight of a Linear"
)
_UNKNOWN = (
    "the file does not say whether it is a Linear or an Embedding, whose change is the transpose; the matrix "
    "is square {shape}, and the class of the base's module is not known"
)
_LAYERS = (
    "the base has an Embedding there, a square one {shape}: whether the file's two Linears change it by B·A "
    "or by its transpose is not known"
)
_DORA = "mlx-lm's DoRA of an embedding has a norm for each token; not supported"
_EXAMPLES = 3
_KINDS: tuple[Kind, ...] = ("linear", "embedding")
# Function that returns a stored parameter's shape and whether its module has a bias; None if it is unknown.
Stored = Callable[[str], tuple[tuple[int, ...], bool] | None]


def as_seen(module: LoraModule, kind: Kind) -> LoraModule | Refusal:
    """Return a module as one of the kind that the base has there, or the reason why that is impossible.

    Args:
        module: Module of an adapter; one whose file states its kind is returned as it is.
        kind: Kind of the base's module.
    """
    if module.kind_by == "file" or module.kind not in _KINDS:
        return module
    kind = "embedding" if kind == "embedding" else "linear"
    rows, cols = module.matrix_shape
    if kind == "embedding" and module.kind_by == "layers" and rows == cols:
        return Refusal("kind", _LAYERS.format(shape=(rows, cols)), AS_PEFT)
    if kind == "embedding" and module.magnitude is not None:
        return Refusal("kind", _DORA)
    return replace(module, kind=kind, kind_by="file")


def settle_kinds(
    adapter: Adapter, held: Callable[[str], ExpertLayout | None], stored: Stored | None = None
) -> tuple[Adapter, tuple[str, ...]]:
    """Return an adapter with the kinds that its base's modules have, as far as they are known, and notes.

    Args:
        adapter: The adapter as its file describes it.
        held: Function that looks up a parameter of the base's model by its path.
        stored: Function that tells without the model what is stored; the model is asked only if that leaves
            a doubt.
    """
    changed: dict[str, LoraModule] = {}
    other: list[LoraModule] = []
    for module in adapter.modules.values():
        kind = _kind_of(module, held, stored) if module.kind_by != "file" else None
        made = as_seen(module, kind) if kind else module
        if isinstance(made, LoraModule) and made is not module:
            changed[module.key] = made
            other += [made] * (made.kind != module.kind)
    notes = tuple(_note(adapter, [m for m in other if m.kind == kind]) for kind in _KINDS)
    settled = replace(adapter, modules={**adapter.modules, **changed}) if changed else adapter
    return settled, tuple(note for note in notes if note)


def unsettled_kind(module: LoraModule, held: Callable[[str], ExpertLayout | None]) -> Refusal | None:
    """Return the reason why a square matrix of a module that is not settled has no site, or None (rule 4)."""
    rows, cols = module.matrix_shape
    if module.kind_by == "file" or module.kind not in _KINDS or rows != cols:
        return None
    place = held(f"{module.path}.{module.parameter}")
    if place is not None and place.kind is not None:
        made = as_seen(module, place.kind)
        return made if isinstance(made, Refusal) else None
    if module.kind == "embedding" or not may_be_embedding(module.path):
        return None
    return Refusal("kind", _UNKNOWN.format(shape=(rows, cols)), AS_PEFT)


def forms_by_kind(target: Target) -> list[tuple[Target, Refusal | None]]:
    """Return a graph's target as each kind that it may be, with the reason why it can't be merged as such."""
    module = target.module
    if module is None or target.action != "merge" or as_seen(module, "linear") is module:
        return [(target, None)]
    forms: list[tuple[Target, Refusal | None]] = []
    for kind in _KINDS:
        seen = as_seen(module, kind)
        refusal = seen if isinstance(seen, Refusal) else None
        made = replace(module, kind=kind, kind_by="file") if isinstance(seen, Refusal) else seen
        forms.append((replace(target, kind=kind, shape=made.weight_shape, module=made), refusal))
    return forms


def _kind_of(
    module: LoraModule, held: Callable[[str], ExpertLayout | None], stored: Stored | None
) -> Kind | None:
    """Apply rules 1 to 3, the ones that need no model first."""
    path = f"{module.path}.{module.parameter}"
    linear = (module.lora_b.shape[0], *module.lora_a.shape[1:])
    known = stored(path) if stored is not None else None
    if known is not None:
        shape, has_bias = known
        if has_bias or (shape == linear and shape != linear[::-1]):
            return "linear"
    place = held(path)
    return place.kind if place is not None else None


def _note(adapter: Adapter, modules: list[LoraModule]) -> str:
    """Return a note on modules that are of another kind than their names say."""
    if not modules:
        return ""
    named = ", ".join(module.path for module in modules[:_EXAMPLES]) + ", …" * (len(modules) > _EXAMPLES)
    kind = "an Embedding" if modules[0].kind == "embedding" else "a Linear"
    return f"{adapter.name}: the file does not say what kind of module {named} is; in the base it is {kind}"
