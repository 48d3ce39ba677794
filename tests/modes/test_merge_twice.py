"""One adapter given twice to a merge is refused, under whatever name: it would count twice without a word."""

import shutil
from dataclasses import replace

import pytest
import tiny

from lora_export import load_adapter, merge_checkpoint, merge_onnx
from lora_export.errors import AdapterError
from lora_export.modes.merging.blend import check_blend

WAYS = {
    "merge": lambda given, output, **more: merge_checkpoint(tiny.checkpoint("llama"), given, output, **more),
    "merge-onnx": lambda given, output, **more: merge_onnx(
        tiny.base_onnx("llama", "dynamo"), given, output / "m.onnx", **more
    ),
}


@pytest.mark.parametrize("weights", [None, [0.25, 0.5], [1.0, -1.0]])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused(way, weights, tmp_path):
    copy = shutil.copytree(tiny.adapter("llama"), tmp_path / "copy")
    for given in ([tiny.adapter("llama")] * 2, [tiny.adapter("llama"), copy]):
        with pytest.raises(AdapterError, match="the same adapter is given twice") as caught:
            WAYS[way](given, tmp_path / "out", weights=weights)
        assert f"--weight {sum(weights or [1, 1]):g}" in caught.value.problems[0]
        assert str(given[1]) in caught.value.problems[0]
        assert "give it once" in caught.value.hint
        assert not (tmp_path / "out").exists()


def test_each_pair_is_named():
    adapter, other = (load_adapter(tiny.adapter("llama", seed=seed)) for seed in (0, 1))
    with pytest.raises(AdapterError) as caught:
        check_blend([adapter, other, replace(adapter, name="again")], None)
    (problem,) = caught.value.problems
    assert "again" in problem
    assert other.name not in problem.replace(adapter.source, "")


def test_what_differs_in_a_value_or_a_setting_is_another_adapter():
    adapter = load_adapter(tiny.adapter("llama"))
    key, module = next(iter(adapter.modules.items()))
    changed = module.lora_b.copy()
    changed.flat[0] += 1
    for made in (replace(module, lora_b=changed), replace(module, alpha=module.alpha * 2)):
        other = replace(adapter, modules={**adapter.modules, key: made})
        assert check_blend([adapter, other], None)[0] == [adapter, other]
    fewer = replace(adapter, modules={key: module})
    assert check_blend([adapter, fewer], None)[1] == [1.0, 1.0]
