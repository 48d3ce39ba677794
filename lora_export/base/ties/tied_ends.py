"""Give a change of a tied weight to every module of a graph that has that weight.

The change is a copy that PEFT loads into the weight, or LoRA that mlx-lm adds wherever the weight is used.

A graph has a tied weight once, read by a Gather and a product, or once for each module, if its exporter has
computed the transpose. It does not say that they are tied; equal values and the checkpoint do.
Rules:

1. A copy for one module (``modules_to_save``), or with the graph's own values, concerns no other module.
   Neither does LoRA if the adapter has LoRA for another reader, too: its base ties nothing.
2. A module for which the adapter has a copy of its own is not changed by another copy.
3. The checkpoint's model says whether the weight is tied.
4. Without a checkpoint, readers of the same constant are taken for tied; another constant with its values may
   be a weight of its own, so that the copy has no certain site.
5. A reader that can't be merged into, or is not understood, is refused, because it can't stay as it is.
6. Two copies with different values are not of one weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from lora_export.adapter import Adapter, Array
from lora_export.base.ties.copies import is_same
from lora_export.formats.reading.whole_copies import Reach, copy_reach
from lora_export.graph.onnx_file import release
from lora_export.plan import Refusal
from lora_export.sites import fit
from lora_export.sites.doubts.readers import module_by_name
from lora_export.sites.isolate import readers_of
from lora_export.sites.operand import Use
from lora_export.sites.target import ConstantPart, Miss, Site, Target, WeightOf
from lora_export.sites.values.codes import canonical_shape, decoded_rows
from lora_export.sites.values.verify import canonical_rows
from lora_export.storage.patch import Placement

_MATRICES = ("linear", "embedding")
# Number of rows by which another constant is recognised before all of it is compared; least cosine for codes.
_ROWS, _ALIKE = 8, 0.9
_CHECKPOINT = "give --checkpoint BASE_DIR: the model says what is tied"
_BASE = "give --checkpoint BASE_DIR if the base ties nothing; else the base that the adapter was trained on"
_AGAIN = "merge into the checkpoint (lora-export merge) and export the result"
_CONFIG = "put the adapter's adapter_config.json beside its file"


def with_tied_ends(
    adapter: Adapter, sites: Sequence[Site], uses: Sequence[Use], weight_of: WeightOf | None
) -> tuple[list[Site], list[Miss], list[str]]:
    """Return sites with all ends of their copies, misses, and notes.

    Args:
        adapter: The adapter.
        sites: Sites of its targets.
        uses: All uses in the graph.
        weight_of: The checkpoint's weights for this adapter, if there is one.
    """
    made, misses, notes = [], [], []
    taken = {_key(use) for site in sites if _is_copy(site) for use in _uses_of(site)}
    changed = {_key(use) for site in sites if not _is_copy(site) for use in _uses_of(site)}
    for site in sites:
        reach = _reach(adapter, site)
        tied = weight_of.is_tied(site.target) if weight_of and reach != "one" else None
        if reach == "one" or tied is False or not _changes_whole(site):
            made.append(site)  # Rules 1 and 3.
            continue
        ends = _ends(site, uses)
        if not _is_copy(site) and any(_key(use) in changed for use in ends):
            made.append(site)  # Rule 1.
            continue
        if refusal := _problem(adapter, site, sites=sites, ends=ends, uses=uses, tied=tied):
            misses.append(Miss(site.target, refusal))
            continue
        if ends := [use for use in ends if _key(use) not in taken]:  # Rule 2.
            # Of two copies with the same values the first stands for both at the other ends.
            taken |= set(map(_key, ends))
            names = ", ".join(sorted({module_by_name(use.node) or str(use.node.name) for use in ends}))
            how = "the checkpoint's model ties it to" if tied else "its constant is also read by"
            what = "the adapter's copy replaces it there, too, as in PEFT"
            if not _is_copy(site):
                what = "the adapter is added there, too, as mlx-lm does"
            notes.append(f"{site.target.key}: {how} {names}: {what}")
            made.append(replace(site, parts=_parts(site, ends, sites)))
        else:
            made.append(site)
    return made, misses, notes


def _reach(adapter: Adapter, site: Site) -> Reach:
    """Return the readers of its weight that a site's change is for."""
    if _is_copy(site):
        return copy_reach(adapter, site.target.key)
    return "all" if site.target.module is not None and site.target.module.everywhere else "one"


def _is_copy(site: Site) -> bool:
    return site.target.action == "replace"


def _uses_of(site: Site) -> list[Use]:
    return [use for part in site.parts for use in part.uses]


def _key(use: Use) -> tuple[int, int]:
    return id(use.node), use.operand.index


