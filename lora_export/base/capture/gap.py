"""Prove a captured graph: ONNX Runtime computes with it what PyTorch computes with the model.

What is compared depends on the graph's inputs, not on the kind of model:

* the example that the model was traced with, the same in several larger sizes, and one row of a thousand
  tokens (or of as many as the model has positions for, or blocks), because models may go another way from
  some length on;
* with a mask: padding on the left and on the right;
* with a cache: a prompt with rows of different lengths, and steps behind it that go on with the cache;
* of an encoder–decoder's halves: see `half_gap`; of a vision–language model's parts: `vision_language_gap`.

A graph whose record says that it takes padding on the right only is compared on that, with one token a step
for several rows; the cache of a padded row is its own there, which the steps behind it read.

The limit is 2e-6 of the largest expected value (of a text of more than 64 tokens more, by the root of their
number, which is 8e-6 for a thousand; in 16 bits, four units of their precision), or eight times (in 16 bits,
four times) what PyTorch's own answers are away from those of the same weights in float64, if that is larger.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.base.capture.export import named_tensors, run_module
from lora_export.base.capture.half_gap import (
    DECODER_INPUTS,
    decoder_answers,
    decoder_runs,
    encoder_answers,
    is_start,
)
from lora_export.base.capture.vision_language_gap import (
    embedding_answers,
    feature_answers,
    text_answers,
    whole_runs,
)
from lora_export.base.parts import VISION_LANGUAGE, Part
from lora_export.errors import GraphError
from lora_export.graph.captured import BATCH, DECODER_SEQUENCE, SEQUENCE, Captured

if TYPE_CHECKING:
    import onnxruntime as ort
    import torch

    from lora_export.base.kinds.model_kind import ModelKind

# Relative to the largest expected value; in 16 bits, in units of their precision.
_EXACT, _EXACT_HALVES = 2e-6, 4
# Times PyTorch's own error. Sums in float32 in different orders can be far apart: over a thousand tokens of
# a T5, whose scores have no scale, ONNX Runtime was 4.7 times as far from PyTorch on one kind of processor.
_OWN, _OWN_HALVES = 8, 4
# As many times as much, where there is no answer in float64 to measure PyTorch's own error with.
_WITHOUT_OWN = 5
# Tokens of the steps behind a prompt.
_STEPS, _ONE_BY_ONE = (1, 2, 1), (1, 1, 1)
# Larger sizes of the example; two more than one and a half times it have another number of a sound's frames.
_FACTORS = (1.0, 1.5, 1.9, 2.2)
# Tokens of the long row, at most so many for a model that works in blocks; and its scores, which are computed
# in float64 as well.
_LONG, _LONGEST, _LONG_VALUES = 1040, 4096, 1 << 24
_TOKENS = (SEQUENCE, DECODER_SEQUENCE)
# Tokens up to which sums over them round as those over a layer's width do.
_FEW = 64
# Letters of ONNX Runtime's reasons, and what it says of a file of its own and a function there.
_SAID, _PLACE = 600, re.compile(r"/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\) ")
_OTHERWISE = "export the model yourself and go on with that .onnx; please report the model's config"
_ONE_SIZE = (
    "the model's code goes through its input in steps or pieces, and a trace has as many as the example; "
    "export the model yourself with operators for them and go on with that .onnx"
)
_PAST, _PRESENT = "past_key_values.", "present."

Feeds = Mapping[str, Any]
Answers = Sequence[Mapping[str, "torch.Tensor"]]
Ask = Callable[[Any, Sequence[Feeds]], Answers]
# Part of a model → what PyTorch's whole model answers for it.
_ANSWERS: dict[Part, Ask] = {
    "encoder": encoder_answers,
    "decoder": decoder_answers,
    "vision": feature_answers,
    "embedding": embedding_answers,
    "text": text_answers,
}


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Distance of a graph's answers from PyTorch's.

    Attributes:
        error: Largest difference, relative to the largest expected value of the output.
        limit: Largest one that rounding explains.
        output: Of which output and run it is.
        runs: Number of runs.
    """

    error: float
    limit: float
    output: str
    runs: int

    def refuse_large(self, whose: str) -> None:
        """Raise `GraphError` if the error is above the limit.

        Args:
            whose: Name of the model for the message.
        """
        if not self.error <= self.limit:
            raise GraphError(
                f"the graph of {whose} answers otherwise than PyTorch: a relative difference of "
                f"{self.error:.2g} in {self.output}, at most {self.limit:.2g} wanted; nothing is written",
                "give --trace loaded, omit --fused, or export the model yourself and go on with that .onnx; "
                "please report the model's config",
            )


