"""Find parameters of a base that share one weight, such as an output head tied to the input embedding.

transformers knows them: ``_tied_weights_keys`` of the model's class and of its submodels, as far as the
config switches them on. Whether they can be parted is tried on the class as well: with
``tie_word_embeddings: false`` none may stay tied, nothing else of the config may change with it (T5 v1.1
derives a factor from it), and no ``forward`` may read it (UMT5 scales its output by it).

Without transformers, or for a model that it can't build, the names of embeddings and heads decide for plain
causal models; everything else that the config ties is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.meta_model import LoadedNames, build_model, loaded_names
from lora_export.errors import install_line

FLAG = "tie_word_embeddings"
_HEADS = {"lm_head", "embed_out", "output_projection"}
_HEAD_OF = {"gpt_neox": "embed_out.weight", "biogpt": "output_projection.weight"}
_EMBEDDINGS = {
    *("embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embed_in", "tokens_embed", "shared")
}
# Classes with an output head over the vocabulary, by a part of their name.
_LANGUAGE_MODELS = ("LM", "PreTraining", "ConditionalGeneration")
# Number of bytes compared at a time: tensors with different values differ in the first.
_COMPARED_BYTES = 1 << 20
# Hint for weights that have to stay one.
BESIDE = "export the base to ONNX and keep the adapter beside its weights (lora-export swap-onnx)"
TOGETHER = f"train the adapter with ensure_weight_tying=True, or {BESIDE}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Tie:
    """Parameters that are one weight.

    Attributes:
        tensors: The model's name of each → its tensor in the file, or the name that it would get there. The
            first is the one that the others follow: the input embedding.
        source: The stored tensor with their values.
        refusal: Reason why they can't be given values of their own; empty if they can.
        hint: Hint on the base, if one helps.
        apart: Tensors that the class ties to them, but that the file holds with other values.
        input_tensor: The one of `tensors` that is the model's input embedding, which trainers ask it for; ""
            if that is the first, or unknown.
    """

    tensors: Mapping[str, str]
    source: str
    refusal: str = ""
    hint: str = ""
    apart: tuple[str, ...] = ()
    input_tensor: str = ""


@dataclass(frozen=True)
class Ties:
    """Ties of a base.

    Attributes:
        ties: The ties.
        note: Note for the user on how they were found.
    """

    ties: tuple[Tie, ...] = ()
    note: str = ""

    @cached_property
    def _by_tensor(self) -> dict[str, Tie]:
        return {tensor: tie for tie in self.ties for tensor in tie.tensors.values()}

    def of(self, tensor: str) -> Tie | None:
        """Return the tie that a stored tensor, or one that would be stored, belongs to."""
        return self._by_tensor.get(tensor)

    def absent(self, parameter: str, flattened: bool = False) -> tuple[Tie, str] | None:
        """Return the tie of a parameter that the file does not hold, and the name that it would have there.

        Args:
            parameter: Dotted path as the adapter has it; the model's may have more components in front, or
                fewer.
            flattened: The module path's dots are underscores.
        """
        names = {_flat(name) if flattened else name: (tie, name) for tie in self.ties for name in tie.tensors}
        if parameter in names:
            # Another name may end like it: that of a head which is tied to one of the decoder's.
            tie, name = names[parameter]
            return tie, tie.tensors[name]
        found = {tie.tensors[name]: tie for own, (tie, name) in names.items() if _same(own, parameter)}
        if len(found) != 1:
            return None
        ((tensor, tie),) = found.items()
        return tie, tensor


def may_be_tied(name: str) -> bool:
    """Return True if a parameter could share its weight: not in a numbered layer, unless it embeds."""
    return "embed" in name or not any(part.isdigit() for part in name.split("."))


def is_head(tensor: str) -> bool:
    """Return True if a tensor's name is an output head's."""
    return _leaf(tensor) in _HEADS


def is_table(tensor: str) -> bool:
    """Return True if a tensor's name is an input embedding's."""
    return _leaf(tensor) in _EMBEDDINGS


def find_ties(checkpoint: Checkpoint) -> Ties:
    """Return the ties of a checkpoint's model; asking transformers takes some seconds."""
    if "model_type" not in checkpoint.config:
        return _by_names(checkpoint, "")
    try:
        return _by_transformers(checkpoint)
    except ImportError:
        return _by_names(checkpoint, f"transformers is not installed ({install_line('hf')})")
    except Exception as error:  # a model that this transformers can't build
        first = str(error).partition("\n")[0]
        why = f"transformers can't build the model ({type(error).__name__}: {first})"
        return _by_names(checkpoint, why, is_unknown=True)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with every ``tie_word_embeddings`` off, at all levels that may have one."""
    result = dict(config) | {FLAG: False}
    for key, value in config.items():
        if isinstance(value, dict) and (FLAG in value or "vocab_size" in value):
            result[key] = value | {FLAG: False}
    return result


def tied_head(config: Mapping[str, Any]) -> bool:
    """Return True if the config says that the output head shares the input embedding's weight.

    transformers assumes True for a causal model if the key is missing.
    """
    nested = config.get("text_config")
    for level in (config, nested if isinstance(nested, dict) else {}):
        if FLAG in level:
            return bool(level[FLAG])
    names = " ".join(map(str, config.get("architectures") or []))
    return "CausalLM" in names or "LMHead" in names


def _says_tied(config: Mapping[str, Any]) -> bool:
    """Return True if the config itself has the switch, on."""
    nested = config.get("text_config")
    return any(level.get(FLAG) is True for level in (config, nested if isinstance(nested, dict) else {}))


def _by_transformers(checkpoint: Checkpoint) -> Ties:
    model = build_model(checkpoint)
    follows: Mapping[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    groups: dict[str, list[str]] = {}
    for name in follows:
        first = name
        # No chain is longer than the table, so that a circle ends as well.
        for _ in follows:
            first = follows.get(first, first)
        groups.setdefault(first, [first]).append(name)
    if not groups:
        return Ties()
    renaming = LoadedNames(model)
    held = dict(loaded_names(renaming, checkpoint.tensors))
    refusal = _why_together(checkpoint, model)
    ties = []
    embedding = _input_embedding(model)
    for names in groups.values():
        stored = [held[name] for name in names if name in held]
        if not stored:
            continue
        apart = [name for name in stored[1:] if not _hold_one(checkpoint, stored[0], name)]
        as_loaded = all(held.get(name, name) == name for name in names)
        tensors = {n: held.get(n) or (n if as_loaded else renaming.stored(n)) for n in names}
        one = {name: tensor for name, tensor in tensors.items() if tensor not in apart}
        ties.append(
            Tie(
                tensors=one,
                source=stored[0],
                refusal=refusal,
                apart=tuple(apart),
                input_tensor=one.get(embedding, ""),
            )
        )
    return Ties(tuple(ties))


def _input_embedding(model: Any) -> str:
    """Return the path of the input embedding's weight; "" if the model names none."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return ""
    return next((f"{path}.weight" for path, module in model.named_modules() if module is embedding), "")


