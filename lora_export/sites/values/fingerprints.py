"""Find possible sites of weights by their values, for all weights in one pass over a graph's constants.

Comparing each weight with each constant would read every constant once for each weight, which takes minutes.
A fingerprint, a row's values at a few columns, distinguishes two rows as well. Only where fingerprints agree,
the values are compared (`verify.check_content`), so that nothing is decided here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count

import numpy as np
import onnx_ir as ir

from lora_export.adapter import Array
from lora_export.graph.onnx_file import matrix_shape, release, shape_of, stored_matrix
from lora_export.machines.blas import one_blas_thread
from lora_export.progress import tell_stage
from lora_export.sites import fit
from lora_export.sites.operand import Use
from lora_export.sites.target import Target
from lora_export.sites.values import content

# Number of columns of a fingerprint. Two rows of random weights agree by chance once in 10²² pairs.
_COLUMNS = 32
# Least cosine of two fingerprints of one row: below `content.COSINE`, because the rounding errors of a few
# values don't average out.
_ALIKE = 0.98
# Number of rows of a weight that are looked for; one may be zero in the graph if a batch norm's factor is.
_ROWS = 4
# Least ratio of a row's mean square at the fingerprint's columns to that of all, so that they tell enough.
_TELLING = 0.25
# Number of values of a product that are computed at a time, which fit a processor's cache.
_BLOCK = 1 << 18
# (identity of the constant, stored transposed) → offsets of a weight's rows in it, or of it in the weight's.
Places = Mapping[tuple[int, bool], Sequence[int]]


@dataclass(frozen=True, eq=False)
class _View:
    """Constant in one orientation, whose rows are outputs, and its uses in this orientation."""

    root: ir.Value
    transposed: bool
    uses: tuple[Use, ...]

    @property
    def key(self) -> tuple[int, bool]:
        return id(self.root), self.transposed

    @property
    def shape(self) -> tuple[int, int]:
        assert self.root.const_value is not None
        rows, cols = matrix_shape(shape_of(self.root.const_value))
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def matrix(self) -> Array:
        assert self.root.const_value is not None
        stored = stored_matrix(self.root.const_value)
        return stored.T if self.transposed else stored


@dataclass(frozen=True, eq=False)
class _Probe:
    """Some rows of a matrix by which it is looked for.

    Attributes:
        height: Number of rows of the whole matrix.
        rows: Numbers of the rows, ``(count,)``; empty if no row's fingerprint tells enough.
        prints: Their fingerprints, ``(count, columns)``.
    """

    height: int
    rows: Array
    prints: Array


@dataclass(eq=False)
class _Wanted:
    """Target that is looked for, with a probe for each orientation that it may have."""

    target: Target
    matrices: Callable[[], Sequence[Array]]
    probes: list[_Probe]
    found: dict[tuple[int, bool], set[int]] = field(default_factory=lambda: defaultdict(set))


def find_places(
    uses: Sequence[Use], targets: Sequence[Target], matrices: Callable[[Target], Sequence[Array]]
) -> dict[int, Places]:
    """Return the places where each target's values may be.

    Args:
        uses: Uses of the graph's constants that may be the targets'.
        targets: Linears, convolutions and tables.
        matrices: Function that returns a target's canonical matrix in each orientation that it may have; it
            is called more than once, so that not all matrices are held.

    Returns:
        Identity of the target → its places.
    """
    wanted: dict[int, list[_Wanted]] = defaultdict(list)
    for target in targets:
        made = matrices(target)
        if made and 0 not in target.matrix:
            probes = [_probe(matrix) for matrix in made]
            wanted[target.matrix[1]].append(_Wanted(target, partial(matrices, target), probes))
    views: dict[int, list[_View]] = defaultdict(list)
    readers: dict[tuple[int, bool], list[Use]] = defaultdict(list)
    for use in uses:
        readers[id(use.root), use.transposed].append(use)
    for (_, transposed), mine in readers.items():
        view = _View(mine[0].root, transposed, tuple(mine))
        # A constant without rows or columns is nobody's.
        if view.shape[0] and view.shape[1] in wanted:
            views[view.shape[1]].append(view)
    every, seen = sum(map(len, views.values())), count()

    def tell() -> None:
        tell_stage("looking for the adapter's weights by their values", next(seen) / every)

    # With so few columns a second thread costs more than it saves.
    with one_blas_thread():
        for width, group in wanted.items():
            _search(group, views[width], tell)
    return {
        id(item.target): {key: sorted(offsets) for key, offsets in item.found.items()}
        for group in wanted.values()
        for item in group
    }


def _search(group: Sequence[_Wanted], views: Sequence[_View], tell: Callable[[], None]) -> None:
    """Fill in ``found`` for targets of one width."""
    around: dict[int, list[tuple[_View, _Probe]]] = defaultdict(list)
    kinds = [_kind(item.target) for item in group]
    samples = dict(zip(kinds, (item.target for item in group), strict=True))
    for view in views:
        tell()
        height, matrix = view.shape[0], view.matrix
        accepted = {k for k, one in samples.items() if any(fit.accepts(one, use) for use in view.uses)}
        fitting = [item for item, kind in zip(group, kinds, strict=True) if kind in accepted]
        inside = [item for item in fitting if item.target.matrix[0] <= height]
        if inside:
            _find_inside(view, matrix, inside)
        if len(inside) < len(fitting):
            probe = _probe(matrix)
            for item in fitting:
                if item.target.matrix[0] > height:
                    around[id(item)].append((view, probe))
        del matrix
        release(view.root)
    for item in group:
        if id(item) in around:
            _find_around(item, around[id(item)])


def _kind(target: Target) -> tuple[object, ...]:
    """Return a key that is equal for targets that accept the same uses."""
    return target.kind, target.shape, target.module.groups if target.module else 1


def _find_inside(view: _View, matrix: Array, group: Sequence[_Wanted]) -> None:
    """Look for whole targets among the rows of a constant."""
    probes = [(item, at, probe) for item in group for at, probe in enumerate(item.probes)]
    telling = [(item, probe) for item, _, probe in probes if len(probe.rows)]
    if telling:
        prints = _unit(_sample(matrix))
        for number, offset in _hits(prints, [probe for _, probe in telling]):
            telling[number][0].found[view.key].add(offset)
    for item, at, probe in probes:
        if not len(probe.rows):
            item.found[view.key].update(content.find_rows(matrix, item.matrices()[at]))


def _find_around(item: _Wanted, shorter: Sequence[tuple[_View, _Probe]]) -> None:
    """Look for constants that are some rows of a target, which an exporter may have split."""
    telling = [(view, probe) for view, probe in shorter if len(probe.rows)]
    for matrix in item.matrices():
        if telling:
            for number, offset in _hits(_unit(_sample(matrix)), [probe for _, probe in telling]):
                item.found[telling[number][0].key].add(offset)
        for view, probe in shorter:
            if not len(probe.rows):
                item.found[view.key].update(content.find_rows(matrix, view.matrix))
                release(view.root)


def _hits(prints: Array, probes: Sequence[_Probe]) -> set[tuple[int, int]]:
    """Return (number of a probe, offset at which its matrix may begin) in a matrix's fingerprints."""
    equal = [number for number, probe in enumerate(probes) if probe.height >= len(prints)]
    smaller = [number for number, probe in enumerate(probes) if probe.height < len(prints)]
    found = {(equal[at], 0) for at in _equal_hits(prints, [probes[number] for number in equal])}
    if not smaller:
        return found
    # For a part two rows are enough: the cost of a search is their number.
    rows = np.concatenate([probes[number].rows[:2] for number in smaller])
    numbers = np.repeat(smaller, [len(probes[number].rows[:2]) for number in smaller])
    heights = np.array([probe.height for probe in probes])[numbers]
    sought = np.concatenate([probes[number].prints[:2] for number in smaller]).T
    step = max(1, _BLOCK // len(rows))
    # One buffer serves all products: allocating one costs more than computing it.
    buffer = np.empty((min(step, len(prints)), len(rows)), np.float32)
    for start in range(0, len(prints), step):
        block = prints[start : start + step]
        cosines = np.matmul(block, sought, out=buffer[: len(block)])
        if cosines.max() < _ALIKE and cosines.min() > -_ALIKE:
            continue
        at, which = np.divmod(np.flatnonzero(np.abs(cosines).ravel() >= _ALIKE), len(rows))
        offsets = at + start - rows[which]
        inside = (offsets >= 0) & (offsets + heights[which] <= len(prints))
        found.update(zip(numbers[which][inside].tolist(), offsets[inside].tolist(), strict=True))
    return found


def _equal_hits(prints: Array, probes: Sequence[_Probe]) -> list[int]:
    """Return the numbers of the probes whose matrices have the same height and may be the same."""
    if not probes:
        return []
    rows = np.concatenate([probe.rows for probe in probes])
    owners = np.repeat(np.arange(len(probes)), [len(probe.rows) for probe in probes])
    mine, theirs = prints[rows], np.concatenate([probe.prints for probe in probes])
    alike = np.abs(np.einsum("ij,ij->i", mine, theirs)) >= _ALIKE
    # Channels that a batch norm set to zero tell nothing.
    telling = np.bincount(owners[mine.any(axis=1)], minlength=len(probes)) > 0
    hits = np.bincount(owners[alike], minlength=len(probes)) > 0
    return [int(number) for number in np.flatnonzero(hits | ~telling)]


def _probe(matrix: Array) -> _Probe:
    """Choose the rows whose fingerprints tell the most."""
    height = len(matrix)
    rows = np.unique(np.linspace(0, height - 1, 4 * _ROWS).astype(int))
    values = np.asarray(matrix[rows], dtype=np.float32)
    values = values / np.maximum(np.abs(values).max(axis=1, keepdims=True), np.float32(1e-30))
    sampled = values[:, _columns(matrix.shape[1])]
    share = (sampled**2).mean(axis=1) / np.maximum((values**2).mean(axis=1), 1e-30)
    best = np.argsort(-share, kind="stable")[:_ROWS]
    best = best[share[best] >= _TELLING]
    return _Probe(height, rows[best], _unit(sampled[best]))


@cache
def _columns(width: int) -> Array:
    """Return the columns of the fingerprints for a width: not evenly spaced, because weights have heads."""
    if width <= _COLUMNS:
        return np.arange(width)
    return np.sort(np.random.default_rng(width).choice(width, _COLUMNS, replace=False))


def _sample(matrix: Array) -> Array:
    return np.asarray(matrix[:, _columns(matrix.shape[1])], dtype=np.float32)


def _unit(prints: Array) -> Array:
    """Return rows of length 1; zeros stay."""
    largest = np.maximum(np.abs(prints).max(axis=1, keepdims=True, initial=0), np.float32(1e-30))
    scaled = prints / largest
    lengths: Array = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))[:, None]
    return np.asarray(scaled / np.maximum(lengths, np.float32(1e-30)))
