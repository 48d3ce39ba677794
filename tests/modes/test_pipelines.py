"""A pipeline of diffusers becomes a folder of graphs, with an adapter in the components that it is for."""

from __future__ import annotations

import json
import logging
import re
import shutil
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export import (
    AdapterError,
    CheckpointError,
    OutputError,
    capture_onnx,
    load_adapter,
    merge_onnx,
    verify,
)
from lora_export.base.pipeline_graphs import open_pipeline
from lora_export.base.pipeline_parts import part_adapters
from lora_export.cli import _run

tiny = pytest.importorskip("tiny_pipelines")

ALPHA, RANK = 3.0, 2
# Component → ends of the paths of modules that the adapter changes.
ENDS = {
    "unet": ("attn1.to_q", "attn2.to_k", "ff.net.2"),
    "transformer": ("attn.to_q", "attn.to_v"),
    "text_encoder": ("q_proj", "fc1"),
    "text_encoder_2": ("v_proj", "fc2"),
}
KOHYA = {
    "unet": "lora_unet",
    "transformer": "lora_unet",
    "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2",
}


def kohya_file(path: Any, pairs: dict[str, dict[str, Any]]) -> Any:
    """Write kohya's names, as of a text encoder of transformers 4."""
    tensors = {}
    for component, modules in pairs.items():
        for module, (a, b) in modules.items():
            is_text = component.startswith("text") and not module.startswith("text_model.")
            inside = f"text_model.{module}" if is_text else module
            name = f"{KOHYA[component]}_{inside.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return path


def diffusers_file(path: Any, pairs: dict[str, dict[str, Any]], scaling: float = 1.0) -> Any:
    tensors = {}
    for component, modules in pairs.items():
        for module, (a, b) in modules.items():
            tensors[f"{component}.{module}.lora_A.weight"] = a
            tensors[f"{component}.{module}.lora_B.weight"] = b * scaling
    save_file(tensors, path)
    return path


def pairs_of(pipeline: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for component, ends in ENDS.items():
        model = getattr(pipeline, component, None)
        if model is not None and not type(model).__name__.startswith("T5"):
            found[component] = tiny.pairs_of(model, ends)
    return found


def run(graph: Any, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(graph))
    assert {given.name for given in session.get_inputs()} == feeds.keys()
    values = {name: np.asarray(value) for name, value in feeds.items()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, values), strict=True))


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    scale = wanted.abs().max().item()
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=0, atol=1e-5 * scale)


def compare_text_encoder(folder: Any, model: Any) -> None:
    """Compare all outputs that pipelines take, in their order."""
    ids = torch.randint(0, 58, (3, 9))
    ids[:, -1] = 59
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True)
    found = run(folder / "model.onnx", {"input_ids": ids})
    if type(model).__name__.startswith("T5"):
        assert list(found) == ["last_hidden_state"]
    else:
        first = "text_embeds" if "Projection" in type(model).__name__ else "last_hidden_state"
        assert next(iter(found)) == first
        close(found[first], wanted[first])
        for number, states in enumerate(wanted.hidden_states):
            close(found[f"hidden_states.{number}"], states)
    close(found["last_hidden_state"], wanted.last_hidden_state)


def compare_vae(folder: Any, model: Any) -> None:
    images, latents = torch.randn(1, 3, 12, 8), torch.randn(2, 4, 3, 7)
    with torch.no_grad():
        close(
            run(folder / "vae_decoder/model.onnx", {"latent_sample": latents})["sample"],
            model.decode(latents).sample,
        )
        wanted = model.encode(images).latent_dist.parameters
    close(run(folder / "vae_encoder/model.onnx", {"sample": images})["latent_parameters"], wanted)


def feeds_of(pipeline: Any) -> dict[str, torch.Tensor]:
    if hasattr(pipeline, "unet"):
        width = pipeline.unet.config.cross_attention_dim
        feeds = {
            "sample": torch.randn(2, 4, 6, 10),
            "timestep": torch.tensor([501.0]),
            "encoder_hidden_states": torch.randn(2, 9, width),
        }
        if hasattr(pipeline, "text_encoder_2"):
            feeds |= {"text_embeds": torch.randn(2, 14), "time_ids": torch.rand(2, 6) * 512}
        return feeds
    feeds = {
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, pipeline.transformer.config.pooled_projection_dim),
        "timestep": torch.tensor([0.2, 0.9]),
    }
    if "Flux" in type(pipeline).__name__:
        feeds |= {
            "hidden_states": torch.randn(2, 8, 16),
            "img_ids": torch.rand(8, 3) * 9,
            "txt_ids": torch.zeros(5, 3),
        }
        return feeds | {"guidance": torch.tensor([3.5, 3.5])}
    return feeds | {"hidden_states": torch.randn(2, 4, 8, 4)}