def measure_gap(graph: Path, model: Any, kind: ModelKind, example: Feeds, *, part: Part = "") -> Gap:
    """Compare a graph with the model that it is of.

    Args:
        graph: The file, with the model's weights.
        model: The model as transformers loads it, and never run before.
        kind: Its kind.
        example: Inputs that it runs with.
        part: Use of the model, if its graph differs for it.

    Raises:
        GraphError: ONNX Runtime can't run the graph, or it has none of the model's outputs.
    """
    import torch

    session = _opened(graph)
    has_cache = any(port.name.startswith(_PAST) for port in session.get_inputs())
    stated = Captured.from_metadata(session.get_modelmeta().custom_metadata_map)
    is_right = stated is not None and stated.padding == "right"
    ask: Ask = _ANSWERS.get(part, functools.partial(_of_module, has_cache=has_cache))
    if part in _ANSWERS:
        runs = list(_runs_of_part(kind, model, example, part))
    else:
        runs = list(
            _cached_runs(kind, model, example, is_right) if has_cache else _plain_runs(kind, model, example)
        )
    # A run may change what a module does later: the second one begins as the first did, with its weights.
    second = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    answers = [ask(model, runs)]
    renamed = DECODER_INPUTS if part == "decoder" else {}
    answers.append(_of_graph(session, runs, answers[0], has_cache, renamed=renamed))
    del session
    is_half = model.dtype.itemsize == 2
    exact = _EXACT_HALVES * torch.finfo(model.dtype).eps if is_half else _EXACT
    try:
        doubled = [_doubled(run) for run in runs] if kind.is_exact_in_float64 else []
        answers.append(ask(second.double(), doubled))
    except Exception:  # of the model's own code, some of which computes in one dtype only
        answers.append([])
    # The decoder's tokens are none of those that are padded.
    masks = [{} for _ in runs] if part == "decoder" else runs
    seen = [
        [
            {name: _seen(value, mask, is_right) for name, value in answer.items()}
            for mask, answer in zip(masks, found, strict=bool(found))
        ]
        for found in answers
    ]
    return _worst(*seen, least=[exact if is_half else exact * _slack(run) for run in runs])


def _runs_of_part(kind: ModelKind, model: Any, example: Feeds, part: Part) -> Iterator[dict[str, Any]]:
    """Yield the runs of a part of a model, of which some are the whole model's."""
    if part == "decoder":
        yield from [*decoder_runs(example), _long(kind, model, example)]
    elif part == "vision":
        yield from _plain_runs(kind, model, {"pixel_values": example["pixel_values"]})
    elif part in VISION_LANGUAGE:
        long = _long(kind, model, {"input_ids": example["input_ids"]})
        yield from whole_runs(model, example, longest=long["input_ids"].shape[1])
    else:
        yield from _plain_runs(kind, model, example)


def _slack(run: Feeds) -> float:
    """Return how much more rounding the sums over many tokens take, in another order, than those over few."""
    # Of ids and masks: a sound's samples are no tokens.
    texts = (value for value in run.values() if value.ndim == 2 and not value.is_floating_point())
    tokens = max((value.shape[1] for value in texts), default=1)
    return float(max(1.0, (tokens / _FEW) ** 0.5))


def _worst(expected: Answers, actual: Answers, exact: Answers, *, least: Sequence[float]) -> Gap:
    """Return the gap that is largest in its limit."""
    worst: Gap | None = None
    for number, (want, got) in enumerate(zip(expected, actual, strict=True)):
        for name in want.keys() & got.keys():
            wanted = want[name]
            if not wanted.is_floating_point():
                continue
            error = _distance(got[name], wanted)
            limit = _WITHOUT_OWN * least[number]
            if exact and name in exact[number]:
                times = _OWN_HALVES if wanted.dtype.itemsize == 2 else _OWN
                limit = max(least[number], times * _distance(wanted, exact[number][name]))
            count = sum(map(bool, expected))
            gap = Gap(error=error, limit=limit, output=f"{name} of run {number + 1}", runs=count)
            if worst is None or not error / limit <= worst.error / worst.limit:
                worst = gap
    if worst is None:
        raise GraphError("the graph has none of the model's outputs", "please report it")
    return worst


