"""Apply adapters beside a PyTorch model's weights with hooks: h = W0 x + scaling·B·A x, nothing merged.

`bind` finds every module of an adapter in the model and checks its shape; `applied` activates some adapters
within a block. Inside, whole parameters are replaced first; then each module's hook adds its product to the
module's output. A parameter without such an output (stacked experts, modules that do more than one product)
is changed to W0 + scaling·B·A while its module runs, as in PEFT.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_export.adapter import MERGE_ROWS, Adapter, Array, LoraModule, token_rows_problems
from lora_export.base.checkpoint.meta_model import module_kind
from lora_export.base.checkpoint.names import StoredPart
from lora_export.errors import AdapterError
from lora_export.formats.reading.whole_copies import copy_reach
from lora_export.formats.schemes import fitted
from lora_export.plan import Refusal
from lora_export.runtimes.torch.find_parameters import TRAINED_ON, ModelParameters, NoParameter, OwnedTensor
from lora_export.runtimes.torch.products import Hook, changed, hook_of, tensor_of
from lora_export.sites.experts import ExpertLayout, settle_layout
from lora_export.sites.kinds import settle_kinds

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class HookedModule:
    """One module of an adapter with its target in the model.

    Attributes:
        lora: The adapter's module.
        where: Path of the module in the model.
        owner: Owner of the parameter W0.
        hook: Hook that adds the product to the module's output, times a strength; None: W0 is changed
            during a call.
        part: The expert and rows of W0 that the module changes; None for all of it.
    """

    lora: LoraModule
    where: str
    owner: OwnedTensor
    hook: Hook | None
    part: StoredPart | None = None


@dataclass(frozen=True)
class Bound:
    """An adapter bound to one model.

    Attributes:
        adapter: The adapter.
        branches: Its modules with their targets.
        extras: Whole parameters that it replaces, without those that equal the model's.
        paths: `LoraModule.path` → path of the module in the model.
    """

    adapter: Adapter
    branches: tuple[HookedModule, ...]
    extras: tuple[tuple[OwnedTensor, torch.Tensor], ...]
    paths: Mapping[str, str]


def bind(
    model: torch.nn.Module, adapter: Adapter, parameters: ModelParameters
) -> tuple[Bound, dict[str, str]]:
    """Return an adapter bound to a model, and line → hint for each part that is not found or does not fit."""
    import torch

    adapter = fitted(adapter, parameters.known, [])
    finder = parameters.finder(adapter)
    problems = {f"{path}: {problem}": MERGE_ROWS for path, problem in token_rows_problems(adapter)}
    branches = []

    def locate(
        parameter: str, action: str = "merge", component: str | None = None
    ) -> tuple[str, OwnedTensor, StoredPart | None]:
        found = finder.find(parameter, action, component)
        if isinstance(found, Refusal):
            raise NoParameter(found.detail, found.hint or TRAINED_ON)
        name, part = found
        path, _, leaf = name.rpartition(".")
        return path, OwnedTensor(model.get_submodule(path), leaf), part

    def held(parameter: str) -> ExpertLayout | None:
        try:
            _, owner, part = locate(parameter)
        except NoParameter:
            return None
        transposed = bool(getattr(owner.module, "is_transposed", False))
        return (
            ExpertLayout(tuple(owner.get().shape), transposed, module_kind(owner.module))
            if part is None
            else None
        )

    adapter, _ = settle_kinds(settle_layout(adapter, held)[0], held)
    copies: dict[OwnedTensor, torch.Tensor] = {}
    # A module's own copies come last: they override the replacement of a shared weight.
    own_last = sorted(adapter.extras.items(), key=lambda extra: copy_reach(adapter, extra[0]) == "one")
    for path, values in own_last:
        try:
            _, owner, part = locate(path, "replace")
            tensor = _replacement(owner, values, part)
            copies |= dict.fromkeys(
                _replaced_by(adapter, path, owner=owner, model=model, tensor=tensor, copies=copies), tensor
            )
        except NoParameter as problem:
            problems[f"{path}  {problem}"] = problem.hint
    extras = [(owner, tensor) for owner, tensor in copies.items() if not torch.equal(owner.get(), tensor)]
    for lora in adapter.modules.values():
        try:
            where, owner, part = locate(f"{lora.path}.{lora.parameter}", "merge", lora.component)
            branches.append(
                HookedModule(lora=lora, where=where, owner=owner, hook=hook_of(lora, owner, part), part=part)
            )
            branches += _at_tied_heads(model, branches[-1], adapter)
        except NoParameter as problem:
            problems[f"{lora.path}  {problem}"] = problem.hint
    paths = {branch.lora.path: branch.where for branch in branches}
    return Bound(adapter, tuple(branches), tuple(extras), paths), problems


@contextlib.contextmanager
def applied(adapters: Sequence[tuple[Bound, float]]) -> Iterator[None]:
    """Apply adapters with weights to their model inside a ``with`` block; afterwards the model is unchanged.

    Raises:
        AdapterError: DoRA, or whole replaced parameters, with a weight other than 1 or with other adapters
            that change the same parameters.
    """
    _refuse_blends(adapters)
    before: dict[OwnedTensor, torch.Tensor] = {}
    handles: list[Any] = []
    try:
        for bound, _ in adapters:
            for owner, values in bound.extras:
                before.setdefault(owner, owner.get())
                owner.put(values)
        for bound, weight in adapters:
            for branch in bound.branches:
                strength = weight * branch.lora.scaling
                module = branch.owner.module
                if branch.hook is not None:
                    hook = functools.partial(branch.hook, strength=strength)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
                else:
                    before.setdefault(branch.owner, branch.owner.get())
                    handles += _changed_while_running(branch, weight)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, tensor in before.items():
            owner.put(tensor)


def _refuse_blends(adapters: Sequence[tuple[Bound, float]]) -> None:
    problems = []
    replaced: set[OwnedTensor] = set()
    for bound, weight in adapters:
        name = bound.adapter.name
        dora = [branch.lora.path for branch in bound.branches if branch.lora.magnitude is not None]
        if dora and (weight != 1 or len(adapters) > 1):
            problems.append(f"{name}: DoRA ({len(dora)} modules, {dora[0]} …) can't be weighted or added")
        owners = {owner for owner, _ in bound.extras}
        if owners and (weight != 1 or owners & replaced):
            problems.append(f"{name}: replaces whole parameters ({next(iter(bound.adapter.extras))} …)")
        replaced |= owners
    if problems:
        raise AdapterError(
            "these adapters can't be active together", "run them one by one, with weight 1", problems
        )


def _changed_while_running(branch: HookedModule, weight: float) -> list[Any]:
    """Change W0 while the module runs, and restore it: only one module's copy exists at a time."""
    kept: list[torch.Tensor] = []

    def enter(*_: Any) -> None:
        kept.append(branch.owner.get())
        branch.owner.put(changed(branch.lora, branch.owner, branch.part, weight))

    def leave(*_: Any) -> None:
        branch.owner.put(kept.pop())

    module = branch.owner.module
    # The last hook to change W0 is the first to restore it.
    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, prepend=True),
    ]