def answer(pipeline: Any, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    given = dict(feeds)
    if "time_ids" in given:
        given["added_cond_kwargs"] = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
    model = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


def fused(pipeline: Any, file: Any) -> Any:
    """The oracle: diffusers loads the file and merges it itself."""
    logging.disable(logging.WARNING)
    try:
        pipeline.load_lora_weights(str(file))
        loadable = pipeline._lora_loadable_modules
        pipeline.fuse_lora(
            components=[name for name in loadable if getattr(pipeline, name, None) is not None]
        )
        pipeline.unload_lora_weights()
    finally:
        logging.disable(logging.NOTSET)
    return pipeline


@pytest.mark.parametrize(
    ("name", "write"), [("sd15", kohya_file), ("sdxl", diffusers_file), ("flux", diffusers_file)]
)
def test_one_command_from_a_pipeline_and_an_adapter_to_running_graphs(name, write, tmp_path):
    pipeline = tiny.saved_pipeline(name, tmp_path / "pipe")
    pairs = pairs_of(pipeline)
    file = write(tmp_path / "lora.safetensors", pairs)
    feeds = feeds_of(pipeline)
    before = answer(pipeline, feeds)
    command = [
        "merge-onnx",
        "--base",
        str(tmp_path / "pipe"),
        "--adapter",
        str(file),
        "-o",
        str(tmp_path / "out"),
    ]
    assert _run(command, False) == 0
    # diffusers 0.42 loses attention in kohya's text encoders under transformers 5: it reads its own names.
    scaling = ALPHA / RANK if write is kohya_file else 1.0
    fused(pipeline, diffusers_file(tmp_path / "oracle.safetensors", pairs, scaling))
    out = tmp_path / "out"
    wanted = answer(pipeline, feeds)
    assert (wanted - before).abs().max() > 1e-2 * before.abs().max()
    denoiser = "unet" if hasattr(pipeline, "unet") else "transformer"
    (found,) = run(out / denoiser / "model.onnx", feeds).values()
    close(found, wanted)
    for component in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, component, None) is not None:
            compare_text_encoder(out / component, getattr(pipeline, component))
    compare_vae(out, pipeline.vae)
    # Every tensor is accounted for, in the part that it is for.
    manifest = json.loads((out / "lora.json").read_text())
    placed = {
        (row["parameter"].partition("/")[0], tensor)
        for row in manifest["plan"]["rows"]
        for tensor in row["tensors"]
    }
    assert {tensor for _, tensor in placed} == set(load_names(file))
    assert {component for component, _ in placed} == pairs.keys() == manifest["outputs"]["adapters"].keys()
    assert not verify(out).failures()
    assert json.loads((out / "model_index.json").read_text()) == json.loads(
        (tmp_path / "pipe/model_index.json").read_text()
    )
    for small in (
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "vae_decoder/config.json",
    ):
        assert (out / small).is_file()


def load_names(file: Any) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return list(opened.keys())


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("sd15") / "pipe"
    tiny.saved_pipeline("sd15", folder)
    return folder


NOTHING = """<ir_version: 10, opset_import: ["": 20]>
nothing (float[1] x) => (float[1] y) { y = Identity (x) }"""


@pytest.fixture
def traced(monkeypatch: Any) -> list[tuple[str, str]]:
    """Replace tracing by a graph that holds nothing; return what is asked for: component and use."""
    asked = []

    def capture(folder: Any, path: Any, dtype: str, part: str, **_: Any) -> None:
        asked.append((folder.name, part))
        onnx.save(onnx.parser.parse_model(NOTHING), path)
        path.with_name(f"{path.name}.data").write_bytes(b"weights")

    for mode in ("merge", "capture"):
        monkeypatch.setattr(f"lora_export.modes.pipelines.{mode}.capture_checkpoint", capture)
    return asked


def copied(pipe: Any, place: Any) -> Any:
    shutil.copytree(pipe, place)
    return place


def with_index(folder: Any, **change: Any) -> Any:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    return folder


