"""Write the names of models of several parts in one way, whatever version of transformers wrote them.

The parts of a vision–language model were renamed one by one, so that no change of prefix holds for all:

- 4.51 and before: ``language_model.model.…``, ``language_model.lm_head``, ``vision_tower.vision_model.…``,
  ``multi_modal_projector.…``; Qwen2-VL ``model.layers.…`` beside ``visual.…``.
- 4.52 to 4.57: ``model.language_model.…``, ``lm_head``, ``model.vision_tower.vision_model.…``,
  ``model.multi_modal_projector.…``.
- 5: the same without the ``vision_model`` of CLIP's and SigLIP's towers. Files that it saves have the names
  of 4.51 without it.

Source: transformers, ``_checkpoint_conversion_mapping`` of the classes in 4.52 to 4.57,
``conversion_mapping.py`` in 5. Only names in these tables change here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lora_export.sites.naming.known_names import KnownNames

# Parts that transformers 4.52 put below ``model``.
_PARTS = (
    "language_model|text_model|vision_model|vision_tower|image_tower|video_tower|audio_tower|visual|vqmodel"
    "|vision_embed_tokens|multi_modal_projector|image_newline"
)
_BELOW_MODEL = re.compile(rf"^model\.(?=(?:{_PARTS})(?:\.|$))")
_LANGUAGE = re.compile(r"^(language_model|text_model)\.model\.")
_HEAD = re.compile(r"^(?:language_model|text_model)\.(?=lm_head\.)")
# A tower that was a class around another. CLIP itself has ``vision_model`` right below its own name.
_IMAGES = re.compile(r"((?:^|\.)(?:\w+_)?(?:vision|image|video)_(?:tower|model|encoder)\.)vision_model\.")
_TEXTS = re.compile(r"((?:^|\.)(?:\w+_)?text_(?:model|encoder)\.)text_model\.")
# Qwen2-VL and Qwen2.5-VL: the language model had no name of its own.
_VISUAL = re.compile(r"^visual\.")
_UNNAMED = re.compile(r"^model\.(?=(?:layers|embed_tokens|norm)\.)")


def in_one_version(names: Iterable[str]) -> list[str]:
    """Return the paths of one model, or of one adapter, under names that no version changes."""
    found = [_converted(name) for name in names]
    if any(map(_VISUAL.match, found)):
        found = [_UNNAMED.sub("language_model.", name) for name in found]
    return found


def _converted(name: str) -> str:
    name = _HEAD.sub("", _LANGUAGE.sub(r"\1.", _BELOW_MODEL.sub("", name)))
    return _TEXTS.sub(r"\1", _IMAGES.sub(r"\1", name))


class OneVersion:
    """A base's paths under names that no version changes.

    Args:
        known: The base's own paths.

    Attributes:
        known: The paths. Of two that would become one, neither.
        differs: True if some of them are not the base's own.
    """

    def __init__(self, known: KnownNames) -> None:
        names = sorted(known.names)
        found = in_one_version(names)
        self.differs = found != names
        count = Counter(found)
        self._own = {new: own for new, own in zip(found, names, strict=True) if count[new] == 1}
        self.known = KnownNames(self._own, lambda name: known.shape(self._own[name]), lambda: known.kinds)
        self._modules: dict[str, str] = {}
        for new, own in self._own.items():
            self._add_modules(new.split("."), own.split("."))

    def _add_modules(self, new: list[str], own: list[str]) -> None:
        while len(new) > 1 and len(own) > 1 and new[-1] == own[-1]:
            new, own = new[:-1], own[:-1]
            self._modules.setdefault(".".join(new), ".".join(own))

    def own(self, name: str) -> str:
        """Return the base's path; of one that it lacks, or has under a builder's name, the module's above."""
        if name in self._own:
            return self._own[name]
        path, end = name, ""
        while path and path not in self._modules:
            path, _, leaf = path.rpartition(".")
            end = f".{leaf}{end}"
        return f"{self._modules[path]}{end}" if path else name
