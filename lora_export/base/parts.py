"""Name the uses of a model for which its graph differs: in a pipeline, or as one of several of one model."""

from __future__ import annotations

from typing import Literal

# The first half of an autoencoder, a text encoder (`capture.prompt`), the halves of an encoder–decoder
# (`capture.halves`), the parts of a vision–language model (`capture.vision_language`).
Part = Literal["", "vae-encoder", "prompt", "encoder", "decoder", "vision", "embedding", "text"]
HALVES = frozenset({"encoder", "decoder"})
VISION_LANGUAGE = frozenset({"vision", "embedding", "text"})
# Several graphs of one folder.
OF_ONE_MODEL = HALVES | VISION_LANGUAGE
