"""Which stored tensors hold a parameter of a model: by name, else by the renaming that transformers knows.

An adapter speaks of modules as they were named in memory; a file may use other names. Three differences
occur: a prefix (``bert.encoder…`` against ``encoder…``), names of an older transformers (5.x renames modules
and writes the old names), and experts that are stacked in memory but stored one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_export.checkpoint import Checkpoint
from lora_export.sites.experts import Held

_NO_TRANSFORMERS = "transformers' table of renamed modules could not be asked: pip install 'lora-export[hf]'"


@dataclass(frozen=True)
class Part:
    """A stored tensor that holds a parameter, or some rows of it.

    Attributes:
        tensor: The stored tensor's name.
        expert: Which of the parameter's stacked matrices; None: all of them, or it is not stacked.
        piece: ``(index, count)``: the tensor is the index-th of count that are concatenated along the rows.
        reason: What led here.
        transposed: The module holds the transpose of the (last two axes of the) tensor.
    """

    tensor: str
    expert: int | None = None
    piece: tuple[int, int] = (0, 1)
    reason: str = "name"
    transposed: bool = False


class Names:
    """Finds parameters in a checkpoint.

    Args:
        checkpoint: The base.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stored = _Table({name: (Part(name),) for name in checkpoint.tensors})
        self._held: dict[str, Held | None] = {}

    def find(self, parameter: str, flattened: bool = False) -> tuple[Part, ...] | str:
        """Return where ``parameter`` is stored, or why that is not known.

        Args:
            parameter: Dotted path with the parameter's own name: ``model.layers.0.mlp.up_proj.weight``.
            flattened: The module path's dots are underscores (kohya's files).
        """
        found = self._stored.find(parameter, flattened)
        if isinstance(found, str) or found:
            return found
        table, problem = self._renamed
        if table is None:
            return f"no tensor of that name ({problem})" if problem else "no tensor of that name"
        found = table.find(parameter, flattened)
        return found or "no tensor of that name"

    def held(self, parameter: str) -> Held | None:
        """Return how the model's own module holds a parameter in memory, as transformers builds it.

        Without transformers, or for a model that it doesn't know, as the parameter is stored. None where
        there is no such parameter, or several that differ.
        """
        if parameter not in self._held:
            self._held[parameter] = self._look_up(parameter)
        return self._held[parameter]

    def _look_up(self, parameter: str) -> Held | None:
        shapes = self._shapes
        names: list[str] = [parameter] if parameter in shapes else []
        # Other components may stand in front, in both: what counts is that all that may be meant are alike.
        for tail in () if names else (parameter, *_tails(parameter)):
            names = names or [name for name in shapes if name == tail or name.endswith(f".{tail}")]
        found = set()
        for name in names:
            owner = self._model[0].get_submodule(name.rpartition(".")[0])
            found.add(Held(shapes[name], bool(getattr(owner, "is_transposed", False))))
        if found:
            return found.pop() if len(found) == 1 else None
        parts = self._stored.find(parameter, False)
        if isinstance(parts, str) or len(parts) != 1:
            return None
        return Held(self._checkpoint.tensors[parts[0].tensor].shape, None)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        model, _ = self._model
        return {} if model is None else {n: tuple(v.shape) for n, v in model.state_dict().items()}

    @cached_property
    def _model(self) -> tuple[Any, str]:
        """The model without its values, or why there is none; asked only when needed: it imports torch."""
        try:
            return _on_meta(self._checkpoint), ""
        except ImportError:
            return None, _NO_TRANSFORMERS
        except Exception as error:  # a model that this transformers can't build
            return None, f"transformers cannot build the model: {type(error).__name__}: {error}"

    @cached_property
    def _renamed(self) -> tuple[_Table | None, str]:
        """The renaming of transformers, asked only when a name was not found."""
        model, problem = self._model
        if model is None:
            return None, problem
        try:
            return _Table(dict(_by_transformers(self._checkpoint, model))), ""
        except Exception as error:  # a conversion that we don't know
            return None, f"transformers' renaming can't be followed: {type(error).__name__}: {error}"


