"""Find the parameters that an adapter changes in a PyTorch model.

An adapter's paths are those of the model in the process that trained it. They differ if the model was
wrapped, is another class of the same family, has modules that transformers has renamed since, or if the file
writes underscores for dots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Names, StoredPart
from lora_export.errors import LoraExportError
from lora_export.plan import Refusal
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import Renaming, rename

if TYPE_CHECKING:
    import torch


TRAINED_ON = "give the base that the adapter was trained on"


class NoParameter(Exception):
    """A part of an adapter can't be applied to the model; the message says why. Caught in `hooks.bind`.

    Args:
        text: The reason.
        hint: Remedy.
    """

    def __init__(self, text: str, hint: str = TRAINED_ON) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass(frozen=True)
class OwnedTensor:
    """A parameter or a buffer, by the module that holds it; hashable, to be the key of its former values.

    Attributes:
        module: The module.
        name: Name of the parameter in the module.
    """

    module: torch.nn.Module
    name: str

    def get(self) -> torch.Tensor:
        """Return the present values."""
        values: torch.Tensor = getattr(self.module, self.name)
        return values

    def put(self, values: torch.Tensor) -> None:
        """Replace the values in this module; parameters of other modules that are tied to it keep theirs."""
        import torch

        if self.name not in self.module._parameters:
            self.module._buffers[self.name] = values
        elif isinstance(values, torch.nn.Parameter):
            self.module._parameters[self.name] = values
        else:
            self.module._parameters[self.name] = torch.nn.Parameter(values, requires_grad=False)


class ModelParameters:
    """Find parameters and buffers of a model by an adapter's paths.

    Args:
        model: The model.
        folder: The model's checkpoint, whose names may be those of an older transformers; None if there is
            none.
    """

    def __init__(self, model: torch.nn.Module, folder: Path | None = None) -> None:
        # Tied parameters are listed under each of their names.
        self._known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._names = KnownNames(self._known)
        self._folder = folder

    @property
    def known(self) -> set[str]:
        """Names of the model's parameters and buffers."""
        return self._known

    def finder(self, adapter: Adapter) -> ParameterFinder:
        """Return a finder for one adapter's parameters; one renaming holds for all of them.

        If the model's own names don't fit, the names under which the checkpoint stores its parameters may
        fit.
        """
        named = [
            *(Named(f"{module.path}.{module.parameter}", "merge", module.component)
              for module in adapter.modules.values()),
            *(Named(path, "replace") for path in adapter.extras),
        ]  # fmt: skip
        found = rename(named, self._names, flattened=adapter.flattened, scope=adapter.scope)
        missing = [n for n, name in enumerate(found.names) if name not in self._known]
        older = found
        if missing and self._by_stored:
            older = rename(
                named, KnownNames(self._by_stored), flattened=adapter.flattened, scope=adapter.scope
            )
        return ParameterFinder(self, named, found, older)

    def stored(self, parameter: str) -> list[tuple[str, StoredPart]]:
        """Return the model's names of a tensor that the checkpoint stores under an older name."""
        return self._by_stored.get(parameter, [])

    @cached_property
    def _by_stored(self) -> dict[str, list[tuple[str, StoredPart]]]:
        if self._folder is None:
            return {}
        try:
            table = Names(Checkpoint.open(self._folder))
        except LoraExportError:  # not safetensors: transformers loaded it, but we can't list it
            return {}
        found: dict[str, list[tuple[str, StoredPart]]] = {}
        for name in sorted(self._known):
            parts = table.find(name)
            for part in parts:
                if part.transposed:  # an adapter for the stored, transposed tensor would be ambiguous
                    continue
                found.setdefault(part.tensor, []).append((name, part))
        return found


class ParameterFinder:
    """Find one adapter's parameters; made by `ModelParameters.finder`."""

    def __init__(
        self, parameters: ModelParameters, named: Sequence[Named], own: Renaming, older: Renaming
    ) -> None:
        self._parameters, self._own, self._older = parameters, own, older
        self._numbers = {one: number for number, one in enumerate(named)}

    def find(
        self, parameter: str, action: str = "merge", component: str | None = None
    ) -> tuple[str, StoredPart | None] | Refusal:
        """Return the model's name of a parameter, or the reason why there is none.

        With the name comes a `StoredPart` if the path means only one expert, or some rows, of that parameter.
        """
        number = self._numbers[Named(parameter, action, component)]
        problem = self._own.problems.get(number)
        name = self._own.names[number]
        if name is not None and not problem and name in self._parameters.known:
            return name, None
        older = self._older.names[number]
        stored = self._parameters.stored(older) if older and number not in self._older.problems else []
        if len(stored) == 1:
            name, part = stored[0]
            whole = part.expert is None and part.piece == (0, 1)
            return name, None if whole else part
        if problem and problem.kind == "ambiguous":
            return Refusal(problem.kind, str(problem), self._own.hint)
        return Refusal("not found", "the model has no parameter of that name", self._own.hint)