def test_a_pipeline_without_an_adapter(pipe, tmp_path, traced, capsys):
    out = tmp_path / "out"
    assert _run(["capture-onnx", str(pipe), "-o", str(out)], False) == 0
    assert traced == [("text_encoder", "prompt"), ("unet", ""), ("vae", ""), ("vae", "vae-encoder")]
    graphs = {path.parent.name for path in out.glob("*/model.onnx")}
    assert graphs == {"vae_decoder", "vae_encoder", "text_encoder", "unet"}
    assert not verify(out).failures()
    for name in graphs:
        component = "vae" if name.startswith("vae") else name
        assert (out / name / "config.json").read_bytes() == (pipe / component / "config.json").read_bytes()
    # The tokenizer is the pipeline's, and works where it is.
    ids = [
        transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")("ab").input_ids
        for folder in (pipe, out)
    ]
    assert ids[0] == ids[1]
    with pytest.raises(OutputError, match="exists already"):
        capture_onnx(pipe, out)
    (out / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="holds files that its record does not list"):
        capture_onnx(pipe, out, force=True)
    (out / "mine.txt").unlink()
    capture_onnx(pipe, out, force=True)


def test_all_graphs_appear_or_none(pipe, tmp_path, monkeypatch, traced):
    def full(path: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_export.modes.pipelines.folder.shutil.copyfile", full)
    with pytest.raises(OutputError, match="No space left"):
        capture_onnx(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_component_that_the_pipeline_lacks(pipe, tmp_path, traced):
    pairs = {"text_encoder_2": {"encoder.layers.0.self_attn.q_proj": (torch.ones(2, 12), torch.ones(12, 2))}}
    file = diffusers_file(tmp_path / "a.safetensors", pairs)
    with pytest.raises(AdapterError) as caught:
        merge_onnx(pipe, file, tmp_path / "out")
    assert caught.value.problems == tuple(f"{name}, for 'text_encoder_2'" for name in load_names(file))
    assert "it has: text_encoder, unet" in caught.value.message
    # With a part that belongs, the user may leave the other out; it is warned of and recorded.
    pairs["text_encoder"] = {path: (a.clone(), b.clone()) for path, (a, b) in pairs["text_encoder_2"].items()}
    adapter = load_adapter(diffusers_file(tmp_path / "b.safetensors", pairs))
    opened = open_pipeline(pipe)
    with pytest.raises(AdapterError, match="has 2 tensors for parts"):
        part_adapters([adapter], [1.0], opened, allow_unmatched=False)
    shares, notes = part_adapters([adapter], [1.0], opened, allow_unmatched=True)
    assert shares.keys() == {"text_encoder"}
    assert len(notes) == 2
    alone = load_adapter(tmp_path / "b.safetensors", component="text_encoder")
    assert part_adapters([alone], [1.0], opened, allow_unmatched=False)[1] == []
    assert traced == []


def test_an_adapter_without_components_goes_where_it_fits(pipe, tmp_path):
    opened = open_pipeline(pipe)
    encoder = {"encoder.layers.0.self_attn.q_proj": (torch.ones(2, 12), torch.ones(12, 2))}
    denoiser = {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 16), torch.ones(16, 2))
    }
    nowhere = {"encoder.layers.7.self_attn.q_proj": (torch.ones(2, 12), torch.ones(12, 2))}
    for pairs, component in ((encoder, "text_encoder"), (denoiser, "unet"), (nowhere, None)):
        tensors = {}
        for path, (a, b) in pairs.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
        save_file(tensors, tmp_path / "a.safetensors")
        adapter = load_adapter(tmp_path / "a.safetensors", alpha=1.0)
        if component is None:
            with pytest.raises(AdapterError, match="does not fit any of them"):
                part_adapters([adapter], [1.0], opened, allow_unmatched=False)
        else:
            shares, _ = part_adapters([adapter], [0.5], opened, allow_unmatched=False)
            ((name, (share,)),) = shares.items()
            assert (name, share.factor) == (component, 0.5)


def test_a_pipeline_that_lacks_something(pipe, tmp_path, traced):
    folder = copied(pipe, tmp_path / "pipe")
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "text_encoder")
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError) as caught:
        capture_onnx(folder, tmp_path / "out")
    lines = "\n".join(caught.value.problems)
    for text in ("tokenizer (CLIPTokenizer): no folder of it", "text_encoder (CLIPTextModel)", "unet: "):
        assert text in lines
    assert len(caught.value.problems) == 3
    assert traced == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"_class_name": ["mine", "Pipeline"]}, "code of a pipeline's own is never run"),
        ({"unet": ["mine", "Denoiser"]}, r"no denoiser among its models \(unet"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "UNet3DConditionModel.*wanted one of"),
        ({"text_encoder": ["mine", "Encoder"]}, "not a model of transformers"),
        ({"unet": "diffusers"}, "no denoiser"),
        ({"unet": ["diffusers"]}, "wanted library and class"),
        ({"../up": ["diffusers", "UNet2DConditionModel"]}, "no folder of it"),
        ({"vae_decoder": ["diffusers", "UNet2DConditionModel"]}, "its graph, vae_decoder, is another's"),
    ],
)
def test_an_index_that_is_not_followed(change, text, pipe, tmp_path, traced):
    folder = with_index(copied(pipe, tmp_path / "pipe"), **change)
    if "vae_decoder" in change:
        shutil.copytree(pipe / "unet", folder / "vae_decoder")
    with pytest.raises(CheckpointError) as caught:
        capture_onnx(folder, tmp_path / "out")
    assert re.search(text, "\n".join([caught.value.message, *caught.value.problems]))
    assert traced == []


