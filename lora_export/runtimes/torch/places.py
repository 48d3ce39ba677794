"""Where the parameters that an adapter changes are in a PyTorch model.

An adapter's paths are those of the model in the process that trained it. They differ where the model was
wrapped, is another class of the same family, has modules that transformers has renamed since, or where the
file writes underscores for dots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.names import Names, Part
from lora_export.errors import LoraExportError
from lora_export.plan import Refusal
from lora_export.sites.naming.known_names import KnownNames
from lora_export.sites.naming.names import Named
from lora_export.sites.naming.renaming import Renaming, rename

if TYPE_CHECKING:
    import torch


class NoPlace(Exception):
    """Why a part of an adapter can't act on the model; caught in `torch_branches.bind`."""


@dataclass(frozen=True)
class Owner:
    """A parameter or a buffer, by the module that holds it; hashable, so that what stood there can be kept.

    Attributes:
        module: The module.
        name: The parameter's own name in it.
    """

    module: torch.nn.Module
    name: str

    def get(self) -> torch.Tensor:
        """Return what is there now."""
        values: torch.Tensor = getattr(self.module, self.name)
        return values

    def put(self, values: torch.Tensor) -> None:
        """Put other values there; the same name in other modules, tied to it, keeps its own."""
        import torch

        if self.name not in self.module._parameters:
            self.module._buffers[self.name] = values
        elif isinstance(values, torch.nn.Parameter):
            self.module._parameters[self.name] = values
        else:
            self.module._parameters[self.name] = torch.nn.Parameter(values, requires_grad=False)


class Places:
    """Finds parameters and buffers of a model by the paths that adapters have for them.

    Args:
        model: Where to look.
        folder: Its checkpoint, whose names may be those of an older transformers; None: there is none.
    """

    def __init__(self, model: torch.nn.Module, folder: Path | None = None) -> None:
        # Tied parameters have a place under each of their names.
        self._known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._names = KnownNames(self._known)
        self._folder = folder

    @property
    def known(self) -> set[str]:
        """The model's names of parameters and buffers."""
        return self._known

    def finder(self, adapter: Adapter) -> Finder:
        """Return what finds one adapter's parameters: one change of names holds for all of them.

        Where the model's own names don't fit, those under which the checkpoint stores its parameters may.
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
        return Finder(self, named, found, older)

    def stored(self, parameter: str) -> list[tuple[str, Part]]:
        """Return the model's names of a tensor that the checkpoint stores under an older name."""
        return self._by_stored.get(parameter, [])

    @cached_property
    def _by_stored(self) -> dict[str, list[tuple[str, Part]]]:
        if self._folder is None:
            return {}
        try:
            table = Names(Checkpoint.open(self._folder))
        except LoraExportError:  # not safetensors: transformers has loaded it, we can't list it
            return {}
        found: dict[str, list[tuple[str, Part]]] = {}
        for name in sorted(self._known):
            parts = table.find(name)
            for part in parts:
                if part.transposed:  # what the adapter would mean by the stored tensor's name is not known
                    continue
                found.setdefault(part.tensor, []).append((name, part))
        return found


class Finder:
    """Finds one adapter's parameters; made by `Places.finder`."""

    def __init__(self, places: Places, named: Sequence[Named], own: Renaming, older: Renaming) -> None:
        self._places, self._own, self._older = places, own, older
        self._numbers = {one: number for number, one in enumerate(named)}

    def find(
        self, parameter: str, action: str = "merge", component: str | None = None
    ) -> tuple[str, Part | None] | Refusal:
        """Return the model's name of a parameter, or why there is none.

        With the name comes a `Part` where the path means only one expert, or some rows, of that parameter.
        """
        number = self._numbers[Named(parameter, action, component)]
        problem = self._own.problems.get(number)
        name = self._own.names[number]
        if name is not None and not problem and name in self._places.known:
            return name, None
        older = self._older.names[number]
        stored = self._places.stored(older) if older and number not in self._older.problems else []
        if len(stored) == 1:
            name, part = stored[0]
            whole = part.expert is None and part.piece == (0, 1)
            return name, None if whole else part
        if problem and problem.kind == "ambiguous":
            return Refusal(problem.kind, str(problem))
        hint = f"; {self._own.hint}" if self._own.hint else ""
        return Refusal("not found", f"the model has no parameter of that name{hint}")
