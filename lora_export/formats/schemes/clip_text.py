"""CLIP text models as transformers 4 names them (``text_model.…``) → as transformers 5 does, without it.

Only a base that is a text model by its own names (it has ``embeddings.token_embedding``) takes them: the
vision model's layers have the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.adapter import Adapter
from lora_export.formats.schemes.known import KnownModules, flatten
from lora_export.formats.schemes.rules import Components, Counterpart, Lookup, paths_of

_TEXT_MODEL = "text_model_"
_TOKENS = "embeddings.token_embedding"
_PATCHES = "embeddings.patch_embedding"


@dataclass(frozen=True)
class _ClipText:
    name: str = "transformers 4's CLIP text model"
    components: Components = (None, "text_encoder", "text_encoder_2", "text_encoder_3")
    structural: bool = False

    def recognises(self, adapter: Adapter) -> bool:
        """Whether every path begins with ``text_model``."""
        paths = paths_of(self, adapter)
        return bool(paths) and all(path.startswith(_TEXT_MODEL) for path in paths)

    def lookup(self, known: KnownModules) -> Lookup:
        """Return a function that takes ``text_model`` off, where the base is a text model."""
        is_text = bool(known.find(_TOKENS)) and not known.find(_PATCHES)

        def find(path: str) -> Sequence[Counterpart]:
            if not is_text or not flatten(path).startswith(_TEXT_MODEL):
                return ()
            return (Counterpart(path[len(_TEXT_MODEL) :]),)

        return find


SCHEME = _ClipText()
