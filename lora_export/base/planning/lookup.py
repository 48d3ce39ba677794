"""Find the stored tensors that hold the parameters of an adapter, by their names in the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.heads import head_classes
from lora_export.base.checkpoint.names import Names, StoredPart
from lora_export.base.checkpoint.quantised import Quantised
from lora_export.base.checkpoint.vocabulary import head_hint, is_task_head
from lora_export.base.planning.checkpoint_plan import NoSite
from lora_export.base.planning.ledger import Ledger
from lora_export.base.ties.tied_layers import may_tie_layers
from lora_export.base.ties.ties import Ties, find_ties, may_be_tied
from lora_export.plan import Refusal
from lora_export.sites.experts import ExpertLayout
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import NOT_FOUND, NamingProblem, Renaming


def named_of(adapter: Adapter) -> list[Named]:
    """Return all parameters that an adapter changes, by its own paths."""
    named = [Named(path, "replace", shape=values.shape) for path, values in adapter.extras.items()]
    named += [Named(path, "replace rows") for path in adapter.token_rows]
    for module in adapter.modules.values():
        parameter = f"{module.path}.{module.parameter}"
        named.append(Named(parameter, "merge", module.component, module.told_shape))
        if module.lora_bias is not None:
            named.append(Named(f"{module.path}.bias", "add to bias", module.component))
    return named


class Lookup:
    """A look-up of the adapters' parameters in one checkpoint.

    Args:
        checkpoint: The base.
        quantised: The base's quantised weights.
        ledger: Gets the tensors that the base has only as another one of a tie.

    Attributes:
        absent: Parameters without a site because the base has no such name.
    """

    def __init__(self, checkpoint: Checkpoint, quantised: Quantised, ledger: Ledger) -> None:
        self._checkpoint, self._quantised, self._ledger = checkpoint, quantised, ledger
        self.absent: list[str] = []
        self._names = Names(checkpoint, is_changed=True)
        self._renaming = Renaming(names=())
        self._numbers: dict[Named, int] = {}
        self._is_flattened = False
        self._trained: Mapping[str, Any] = {}

    def begin(self, adapter: Adapter) -> Renaming:
        """Find the base's names for one adapter's parameters: one change of names holds for all."""
        self._is_flattened, self._trained = adapter.flattened, adapter.config
        named = named_of(adapter)
        self._renaming = self._names.rename(named, adapter.flattened, adapter.scope)
        self._numbers = {one: number for number, one in enumerate(named)}
        return self._renaming

    def held(self, parameter: str) -> ExpertLayout | None:
        """Return the layout of a parameter in the model's own module; see `Names.held`."""
        return self._names.held(parameter)

    def stored(self, parameter: str) -> tuple[tuple[int, ...], bool] | None:
        """Return a stored parameter's shape, and True if its module has a bias; see `Names.stored`."""
        return self._names.stored(parameter)

    @cached_property
    def ties(self) -> Ties:
        """The base's ties."""
        return find_ties(self._checkpoint)

    @cached_property
    def _layers_may_be_tied(self) -> bool:
        return may_tie_layers(self._checkpoint.config)

    def may_be_tied(self, name: str) -> bool:
        """Return whether a name may be one of a tie, so that `ties` must be asked."""
        return may_be_tied(name) or self._layers_may_be_tied

    def _find(self, named: Named) -> tuple[StoredPart, ...] | NamingProblem:
        """Return the tensors that hold an adapter's parameter, or the reason why they are unknown."""
        number = self._numbers[named]
        name, problem = self._renaming.names[number], self._renaming.problems.get(number)
        return (self._names.parts(name) if name and not problem else ()) or problem or NOT_FOUND

    def parts(self, named: Named, whole: tuple[int, ...] = ()) -> tuple[StoredPart, ...]:
        """Return the tensors that hold a parameter, or will.

        Args:
            named: A parameter of the adapter that `begin` was called with.
            whole: Shape of the values that replace it whole, for the hint.

        Raises:
            NoPlace: The base lacks it, has several, or can't be merged into there.
        """
        parts = self._find(named)
        if not isinstance(parts, NamingProblem):
            self._check(parts)
            return parts
        number = self._numbers[named]
        parameter = self._renaming.names[number] or named.key
        if packed := self._quantised.packed_at(parameter):
            raise NoSite(packed)
        if parts.kind == "ambiguous":
            raise NoSite(Refusal("ambiguous", str(parts)))
        flattened = self._is_flattened and self._renaming.names[number] is None
        tied = self.ties.absent(parameter, flattened) if self.may_be_tied(parameter) else None
        if tied is None:
            self.absent.append(named.key)
            raise NoSite(Refusal("not found", str(parts), self._head_hint(named.key, whole) if whole else ""))
        tie, name = tied
        if name not in self._checkpoint.tensors:
            self._ledger.sources[name] = tie.source
        part = StoredPart(tensor=name, reason=f"tied to {tie.source}")
        self._check([StoredPart(tensor=tie.source)])
        return (part,)

    def _check(self, parts: Sequence[StoredPart]) -> None:
        """Refuse tensors that can't be merged into."""
        for part in parts:
            if refusal := self._quantised.refusal(part.tensor):
                raise NoSite(refusal)

    def single(self, named: Named, whole: tuple[int, ...] = ()) -> tuple[str, str]:
        """Return the one tensor that is a parameter, and the evidence for it; see `parts`."""
        parts = self.parts(named, whole)
        (first, *more) = parts
        if more or first.piece != (0, 1) or first.expert is not None or first.transposed:
            raise NoSite(
                Refusal(
                    "operator",
                    f"the base stores it as {len(parts)} tensors: replacing it whole is not possible",
                )
            )
        return parts[0].tensor, parts[0].reason

    def _head_hint(self, path: str, shape: tuple[int, ...]) -> str:
        if not is_task_head(path):
            return ""
        classes = head_classes(self._checkpoint, path, shape, self._trained)
        return head_hint(path, shape, classes, of_graph=False)
