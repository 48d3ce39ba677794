"""Graphs of builders and of transformers' exporter that tools have changed: right by PEFT, or refused.

`test_changed_graphs` has those of torch.onnx, of models in which a tool folds something.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from changed_graphs import MODES, TOOLS
from safetensors.numpy import load_file

from lora_export import SiteError, convert_adapter, merge_onnx, swap_onnx

TOLERANCE, ARCH = 2e-6, "llama"
# Tools that can read the exporter's graph: others know no GroupQueryAttention, or fail with an error.
READ_BY = {
    "genai": ("onnxslim", "ort-basic", "ort-extended", "ort-all"),
    "mobius": ("onnxslim", "onnxsim", "ort-basic", "ort-extended", "ort-all", "version"),
    "ort_fusions": ("onnxslim", "onnxsim", "ort-extended"),
}
CASES = [(exporter, tool) for exporter, tools in READ_BY.items() for tool in tools]
# genai's builder writes module paths into the names of nodes, which every tool keeps.
NAMED = {"genai"}


def answer(mode: str, graph: Path, out: Path, **options: Path) -> np.ndarray:
    """Return what the graph with the adapter answers."""
    given = tiny.adapter(ARCH)
    if mode == "merge":
        merge_onnx(graph, given, out, **options)
        return tiny.run(out, tiny.feeds(ARCH, out))
    swap_onnx(graph, out, adapter=given, **options)
    tensors = out.with_suffix(".safetensors")
    convert_adapter(given, out, tensors)
    return tiny.run(out, tiny.feeds(ARCH, out) | load_file(tensors))


@pytest.mark.xdist_group(ARCH)
@pytest.mark.parametrize(("exporter", "tool"), CASES)
def test_right_by_peft_or_refused_for_want_of_a_checkpoint(exporter, tool, tmp_path):
    # Beside the export, whose data file the tool's graph may still refer to.
    base = tiny.base_onnx(ARCH, exporter)
    shutil.copytree(base.parent, tmp_path, dirs_exist_ok=True)
    graph = tmp_path / "graph.onnx"
    TOOLS[tool](tmp_path / base.name, graph)
    wanted, plain = tiny.reference(ARCH, tiny.adapter(ARCH)), tiny.base_reference(ARCH)
    assert tiny.relative_error(tiny.run(graph, tiny.feeds(ARCH, graph)), plain) < TOLERANCE
    assert tiny.relative_error(plain, wanted) > 1e3 * TOLERANCE
    for mode in MODES:
        got = answer(mode, graph, tmp_path / f"{mode}.onnx", checkpoint=tiny.checkpoint(ARCH))
        assert tiny.relative_error(got, wanted) < TOLERANCE
        if exporter in NAMED:
            got = answer(mode, graph, tmp_path / f"{mode}-named.onnx")
            assert tiny.relative_error(got, wanted) < TOLERANCE
            continue
        with pytest.raises(SiteError) as refused:
            answer(mode, graph, tmp_path / f"{mode}-named.onnx")
        assert len(refused.value.problems) == 14
        assert "--checkpoint" in refused.value.hint
