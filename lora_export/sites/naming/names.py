"""List other names of a parameter path: other prefixes, renamed, fused and split modules, flattened paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Builders rename a part of the path (onnxruntime-genai ``models/builders/base.py``: attn).
_RENAMED = (("self_attn", "attn"), ("self_attention", "attn"))
# Modules that builders fuse into one weight, in their order in it.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Named:
    """Parameter that an adapter changes, by its own path.

    Attributes:
        key: Parameter path, ``model.layers.0.mlp.up_proj.weight``; a flattened one keeps only its last dot.
        action: Action on the parameter: two with the same action must not become one.
        component: Model that it is for, if a file serves several.
        shape: Shape of the parameter in the base, as far as the adapter tells; only hints depend on it.
    """

    key: str
    action: str = "merge"
    component: str | None = None
    shape: tuple[int, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Variant:
    """Other name under which a module, or a part of it, may be in the graph.

    Attributes:
        keys: Parameter paths in the graph; if the module was split, several in their order.
        part: ``(position, count)`` of the module inside a fused weight.
        how: Assumptions, for the plan.
    """

    keys: tuple[str, ...]
    part: tuple[int, int] | None = None
    how: str = ""


@dataclass(frozen=True)
class Prefix:
    """Change from an adapter's paths to the graph's: prefix ``strip`` is removed, then ``add`` is added."""

    strip: str = ""
    add: str = ""

    def apply(self, key: str) -> str | None:
        """Return the graph's path, or None if ``key`` lacks the prefix to strip."""
        if self.strip:
            if not key.startswith(self.strip + "."):
                return None
            key = key[len(self.strip) + 1 :]
        return f"{self.add}.{key}" if self.add else key


def variants(key: str) -> Iterator[Variant]:
    """Yield the names under which a parameter path may be in a graph, the plainest first."""
    renamed = [(key, "")]
    for old, new in _RENAMED:
        if f".{old}." in key:
            renamed.append((key.replace(f".{old}.", f".{new}."), f"{old} is called {new}"))
    for name, how in renamed:
        yield Variant((name,), how=how)
    for name, how in renamed:
        module, _, parameter = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        stem = f"{parent}." if parent else ""
        for fused, parts in _FUSED.items():
            if leaf in parts:
                note = f"part {parts.index(leaf) + 1} of {len(parts)} of {fused}"
                yield Variant(
                    (f"{stem}{fused}.{parameter}",),
                    (parts.index(leaf), len(parts)),
                    f"{note}; {how}".rstrip("; "),
                )
            if leaf == fused:
                keys = tuple(f"{stem}{part}.{parameter}" for part in parts)
                yield Variant(keys, how=f"split into {', '.join(parts)}; {how}".rstrip("; "))


def common_form(key: str) -> str:
    """Return a path with one name for each part that builders rename, the same for all renamed variants."""
    parts = key.split(".")
    for old, new in _RENAMED:
        parts = [new if part == old else part for part in parts]
    return ".".join(parts)


def per_expert(key: str, experts: int) -> Iterator[Variant]:
    """Yield the names of stacked matrices in a graph that has each expert's on its own."""
    stack, _, parameter = key.rpartition(".")
    if experts > 1 and stack:
        parts = _FUSED.get(parameter, (parameter,))
        keys = [f"{stack}.{expert}.{part}.weight" for expert in range(experts) for part in parts]
        yield Variant(tuple(keys), how="experts one by one")


def parts_of(key: str) -> list[str]:
    """Return the parameters that a builder's fused one stands for, or an empty list."""
    module, _, parameter = key.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    stem = f"{parent}." if parent else ""
    return [f"{stem}{part}.{parameter}" for part in _FUSED.get(leaf, ())]


def fused_of(keys: Sequence[str]) -> str | None:
    """Return the fused parameter that parameters make up in order; None if they are not a known pack."""
    stems = {tuple(key.split(".")[:-2]) for key in keys}
    parameters = {key.rpartition(".")[2] for key in keys}
    leaves = tuple(key.split(".")[-2] if "." in key else "" for key in keys)
    fused = next((name for name, parts in _FUSED.items() if parts == leaves), None)
    if fused is None or len(stems) != 1 or len(parameters) != 1:
        return None
    return ".".join([*stems.pop(), fused, parameters.pop()])
