"""Structured mutations of every file that is read, with a fixed budget and seeds: no defect, no hang."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mutators
import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from lora_export.cli import main

# Seconds that a run on a file of a few kilobytes may take: a hang is what is looked for.
HANG_S = 20.0
ONES = np.ones
EXAMPLES = 60
# One entry for each run on a mutated file.
TRIED: list[int] = []


def mutating(examples: int = EXAMPLES) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def run(*arguments: object) -> int:
    TRIED.append(1)
    begin = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in arguments])
    code = int(stop.value.code or 0)
    assert code in (0, 1), f"exit code {code}"
    assert time.monotonic() - begin < HANG_S
    return code


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, int], None]) -> Iterator[None]:
    TRIED.clear()
    yield
    record_property("tried", len(TRIED))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutations")


def fresh(place: Path) -> Path:
    shutil.rmtree(place / "now", ignore_errors=True)
    (place / "now").mkdir()
    return place / "now"


def pair(a: str, b: str, **more: Any) -> mutators.Tensors:
    return {a: ONES((4, 8), np.float32), b: ONES((8, 4), np.float32), **more}


CONFIG = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "bias": "none",
    "use_rslora": False,
    "rank_pattern": {"k": 2}, "alpha_pattern": {"k": 4}, "fan_in_fan_out": False, "modules_to_save": None,
    "base_model_name_or_path": "x", "peft_version": "0.18.0",
}  # fmt: skip
KEYS = (
    "use_dora", "use_bdlora", "layers_pattern", "layers_to_transform", "exclude_modules", "target_parameters",
    "trainable_token_indices", "lora_bias", "init_lora_weights", "layer_replication", "auto_mapping",
    "megatron_config", "loftq_config", "unknown", "modules_to_save", "rank_pattern", "alpha_pattern", "bias",
)  # fmt: skip
MLX = {
    "fine_tune_type": "lora",
    "num_layers": 1,
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
}
P = "base_model.model."
X = "double_blocks.0.processor"
ALPHA = np.asarray(4.0, np.float32)
# Name → tensors, config or None, metadata, the file's name.
LAYOUTS: dict[str, tuple[mutators.Tensors, dict[str, Any] | None, dict[str, str], str]] = {
    "peft": (pair(f"{P}q.lora_A.weight", f"{P}q.lora_B.weight"), CONFIG, {}, "adapter_model.safetensors"),
    "peft, dora": (
        pair(f"{P}q.lora_A.weight", f"{P}q.lora_B.weight",
             **{f"{P}q.lora_magnitude_vector.weight": ONES(8, np.float32)}),
        CONFIG | {"use_dora": True}, {}, "adapter_model.safetensors",
    ),
    "peft, experts and tokens": (
        {**pair(f"{P}m.experts.lora_A.weight", f"{P}m.experts.lora_B.weight"),
         **pair(f"{P}e.lora_embedding_A", f"{P}e.lora_embedding_B"),
         f"{P}e.token_adapter.trainable_tokens_delta": ONES((2, 8), np.float32)},
        CONFIG | {"target_parameters": ["m.experts"], "trainable_token_indices": {"e": [1, 3]}}, {},
        "adapter_model.safetensors",
    ),
    "kohya": (
        pair("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", **{"lora_unet_q.alpha": ALPHA}),
        None, {"ss_network_alpha": "4", "ss_network_dim": "4"}, "k.safetensors",
    ),
    "diffusers": (
        pair("transformer.q.lora_A.weight", "transformer.q.lora_B.weight"), None,
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
        "d.safetensors",
    ),
    "mlx": (
        {"q.lora_a": ONES((8, 4), np.float32), "q.lora_b": ONES((4, 8), np.float32)}, MLX, {},
        "adapters.safetensors",
    ),
    "edge-llm": (
        pair("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"), None, {},
        "processed_adapter_model.safetensors",
    ),
    "plain": (pair("q.lora_A", "q.lora_B"), None, {}, "p.safetensors"),
    "xlabs": (
        {**pair(f"{X}.qkv_lora1.down.weight", f"{X}.qkv_lora1.up.weight"),
         **pair(f"{X}.proj_lora1.down.weight", f"{X}.proj_lora1.up.weight")},
        None, {}, "x.safetensors",
    ),
}  # fmt: skip


def write(folder: Path, tensors: Any, config: Any, metadata: Any, name: str) -> Path:
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name, metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder if config is not None else folder / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_adapters(layout: str, place: Path) -> None:
    good, config, metadata, name = LAYOUTS[layout]

    @mutating()
    @given(mutators.tensors(good), st.sampled_from([(), ("--alpha", "4"), ("--component", "transformer")]))
    def check(tensors: mutators.Tensors, options: tuple[str, ...]) -> None:
        run("inspect", write(fresh(place), tensors, config, metadata, name), *options)

    check()


@pytest.mark.parametrize("layout", [name for name, (_, config, *_) in LAYOUTS.items() if config])
def test_configs_of_adapters(layout: str, place: Path) -> None:
    tensors, good, metadata, name = LAYOUTS[layout]

    @mutating()
    @given(mutators.plain_data(good, KEYS))
    def check(config: Any) -> None:
        run("inspect", write(fresh(place), tensors, config, metadata, name))

    check()


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_metadata_of_adapters(layout: str, place: Path) -> None:
    tensors, config, metadata, name = LAYOUTS[layout]
    odd = ['{"transformer.r": []}', '{"transformer.rank_pattern": 3, "r": "x"}', "[" * 5000, "9" * 5000]
    texts = st.sampled_from(["", "x", "nan", "inf", "1e999", "-4", "[]", "{}", "null", *odd])
    known = ["ss_network_module", "ss_network_args", "ss_base_model_version", "format"]
    keys = st.sampled_from([*metadata, *known])

    @mutating()
    @given(st.dictionaries(keys, texts, min_size=1, max_size=3))
    def check(changed: dict[str, str]) -> None:
        run("inspect", write(fresh(place), tensors, config, metadata | changed, name))

    check()


PT = {
    "q.lora_A": [4, 8], "q.lora_B": [8, 4], "alpha": 8, "r": 4, "rslora": False, "enable_lora": [True],
    "lora_config": {"r": 4, "lora_alpha": 8, "default": {"r": 4}}, "state_dict": {"k.lora_A": [4, 8]},
    "optimizer": {"state": {"alpha": 3}},
}  # fmt: skip


def _with_tensors(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _with_tensors(value) for key, value in data.items()}
    if isinstance(data, list) and data and all(type(n) is int and 0 <= n < 100 for n in data):
        return torch.ones(data)
    return data


@mutating(120)
@given(data=mutators.plain_data(PT, ("alpha", "q.lora_A", "use_dora", "scaling", "epoch", "lora", "peft")))
def test_pt_files(place: Path, data: Any) -> None:
    path = fresh(place) / "a.pt"
    torch.save(_with_tensors(data), path)
    run("inspect", path)


def graph() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "q.weight")
    bias = numpy_helper.from_array(np.ones(8, np.float32), "k.bias")
    gemm = numpy_helper.from_array(np.ones((8, 8), np.float32), "k.weight")
    nodes = [
        helper.make_node("MatMul", ["x", "q.weight"], ["h"], name="/q/MatMul"),
        helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("Mul", ["h", "one"], ["m"]),
        helper.make_node("Gemm", ["m", "k.weight", "k.bias"], ["y"], name="/k/Gemm", transB=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])]
    made = helper.make_graph(nodes, "g", inputs, outputs, [weight, gemm, bias])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_good(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors, config, metadata, name = LAYOUTS["peft"]
    return write(folder, tensors, config, metadata, name)


def wide_graph() -> onnx.ModelProto:
    """Operators whose attributes and further inputs are read: lookups, convolutions, quantised weights."""
    rng = np.random.default_rng(0)
    weights = {
        "e.weight": rng.normal(size=(16, 8)).astype(np.float32),
        "d.codes": rng.integers(-8, 8, (8, 8)).astype(np.int8),
        "d.scale": np.full(8, 0.1, np.float32),
        "d.zero": np.zeros(8, np.int8),
        "n.codes": rng.integers(0, 255, (8, 1, 16)).astype(np.uint8),
        "n.scale": np.full(8, 0.1, np.float32),
        "t.weight": rng.normal(size=(8, 8)).astype(np.float32),
        "c.weight": rng.normal(size=(8, 8, 1)).astype(np.float32),
        "wide": np.asarray([0, 0, 32], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["e.weight", "ids"], ["h0"], name="/e/Gather", axis=0),
        helper.make_node("DequantizeLinear", ["d.codes", "d.scale", "d.zero"], ["dw"], name="/d/DQ", axis=1),
        helper.make_node("MatMul", ["h0", "dw"], ["h1"], name="/d/MatMul"),
        helper.make_node("Transpose", ["t.weight"], ["tw"], name="/t/Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["h1", "tw"], ["h2"], name="/t/MatMul"),
        helper.make_node("Transpose", ["h2"], ["h3"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["h3", "c.weight"], ["h4"], name="/c/Conv", kernel_shape=[1], group=1),
        helper.make_node("Transpose", ["h4"], ["h5"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["h5", "h5", "h5", "h5"], ["h6"], axis=-1),
        helper.make_node("MatMulNBits", ["h6", "n.codes", "n.scale"], ["y"], name="/n/MatMul_Q4",
                         domain="com.microsoft", K=32, N=8, bits=4, block_size=32),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 8])]
    held = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, held), opset_imports=opsets, ir_version=10
    )


def write_wide(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sizes = {"d": (8, 8), "t": (8, 8), "n": (32, 8)}
    found = {}
    for name, (width, out) in sizes.items():
        found[f"{P}{name}.lora_A.weight"] = ONES((4, width), np.float32)
        found[f"{P}{name}.lora_B.weight"] = ONES((out, 4), np.float32)
    found |= {f"{P}e.lora_embedding_A": ONES((4, 16), np.float32)}
    found |= {f"{P}e.lora_embedding_B": ONES((8, 4), np.float32)}
    found |= {f"{P}c.lora_A.weight": ONES((4, 8, 1), np.float32)}
    found |= {f"{P}c.lora_B.weight": ONES((8, 4, 1), np.float32)}
    config = CONFIG | {"target_modules": [*sizes, "e", "c"]}
    return write(folder, found, config, {}, "adapter_model.safetensors")


GRAPHS = {"plain": (graph, write_good), "wide": (wide_graph, write_wide)}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx", "bank-onnx"])
def test_graphs(verb: str, kind: str, place: Path) -> None:
    make, write_adapter = GRAPHS[kind]
    adapter = write_adapter(place / "good")
    given_adapter = f"one={adapter}" if verb == "bank-onnx" else adapter

    @mutating(120)
    @given(mutators.protos(make()))
    def check(model: Any) -> None:
        folder = fresh(place)
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        output = folder / "out" / "o.onnx"
        run(verb, "--base", folder / "m.onnx", "--adapter", given_adapter, "-o", output, "--allow-unmatched")

    check()


@pytest.mark.parametrize("key", ["lora_export.exposed", "lora_export.data"])
def test_records_in_graphs(key: str, place: Path) -> None:
    adapter = write_good(place / "good")
    base = place / "external.onnx"
    onnx.save(graph(), base, save_as_external_data=True, size_threshold=0, location="external.data")
    run("swap-onnx", "--base", base, "--adapter", adapter, "-o", place / "swap.onnx", "--force")
    model = onnx.load(place / "swap.onnx", load_external_data=False)
    (entry,) = [one for one in model.metadata_props if one.key == key]

    @mutating(80)
    @given(mutators.plain_data(json.loads(entry.value)))
    def check(data: Any) -> None:
        entry.value = json.dumps(data)
        (place / "changed.onnx").write_bytes(model.SerializeToString())
        out = fresh(place) / "a.onnx_adapter"
        run("convert-adapter", adapter, "--for", place / "changed.onnx", "-o", out)

    check()


def test_manifests_of_merged_graphs(place: Path) -> None:
    adapter = write_good(place / "good")
    base = place / "base.onnx"
    onnx.save(graph(), base)
    merged = place / "merged.onnx"
    run("merge-onnx", "--base", base, "--adapter", adapter, "-o", merged, "--force")
    manifest = merged.with_suffix(".lora.json")
    good = json.loads(manifest.read_text())

    @mutating(80)
    @given(mutators.plain_data(good))
    def check(data: Any) -> None:
        manifest.write_text(json.dumps(data))
        run("merge-onnx", "--base", merged, "--adapter", adapter, "-o", fresh(place) / "o.onnx")

    check()


RECIPE = {
    "name": "x", "description": "y", "needs": ["numpy"],
    "steps": [{"inspect": {"adapter": "no-such-adapter", "json": True}}],
}  # fmt: skip


@mutating(80)
@given(data=mutators.plain_data(RECIPE, ("name", "steps", "inspect", "adapter", "merge")))
def test_recipes(place: Path, data: Any) -> None:
    path = fresh(place) / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    run("run", path, "--dry-run")


CHECKPOINT = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 16,
    "torch_dtype": "float32", "tie_word_embeddings": False, "time_step_limit": [0.0, float("inf")],
}  # fmt: skip
INDEX = {"metadata": {"total_size": 256}, "weight_map": {"q.weight": "model-00001-of-00001.safetensors"}}


@pytest.mark.parametrize("what", ["config", "index", "tensors"])
def test_checkpoints(what: str, place: Path) -> None:
    adapter = write_good(place / "good")
    kinds: dict[str, Any] = {
        "config": mutators.plain_data(CHECKPOINT, ("quantization_config", "_class_name", "text_config")),
        "index": mutators.plain_data(INDEX, ("q.weight", "weight_map", "metadata")),
        "tensors": mutators.tensors({"q.weight": ONES((8, 8), np.float32)}),
    }

    @mutating(80)
    @given(kinds[what])
    def check(changed: Any) -> None:
        folder = fresh(place)
        tensors = changed if what == "tensors" else {"q.weight": ONES((8, 8), np.float32)}
        save_file(tensors, folder / "model-00001-of-00001.safetensors")
        (folder / "config.json").write_text(json.dumps(changed if what == "config" else CHECKPOINT))
        index = json.dumps(changed if what == "index" else INDEX)
        (folder / "model.safetensors.index.json").write_text(index)
        run("merge", "--base", folder, "--adapter", adapter, "-o", place / "now" / "merged")

    check()


HEADER = {"q.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]}, "__metadata__": {"k": "v"}}


@mutating(150)
@given(data=mutators.plain_data(HEADER, ("q.weight", "dtype", "shape", "__metadata__")))
def test_headers(place: Path, data: Any) -> None:
    folder = fresh(place)
    text = json.dumps(data).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(256))
    run("inspect", folder / "model.safetensors")
    run("merge", "--base", folder, "--adapter", write_good(place / "good"), "-o", folder / "merged")
