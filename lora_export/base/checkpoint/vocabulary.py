"""Give a base's embedding and head more rows, for new tokens of an adapter.

transformers' `resize_token_embeddings` gives the input embedding, the output head and other tensors with a
row for each token the requested number of rows, and changes ``vocab_size``. Here the adapter holds the new
matrices whole; rows that it doesn't hold can't be made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.meta_model import LoadedNames, build_model, loaded_names
from lora_export.base.ties.ties import may_be_tied

_KEY = "vocab_size"
# Heads for a task, by their modules' names; the rows of the last are not labels.
_HEADS = {"score", "classifier", "qa_outputs", "out_proj", "dense"}
_INNER = "dense"


def resized_config(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Return the config with each ``vocab_size`` of ``old`` tokens, at any level, made ``new``."""
    result = {k: resized_config(v, old, new) if isinstance(v, dict) else v for k, v in config.items()}
    return result | {_KEY: new} if config.get(_KEY) == old else result


def why_not_resized(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the reason why tensors can't get other shapes, or an empty string.

    Args:
        checkpoint: The base.
        shapes: Stored tensor → its new shape, with more rows.
    """
    sizes = {(checkpoint.tensors[name].shape[0], shape[0]) for name, shape in shapes.items()}
    if len(sizes) != 1:
        return "the adapter's matrices have different numbers of rows"
    ((old, new),) = sizes
    config = resized_config(checkpoint.config, old, new)
    if config == checkpoint.config:
        return f"no vocab_size of the base's config is {old}, the rows that it has"
    expected = _expected(checkpoint, config) or {
        name: (new, *tensor.shape[1:])
        for name, tensor in checkpoint.tensors.items()
        if tensor.shape[:1] == (old,) and may_be_tied(name)
    }
    wrong = [
        name
        for name, shape in expected.items()
        if shapes.get(name, checkpoint.tensors[name].shape) != shape and name in checkpoint.tensors
    ]
    if wrong:
        return f"{', '.join(wrong)} would need {new} rows as well, and the adapter doesn't hold them"
    return ""


def _expected(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a config's model needs, as far as transformers can tell."""
    if "model_type" not in config:
        return {}
    try:
        model = build_model(checkpoint, config)
        meta = model.state_dict()
        names = loaded_names(LoadedNames(model), checkpoint.tensors)
        return {stored: tuple(meta[name].shape) for name, stored in names if name in meta}
    except Exception:  # no transformers, or a model that it can't build: shapes alone decide
        return {}


def grows(path: str, shape: tuple[int, ...], seen: tuple[int, ...]) -> bool:
    """Return True if an adapter's whole parameter has more rows than the base's, as for new tokens."""
    same = len(shape) == len(seen) > 0 and shape[1:] == seen[1:]
    return same and seen[0] > shape[0] and _leaf(path) not in _HEADS and may_be_tied(path)


def resize_hint(rows: int) -> str:
    """Return a hint on how to give a base more rows."""
    return f"resize the base to {rows} rows (model.resize_token_embeddings({rows}), then save_pretrained)"


def rows_hint(
    config: Mapping[str, Any],
    path: str,
    shape: tuple[int, ...],
    seen: tuple[int, ...],
    may_resize: bool,
) -> str:
    """Return a hint for a base with more or fewer rows than an adapter; empty for other differences.

    Args:
        config: The base's config.
        path: The parameter.
        shape: Stored shape.
        seen: The adapter's shape.
        may_resize: True if ``--resize`` can be given, and was not.
    """
    if not may_be_tied(path) or not shape or shape[1:] != seen[1:]:
        return ""
    if _leaf(path) in _HEADS:
        return (
            f"save the base with a head of {seen[0]} labels (from_pretrained(BASE, num_labels={seen[0]}), "
            "then save_pretrained)"
        )
    levels = [config, *(level for level in config.values() if isinstance(level, dict))]
    if "embed" not in path and shape[0] not in [level.get(_KEY) for level in levels]:
        return ""
    if seen[0] < shape[0]:
        return f"take the base from before its vocabulary grew: the adapter knows {seen[0]} tokens"
    rows = ", or give --resize, which takes the rows from the adapter if it holds them whole"
    return f"the adapter was trained with new tokens: {resize_hint(seen[0])}{rows if may_resize else ''}"


def is_task_head(path: str) -> bool:
    """Return True if a parameter is, by its name, of a head for a task."""
    return _leaf(path) in _HEADS and may_be_tied(path)


def head_hint(path: str, shape: tuple[int, ...], classes: Sequence[str] = (), *, of_graph: bool) -> str:
    """Return a hint for a base without a head that an adapter holds whole; empty for other parameters.

    Args:
        path: The parameter.
        shape: Shape of the parameter.
        classes: Classes of transformers that put such a head on the base, if known.
        of_graph: True if the base is a graph.
    """
    if not is_task_head(path):
        return ""
    is_counted = _leaf(path) != _INNER
    count, labels = (f" of {shape[0]} labels", f", num_labels={shape[0]}") if is_counted else ("", "")
    made = " or ".join(classes) or "the class of transformers that the adapter was trained with: CLASS"
    end = "export that, and merge into the graph" if of_graph else "and merge into that"
    call = f"{made}.from_pretrained(BASE{labels}), then save_pretrained"
    return f"save the base with a head{count} ({call}), {end}"


def _leaf(path: str) -> str:
    return path.rpartition(".")[0].rpartition(".")[2]