def _opened(graph: Path) -> ort.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # One order of adding up, so that the error is the same on every machine of a kind.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own
        raise GraphError(
            f"ONNX Runtime can't load the graph on the CPU: {_reason(error)}",
            "give --no-twin if it is for another runtime: then it is written without this comparison; please "
            "report it",
        ) from error


def _plain_runs(kind: ModelKind, model: Any, example: Feeds) -> Iterator[dict[str, Any]]:
    """Yield the example, it in several larger sizes, and it with padding on the left and right."""
    largest, seen = kind.largest(model), {_sizes(example)}
    if largest or any(dim in _TOKENS for name in example for dim in kind.axes(name).values()):
        # First: a short text changes BigBird for all that come behind it.
        yield _long(kind, model, example)
    yield dict(example)
    for factor in _FACTORS:
        run = {}
        for name, values in example.items():
            for axis, dim in kind.axes(name).items():
                size, more = values.shape[axis], kind.step(model, dim)
                wanted = size + more if dim not in largest and "batch" in dim else int(factor * size)
                wanted = size + more * max(1, (wanted - size) // more)
                values = _resized(values, axis, min(wanted, largest.get(dim, wanted)))
            run[name] = values
        if _sizes(run) not in seen:
            seen.add(_sizes(run))
            yield run
    if rests := kind.rests(model):
        # torch.export may take the example's rest for every size's (in Wav2Vec2-Conformer's positions).
        yield dict(example) | {
            name: _resized(values, axis, min(rests[dim], largest.get(dim, rests[dim])))
            for name, values in example.items()
            for axis, dim in kind.axes(name).items()
            if dim in rests
        }
    yield from padded(example)


def _long(kind: ModelKind, model: Any, example: Feeds) -> dict[str, Any]:
    """Return one row of many tokens: models may go another way from some length on."""
    most = max(_LONG, min(kind.seam(model), _LONGEST))
    most = min(most, _LONG_VALUES // max(1, kind.vocab_size(model) or 1))
    largest, run = kind.largest(model), {}
    for name, values in example.items():
        for axis, dim in kind.axes(name).items():
            size = values.shape[axis]
            if dim in largest or dim in _TOKENS:
                size = max(size, min(largest.get(dim, most), most))
            values = _resized(values, axis, 1 if dim == BATCH else size)
        run[name] = values
    return run


def _resized(values: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return values.index_select(axis, _counted(size, values) % values.shape[axis])


def _sizes(run: Feeds) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(values.shape) for values in run.values())


def padded(inputs: Feeds) -> list[dict[str, Any]]:
    """Return the inputs with padding in the first row, on the left and on the right; none without a mask."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return []
    found = []
    for side in (slice(0, 2), slice(-2, None)):
        one = mask.clone()
        one[0, side] = 0
        found.append({**inputs, "attention_mask": one})
    return found


def _cached_runs(kind: ModelKind, model: Any, example: Feeds, is_right: bool) -> Iterator[dict[str, Any]]:
    """Yield a prompt of three rows, two of them padded, what comes behind it, and a long one."""
    import torch

    ids = example["input_ids"]
    ids = torch.cat([ids, ids[:1].flip(1)])
    mask = torch.ones_like(ids)
    mask[1, -3:] = mask[2, -2:] = 0
    if not is_right:
        mask[1] = mask[1].flip(0)
    has_positions = "position_ids" in inspect.signature(model.forward).parameters
    prompts = [(ids, mask, _ONE_BY_ONE), (ids[:1], mask[:1], _STEPS)] if is_right else [(ids, mask, _STEPS)]
    for tokens, given, steps in prompts:
        yield _step(tokens, given, has_positions)
        for count in steps:
            given = torch.cat([given, given.new_ones(len(given), count)], 1)
            yield _step(tokens[:, 1 : 1 + count], given, has_positions)
    long = _long(kind, model, {"input_ids": example["input_ids"]})["input_ids"]
    yield _step(long, torch.ones_like(long), has_positions)


def _is_prompt(run: Feeds) -> bool:
    """Return whether a run begins with an empty cache."""
    if "decoder_input_ids" in run:
        return is_start(run)
    return bool(run["attention_mask"].shape[1] == run["input_ids"].shape[1])


def _step(ids: torch.Tensor, mask: torch.Tensor, has_positions: bool) -> dict[str, Any]:
    step = {"input_ids": ids, "attention_mask": mask}
    if has_positions:
        step["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return step


def _of_module(model: Any, runs: Sequence[Feeds], has_cache: bool) -> Answers:
    """Return what PyTorch answers; with a cache each run goes on behind the one before it."""
    found: list[Mapping[str, torch.Tensor]] = []
    state = None
    for run in runs:
        past = None if has_cache and _is_prompt(run) else state
        more = {"past_key_values": past, "use_cache": True} if has_cache else {}
        try:
            outputs = run_module(model, {**run, **more})
        except GraphError:  # of a size that the model does not take
            found.append({})
            continue
        state = outputs.get("past_key_values")
        found.append({name: value.detach() for name, value in named_tensors(outputs).items()})
    return found


def _of_graph(
    session: ort.InferenceSession,
    runs: Sequence[Feeds],
    expected: Answers,
    has_cache: bool,
    *,
    renamed: Mapping[str, str] | None = None,
) -> Answers:
    """Return what ONNX Runtime answers where there is something to expect.

    Args:
        session: The graph.
        runs: The runs.
        expected: PyTorch's answers, with the encoder's keys and values for a decoder's half.
        has_cache: True if runs go on behind those before them.
        renamed: Input of the graph → name of it in the runs, where that is another one.
    """
    import torch

    names = [port.name for port in session.get_outputs()]
    found: list[dict[str, torch.Tensor]] = []
    state: dict[str, Any] = {}
    for run, wanted in zip(runs, expected, strict=True):
        if not wanted:
            found.append({})
            continue
        if has_cache and _is_prompt(run):
            state = {}
        feeds = {}
        for port in session.get_inputs():
            name = (renamed or {}).get(port.name, port.name)
            if name in run:
                feeds[port.name] = run[name].numpy()
            elif name in wanted:
                feeds[port.name] = wanted[name].numpy()
            elif name.startswith(_PAST):
                feeds[name] = state.get(name, _empty(port, len(next(iter(run.values())))))
        try:
            answers = dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime raises classes of its own
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in run.items())
            raise GraphError(
                f"ONNX Runtime can't run the graph on {sizes}, as PyTorch does: {_reason(error)}",
                _ONE_SIZE if "Got invalid dimensions" in str(error) else _OTHERWISE,
            ) from error
        state = {
            name.replace(_PRESENT, _PAST): value
            for name, value in answers.items()
            if name.startswith(_PRESENT)
        }
        found.append({name: torch.from_numpy(value) for name, value in answers.items()})
    return found


def _reason(error: Exception) -> str:
    """Return what ONNX Runtime says on all of its lines, without the places in its own code."""
    said = _PLACE.sub("", " ".join(str(error).split()))
    return said if len(said) <= _SAID else f"{said[:_SAID]}…"


def _empty(port: Any, rows: int) -> np.ndarray:
    """Return a cache of no tokens."""
    dtype = np.float16 if "float16" in port.type else np.float32
    return np.zeros([rows, port.shape[1], 0, port.shape[3]], dtype)


def _doubled(run: Feeds) -> dict[str, Any]:
    return {name: value.double() if value.is_floating_point() else value for name, value in run.items()}


def _counted(size: int, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.arange(size, device=like.device)


def _seen(values: torch.Tensor, run: Feeds, is_right: bool) -> torch.Tensor:
    """Return an output without its padded tokens: nobody reads them."""
    mask, ids = run.get("attention_mask"), run.get("input_ids")
    if mask is None or ids is None or not values.ndim or len(values) != len(ids):
        return values
    if values.shape[:2] == ids.shape:
        return values[mask[:, -ids.shape[1] :].bool()]
    if is_right:
        return values[mask.bool().all(1)]
    # What is read of one token may be read of a padded one (CLIP's text encoder reads the first).
    return values[mask[:, 0].bool()]


def _distance(values: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference relative to the largest wanted value; infinite where there is a NaN."""
    if values.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    exact, given = wanted.double(), values.double()
    # What is infinite or NaN in both is the same.
    is_same = (given == exact) | (given.isnan() & exact.isnan())
    gap = (given - exact).masked_fill(is_same, 0.0).abs().max()
    largest = exact.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1e-30)
    return float("inf") if gap.isnan() else float(gap / largest)
