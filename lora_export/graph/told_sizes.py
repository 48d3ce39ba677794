"""Sizes of inputs that a graph leaves open, told by the user or by the ``genai_config.json`` beside it.

onnxruntime-genai's builder names the width of a head in the cache's inputs (``kv_cache_dim``) and writes its
size only into its config. A diffusion model's graph doesn't say how high and wide its images are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_export.errors import BackendError
from lora_export.storage.inputs import note_inputs
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import FieldError, Size, from_plain
from lora_export.untrusted.places import is_there

Dims = tuple[int | str | None, ...]
CONFIG = "genai_config.json"
_HINT = "give --shape DIMENSION=SIZE (height=64) or --shape INPUT=SIZES (timestep=1, sample=1x4x64x64)"
_WORD = re.compile(r"(.+)=(\d{1,18}(?:x\d{1,18})*)", re.S)
_AGAIN = "have onnxruntime-genai's builder write it again, or give the sizes with --shape"


@dataclass(frozen=True)
class _Inputs:
    past_key_names: str = "past_key_values.%d.key"
    past_value_names: str = "past_key_values.%d.value"


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    filename: str
    head_size: Size
    num_key_value_heads: Size
    inputs: _Inputs = field(default_factory=_Inputs)


@dataclass(frozen=True, kw_only=True)
class _Model:
    decoder: _Decoder
    vocab_size: Size | None = None


@dataclass(frozen=True)
class _Config:
    model: _Model


@dataclass(frozen=True, kw_only=True)
class ToldSizes:
    """Sizes that a graph doesn't state.

    Attributes:
        shapes: Dimension → its size, or input → all its sizes, by the user.
        heads: Number of heads in the cache, by the config; None without one.
        head_size: Width of a head.
        vocab_size: Number of token ids.
        caches: Names of the cache's inputs, with ``%d`` for the layer.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: int | None = None
    head_size: int | None = None
    vocab_size: int | None = None
    caches: tuple[str, ...] = ()

    def dims(self, name: str, dims: Dims) -> Dims:
        """Return an input's dimensions with the sizes that are told in place of names."""
        whole = self.shapes.get(name)
        if whole is not None and len(whole) == len(dims):
            return tuple(dim if isinstance(dim, int) else size for dim, size in zip(dims, whole, strict=True))
        single = {key: sizes[0] for key, sizes in self.shapes.items() if len(sizes) == 1}
        found = [single.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
        if len(dims) == 4 and any(_is_layer(name, pattern) for pattern in self.caches):
            for axis, size in ((1, self.heads), (3, self.head_size)):
                found[axis] = found[axis] if isinstance(found[axis], int) else size
        return tuple(found)

    def refuse_unknown(self, inputs: Iterable[tuple[str, Dims]]) -> None:
        """Raise `BackendError` for told sizes that no input has, or that a graph contradicts."""
        listed = list(inputs)
        symbols = {dim for _, dims in listed for dim in dims if isinstance(dim, str)}
        known = dict(listed)
        problems = []
        for key, sizes in self.shapes.items():
            text = "x".join(map(str, sizes))
            if key in known and len(sizes) != len(known[key]):
                problems.append(f"{key}={text}: the input has {len(known[key])} axes")
            elif key in known:
                fixed = zip(known[key], sizes, strict=True)
                wrong = [f"{dim}, not {size}" for dim, size in fixed if isinstance(dim, int) and dim != size]
                problems += [f"{key}={text}: the graph fixes {', '.join(wrong)}"] * bool(wrong)
            elif key not in symbols:
                problems.append(f"{key}={text}: no dimension and no input has this name")
            elif len(sizes) != 1:
                problems.append(f"{key}={text}: a dimension has one size")
        if problems:
            names = ", ".join([*sorted(symbols), *known])
            raise BackendError("these sizes don't fit the graph", f"it has {names}; {_HINT}", problems)


def _is_layer(name: str, pattern: str) -> bool:
    before, mark, after = pattern.partition("%d")
    middle = name[len(before) : len(name) - len(after)]
    return bool(mark) and name == before + middle + after and middle.isdigit()


def parse_sizes(words: Sequence[str] | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Read ``NAME=SIZE`` and ``NAME=1x4x64`` words, or take them as a mapping.

    Raises:
        BackendError: A word is not of this form, a size is 0, or a name is given twice.
    """
    if isinstance(words, Mapping):
        words = [f"{name}={'x'.join(map(str, sizes))}" for name, sizes in words.items()]
    problems, found = [], dict[str, tuple[int, ...]]()
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            problems.append(f"{word!r}: not NAME=SIZE or NAME=1x4x64")
            continue
        sizes = tuple(map(int, match[2].split("x")))
        if match[1] in found:
            problems.append(f"{match[1]}: given twice")
        if 0 in sizes:
            problems.append(f"{word!r}: a size is at least 1")
        found[match[1]] = sizes
    if problems:
        raise BackendError("these sizes can't be read", _HINT, problems)
    return found


def told_sizes(
    graph: Path, inputs: Iterable[tuple[str, Dims]], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> ToldSizes:
    """Return what is told of a graph's sizes; the config is read only if a cache's input leaves sizes open.

    Args:
        graph: The graph's file.
        inputs: Name and dimensions of each input.
        shapes: The user's sizes.

    Raises:
        BackendError: The config beside it, which is needed, is damaged.
    """
    told = ToldSizes(shapes=shapes or {})
    open_sizes = any(
        len(dims) == 4 and name.startswith("past") and not isinstance(told.dims(name, dims)[axis], int)
        for name, dims in inputs
        for axis in (1, 3)
    )
    config = graph.parent / CONFIG
    if not open_sizes or not is_there(config):
        return told
    note_inputs([config])
    try:
        found = from_plain(_Config, read_json(config, BackendError, _AGAIN, given=graph), known_only=False)
    except FieldError as error:
        text = f"{config} is not a decoder's, or damaged: the sizes of the cache are unknown"
        raise BackendError(text, _AGAIN, error.problems) from error
    decoder = found.model.decoder
    if decoder.filename != graph.name:
        return told
    return ToldSizes(
        shapes=told.shapes,
        heads=decoder.num_key_value_heads,
        head_size=decoder.head_size,
        vocab_size=found.model.vocab_size,
        caches=(decoder.inputs.past_key_names, decoder.inputs.past_value_names),
    )
