"""Settle on which axis of its stacked experts an adapter's factors act, once the base is known.

Rules, for the parameters of one module (PEFT wraps them all alike):

1. Shapes are proof: if one parameter's matrices are not square, the factors fit in one way only.
2. Else the file's PEFT version decides, alone or together with the module's ``is_transposed``
   (`lora_export.formats.reading.experts` has the table).
3. Else the axis is unknown; the module stays as it was, and is refused when its site is looked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from lora_export.adapter import Adapter, Kind, LoraModule
from lora_export.plan import Refusal

UNKNOWN = (
    "the experts' matrices are square {shape}, and whether the module holds them transposed can't be known "
    "({why}): use a transformers that has the model's class, or target a parameter of the module that is not "
    "square as well"
)


@dataclass(frozen=True)
class ExpertLayout:
    """Layout of a parameter in the module's memory.

    Attributes:
        shape: Shape of the parameter.
        is_transposed: The module's attribute, False if it has none; None if its class is unknown.
        kind: Kind of module that its class is; None if it is another one or unknown.
    """

    shape: tuple[int, ...]
    is_transposed: bool | None
    kind: Kind | None = None


def settle_layout(
    adapter: Adapter, held: Callable[[str], ExpertLayout | None]
) -> tuple[Adapter, tuple[str, ...]]:
    """Return the adapter with its experts' layout as far as it is known, and notes on assumptions.

    Args:
        adapter: The adapter as its file describes it.
        held: Function that looks up a parameter by its path; it returns None if the base has none of this
            name.
    """
    groups: dict[str, list[LoraModule]] = defaultdict(list)
    for module in adapter.modules.values():
        if module.experts > 1:
            groups[module.path].append(module)
    changed: dict[str, LoraModule] = {}
    notes: list[str] = []
    for modules in groups.values():
        places = {module.key: held(f"{module.path}.{module.parameter}") for module in modules}
        proofs = {key: _proof(adapter.modules[key], place) for key, place in places.items()}
        shared = _agreed(proofs.values())
        for module in modules:
            by_version = _by_version(module, places[module.key])
            proof = proofs[module.key]
            turned = proof if proof is not None else shared if shared is not None else by_version
            if turned is None:
                continue
            changed[module.key] = replace(module, turned=turned, layout="known")
            if by_version is not None and by_version != turned:
                notes.append(_contradiction(adapter, module))
            elif proof is None and shared is None and adapter.config.get("peft_version") is None:
                notes.append(_assumption(adapter, module))
    if not changed:
        return adapter, ()
    # One note is enough for all layers.
    return replace(adapter, modules={**adapter.modules, **changed}), tuple(notes[:1])


def unsettled(module: LoraModule, held: ExpertLayout | None) -> Refusal | None:
    """Return the reason why a module of square experts has no site; None if it may have one."""
    rows, cols = module.weight_shape[:2]
    if module.experts == 1 or module.layout == "known" or rows != cols:
        return None
    why = "its class is not known"
    if module.layout == "unknown":
        why = "the config's peft_version is a development version between 0.18 and 0.19.1"
    elif held is None:
        why = "the base has no such parameter"
    return Refusal("unproven", UNKNOWN.format(shape=(module.experts, rows, cols), why=why))


def is_turned(stored: tuple[int, ...], held: tuple[int, ...]) -> bool:
    """Return True if a tensor is stored as the transpose (of its last two axes) of what the module holds."""
    return stored != held and len(stored) >= 2 and (*stored[:-2], stored[-1], stored[-2]) == held


def fit_parameter(module: LoraModule, shape: tuple[int, ...], turned: bool) -> bool | Refusal:
    """Return True if a parameter's change is transposed in a tensor, or the reason why it doesn't fit.

    Args:
        module: Change of a ``parameter``.
        shape: Shape of the stored tensor with all experts.
        turned: True if the tensor holds the transpose of what the module holds.
    """
    matrix = module.matrix_shape
    if module.experts > 1 or len(shape) == 3:
        if len(shape) != 3 or shape[0] != module.experts:
            return Refusal(
                "shape", f"stored with shape {shape}, the adapter fits {module.experts} × {matrix}"
            )
        shape = shape[1:]
    if len(shape) != 2:
        return Refusal(
            "shape",
            f"stored with shape {shape}: LoRA on a parameter itself needs one of 2 dimensions, or of 3 "
            f"(experts); the adapter fits {matrix}",
        )
    if module.experts > 1 and module.layout != "known" and shape == matrix[::-1]:
        return True
    return fit_matrix(matrix, shape, turned)


def fit_matrix(matrix: tuple[int, int], shape: tuple[int, ...], turned: bool) -> bool | Refusal:
    """Return ``turned`` if a matrix has that shape, or a refusal with the difference."""
    if shape == (matrix[::-1] if turned else matrix):
        return turned
    way = ", transposed" if turned else ""
    return Refusal("shape", f"stored with shape {shape}, the adapter fits {matrix}{way}")


def _proof(module: LoraModule, held: ExpertLayout | None) -> bool | None:
    """Return True if by the parameter's shape the factors are transposed; None if it doesn't tell."""
    sizes = (module.lora_b.shape[0], module.lora_a.shape[1])
    if held is None or sizes[0] == sizes[1] or len(held.shape) != 3:
        return None
    return {sizes: False, sizes[::-1]: True}.get((held.shape[1], held.shape[2]))


def _agreed(proofs: Iterable[bool | None]) -> bool | None:
    found = {proof for proof in proofs if proof is not None}
    return found.pop() if len(found) == 1 else None


def _by_version(module: LoraModule, held: ExpertLayout | None) -> bool | None:
    """Return True if the factors are transposed by the file's PEFT version and the module's class."""
    if module.layout == "known":
        return module.turned
    if module.layout == "unknown" or held is None or held.is_transposed is None:
        return None
    return held.is_transposed != (module.layout == "class inverted")


def _assumption(adapter: Adapter, module: LoraModule) -> str:
    return (
        f"{adapter.name}: the config names no peft_version, and {module.path}.{module.parameter} is square: "
        "its factors are read as PEFT before 0.18 wrote them, lora_A on the experts' first axis; if a later "
        "PEFT wrote them, put its peft_version into adapter_config.json"
    )


def _contradiction(adapter: Adapter, module: LoraModule) -> str:
    version = adapter.config.get("peft_version")
    return (
        f"{adapter.name}: by peft_version {version if version else '(missing: before 0.18)'} lora_A of "
        f"{module.path} would act on the other axis of the experts; the base's shapes prove it does not, and "
        "they are believed"
    )