def _changes_whole(site: Site) -> bool:
    """Return True if a site is one constant of plain values, a matrix, and the change has others."""
    (part, *more), target = site.parts, site.target
    (placement, *others) = part.placements
    if more or others or len(target.shape) != 2 or any(use.quantised for use in part.uses):
        return False
    if placement.row_scale is not None or placement.shift or placement.rows != (0, target.matrix[0]):
        return False
    return not _is_copy(site) or not is_same(np.asarray(target.values), canonical_rows(part, placement))


def _ends(site: Site, uses: Iterable[Use]) -> list[Use]:
    """Return the other uses of the weight: of the site's constant, and of those with its values."""
    (part,) = site.parts
    mine = canonical_rows(part, part.placements[0])
    picked = np.unique(np.linspace(0, len(mine) - 1, _ROWS).astype(int))
    rows = np.asarray(mine[picked], np.float64)
    own = {_key(use) for use in part.uses}
    found = []
    for use in uses:
        if (
            _key(use) in own
            or use.operand.kind not in _MATRICES
            or canonical_shape(use) != site.target.matrix
        ):
            continue
        if use.root is part.root or (rows.any() and _holds(use, mine, picked, rows)):
            found.append(use)
        if use.root is not part.root:
            release(use.root)
    return found


def _holds(use: Use, mine: Array, picked: Array, rows: Array) -> bool:
    """Return True if a constant has a weight's values, or codes for them."""
    other = decoded_rows(use, picked)
    if other is None:
        return False
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(other, axis=1)
    if (np.einsum("ij,ij->i", rows, other) < _ALIKE * lengths).any():
        return False
    if use.quantised:
        return True
    placement = Placement(rows=(0, len(mine)), row=0, col=0, transposed=use.transposed)
    return is_same(canonical_rows(ConstantPart(use.root, (use,), (placement,)), placement), mine)


def _problem(
    adapter: Adapter,
    site: Site,
    sites: Sequence[Site],
    ends: Sequence[Use],
    uses: Sequence[Use],
    tied: bool | None,
) -> Refusal | None:
    """Return the reason why a copy has no certain site, with a hint; None if it has one.

    Args:
        adapter: The adapter.
        site: Site of the copy.
        sites: All sites of the adapter.
        ends: Other uses of the weight.
        uses: All uses in the graph.
        tied: True if the checkpoint's model ties the weight; None if there is no checkpoint.
    """
    root, target = site.parts[0].root, site.target
    copies = {_key(use): other.target for other in sites if _is_copy(other) for use in _uses_of(other)}
    there = {id(copy): copy for use in ends if (copy := copies.get(_key(use))) is not None}.values()
    rivals = [
        copy.key
        for copy in there
        if _is_copy(site) and copy_reach(adapter, copy.key) != "one" and not _are_equal(copy, target)
    ]
    if rivals:  # Rule 6.
        listed = ", ".join(rivals)
        reason = f"its weight is that of {listed}, too, and the adapter has copies with other values for each"
        return Refusal("tied", reason, _BASE)
    ends = [use for use in ends if _key(use) not in copies]
    if ends and _reach(adapter, site) == "unknown":
        reason = f"{root.name!r} is other modules' too, and no config says whether the copy is of all of them"
        return Refusal("tied", reason, _CONFIG)
    closed = [
        use for use in ends if use.refusal or use.quantised or isinstance(fit.place(target, use), Refusal)
    ]
    hidden = set(readers_of(root)) - {_key(use) for use in uses}
    if hidden or closed:  # Rule 5.
        what = closed[0].node.op_type if closed else "a node that is not understood"
        does = "the copy replaces" if _is_copy(site) else "the adapter changes"
        return Refusal("tied", f"{does} all that is tied to it, and {what} reads the weight as well", _AGAIN)
    others = sorted({str(use.root.name) for use in ends if use.root is not root})
    if tied is None and others:  # Rule 4.
        listed = ", ".join(map(repr, others))
        reason = f"{listed} holds the same values, and no name tells whether it is tied and changed, too"
        return Refusal("tied", reason, _CHECKPOINT)
    return None


def _are_equal(one: Target, other: Target) -> bool:
    return np.array_equal(np.asarray(one.values), np.asarray(other.values))


def _parts(site: Site, ends: Sequence[Use], sites: Sequence[Site]) -> tuple[ConstantPart, ...]:
    """Return the site's part and those of the ends; other uses that change with a part belong to it."""
    (first,) = site.parts
    owners = {
        _key(use): frozenset(map(_key, _uses_of(other)))
        for other in sites
        if not _is_copy(other)
        for use in _uses_of(other)
    }
    alone: frozenset[tuple[int, int]] = frozenset()
    groups = {(id(first.root), owners.get(_key(first.uses[0]), alone)): list(first.uses)}
    for use in ends:
        groups.setdefault((id(use.root), owners.get(_key(use), alone)), []).append(use)
    made = []
    for (root, _), found in groups.items():
        placed = first.placements if root == id(first.root) else fit.place(site.target, found[0])
        assert not isinstance(placed, Refusal)
        made.append(ConstantPart(found[0].root, tuple(found), placed))
    return tuple(made)
