"""Component folders of diffusers are captured, and answer as diffusers does, with an adapter and without."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import peaks
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export import (
    AdapterSession,
    CheckpointError,
    GraphError,
    bank_onnx,
    capture_onnx,
    check_parity,
    merge_checkpoint,
    merge_onnx,
    swap_onnx,
)
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.capture.loading import load_model
from lora_export.base.kinds import DIFFUSERS, KINDS
from lora_export.graph.captured import Captured
from lora_export.graph.proof import Proof

tiny = pytest.importorskip("tiny_pipelines")

ALPHA, RANK = 3.0, 2


@dataclass(frozen=True)
class Case:
    """A class of diffusers.

    Attributes:
        make: Returns the model.
        component: Its name in a pipeline.
        kind: Its key in `KINDS`.
        feeds: Returns inputs of other sizes than the capture's example.
        call: Returns diffusers' answer.
        output: Name of the graph's only output.
        ends: Ends of the paths of modules that an adapter changes.
    """

    make: Callable[[], Any]
    component: str
    kind: str
    feeds: Callable[[], dict[str, torch.Tensor]]
    call: Callable[[Any, dict[str, torch.Tensor]], Any]
    output: str
    ends: tuple[str, ...]


def plain(model: Any, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**feeds, return_dict=False)[0]


def conditioned(model: Any, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    named = dict(feeds)
    added = {name: named.pop(name) for name in ("text_embeds", "time_ids")}
    return model(**named, added_cond_kwargs=added, return_dict=False)[0]


def latents(rows: int = 3, width: int = 12) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(rows, 4, 6, 10),
        "timestep": torch.tensor([17.0, 400.0, 999.25][:rows]),
        "encoder_hidden_states": torch.randn(rows, 9, width),
    }


CASES = {
    "unet": Case(
        make=tiny.unet,
        component="unet",
        kind="unet",
        # One time step for all rows, as pipelines give it.
        feeds=lambda: latents() | {"timestep": torch.tensor([500.5])},
        call=plain,
        output="out_sample",
        ends=("to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"),
    ),
    "unet of SDXL": Case(
        make=tiny.unet_xl,
        component="unet",
        kind="unet",
        feeds=lambda: (
            latents(1, 24)
            | {"text_embeds": torch.randn(1, 14), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 256]])}
        ),
        call=conditioned,
        output="out_sample",
        ends=("to_k", "to_v", "ff.net.2"),
    ),
    "sd3": Case(
        make=tiny.sd3,
        component="transformer",
        kind="sd3",
        feeds=lambda: {
            "hidden_states": torch.randn(3, 4, 10, 6),
            "encoder_hidden_states": torch.randn(3, 4, 16),
            "pooled_projections": torch.randn(3, 28),
            "timestep": torch.tensor([3.0, 70.5, 900.0]),
        },
        call=plain,
        output="out_hidden_states",
        ends=("to_q", "add_k_proj", "to_out.0"),
    ),
    "flux": Case(
        make=tiny.flux,
        component="transformer",
        kind="flux",
        feeds=lambda: {
            "hidden_states": torch.randn(3, 12, 16),
            "encoder_hidden_states": torch.randn(3, 4, 16),
            "pooled_projections": torch.randn(3, 12),
            "timestep": torch.tensor([0.1, 0.5, 1.0]),
            "img_ids": torch.randint(0, 64, (12, 3)).float(),
            "txt_ids": torch.zeros(4, 3),
            "guidance": torch.tensor([1.0, 3.5, 7.0]),
        },
        call=plain,
        output="out_hidden_states",
        ends=("to_q", "to_v", "proj_mlp"),
    ),
    "wan": Case(
        make=tiny.wan,
        component="transformer",
        kind="wan",
        feeds=lambda: {
            "hidden_states": torch.randn(1, 4, 3, 8, 12),
            "timestep": torch.tensor([900.0]),
            "encoder_hidden_states": torch.randn(1, 11, 16),
        },
        call=plain,
        output="out_hidden_states",
        ends=("to_q", "ffn.net.2"),
    ),
    "vae": Case(
        make=tiny.vae,
        component="vae",
        kind="vae-decoder",
        feeds=lambda: {"latent_sample": torch.randn(3, 4, 5, 7)},
        call=lambda model, feeds: model.decode(feeds["latent_sample"]).sample,
        output="sample",
        ends=("decoder.mid_block.attentions.0.to_q", "decoder.up_blocks.0.resnets.0.conv1"),
    ),
}


def run(graph: Any, feeds: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(graph))
    names = [output.name for output in session.get_outputs()]
    assert {given.name for given in session.get_inputs()} == feeds.keys()
    values = {name: value.numpy() for name, value in feeds.items()}
    return dict(zip(names, session.run(None, values), strict=True))


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    scale = wanted.abs().max().item()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5 * scale)


def written(path: Any, pairs: dict[str, Any], component: str) -> Any:
    """Write a file of diffusers, whose scaling is in B."""
    # diffusers has no LoRA of autoencoders, so that no component is called so.
    front = "" if component == "vae" else f"{component}."
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{front}{module}.lora_A.weight"] = a
        tensors[f"{front}{module}.lora_B.weight"] = b * (ALPHA / RANK)
    save_file(tensors, path)
    return path


def fused(model: Any, pairs: dict[str, Any]) -> Any:
    """Add the change to the model's own weights, in float64."""
    with torch.no_grad():
        for path, (a, b) in pairs.items():
            weight = model.get_submodule(path).weight
            change = b.double().flatten(1) @ a.double().flatten(1)
            weight.copy_(weight.double() + ALPHA / RANK * change.reshape(weight.shape))
    return model


