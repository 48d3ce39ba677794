"""The zoo itself: what the other tests build on must be right, and must show a mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

# Seconds instead of a tenth of one: torch.export traces each of them.
SLOW_EXPORTERS = {"dynamo", "dynamo_noopt", "ort_fusions"}
EXPORTS = [
    pytest.param(arch, exporter, marks=[pytest.mark.slow] if exporter in SLOW_EXPORTERS else [])
    for arch, exporter in tiny.pairs()
]
ADAPTERS = [(arch, feature) for arch, spec in tiny.ARCHITECTURES.items() for feature in spec.features]


@pytest.mark.parametrize(("arch", "exporter"), EXPORTS)
def test_base_onnx_equals_pytorch(arch: str, exporter: str) -> None:
    path = tiny.base_onnx(arch, exporter)
    got = tiny.run(path, tiny.feeds(arch, path))
    assert tiny.relative_error(got, tiny.base_reference(arch)) <= 2e-6


@pytest.mark.parametrize(("arch", "exporter"), tiny.UNSUPPORTED)
def test_what_is_called_unsupported_fails(arch: str, exporter: str, tmp_path: Path) -> None:
    kind = tiny.UNSUPPORTED[arch, exporter].partition(":")[0]
    with pytest.raises((NotImplementedError, ValueError)) as caught:
        tiny.export(arch, exporter, tmp_path)
    assert caught.type.__name__ == kind


@pytest.mark.parametrize(("arch", "feature"), ADAPTERS)
def test_adapter_is_visible_and_merges(arch: str, feature: str) -> None:
    adapter = tiny.adapter(arch, feature)
    merged = tiny.reference(arch, adapter)
    assert tiny.relative_error(merged, tiny.base_reference(arch)) >= 1e-2
    # PEFT's merge is the oracle: where PEFT disagreed with itself, it would be none.
    assert tiny.relative_error(tiny.reference(arch, adapter, merged=False), merged) <= 2e-6


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_weights_are_the_same_at_every_build(arch: str) -> None:
    first, second = tiny.build(arch).state_dict(), tiny.build(arch).state_dict()
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def test_seeds_give_different_adapters() -> None:
    first, second = (tiny.reference("llama", tiny.adapter("llama", "plain", seed)) for seed in (0, 1))
    assert not np.allclose(first, second, atol=1e-2)
