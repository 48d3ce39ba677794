"""The spectrum from the factors is the spectrum of the full matrix."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.adapter import LoraModule
from lora_export.reports.adapter.spectrum import Spectrum, spectrum

RANDOM = np.random.default_rng(1)


def module(a: tuple[int, ...], b: tuple[int, ...], **kwargs: Any) -> LoraModule:
    return LoraModule(
        "m",
        **{
            "kind": "linear",
            "lora_a": RANDOM.standard_normal(a).astype(np.float32),
            "lora_b": RANDOM.standard_normal(b).astype(np.float32),
            "alpha": 3.0,
            "rank": a[0],
            **kwargs,
        },
    )


CASES = [
    module((3, 20), (10, 3)),
    module((3, 20), (10, 3), rslora=True),
    module((9, 4), (5, 9)),  # rank above both dimensions
    module((4, 6, 3, 3), (8, 4, 1, 1), kind="conv"),
    module((2, 30), (8, 2), kind="embedding"),
    module((6, 7), (5, 6), kind="parameter", experts=3, rank=2),
]


@pytest.mark.parametrize("case", CASES)
def test_is_the_spectrum_of_the_full_matrix(case: LoraModule) -> None:
    full = []
    for expert in range(case.experts):
        left, right = case.factors(expert, np.float64)
        full.append(np.linalg.svd(left @ right, compute_uv=False))
    wanted = np.sort(np.concatenate(full))[::-1]
    got = spectrum(case)
    size = min(wanted.size, got.singular_values.size)
    np.testing.assert_allclose(got.singular_values[:size], wanted[:size], rtol=1e-10, atol=1e-12 * wanted[0])
    assert got.norm == pytest.approx(np.linalg.norm(wanted), rel=1e-12)
    assert got.spectral_norm == pytest.approx(wanted[0], rel=1e-12)


def test_a_factor_of_many_rows_is_taken_in_parts() -> None:
    case = module((5, 300_000), (4, 5))
    left, right = case.factors(0, np.float64)
    wanted = np.linalg.svd(left @ np.linalg.qr(right.T, mode="r").T, compute_uv=False)
    np.testing.assert_allclose(spectrum(case).singular_values, wanted, rtol=1e-10)


@pytest.mark.parametrize("code", [ml_dtypes.float8_e4m3fn, np.float32])
def test_memory_suits_the_factors(code: Any) -> None:
    """float64 of a whole factor, and its copies in LAPACK, took 25 times an adapter in float8."""
    a = RANDOM.standard_normal((64, 100_000), np.float32).astype(code)
    case = module((64, 1), (16, 64), lora_a=a)
    tracemalloc.start()
    spectrum(case)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6


def test_memory_of_a_grouped_convolution() -> None:
    """Its B as a dense matrix would have 13 GB."""
    case = module((40_000, 1, 3), (40_000, 1, 1), kind="conv", groups=40_000)
    wanted = np.linalg.norm(case.lora_a[:, 0] * case.lora_b[:, 0] * case.scaling)
    assert spectrum(case).norm == pytest.approx(wanted, rel=1e-5)


def test_grouped_convolution_is_the_matrix_it_acts_as() -> None:
    """Oracle: B's grouped 1×1 convolution as a dense matrix, times A."""
    torch = pytest.importorskip("torch")
    case = module((6, 4, 3), (9, 2, 1), kind="conv", groups=3)
    eye = torch.eye(6, dtype=torch.float64)[:, :, None]
    lora_b = torch.from_numpy(case.lora_b.astype(np.float64))
    dense = torch.nn.functional.conv1d(eye, lora_b, groups=3)[..., 0].T.numpy()
    full = dense @ case.lora_a.reshape(6, -1).astype(np.float64) * case.scaling
    wanted = np.linalg.svd(full, compute_uv=False)[:6]
    np.testing.assert_allclose(spectrum(case).singular_values, wanted, rtol=1e-10)


def test_effective_rank_counts_energy() -> None:
    found = Spectrum(np.array([3.0, 1.0, 0.1, 0.0]))
    assert [found.effective_rank(share) for share in (0.5, 0.8, 0.95, 0.9999, 1.0)] == [1, 1, 2, 3, 3]
    assert Spectrum(np.zeros(3)).effective_rank() == 0
    assert Spectrum(np.zeros(3)).entropy_rank == 0.0
    assert Spectrum(np.ones(4)).entropy_rank == pytest.approx(4.0)
    assert Spectrum(np.array([1.0])).entropy_rank == pytest.approx(1.0)


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 1.0))
@settings(max_examples=50, deadline=None)
def test_ranks_stay_within_bounds(rank: int, rows: int, cols: int, share: float) -> None:
    found = spectrum(module((rank, cols), (rows, rank)))
    assert 1 <= found.effective_rank(share) <= min(rank, rows, cols)
    assert 0 < found.entropy_rank <= rank * (1 + 1e-9)
