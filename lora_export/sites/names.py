"""Match an adapter's parameter paths with a graph's: wrapper prefixes, renamed, fused and split modules."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

# Builders rename a part of the path (onnxruntime-genai ``models/builders/base.py``: attn).
_RENAMED = (("self_attn", "attn"), ("self_attention", "attn"))
# Modules that builders fuse into one weight, in the order in which they lie in it.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Variant:
    """Another name under which (a part of) a module may stand in the graph.

    Attributes:
        keys: Parameter paths in the graph; more than one where the module was split, in order.
        part: ``(position, count)`` of the module inside a fused weight.
        how: What was assumed, for the plan.
    """

    keys: tuple[str, ...]
    part: tuple[int, int] | None = None
    how: str = ""


@dataclass(frozen=True)
class Prefix:
    """How an adapter's paths become the graph's: ``strip`` goes off the front, then ``add`` comes there."""

    strip: str = ""
    add: str = ""

    def apply(self, key: str) -> str | None:
        """Return the graph's path, or None where ``key`` has not the prefix to strip."""
        if self.strip:
            if not key.startswith(self.strip + "."):
                return None
            key = key[len(self.strip) + 1 :]
        return f"{self.add}.{key}" if self.add else key


def variants(key: str) -> Iterator[Variant]:
    """Yield the names under which a parameter path may stand in a graph, the plainest first."""
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


def per_expert(key: str, experts: int) -> Iterator[Variant]:
    """Yield the names of stacked matrices where a graph has each expert's on its own."""
    stack, _, parameter = key.rpartition(".")
    if experts > 1 and stack:
        parts = _FUSED.get(parameter, (parameter,))
        keys = [f"{stack}.{expert}.{part}.weight" for expert in range(experts) for part in parts]
        yield Variant(tuple(keys), how="experts one by one")


def parts_of(key: str) -> list[str]:
    """Return the parameters that a builder's fused one stands for, or nothing."""
    module, _, parameter = key.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    stem = f"{parent}." if parent else ""
    return [f"{stem}{part}.{parameter}" for part in _FUSED.get(leaf, ())]


def fused_of(keys: Sequence[str]) -> str | None:
    """Return the parameter that these make up one after the other; None where they are no known pack."""
    stems = {tuple(key.split(".")[:-2]) for key in keys}
    parameters = {key.rpartition(".")[2] for key in keys}
    leaves = tuple(key.split(".")[-2] if "." in key else "" for key in keys)
    fused = next((name for name, parts in _FUSED.items() if parts == leaves), None)
    if fused is None or len(stems) != 1 or len(parameters) != 1:
        return None
    return ".".join([*stems.pop(), fused, parameters.pop()])


def flatten(key: str) -> str:
    """Return a path with its dots as underscores: how kohya's files write it."""
    return key.replace(".", "_")


class Flattened:
    """Paths of a graph by their flattened form.

    Args:
        known: The paths.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._exact: dict[str, set[str]] = defaultdict(set)
        self._tails: dict[str, set[str]] = defaultdict(set)
        for path in known:
            self._exact[flatten(path)].add(path)
            parts = path.split(".")
            for start in range(1, len(parts) - 1):
                self._tails[flatten(".".join(parts[start:]))].add(path)

    def find(self, key: str) -> list[str]:
        """Return the paths that ``key`` may stand for: exactly, else with more in front.

        What stands in front ends at a dot: ``attn_q`` is not ``cross_attn.q``.
        """
        flat = flatten(key)
        return sorted(self._exact.get(flat) or self._tails.get(flat) or ())


def find_prefixes(wanted: Iterable[str], known: Collection[str]) -> list[Prefix]:
    """Return the prefix changes under which most wanted paths are known; more than one if they tie.

    One change holds for the whole adapter: matching each path by itself would bind ``encoder.layers.0.q``
    and ``decoder.layers.0.q`` to the same weight.
    """
    by_tail: dict[str, list[str]] = defaultdict(list)
    for key in known:
        by_tail[_tail(key)].append(key)
    votes: Counter[Prefix] = Counter()
    for want in wanted:
        pairs: set[Prefix | None] = set()
        for variant in variants(want):
            for name in variant.keys:
                pairs.update(_prefix(name, key) for key in by_tail.get(_tail(name), ()))
        votes.update(pair for pair in pairs if pair is not None)
    if not votes:
        return []
    most = max(votes.values())
    winners = [pair for pair, count in votes.items() if count == most]
    return [Prefix()] if Prefix() in winners else winners


def _tail(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def _prefix(want: str, key: str) -> Prefix | None:
    if want == key:
        return Prefix()
    if key.endswith("." + want):
        return Prefix(add=key[: -len(want) - 1])
    if want.endswith("." + key):
        return Prefix(strip=want[: -len(key) - 1])
    return None
