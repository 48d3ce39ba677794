"""Translate transformers 4's names of CLIP's and SigLIP's towers (``text_model.…``) to transformers 5's.

transformers 5 omits the tower's name, so that the layers of both towers have the same names: only a base that
is a text (or vision) model by its embeddings' names takes the text (or vision) model's adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.adapter import Adapter
from lora_export.formats.schemes.known import KnownModules, flatten
from lora_export.formats.schemes.rules import Components, Counterpart, Lookup, paths_of

_TOKENS, _PATCHES = "embeddings.token_embedding", "embeddings.patch_embedding"


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """One tower.

    Attributes:
        name: See `Scheme`.
        components: See `Scheme`.
        outer: Part of the names that transformers 5 omits.
        own: A module that only this tower has.
        other: A module that only the other tower has.
        structural: See `Scheme`.
    """

    name: str
    components: Components
    outer: str
    own: str
    other: str
    structural: bool = False

    def recognises(self, adapter: Adapter) -> bool:
        """Return whether every path begins with the tower's name."""
        paths = paths_of(self, adapter)
        return bool(paths) and all(path.startswith(f"{self.outer}_") for path in paths)

    def explains(self, path: str) -> bool:
        """Return whether the path begins with the tower's name."""
        return flatten(path).startswith(f"{self.outer}_")

    def lookup(self, known: KnownModules) -> Lookup:
        """Return a function that removes the tower's name, if the base is that tower."""
        is_tower = known.has(self.own) and not known.has(self.other)

        def find(path: str) -> Sequence[Counterpart]:
            if not is_tower or not self.explains(path):
                return ()
            return (Counterpart(path[len(self.outer) + 1 :]),)

        return find


TEXT = _Tower(
    name="transformers 4's CLIP text model",
    components=(None, "text_encoder", "text_encoder_2", "text_encoder_3"),
    outer="text_model",
    own=_TOKENS,
    other=_PATCHES,
)
VISION = _Tower(
    name="transformers 4's CLIP vision model",
    components=(None, "image_encoder"),
    outer="vision_model",
    own=_PATCHES,
    other=_TOKENS,
)
