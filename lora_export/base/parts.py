"""Name the uses of a model in a pipeline of diffusers for which its graph differs."""

from __future__ import annotations

from typing import Literal

# The first half of an autoencoder, and a text encoder (`capture.prompt`).
Part = Literal["", "vae-encoder", "prompt"]