class _Table:
    """Parameters by name and by dotted suffix."""

    def __init__(self, parts: Mapping[str, tuple[Part, ...]]) -> None:
        self._parts = parts
        self._by_tail: dict[str, list[str]] = {}
        for name in parts:
            for tail in _tails(name):
                self._by_tail.setdefault(tail, []).append(name)

    def find(self, parameter: str, flattened: bool) -> tuple[Part, ...] | str:
        """Return the parts; empty if there are none; a sentence if the name is ambiguous."""
        if flattened:
            names = self._flattened(parameter)
        elif parameter in self._parts:
            names = [parameter]
        else:
            # The file's names have more components in front, or fewer.
            names = self._by_tail.get(parameter, []) or next(
                ([tail] for tail in _tails(parameter) if tail in self._parts), []
            )
        if len(names) > 1:
            return f"ambiguous: {', '.join(sorted(names)[:4])}{', …' if len(names) > 4 else ''}"
        return self._parts[names[0]] if names else ()

    def _flattened(self, parameter: str) -> list[str]:
        module, _, leaf = parameter.rpartition(".")
        wanted = module.replace(".", "_")
        names = [name for name in self._parts if name.rpartition(".")[2] == leaf]
        flat = {name: name.rpartition(".")[0].replace(".", "_") for name in names}
        exact = [name for name in names if flat[name] == wanted]
        return exact or [n for n in names if flat[n].endswith(f"_{wanted}")]


def _tails(name: str) -> Iterator[str]:
    """Yield ``b.c`` and ``c`` for ``a.b.c``, without the bare parameter name."""
    at = name.find(".")
    while at >= 0 and "." in name[at + 1 :]:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def _on_meta(checkpoint: Checkpoint) -> Any:
    """Return the checkpoint's model on torch's meta device, without memory."""
    import torch
    import transformers

    name = (checkpoint.config.get("architectures") or [""])[0]
    kind = getattr(transformers, name, None)
    verbosity = transformers.logging.get_verbosity()
    # Its remarks about the config are for those who run the model.
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            return kind(config) if kind else transformers.AutoModel.from_config(config)
    finally:
        transformers.logging.set_verbosity(verbosity)


def _by_transformers(checkpoint: Checkpoint, model: Any) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Yield the model's parameters as transformers would load them from this checkpoint.

    Source: transformers 5, ``conversion_mapping.get_model_conversion_mapping`` and
    ``core_model_loading.rename_source_key``.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    owner = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    meta = model.state_dict()
    found: dict[str, list[Part]] = {}
    for stored in checkpoint.tensors:
        target, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, meta)
        part = Part(stored, reason="transformers' renaming")
        if pattern is not None:
            stacked = _stacked(stored, pattern, owner[pattern])
            if stacked is None:
                continue
            part = stacked
        found.setdefault(target, []).append(part)
    for target, parts in found.items():
        yield target, tuple(sorted(parts, key=lambda part: (part.expert or 0, part.piece)))


def _stacked(stored: str, pattern: str, converter: Any) -> Part | None:
    """Return which rows of which expert a tensor becomes; None for a conversion that we can't follow."""
    operations = [
        (type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations
    ]
    if operations == [("Transpose", None)]:
        (turn,) = converter.operations
        # ``check_dims``: as its shape wants it, which is told by who places it.
        always = (turn.dim0, turn.dim1) in ((0, 1), (1, 2)) and not turn.check_dims
        return Part(stored, reason="transformers' renaming", transposed=True) if always else None
    if operations not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    numbers = [int(word) for word in stored.split(".") if word.isdigit()]
    if pattern.count("*") != 1 or not numbers:
        return None
    sources = list(converter.source_patterns)
    # The expert's number is the last one of the name: ``layers.3.mlp.experts.17.up_proj.weight``.
    piece = (sources.index(pattern), len(sources))
    return Part(stored, numbers[-1], piece, "transformers' stacking of experts")


def tied_head(config: Mapping[str, Any]) -> bool:
    """Whether the config says that the output head shares the input embedding's weight.

    transformers takes True for a causal model where the key is missing.
    """
    nested = config.get("text_config")
    for level in (config, nested if isinstance(nested, dict) else {}):
        if "tie_word_embeddings" in level:
            return bool(level["tie_word_embeddings"])
    names = json.dumps(config.get("architectures") or [])
    return "CausalLM" in names or "LMHead" in names