def swapped(graph: Any, adapter: Any, feeds: Any, base: Any, wanted: Any, place: Any) -> None:
    """Compare LoRA as inputs, and in a bank whose rows choose in turn, with the same answers."""
    swap_onnx(graph, place / "swap.onnx", adapter=adapter)
    values = {name: value.numpy() for name, value in feeds.items()}
    (output,) = wanted
    with AdapterSession(place / "swap.onnx") as session:
        session.load_adapter("a", adapter)
        close(session.run(values)[output], base[output])
        close(session.run(values, adapter="a")[output], wanted[output])
    bank_onnx(graph, {"a": adapter}, place / "bank.onnx")
    weights = np.array([[1.0 - row % 2] for row in range(len(base[output]))], np.float32)
    session = ort.InferenceSession(str(place / "bank.onnx"))
    (found,) = session.run(None, values | {"lora.adapter_weights": weights})
    for row, values_of_row in enumerate(found):
        close(values_of_row, (base if row % 2 else wanted)[output][row])


@pytest.mark.parametrize("name", CASES)
def test_a_component_folder_answers_as_diffusers_does(name, tmp_path):
    case = CASES[name]
    folder = tmp_path / case.component
    model = tiny.saved(case.make, folder)
    graph, _ = capture_onnx(folder, tmp_path / "base.onnx")
    feeds = case.feeds()
    with torch.no_grad():
        base = case.call(model, feeds)
    found = run(graph, feeds)
    assert list(found) == [case.output]
    close(found[case.output], base)
    pairs = tiny.pairs_of(model, case.ends)
    adapter = written(tmp_path / "a.safetensors", pairs, case.component)
    report = merge_onnx(graph, adapter, tmp_path / "merged.onnx")
    assert len(report.plan.placed) == len(pairs) > 1
    with torch.no_grad():
        wanted = case.call(fused(model, pairs), feeds)
    assert (wanted - base).abs().max() > 1e-2 * base.abs().max()
    close(run(tmp_path / "merged.onnx", feeds)[case.output], wanted)
    swapped(graph, adapter, feeds, {case.output: base}, {case.output: wanted}, tmp_path)
    props = {entry.key: entry.value for entry in onnx.load(graph, load_external_data=False).metadata_props}
    captured = Captured.from_metadata(props)
    assert captured is not None
    assert captured.kind == ("vae-decoder" if case.component == "vae" else "denoiser")