def _hold_one(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """Return True if two stored tensors are equal: transformers does not tie tensors that differ.

    An example is FLAN-T5's head: its class always ties, its config says ``tie_word_embeddings: false``.
    Source: ``PreTrainedModel.tie_weights``, transformers 5.
    """
    a, b = checkpoint.tensors[one], checkpoint.tensors[two]
    if (a.code, a.shape) != (b.code, b.shape):
        return False
    pair = [checkpoint.read(name).reshape(-1).view(np.uint8) for name in (one, two)]
    starts = range(0, a.length, _COMPARED_BYTES)
    parts = (slice(start, start + _COMPARED_BYTES) for start in starts)
    return all(np.array_equal(pair[0][part], pair[1][part]) for part in parts)


def _why_together(checkpoint: Checkpoint, model: Any) -> str:
    """Return the reason why the config can't part this model's tied weights, or an empty string."""
    kind = type(model).__name__
    other = build_model(checkpoint, untied_config(checkpoint.config))
    if other.get_expanded_tied_weights_keys(all_submodels=True):
        return f"transformers ties them in every {kind}, whatever its config says"
    before, after = (_without_flag(one.config.to_dict()) for one in (model, other))
    changed = sorted(key for key in before if before[key] != after.get(key))
    if changed:
        return f"{FLAG} changes {', '.join(changed)} of a {kind} as well"
    readers = sorted({type(module).__name__ for module in model.modules() if _reads_flag(type(module))})
    if readers:
        return f"{readers[0]} computes something else if {FLAG} is false"
    return ""


def _without_flag(value: Any) -> Any:
    if isinstance(value, dict):
        # Keys with an underscore tell where it was read from, and which transformers wrote it.
        kept = {key for key in value if key != FLAG and not str(key).startswith("_")}
        return {key: _without_flag(value[key]) for key in kept if key != "transformers_version"}
    return value


def _reads_flag(kind: type) -> bool:
    if kind.__module__.startswith("torch."):
        return False
    try:
        return FLAG in inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError, AttributeError):
        return False


