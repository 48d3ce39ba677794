"""Guess by its name whether a module is an embedding, for files that don't say so.

A guess decides nothing where the base can be asked; see `lora_export.sites.kinds`.
"""

from __future__ import annotations

import re

_CUSTOMARY = frozenset(
    {
        "embed_in",
        "embed_positions",
        "embed_tokens",
        "embedding",
        "embeddings",
        "position_embeddings",
        "tok_embeddings",
        "token_type_embeddings",
        "word_embeddings",
        "wpe",
        "wte",
    }
)
# Words of tables' names: ``item_emb``, ``position_embedding``, ``relative_attention_bias``, ``vocab``.
_WORDS = re.compile(r"emb|posit|vocab|token|table|lookup|codebook|relative|wte|wpe")


def is_embedding_name(path: str) -> bool:
    """Return whether a module has a customary name of an embedding."""
    return _leaf(path) in _CUSTOMARY


def may_be_embedding(path: str) -> bool:
    """Return whether a module's name has a word that embeddings have."""
    return _WORDS.search(_leaf(path).lower()) is not None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
