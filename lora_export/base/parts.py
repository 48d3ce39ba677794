"""Name the uses of a model for which its graph differs: in a pipeline, or as one of two halves."""

from __future__ import annotations

from typing import Literal

# The first half of an autoencoder, a text encoder (`capture.prompt`), the halves of an encoder–decoder
# (`capture.halves`).
Part = Literal["", "vae-encoder", "prompt", "encoder", "decoder"]
HALVES = frozenset({"encoder", "decoder"})
