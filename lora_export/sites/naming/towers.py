"""Which of several models that are built alike a base is: text, vision or audio; encoder or decoder.

Their blocks may have the same names and sizes (CLIP's towers), so that an adapter of one has a place for
everything in the other. What tells them apart, the surest first:

1. The class that a config names, and its model type (``CLIPVisionModel``, ``clip_vision_model``).
2. Modules that only such a model has: an embedding of tokens, of patches; attention to an encoder.

A base that has a part of the name inside is no part itself: it may hold others beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_export.sites.naming.names import flatten

_WORDS = {
    **dict.fromkeys(("text", "language"), "text"),
    **dict.fromkeys(("vision", "visual", "image", "video"), "vision"),
    **dict.fromkeys(("audio", "speech"), "audio"),
    **dict.fromkeys(("question", "query"), "question"),
    **dict.fromkeys(("ctx", "context", "document", "doc", "passage"), "context"),
    "encoder": "encoder",
    "decoder": "decoder",
}
# A model is one of each group, or holds several.
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
# The rest of a class's name is a task: "ForImageClassification" says nothing of a CLIPModel.
_TASK = re.compile(r"For[A-Z].*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

Kinds = frozenset[str]


def kinds_of_class(config: Mapping[str, Any]) -> Kinds:
    """Return what a config says of its model; empty where it says nothing."""
    names = [str(name) for name in config.get("architectures") or ()]
    words = [word for name in names for word in _WORD.findall(_TASK.sub("", name))]
    return kinds_of_words([*words, *_WORD.findall(str(config.get("model_type", "")))])


def kinds_of_names(names: Iterable[str]) -> Kinds:
    """Return what the names of a base's parameters say of it."""
    listed = list(names)
    return frozenset(kind for kind, pattern in _MODULES.items() if any(map(pattern.search, listed)))


def landmarks(names: Iterable[str]) -> tuple[str, ...]:
    """Return some of a base's names that tell its kind: one of each kind that there is."""
    listed = sorted(names)
    found = (next(filter(pattern.search, listed), None) for pattern in _MODULES.values())
    return tuple(name for name in found if name is not None)


def merged_kinds(surer: Kinds, other: Kinds) -> Kinds:
    """Return what two sources say together: in each group the surer one's, where it says something."""
    parts = ((surer & group) or (other & group) for group in _GROUPS)
    return frozenset().union(*parts)


def telling_components(names: Iterable[str]) -> frozenset[str]:
    """Return the components of the paths of a base's modules that denote a kind of model."""
    inside = {component for name in names for component in name.split(".")[:-1]}
    return frozenset(filter(_of_path, inside))


def other_kind(part: str, kinds: Kinds, inside: Iterable[str]) -> str:
    """Return which kind of model a part's path denotes that a base is not; "" where it may be the base.

    Args:
        part: Path of a submodel, dotted or flattened.
        kinds: The base's.
        inside: What `telling_components` returns for the base's parameters.
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
    """Return what some words of a name denote."""
    return frozenset(_WORDS[word.lower()] for word in words if word.lower() in _WORDS)
