"""Define workloads (a phase with its sizes), and make feeds of exactly these sizes for each model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16 and float8 by name
import numpy as np

from lora_export.adapter import Array
from lora_export.bench.model import BenchModel
from lora_export.graph.feed_sizes import FeedSizes
from lora_export.graph.port import Port

Phase = Literal["run", "prefill", "decode"]
Role = Literal["batch", "sequence", "past", "total"]

_PAST = re.compile(r"^past(_key_values)?[._].*(key|value)")
# Inputs [batch, sequence, …] by the names that exporters of Hugging Face models use.
_TOKENS = frozenset(
    {"input_ids", "token_type_ids", "position_ids", "inputs_embeds"}
    | {"decoder_input_ids", "decoder_attention_mask"}
)
# Word in a symbol's name → its role; the first that fits counts, as "total_sequence" is not "sequence".
_SYMBOLS: tuple[tuple[str, Role], ...] = (
    ("batch", "batch"),
    ("total", "total"),
    ("past", "past"),
    ("seq", "sequence"),
    ("len", "sequence"),
    ("token", "sequence"),
)
_USUAL_SEQUENCE = 128
# Number of token ids to use if the vocabulary's size is unknown: any vocabulary has these.
_SAFE_VOCABULARY = 16
# Steps of a diffusion model's schedule.
_TIMESTEPS = 1000


@dataclass(frozen=True)
class Workload:
    """One phase of a model's work.

    Attributes:
        phase: ``run``: a model without a key-value cache; ``prefill``: the prompt's tokens with an empty
            cache, which is the time to the first token; ``decode``: one token with a full cache.
        batch: Number of rows.
        sequence: New tokens of each row; 0 if the model reads no sequence.
        past: Tokens of each row in the cache.
    """

    phase: Phase
    batch: int
    sequence: int
    past: int = 0

    @property
    def tokens(self) -> int:
        """Number of new tokens of all rows."""
        return self.batch * self.sequence

    @property
    def size(self) -> str:
        """Sizes as text: ``8×128``, with a cache ``8×1 after 128``."""
        text = f"{self.batch}×{self.sequence}" if self.sequence else f"{self.batch}"
        return f"{text} after {self.past}" if self.phase == "decode" else text

    @property
    def label(self) -> str:
        """Phase and sizes as text."""
        return f"{self.phase} {self.size}"

    @property
    def sizes(self) -> dict[Role, int]:
        """Size of the dimensions of each role."""
        return {
            "batch": self.batch,
            "sequence": self.sequence,
            "past": self.past,
            "total": self.past + self.sequence,
        }


def has_cache(model: BenchModel) -> bool:
    """Return True if a model reads a key-value cache."""
    return any(_PAST.match(port.name) for port in model.inputs)


def has_sequence(model: BenchModel) -> bool:
    """Return True if a model reads tokens, or a sequence whose length varies."""
    return any(
        role == "sequence" or port.name in _TOKENS for port in model.inputs for role in _roles(port, {})
    )


def choose_sizes(
    models: Sequence[BenchModel], sequences: tuple[int, ...] | None, pasts: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Return sequences, pasts, and notes on what is smaller than usual.

    Args:
        models: The models; all of them run the same sizes.
        sequences: Tokens of a row; None if not given.
        pasts: Tokens in the cache; empty if not given.
    """
    if sequences is not None:
        return sequences, pasts, ()  # given sizes are used or refused, never changed
    notes = []
    sequence = min([_USUAL_SEQUENCE, *most_of(models, "sequence"), *most_of(models, "total")])
    if sequence < _USUAL_SEQUENCE:
        notes.append(f"--sequence is {sequence}, usually {_USUAL_SEQUENCE}: the model has no more positions")
    if pasts or not has_cache(models[0]):
        return (sequence,), pasts, tuple(notes)
    # The decoded token needs one more position.
    past = min([sequence, *most_of(models, "past"), *(most - 1 for most in most_of(models, "total"))])
    if past < sequence:
        notes.append(
            f"--past is {past}, not {sequence} as --sequence: the model has positions for {past + 1} tokens "
            "in all, and one of them is decoded"
        )
    return (sequence,), (past,), tuple(notes)


def plan_workloads(
    model: BenchModel, batches: Sequence[int], sequences: Sequence[int], pasts: Sequence[int]
) -> tuple[Workload, ...]:
    """Return the workloads of a model.

    Args:
        model: The model.
        batches: Batch sizes.
        sequences: Tokens of a row: of a prompt, or of the whole request without a cache.
        pasts: Tokens in the cache when one more is decoded; empty: as many as the prompts have.
    """
    if has_cache(model):
        prompts = [Workload("prefill", batch, sequence) for batch in batches for sequence in sequences]
        steps = [Workload("decode", batch, 1, past) for batch in batches for past in pasts or sequences]
        return (*prompts, *steps)
    lengths = sequences if has_sequence(model) else [0]
    return tuple(Workload("run", batch, length) for batch in batches for length in lengths)