def _by_names(checkpoint: Checkpoint, problem: str, is_unknown: bool = False) -> Ties:
    """Return the ties by the names of heads and embeddings, for models that transformers doesn't know.

    Args:
        checkpoint: The base.
        problem: Reason why transformers isn't asked.
        is_unknown: True if it was asked and doesn't know the model, so that the class's name tells nothing.
    """
    config = checkpoint.config
    kinds = [str(kind) for kind in config.get("architectures") or []]
    headless = bool(kinds) and not any(part in kind for kind in kinds for part in _LANGUAGE_MODELS)
    if headless and is_unknown:
        return _unknown(checkpoint, problem)
    if headless or not tied_head(config):
        return Ties()
    heads = [name for name in checkpoint.tensors if _leaf(name) in _HEADS]
    embeddings = [name for name in checkpoint.tensors if _leaf(name) in _EMBEDDINGS] or list(
        _unsure(checkpoint)
    )
    if not embeddings:
        return _unknown(checkpoint, problem)
    known = len(embeddings) == 1 and _leaf(embeddings[0]) in _EMBEDDINGS
    apart = tuple(head for head in heads if known and not _hold_one(checkpoint, embeddings[0], head))
    if apart and not _says_tied(config):
        # If the key is missing, the class decides, and it has decided.
        return Ties()
    # Other tied models do more: T5 scales its output, BERT has a transform and a bias before it.
    plain = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    refusal = hint = ""
    if not plain or not known:
        refusal = "the config says that embedding and output head are tied, and " + (
            f"{problem}, which would know how" if problem else "it doesn't say how"
        )
        hint = "save the base with tie_word_embeddings=False, or without its head"
    head = heads[0] if heads else _HEAD_OF.get(str(config.get("model_type")), "lm_head.weight")
    note = f"tied weights were judged by their names: {problem}" if problem else ""
    one = {name: name for name in [*embeddings, head] if name not in apart}
    return Ties((Tie(tensors=one, source=embeddings[0], refusal=refusal, hint=hint, apart=apart),), note)


def _unsure(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield matrices that may be the input embedding."""
    rows = checkpoint.config.get("vocab_size")
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2 and tensor.shape[0] == rows and may_be_tied(name):
            yield name


def _unknown(checkpoint: Checkpoint, problem: str) -> Ties:
    """Return each matrix that may share its weight as a tie of its own, which can't be changed.

    The config itself has to say that something is tied. With nothing known of the model, that may be any
    table with as many rows as a vocabulary.
    """
    config = checkpoint.config
    if config.get(FLAG) is not True:
        return Ties()
    rows = {value for key, value in config.items() if "vocab" in key and isinstance(value, int)}
    why = f"the config says that weights are tied, and not which{f' ({problem})' if problem else ''}"
    hint = f"save the base with {FLAG}=False and each weight for itself"
    return Ties(
        tuple(
            Tie(
                tensors={name: name, f"what may be tied to {name}": f"what may be tied to {name}"},
                source=name,
                refusal=why,
                hint=hint,
            )
            for name, tensor in checkpoint.tensors.items()
            if len(tensor.shape) == 2 and may_be_tied(name) and (not rows or tensor.shape[0] in rows)
        )
    )


def _leaf(name: str) -> str:
    """Return ``embed_tokens`` for ``model.embed_tokens.weight``."""
    module, _, leaf = name.rpartition(".")
    return module.rpartition(".")[2] if leaf == "weight" else ""


def _same(name: str, parameter: str) -> bool:
    return f".{name}".endswith(f".{parameter}") or f".{parameter}".endswith(f".{name}")


def _flat(name: str) -> str:
    module, dot, leaf = name.rpartition(".")
    return re.sub(r"\.", "_", module) + dot + leaf
