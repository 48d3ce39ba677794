"""One option for the part that belongs, in every format and for every verb: as the hint says it."""

import json
import re

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file
from small_graphs import graph, random, save

from lora_export.cli import _run

RANK, SIZE = 2, 4
# (the part that belongs, the other part, the module in it).
PARTS = {
    "seq2seq": ("model.encoder", "model.decoder", "layers.{}.fc1"),
    "two towers": ("vision_model", "text_model", "encoder.layers.{}.mlp.fc2"),
}


def sides_of(pairs):
    for path, (a, b) in pairs.items():
        yield path, "A", a
        yield path, "B", b


def kohya(pairs, folder):
    tensors = {}
    for path, (a, b) in pairs.items():
        front = f"lora_te_{path.replace('.', '_')}"
        tensors |= {f"{front}.lora_down.weight": a, f"{front}.lora_up.weight": b}
        tensors[f"{front}.alpha"] = np.array(RANK, np.float32)
    save_file(tensors, folder / "kohya.safetensors")
    return [folder / "kohya.safetensors"]


def diffusers(pairs, folder):
    tensors = {f"text_encoder.{path}.lora_{side}.weight": values for path, side, values in sides_of(pairs)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return [folder / "pytorch_lora_weights.safetensors"]


def peft(pairs, folder):
    tensors = {
        f"base_model.model.{path}.lora_{side}.weight": values for path, side, values in sides_of(pairs)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["fc1", "fc2"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return [folder]


def mlx(pairs, folder):
    tensors = {
        f"{path}.lora_{side.lower()}": np.ascontiguousarray(values.T)
        for path, side, values in sides_of(pairs)
    }
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 1.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return [folder]


def loralib(pairs, folder):
    tensors = {f"{path}.lora_{side}": torch.from_numpy(values) for path, side, values in sides_of(pairs)}
    torch.save(tensors, folder / "a.pt")
    return [folder / "a.pt", "--alpha", str(RANK)]


FORMATS = (kohya, diffusers, peft, mlx, loralib)
X = random(3, SIZE, seed=9)


@pytest.fixture(params=PARTS)
def case(request, tmp_path):
    """Return the part, the weights of a base that is this part, its graph, and pairs for both parts."""
    part, other, module = PARTS[request.param]
    paths = [module.format(n) for n in range(2)]
    weights = {f"{path}.weight": random(SIZE, SIZE, seed=n) for n, path in enumerate(paths)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    names = [path.replace(".", "_") + "_weight" for path in paths]
    text = f"t = Gemm <transB = 1> (x, {names[0]}) y = Gemm <transB = 1> (t, {names[1]})"
    save(graph(f"g (float[n,{SIZE}] x) => (float[n,{SIZE}] y) {{ {text} }}", weights), tmp_path)
    pairs = {
        f"{owner}.{path}": (random(RANK, SIZE, seed=n + 5), random(SIZE, RANK, seed=n + 7))
        for n, (owner, path) in enumerate((owner, path) for owner in (part, other) for path in paths)
    }
    return part, paths, weights, pairs


def answer(path, **feeds):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X, **feeds})[0]


@pytest.mark.parametrize("verb", ["merge", "merge-onnx", "swap-onnx", "bank-onnx"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_the_hint_followed_gives_the_parts_sum(case, form, verb, tmp_path, capsys):
    part, paths, weights, pairs = case
    (tmp_path / "given").mkdir()
    adapter, *options = form(pairs, tmp_path / "given")
    merged = {f"{p}.weight": weights[f"{p}.weight"] + np.matmul(*pairs[f"{part}.{p}"][::-1]) for p in paths}
    expected = X.astype(np.float64)
    for values in merged.values():
        expected = expected @ values.T.astype(np.float64)
    base = tmp_path / ("base" if verb == "merge" else "base.onnx")
    out = tmp_path / ("out" if verb == "merge" else "out.onnx")
    named = f"a={adapter}" if verb == "bank-onnx" else adapter
    command = [verb, "--base", base, "--adapter", named, *options, "-o", out]
    for more in ([], ["--allow-unmatched"]):
        capsys.readouterr()
        assert run(*command, *more) == 1
        offered = re.findall(r"--component ([\w.:]+)", capsys.readouterr().err)
    (own,) = (one for one in offered if one.replace("_", ".").endswith(part.replace("_", ".")))
    assert run(*command, "--component", own) == 0
    if verb == "merge":
        found = load_file(out / "model.safetensors")
        assert all(np.allclose(found[name], values, atol=1e-5) for name, values in merged.items())
        return
    feeds = {"lora.adapter_weights": np.ones((3, 1), np.float32)} if verb == "bank-onnx" else {}
    if verb == "swap-onnx":
        converted = tmp_path / "a.safetensors"
        convert = ["convert-adapter", adapter, *options, "--for", out, "-o", converted]
        assert run(*convert) == 1
        assert f"--component {own}" in capsys.readouterr().err
        assert run(*convert, "--component", own) == 0
        feeds = load_file(converted)
    np.testing.assert_allclose(answer(out, **feeds), expected, rtol=1e-4, atol=1e-4)


def run(*words):
    return _run([str(word) for word in words], False)


@pytest.mark.parametrize("parts", [("encoder", "decoder"), ("text_model", "vision_model")])
@pytest.mark.parametrize("form", [peft, kohya, loralib], ids=lambda form: form.__name__)
def test_a_part_has_the_graphs_wrapper_in_front(form, parts, tmp_path, capsys):
    """What the hint calls by the graph's path, the checkpoint has without the wrapper."""
    paths = [f"{part}.layers.{n}.fc1" for part in parts for n in range(2)]
    weights = {f"{path}.weight": random(SIZE, SIZE, seed=n) for n, path in enumerate(paths)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    wrapped = {f"net.{name}": values for name, values in weights.items()}
    lines = [
        f"y{n + 1} = Gemm <transB = 1> (y{n}, {name.replace('.', '_')})" for n, name in enumerate(wrapped)
    ]
    save(graph(f"g (float[n,{SIZE}] y0) => (float[n,{SIZE}] y4) {{ {' '.join(lines)} }}", wrapped), tmp_path)
    pairs = {
        f"layers.{n}.fc1": (random(RANK, SIZE, seed=n + 5), random(SIZE, RANK, seed=n + 7)) for n in (0, 1)
    }
    (tmp_path / "given").mkdir()
    adapter, *options = form(pairs, tmp_path / "given")
    command = ["merge-onnx", "--base", tmp_path / "base.onnx", "--checkpoint", tmp_path / "base"]
    command += ["--adapter", adapter, *options, "--force", "-o", tmp_path / "out.onnx"]
    assert run(*command) == 1
    offered = re.findall(r"--component ([\w.:]+)", capsys.readouterr().err)
    assert {one.rpartition("net.")[2].rpartition("net_")[2] for one in offered} == set(parts)
    for one in offered:
        assert run(*command, "--component", one) == 0, (one, capsys.readouterr().err)
        expected = X.astype(np.float64)
        for name, values in weights.items():
            part, _, rest = name.removesuffix(".weight").partition(".")
            own = one.endswith(part)
            expected = expected @ (values + np.matmul(*pairs[rest][::-1]) * own).T.astype(np.float64)
        session = ort.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"y0": X})[0], expected, rtol=1e-4, atol=1e-4)