def shape_problems(model: BenchModel, workload: Workload) -> Iterator[str]:
    """Yield the reasons why a model can't take a workload, as far as its inputs tell."""
    sizes, symbols, made = workload.sizes, _symbols(model), FeedSizes()
    for port in model.inputs:
        known = [
            sizes[role] if role else dim for dim, role in zip(port.dims, _roles(port, symbols), strict=True)
        ]
        if problem := made.problem(port.name, [size for size in known if isinstance(size, int)]):
            yield problem
        for axis, (dim, role) in enumerate(zip(port.dims, _roles(port, symbols), strict=True)):
            if role is None:
                if not isinstance(dim, int):
                    where = f"{port.name}: the size of axis {axis} ({dim or 'no name'})"
                    yield f"{where} is unknown: give --shape NAME=SIZE"
            elif isinstance(dim, int) and dim >= 0 and dim != sizes[role]:
                fix = _fix(workload, role, dim, "{}")
                yield f"{port.name} has a fixed {role} of {dim}, not {sizes[role]}{fix}"
            elif isinstance(dim, str) and sizes[role] > (most := model.largest.get(dim, sizes[role])):
                fix = _fix(workload, role, most, "{} or less")
                yield f"{port.name}: the model has positions for a {role} of {most}, not {sizes[role]}{fix}"


def most_of(models: Iterable[BenchModel], role: Role) -> Iterator[int]:
    """Yield the largest sizes that models have positions for, for dimensions of one role."""
    for model in models:
        symbols = _symbols(model)
        for port in model.inputs:
            for dim, found in zip(port.dims, _roles(port, symbols), strict=True):
                if found == role and isinstance(dim, str) and dim in model.largest:
                    yield model.largest[dim]


def _fix(workload: Workload, role: Role, size: int, text: str) -> str:
    """Return the option that makes a dimension fit, or "" if none does, as for the one token of a decode."""
    decode = workload.phase == "decode"
    if role == "batch":
        flag = "--batch"
    elif role == "total" and decode:
        flag, size = "--past", size - workload.sequence
    elif role == "past":
        flag = "--past" if decode else ""
    else:
        flag = "" if decode else "--sequence"
    return f": give {flag} {text.format(size)}" if flag and size >= 0 else ""


def make_feeds(model: BenchModel, workload: Workload, seed: int) -> dict[str, Array]:
    """Return feeds of exactly a workload's sizes, without padding: ids within the vocabulary, full masks.

    The values are the same for all models with the same inputs. `shape_problems` must yield nothing.
    """
    sizes, symbols = workload.sizes, _symbols(model)
    feeds = {}
    for port in model.inputs:
        shape = tuple(
            sizes[role] if role else int(str(dim))
            for dim, role in zip(port.dims, _roles(port, symbols), strict=True)
        )
        feeds[port.name] = _values(port, shape, work=workload, vocabulary=model.vocab_size, seed=seed)
    return feeds


def _roles(port: Port, symbols: Mapping[str, Role]) -> tuple[Role | None, ...]:
    """Return the role of each axis of an input; None for an axis whose size the graph states."""
    rank = len(port.dims)
    if _PAST.match(port.name) and rank == 4:
        return ("batch", None, "past", None)
    if port.name == "attention_mask" and rank == 2:
        return ("batch", "total")
    if port.name in _TOKENS and rank >= 2 and not (port.name == "position_ids" and rank > 2):
        return ("batch", "sequence", *(None for _ in range(rank - 2)))
    return tuple(_role_of(dim, axis, symbols) for axis, dim in enumerate(port.dims))


def _role_of(dim: int | str | None, axis: int, symbols: Mapping[str, Role]) -> Role | None:
    if isinstance(dim, int) and dim >= 0:
        return None
    if isinstance(dim, str) and dim in symbols:
        return symbols[dim]
    for word, role in _SYMBOLS:
        if isinstance(dim, str) and word in dim.lower():
            return role
    return "batch" if axis == 0 else None


def _symbols(model: BenchModel) -> dict[str, Role]:
    """Return the roles of the symbols in the inputs that are known by name."""
    return {
        dim: role
        for port in model.inputs
        for dim, role in zip(port.dims, _roles(port, {}), strict=True)
        if isinstance(dim, str) and role is not None
    }


def _values(port: Port, shape: tuple[int, ...], work: Workload, vocabulary: int | None, seed: int) -> Array:
    dtype, name = np.dtype(port.dtype), port.name
    random = np.random.default_rng([seed, *name.encode()])
    if "mask" in name or dtype.kind == "b":
        return np.ones(shape, dtype)
    if name == "position_ids":
        return np.broadcast_to(np.arange(work.past, work.past + work.sequence), shape).astype(dtype)
    if "timestep" in name:
        return random.integers(0, _TIMESTEPS, shape).astype(dtype)
    if "type" in name:
        return np.zeros(shape, dtype)
    if dtype.kind in "iu":
        # A record may claim more ids than the input's dtype has.
        most = min(vocabulary or _SAFE_VOCABULARY, np.iinfo(dtype).max)
        return random.integers(0, most, shape).astype(dtype)
    # Made in float32, so that models of every dtype get the same values.
    return (0.5 * random.standard_normal(shape, np.float32)).astype(dtype)
