"""What a graph's LoRA record says against the graph's inputs: compared before anything is made by it."""

import json
import tracemalloc

import numpy as np
import onnx
import pytest
from session_graphs import P, Q, both
from small_graphs import graph, random, save

from lora_export import AdapterSession, bank_onnx, convert_adapter, swap_onnx
from lora_export.cli import _run
from lora_export.errors import GraphError

A = both(1)
TEXT = """g (float[batch,4] x) => (float[batch,3] y) {
    t = MatMul(x, p_weight)  y = MatMul(t, q_weight)
}"""
KEY = "lora_export.exposed"


def made(folder, mode, **options):
    base = save(graph(TEXT, {"p.weight": P.T.copy(), "q.weight": Q.T.copy()}), folder, "base.onnx")
    path = folder / f"{mode}.onnx"
    if mode == "swap":
        swap_onnx(base, path, target_modules=["p", "q"], max_rank=8, **options)
    else:
        bank_onnx(base, {"a": A}, path, resident="inputs", **options)
    return path


def changed(path, change):
    model = onnx.load(path, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == KEY:
            record = json.loads(entry.value)
            change(record)
            entry.value = json.dumps(record)
    path.write_bytes(model.SerializeToString())
    return path


def set_rank(record):
    record["modules"][0]["rank"] = 30_000_000


def set_member_ranks(record):
    record["modules"][0]["members"][0]["ranks"] = [30_000_000]


@pytest.mark.parametrize("flavour", ["ort", "tensorrt"])
@pytest.mark.parametrize("mode", ["swap", "bank"])
def test_the_record_of_our_own_graphs_fits(mode, flavour, tmp_path):
    path = made(tmp_path, mode, flavour=flavour)
    session = AdapterSession(path)
    if mode == "swap" or flavour == "tensorrt":
        session.load_adapter("b" if mode == "swap" else "a", A)
    rows = {"adapter": "b"} if mode == "swap" else {"adapters": ["a", None]}
    assert np.isfinite(session.run({"x": random(2, 4)}, **rows)["y"]).all()
    if mode == "swap":
        convert_adapter(A, path, tmp_path / "a.safetensors")


@pytest.mark.parametrize("mode", ["swap", "bank"])
def test_a_record_of_other_sizes_takes_no_memory(mode, tmp_path):
    path = changed(made(tmp_path, mode), set_rank if mode == "swap" else set_member_ranks)
    calls = [lambda: AdapterSession(path)]
    if mode == "swap":
        calls.append(lambda: convert_adapter(A, path, tmp_path / "a.safetensors"))
    for call in calls:
        tracemalloc.start()
        with pytest.raises(GraphError, match=r"other sizes than the|record is damaged") as caught:
            call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "30000000" in "".join(caught.value.problems)
        assert peak < 50e6
    command = ["build-engine", str(path), "--target", "rtx-4090", "--kit", "-o", str(tmp_path / "kit")]
    assert _run(command, False) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record.update(base_sha256="zz"), "base_sha256"),
        (lambda record: record["modules"][0].update(members=[]), "members: none"),
        (lambda record: record.update(max_rank=2**63), "an integer of 64 bits"),
    ],
)
def test_a_record_that_no_tool_writes_is_the_users_error(change, says, tmp_path, capsys):
    path = changed(made(tmp_path, "swap"), change)
    with pytest.raises(GraphError, match="damaged") as caught:
        convert_adapter(A, path, tmp_path / "a.safetensors")
    assert says in "".join(caught.value.problems)
    command = ["build-engine", str(path), "--target", "rtx-4090", "--kit", "-o", str(tmp_path / "kit")]
    assert _run(command, False) == 1
