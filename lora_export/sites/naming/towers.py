"""Tell which of several similar models a base is: text, vision or audio; encoder or decoder.

Their blocks may have the same names and sizes (CLIP's towers), so that an adapter of one finds a site for
each target in the other. The evidence, the surest first:

1. The class that a config names, and its model type (``CLIPVisionModel``, ``clip_vision_model``).
2. Modules that only such a model has: an embedding of tokens, of patches; attention to an encoder.

A base that has a part of such a name inside is not such a part itself: it may hold others beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_export.formats.schemes.known import flatten

_WORDS = {
    **dict.fromkeys(("text", "language"), "text"),
    **dict.fromkeys(("vision", "visual", "image", "video"), "vision"),
    **dict.fromkeys(("audio", "speech"), "audio"),
    **dict.fromkeys(("question", "query"), "question"),
    **dict.fromkeys(("ctx", "context", "document", "doc", "passage"), "context"),
    "encoder": "encoder",
    "decoder": "decoder",
}
# A model is one kind of each group, or holds several.
_GROUPS = (
    frozenset({"text", "vision", "audio"}),
    frozenset({"encoder", "decoder"}),
    frozenset({"question", "context"}),
)
_MODULES = {
    "text": re.compile(r"(?:^|\.)(?:token_embedding|tok_embeddings|word_embeddings|embed_tokens|wte)\."),
    "vision": re.compile(r"(?:^|\.)patch_(?:embed\w*|conv)\."),
    "audio": re.compile(r"(?:^|\.)feature_(?:extractor\.conv_layers|projection)\."),
    "decoder": re.compile(r"(?:^|\.)(?:encoder_attn|cross_?attn|cross_?attention|EncDecAttention)\."),
}
# The rest of a class's name is a task: "ForImageClassification" tells nothing about a CLIPModel.
_TASK = re.compile(r"For[A-Z].*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

Kinds = frozenset[str]


def kinds_of_class(config: Mapping[str, Any]) -> Kinds:
    """Return the kinds of a model by its config; empty if the config doesn't tell."""
    names = [str(name) for name in config.get("architectures") or ()]
    words = [word for name in names for word in _WORD.findall(_TASK.sub("", name))]
    return kinds_of_words([*words, *_WORD.findall(str(config.get("model_type", "")))])


def kinds_of_names(names: Iterable[str]) -> Kinds:
    """Return the kinds of a base by the names of its parameters."""
    listed = list(names)
    return frozenset(kind for kind, pattern in _MODULES.items() if any(map(pattern.search, listed)))


def landmarks(names: Iterable[str]) -> tuple[str, ...]:
    """Return some of a base's names that tell its kinds: one for each kind."""
    listed = sorted(names)
    found = (next(filter(pattern.search, listed), None) for pattern in _MODULES.values())
    return tuple(name for name in found if name is not None)


def merged_kinds(surer: Kinds, other: Kinds) -> Kinds:
    """Return the kinds by two sources: in each group the surer source's, unless it has none."""
    parts = ((surer & group) or (other & group) for group in _GROUPS)
    return frozenset().union(*parts)


def telling_components(names: Iterable[str]) -> frozenset[str]:
    """Return the components of the paths of a base's modules that denote a kind of model."""
    inside = {component for name in names for component in name.split(".")[:-1]}
    return frozenset(filter(_of_path, inside))


def other_kind(part: str, kinds: Kinds, inside: Iterable[str]) -> str:
    """Return the kind of model that a part's path denotes and a base is not; "" if it may be the base.

    Args:
        part: Path of a submodel, dotted or flattened.
        kinds: Kinds of the base.
        inside: Result of `telling_components` for the base's parameters.
    """
    text = f"_{flatten(part)}_"
    for group in _GROUPS:
        mine, own = _of_path(part) & group, kinds & group
        if not mine or not own or mine & own:
            continue
        if not any(f"_{name}_" in text and _of_path(name) & group for name in inside):
            return min(mine)
    return ""


def _of_path(path: str) -> Kinds:
    return kinds_of_words(re.split(r"[._]", path))


def kinds_of_words(words: Iterable[str]) -> Kinds:
    """Return the kinds that words of a name denote."""
    return frozenset(_WORDS[word.lower()] for word in words if word.lower() in _WORDS)