@pytest.mark.proven
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (tiny.flux, ""),
        (tiny.wan, ""),
        (tiny.vae, "vae-encoder"),
        (tiny.clip_projected, "prompt"),
        (tiny.t5, "prompt"),
    ],
)
def test_a_capture_is_compared_with_diffusers_before_it_is_written(make, part, tmp_path):
    tiny.saved(make, tmp_path / "model")
    capture_checkpoint(tmp_path / "model", tmp_path / "m.onnx", part=part)
    props = onnx.load(tmp_path / "m.onnx", load_external_data=False).metadata_props
    proof = Proof.from_metadata({entry.key: entry.value for entry in props})
    assert proof is not None
    assert proof.of == "model"
    assert proof.runs >= 2  # its example, and one of other sizes
    assert 0 < proof.error <= proof.limit


def test_each_class_has_a_case():
    assert {case.kind for case in CASES.values()} == set(DIFFUSERS.values())
    assert set(DIFFUSERS.values()) <= KINDS.keys()
    for case in CASES.values():
        assert type(case.make()).__name__ in DIFFUSERS


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Return a folder, the cheapest to trace."""
    folder = tmp_path_factory.mktemp("wan") / "transformer"
    tiny.saved(tiny.wan, folder)
    return folder


def changed(folder: Any, place: Any, **change: Any) -> Any:
    """Copy a folder with other entries in its config."""
    shutil.copytree(folder, place)
    config = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | change))
    return place


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"_class_name": "CogVideoXTransformer3DModel"},
            "_class_name is .CogVideoXTransformer3DModel., wanted",
        ),
        ({"_class_name": ["mine", "Model"]}, r"can't be captured: _class_name is"),
        ({"_class_name": "../x"}, "can't be captured"),
        (
            {"auto_map": {"AutoModel": "mine.Model"}},
            r"Python code of its own \(mine.Model\), which is never run",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "are quantised"),
        ({"num_layers": 4000}, "more layers or labels"),
        ({"num_layers": 1500}, r"a model of more than \d+ modules"),
        ({"ffn_dim": 100_000_000}, "larger than in any model"),
        ({"ffn_dim": 100_000, "num_attention_heads": 100}, "describes a model of"),
        ({"rope_max_seq_len": 10**12}, "larger than in any model"),
        ({"patch_size": [1, 1 << 40, 2]}, "larger than in any model"),
        ({"image_dim": 16}, "needs inputs that are not known"),
        ({"num_layers": "two"}, "diffusers can't load"),
        ({"num_layers": 2}, "lacks"),
    ],
)
def test_a_config_that_is_not_followed(change, text, wan, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        load_model(changed(wan, tmp_path / "transformer", **change), "float16")
    assert re.search(text, "\n".join([caught.value.message, *caught.value.problems]))
    assert caught.value.hint
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("make", "change", "text"),
    [
        (tiny.unet, {"class_embed_type": "timestep"}, "class_embed_type: 'timestep'"),
        (tiny.unet, {"addition_embed_type": "image"}, "addition_embed_type: 'image'"),
        (tiny.sd3, {"pos_embed_max_size": 100_000}, "describes a model of"),
        (tiny.unet, {"layers_per_block": 100_000}, "a model of more than"),
        (tiny.unet, {"block_out_channels": [8, 1 << 30]}, "larger than in any model"),
    ],
)
def test_a_config_of_another_class(make, change, text, tmp_path):
    tiny.saved(make, tmp_path / "base")
    with pytest.raises(CheckpointError) as caught:
        load_model(changed(tmp_path / "base", tmp_path / "changed", **change), "float32")
    assert re.search(text, "\n".join([caught.value.message, *caught.value.problems]))


def test_a_config_does_not_choose_how_much_memory_is_taken(wan, tmp_path):
    """Positions, widths and layers: terabytes, asked for by a config of 1 kB."""
    changes = (
        {"rope_max_seq_len": 130_000, "attention_head_dim": 120_000},
        {"ffn_dim": 130_000},
        {"num_layers": 1900},
    )
    folders = [changed(wan, tmp_path / str(number), **change) for number, change in enumerate(changes)]
    warm = [["capture-onnx", wan, "-o", tmp_path / "good.onnx"]]
    for code, _, said, peak, _ in peaks.measured(
        warm, [["capture-onnx", folder, "-o", tmp_path / "m.onnx"] for folder in folders]
    ):
        assert code == 1
        assert "Error: " in said
        assert peak < peaks.allowed(wan)


def test_a_shard_that_is_missing(wan, tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(wan, folder)
    name = "diffusion_pytorch_model-00002-of-00002.safetensors"
    weights = folder / "diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), weights.name) | {"x": name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        capture_onnx(folder, tmp_path / "m.onnx")
    assert any(name in problem for problem in caught.value.problems)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"trace": "outline"}, "not traced without its weights"),
        ({"fused": True}, "does not attend through transformers' interface"),
        ({"kv_cache": True}, "has no key-value cache"),
    ],
)
def test_options_for_models_of_transformers(options, text, wan, tmp_path):
    with pytest.raises(CheckpointError, match=text):
        capture_onnx(wan, tmp_path / "m.onnx", **options)


def test_a_model_that_can_not_be_traced(wan, tmp_path, monkeypatch):
    """The message is one line of the exporter's, which are hundreds."""
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: 1 / 0)
    with pytest.raises(GraphError, match=r"can.t export WanTransformer3DModel: ZeroDivisionError") as caught:
        capture_onnx(wan, tmp_path / "m.onnx")
    assert caught.value.hint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(dtype, wan, tmp_path):
    path, table = "blocks.0.attn1.to_q", "blocks.0.scale_shift_table"
    pair = tiny.pairs_of(tiny.wan(), (path,))
    adapter = written(tmp_path / "a.safetensors", pair, "transformer")
    merge_onnx(wan, adapter, tmp_path / "m.onnx", dtype=dtype)
    weights = {value.name: value for value in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert weights[f"{path}.weight"].data_type == getattr(onnx.TensorProto, dtype.upper())
    # Norms, time steps and modulation are computed in float32 by diffusers as well.
    assert weights[table].data_type == onnx.TensorProto.FLOAT
    a, b = pair[path]
    before = load_file(wan / "diffusion_pytorch_model.safetensors")[f"{path}.weight"].double()
    wanted = before + ALPHA / RANK * b.double() @ a.double()
    found = onnx.numpy_helper.to_array(weights[f"{path}.weight"]).astype(np.float64)
    # Rounded once: half a step of the dtype, which is the same for all numbers below the smallest normal one.
    kind = torch.finfo(getattr(torch, dtype))
    half = kind.eps / 2 * 1.001
    np.testing.assert_allclose(found, wanted.numpy(), rtol=half, atol=half * kind.smallest_normal)


def test_a_folder_merged_in_another_dtype_is_one_of_diffusers(wan, tmp_path):
    """A "dtype" in its config was an argument that diffusers' class does not have."""
    pair = tiny.pairs_of(tiny.wan(), ("to_q",))
    merge_checkpoint(
        wan, written(tmp_path / "a.safetensors", pair, "transformer"), tmp_path / "out", dtype="float16"
    )
    loaded = type(tiny.wan()).from_pretrained(tmp_path / "out", torch_dtype=torch.float16)
    assert loaded.blocks[0].attn1.to_q.weight.dtype == torch.float16


def test_parity_makes_latents_of_several_sizes(wan, tmp_path):
    pairs = tiny.pairs_of(tiny.wan(), ("to_q", "ffn.net.2"))
    adapter = written(tmp_path / "a.safetensors", pairs, "transformer")
    merge_onnx(wan, adapter, tmp_path / "m.onnx")
    report = check_parity(wan, tmp_path / "m.onnx", adapter, samples=3)
    assert report.passed
    sizes = {tuple(feed["shapes"]["hidden_states"][2:]) for feed in report.feeds}
    assert len(sizes) == 3
    assert all(tall % 2 == broad % 2 == 0 for _, tall, broad in sizes)
