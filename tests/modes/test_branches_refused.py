"""Branches that can't be: refused, all of it said."""

import numpy as np
import onnx_ir as ir
import pytest
from branch_cases import BIAS, CONTRIB, IN, OUT, X2, T, W, linear_base, one
from branch_graphs import (
    bind,
    lora,
    reasons,
    refuse_swap,
    swapped,
)
from small_graphs import HEAD, adapter, graph, random, save

from lora_export import AdapterError, GraphError, SiteError
from lora_export.graph.exposed import lora_record_of


def test_an_opset_that_is_too_old(tmp_path):
    head = HEAD.replace('"" : 20', '"" : 12')
    base, weight, _ = linear_base("3-D", tmp_path, head=head)
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape)))
    assert isinstance(caught, GraphError)
    assert "opset 12; branches need 13" in str(caught)


def test_an_ir_version_without_defaults_of_inputs(tmp_path):
    """ONNX Runtime takes its inputs with an initializer for constants: nothing could be swapped."""
    base, weight, _ = linear_base("3-D", tmp_path, head=HEAD.replace("ir_version: 10", "ir_version: 3"))
    caught = refuse_swap(base, adapter(lora("fc", *weight.shape)))
    assert isinstance(caught, GraphError)
    assert "IR version 3" in str(caught)


def test_exposed_twice(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    given = adapter(lora("fc", *weight.shape))
    out, _ = swapped(base, given)
    assert "has exposed LoRA already" in str(refuse_swap(out, given))
    model = ir.load(out)
    model.metadata_props.clear()
    ir.save(model, tmp_path / "foreign.onnx")
    caught = refuse_swap(tmp_path / "foreign.onnx", given)
    assert list(caught.problems) == ["fc.lora_A.weight", "fc.lora_B.weight"]


def test_unknown_module_names(tmp_path):
    base, *_ = linear_base("3-D", tmp_path)
    caught = refuse_swap(base, target_modules=["fc", "q_proj"])
    assert isinstance(caught, SiteError)
    assert list(caught.problems) == ["q_proj"]
    assert "it has: fc" in caught.hint
    caught = refuse_swap(base, adapter(lora("fc", OUT, IN), lora("other", OUT, IN)))
    assert reasons(caught)["other.weight"].startswith("not found")


@pytest.mark.parametrize(
    ("max_rank", "words"),
    [(3, "max_rank is 3, the adapter has rank 4"), (0, "max_rank is 0"), (-1, "max_rank is -1")],
)
def test_max_rank(max_rank, words, tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    given = adapter(lora("fc", *weight.shape, 4))
    caught = refuse_swap(base, given, max_rank=max_rank)
    assert isinstance(caught, AdapterError)
    assert words in str(caught)
    _, report = swapped(base, given, max_rank=4)
    with pytest.raises(SiteError, match="no place"):
        bind(adapter(lora("fc", *weight.shape, 5)), report, base)


def test_neither_adapter_nor_modules_and_both(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    assert "which modules" in str(refuse_swap(base))
    # What both mean is exposed once.
    _, report = swapped(base, adapter(lora("fc", *weight.shape)), target_modules=["fc"])
    assert [module.name for module in report.exposed.modules] == ["fc"]


LEFT = "g (float[40,s] x) => (float[n,s] y) { y = MatMul (fc_weight, x) }"


TRANS_A = "g (float[40,m] x) => (float[m,n] y) { y = Gemm <transA = 1> (x, fc_weight) }"


@pytest.mark.parametrize(
    ("text", "store", "words"),
    [
        (LEFT, np.asarray, "the weight stands on the left"),
        (TRANS_A, T, "reads its activation transposed"),
        (
            one(f"y = {CONTRIB}GemmFastGelu (x, fc_weight, fc_bias)", X2, "float[m,n] y"),
            T,
            "GemmFastGelu applies its activation inside",
        ),
    ],
    ids=["left", "transA", "GemmFastGelu"],
)
def test_operators_without_a_branch(text, store, words, tmp_path):
    weights = {"fc.weight": np.ascontiguousarray(store(W))}
    base = save(graph(text, weights | ({"fc.bias": BIAS} if "fc_bias" in text else {})), tmp_path)
    for options in ({"given": adapter(lora("fc", OUT, IN))}, {"target_modules": ["fc"]}):
        caught = refuse_swap(base, **options)
        assert words in reasons(caught)["fc.weight"]
        # The words are a swap's: nothing is being merged, and nobody is sent in a circle.
        assert "merged into" not in str(caught)
        assert "swap-onnx" not in caught.hint


def test_com_microsoft_attention(tmp_path):
    weight = random(36, 12, seed=7)
    text = (
        "g (float[a,b,12] x) => (float[a,b,12] y) "
        f"{{ y = {CONTRIB}Attention <num_heads = 2> (x, a_qkv_proj_weight, a_qkv_proj_bias) }}"
    )
    weights = {"a.qkv_proj.weight": weight.T.copy(), "a.qkv_proj.bias": random(36, seed=8)}
    base = save(graph(text, weights), tmp_path)
    caught = refuse_swap(base, adapter(lora("a.q_proj", 12, 12)))
    assert "projects and attends in one operator" in reasons(caught)["a.q_proj.weight"]


def test_the_record_is_in_the_file(tmp_path):
    base, weight, _ = linear_base("3-D", tmp_path)
    out, report = swapped(base, adapter(lora("fc", *weight.shape)))
    assert lora_record_of(ir.load(out).metadata_props, out.name) == report.exposed
    assert report.exposed.base == "base.onnx"