def _at_tied_heads(model: torch.nn.Module, branch: HookedModule, adapter: Adapter) -> list[HookedModule]:
    """Return branches at other users of an embedding's weight, if the trainer adds the adapter there."""
    if not branch.lora.everywhere:
        return []
    others = [item for item in _owners_of(model, branch.owner.get()) if item[1] != branch.owner]
    made = []
    for path, owner in others:
        if path in {lora.path for lora in adapter.modules.values()}:
            return []
        lora = branch.lora.as_head(path)
        made.append(HookedModule(lora=lora, where=path, owner=owner, hook=hook_of(lora, owner, None)))
    return made


def _owners_of(model: torch.nn.Module, shared: torch.Tensor) -> list[tuple[str, OwnedTensor]]:
    """Return path and owner of every parameter that is the same tensor object."""
    return [
        (path, OwnedTensor(module, name))
        for path, module in model.named_modules()
        for name, values in module._parameters.items()
        if values is shared
    ]


# --- whole parameters ---------------------------------------------------------------------------------


def _replaced_by(
    adapter: Adapter,
    path: str,
    owner: OwnedTensor,
    model: torch.nn.Module,
    tensor: torch.Tensor,
    copies: Mapping[OwnedTensor, torch.Tensor],
) -> list[OwnedTensor]:
    """Return the parameters that a copy replaces: the named one and all others that PEFT loads it into.

    Args:
        adapter: The adapter.
        path: Path of the copy in the adapter.
        owner: Owner of the parameter that it names.
        model: The model.
        tensor: Values of the copy.
        copies: Parameters that other copies have replaced.
    """
    import torch

    shared = owner.get()
    owners = [one for _, one in _owners_of(model, shared)]
    reach = copy_reach(adapter, path)
    if reach == "one" or len(owners) < 2:
        return [owner]
    if reach == "unknown" and not torch.equal(shared, tensor):
        raise NoParameter(
            "the model ties it to others, and no config says whether the copy is of all of them",
            "put the adapter's adapter_config.json beside its file",
        )
    if any(one in copies and not torch.equal(copies[one], tensor) for one in owners):
        raise NoParameter("the model ties it to others, for which the adapter has a copy with other values")
    return owners


def _replacement(owner: OwnedTensor, values: Array, part: StoredPart | None) -> torch.Tensor:
    if part is not None:
        raise NoParameter("the model holds it as a part of another parameter: it can't be replaced whole")
    old = owner.get()
    if tuple(old.shape) != values.shape:
        raise NoParameter(f"the model has shape {tuple(old.shape)}, the adapter's values {values.shape}")
    return tensor_of(values).to(old.dtype)
