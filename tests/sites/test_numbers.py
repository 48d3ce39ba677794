"""Numbers that programs are written with, and numbers that were computed from weights."""

import math

import numpy as np
import pytest
from transformers import AutoConfig

from lora_export.sites.values.numbers import is_written

WRITTEN = {
    "epsilons": (1e-5, 1e-6, 1e-12, 1e-8),
    "limits": (-65504.0, float(np.finfo(np.float32).min), -1e9, -10000.0, math.inf, 0.0),
    "GELU": (0.044715, math.sqrt(2 / math.pi), 1.702, 1 / math.sqrt(2), 0.5, 1.0),
    "fractions": (1 / 3, 2 / 3, 0.25, 1 / 6, 127.5, 1 / 7),
    "circles": (math.pi, 2 * math.pi, math.pi / 2, 1 / math.pi),
    "logarithms": (math.log(2), math.log(10000)),
    "of the code": (30.0, 50.0, 0.22, 0.18215, 0.13025),
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_programs(kind, dtype):
    assert [value for value in WRITTEN[kind] if not is_written(float(dtype(value)))] == []
    assert all(is_written(-float(dtype(value))) for value in WRITTEN[kind])


@pytest.mark.parametrize("power", [-1 / 2, -1 / 4, 1 / 2])
@pytest.mark.parametrize("size", [8, 16, 24, 32, 48, 64, 72, 80, 96, 128, 160, 256, 576, 2048, 3584])
def test_scales_of_attention_and_embeddings(size, power):
    assert is_written(float(np.float32(size**power)))


def test_numbers_of_configurations():
    """What transformers' own configurations hold, as far as they are written."""
    for kind in ("granite", "gemma2", "cohere", "llama", "falcon", "bert", "t5", "vit"):
        values = AutoConfig.for_model(kind).to_dict().values()
        assert all(is_written(value) for value in values if isinstance(value, float)), kind


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 7.0, 50.0, 900.0])
def test_most_computed_numbers_are_told(scale):
    values = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * np.float32(scale)
    assert np.mean([is_written(float(value)) for value in values]) < 0.06