def test_parts_without_a_graph_are_left_out(pipe, tmp_path):
    folder = with_index(
        copied(pipe, tmp_path / "pipe"), safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"]
    )
    shutil.copytree(pipe / "text_encoder", folder / "safety_checker")
    (folder / "scheduler/mine.py").write_text("raise SystemExit")
    (folder / "scheduler/evil.so").write_bytes(b"x")
    opened = open_pipeline(folder)
    assert opened.index["safety_checker"] == [None, None]
    assert any("safety_checker" in note for note in opened.notes)
    assert any("scheduler/evil.so" in note for note in opened.notes)
    assert not any(
        path.suffix in (".py", ".so") or path.parts[0] == "safety_checker" for path in opened.copied
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["capture-onnx", "PIPE", "-o", "m.onnx"], "the output m.onnx is one graph"),
        (["capture-onnx", "PIPE", "-o", "out", "--kv-cache"], "there is no --kv-cache"),
        (
            ["merge-onnx", "--base", "PIPE", "--adapter", "A", "-o", "out", "--share-base"],
            "there is no --share-base",
        ),
        (
            ["merge-onnx", "--base", "PIPE", "--adapter", "A", "-o", "out", "--quantize", "int8"],
            "there is no --quantize",
        ),
        (["swap-onnx", "--base", "PIPE", "--adapter", "A", "-o", "m.onnx"], "pipeline of several models"),
        (["bank-onnx", "--base", "PIPE", "--adapter", "a=A", "-o", "m.onnx"], "pipeline of several models"),
    ],
)
def test_what_a_pipeline_is_not_for(arguments, text, pipe, tmp_path, monkeypatch, capsys, traced):
    pairs = {
        "unet": {
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 16), torch.ones(16, 2))
        }
    }
    names = {"PIPE": str(pipe), "A": str(diffusers_file(tmp_path / "a.safetensors", pairs))}
    monkeypatch.chdir(tmp_path)
    code = _run([names.get(word, word.replace("a=A", f"a={names['A']}")) for word in arguments], False)
    assert code == 1
    assert text in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert traced == []


def test_a_blend_goes_into_one_part_and_a_dry_run_writes_nothing(pipe, tmp_path, traced, capsys):
    path = "encoder.layers.0.self_attn.q_proj"
    pairs = [{"text_encoder": {path: (torch.randn(2, 12), torch.randn(12, 2))}} for _ in range(2)]
    files = [diffusers_file(tmp_path / f"{number}.safetensors", one) for number, one in enumerate(pairs)]
    out = tmp_path / "out"
    words = ["merge-onnx", "--base", str(pipe), "-o", str(out)]
    for file, weight in zip(files, ("0.5", "-2"), strict=True):
        words += ["--adapter", str(file), "--weight", weight]
    assert _run([*words, "--dry-run"], False) == 0
    assert f"text_encoder/{path}.weight" in capsys.readouterr().out
    assert not out.exists()
    assert traced == []
    assert _run(words, False) == 0
    assert [name for name, _ in traced] == ["unet", "vae", "vae"]
    graph = onnx.load(out / "text_encoder" / "model.onnx").graph
    (found,) = [value for value in graph.initializer if value.name.endswith(f"{path}.weight")]
    stored = load_file(pipe / "text_encoder" / "model.safetensors")
    (before,) = [values for name, values in stored.items() if name.endswith(f"{path}.weight")]
    wanted = before.double()
    for one, weight in zip(pairs, (0.5, -2.0), strict=True):
        a, b = one["text_encoder"][path]
        wanted = wanted + weight * b.double() @ a.double()
    np.testing.assert_allclose(onnx.numpy_helper.to_array(found), wanted.numpy(), rtol=1e-5, atol=1e-5)
    manifest = json.loads((out / "lora.json").read_text())
    assert [entry["weight"] for entry in manifest["adapters"]] == [0.5, -2.0]
    assert manifest["outputs"]["adapters"] == {"text_encoder": ["0", "1"]}
    assert not verify(out).failures()
