"""A weight of a number of axes that its operator can't read is the graph's fault, in every verb."""

import numpy as np
import pytest
from small_graphs import adapter, conv, embedding, graph, linear, random, run, save

from lora_export import bank_onnx, merge_onnx, swap_onnx
from lora_export.errors import GraphError

NODES = {
    "Conv": "y = Conv(x, m_weight)",
    "ConvTranspose": "y = ConvTranspose(x, m_weight)",
    "Conv behind a Cast": "w = Cast<to=1>(m_weight)\n y = Conv(x, w)",
    "Gemm": "y = Gemm<transB=1>(x, m_weight)",
    "Gemm of a Cast": "w = Cast<to=1>(m_weight)\n y = Gemm(x, w)",
}
VERBS = {
    "merge": lambda base, out, module: merge_onnx(base, adapter(module), output=out),
    "swap": lambda base, out, module: swap_onnx(base, out, adapter=adapter(module)),
    "swap of names": lambda base, out, module: swap_onnx(base, out, target_modules=["m"], max_rank=4),
    "bank": lambda base, out, module: bank_onnx(base, {"a": adapter(module)}, out),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", NODES)
def test_a_weight_of_too_few_or_too_many_axes_is_refused_with_its_node(name, verb, tmp_path):
    shapes = [(4, 4), (4,)] if "Conv" in name else [(4, 4, 1), (2, 4, 4), (4,)]
    for number, shape in enumerate(shapes):
        sizes = (1, 4, 8, 8) if "Conv" in name else (1, 4)
        given = f"float[{','.join(map(str, sizes))}] x"
        model = graph(f"g ({given}) => (float y) {{ {NODES[name]} }}", {"m.weight": random(*shape)})
        base = save(model, tmp_path / str(number))
        with pytest.raises(Exception, match=r"ShapeInferenceError|INVALID"):
            run(base, x=np.zeros(sizes, np.float32))
        for module in (linear("m", 4, 4), conv("m", 4, 4, 1, 1), embedding("m", 4, 4)):
            with pytest.raises(GraphError, match=r"/m/(Conv|Gemm)") as caught:
                VERBS[verb](base, tmp_path / "o.onnx", module)
            assert f"of {len(shape)} axes" in caught.value.message
            assert not (tmp_path / "o.onnx").exists()
