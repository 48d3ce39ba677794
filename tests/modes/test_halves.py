"""Encoder–decoders become two graphs with a cache, which generate what PyTorch generates."""

from __future__ import annotations

import exposed_models as exposed
import half_models as halves
import numpy as np
import onnx
import pytest
import tiny
import transformers
from safetensors.numpy import load_file

from lora_export import CheckpointError, GraphError, merge_onnx, swap_onnx, verify
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.cli import _run
from lora_export.graph.captured import Captured
from lora_export.graph.proof import Proof

TOLERANCE = 1e-5

pytestmark = [pytest.mark.slow, pytest.mark.proven]


def each(*archs):
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(f"half-{arch}")) for arch in archs]
    )


def agrees(got, wanted):
    assert np.array_equal(got.tokens, wanted.tokens)
    assert tiny.relative_error(got.logits, wanted.logits) < TOLERANCE


def metadata(folder, half):
    proto = onnx.load(folder / f"{half}_model.onnx", load_external_data=False)
    return {entry.key: entry.value for entry in proto.metadata_props}


@each(*halves.ARCHS)
def test_twelve_greedy_tokens_are_those_of_pytorch(arch):
    wanted = halves.reference(halves.build(arch), arch)
    agrees(halves.run(halves.captured(arch), arch), wanted)
    # Each step answers in its own way, as no state but its own gives.
    for step in range(1, halves.NEW):
        assert tiny.relative_error(wanted.logits[:, step], wanted.logits[:, step - 1]) > 50 * TOLERANCE
    for half in ("encoder", "decoder"):
        assert Proof.from_metadata(metadata(halves.captured(arch), half)).of == "model"


@each("t5", "whisper")
def test_names_and_dims_are_optimums(arch):
    folder, layers, size = halves.captured(arch), 2, halves.WIDTH // halves.HEADS
    parts = [f"{layer}.{{}}.{part}" for layer in range(layers) for part in ("key", "value")]
    sound = halves.KINDS["whisper"][1]
    read = sound["max_source_positions"] if arch == "whisper" else "sequence"
    text = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    frames = {"input_features": ["batch", sound["num_mel_bins"], 2 * sound["max_source_positions"]]}
    cross = ["batch", halves.HEADS, read, size]
    encoder = onnx.load(folder / "encoder_model.onnx", load_external_data=False).graph
    assert dims(encoder.input) == (frames if arch == "whisper" else text)
    assert dims(encoder.output) == {
        "last_hidden_state": ["batch", read, halves.WIDTH],
        **{f"present.{part.format('encoder')}": cross for part in parts},
    }
    decoder = onnx.load(folder / "decoder_model.onnx", load_external_data=False).graph
    mask = {} if arch == "whisper" else {"encoder_attention_mask": ["batch", "sequence"]}
    past, present = (["batch", halves.HEADS, f"{word}_sequence", size] for word in ("past", "total"))
    assert dims(decoder.input) == {
        "input_ids": ["batch", "decoder_sequence"],
        **mask,
        **{f"past_key_values.{part.format('decoder')}": past for part in parts},
        **{f"past_key_values.{part.format('encoder')}": cross for part in parts},
    }
    assert dims(decoder.output) == {
        "logits": ["batch", "decoder_sequence", tiny.VOCAB],
        **{f"present.{part.format('decoder')}": present for part in parts},
    }


def dims(ports):
    return {
        port.name: [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in ports
    }


@each("bart")
def test_each_graph_says_what_it_is_and_has_its_own_weights(arch):
    folder = halves.captured(arch)
    sizes = dict.fromkeys(("decoder_sequence", "past_sequence", "total_sequence"), 64)
    about = {"dtype": "float32", "vocab_size": tiny.VOCAB}
    assert Captured.from_metadata(metadata(folder, "encoder")) == Captured(
        kind="encoder", kv_cache=False, largest={"sequence": 64}, **about
    )
    assert Captured.from_metadata(metadata(folder, "decoder")) == Captured(
        kind="decoder", kv_cache=True, largest=sizes | {"sequence": 64}, **about
    )
    names = {}
    for half in ("encoder", "decoder"):
        graph = onnx.load(folder / f"{half}_model.onnx", load_external_data=False).graph
        names[half] = {value.name for value in graph.initializer if value.name.endswith("_proj.weight")}
    modules = {f"{name}.weight" for name, _ in halves.build(arch).named_modules() if name.endswith("_proj")}
    assert names["encoder"] | names["decoder"] == modules
    assert not names["encoder"] & names["decoder"]
    cross = {f"model.decoder.layers.{n}.encoder_attn.{p}_proj.weight" for n in (0, 1) for p in "kv"}
    assert {name for name in names["encoder"] if "decoder" in name} == cross
    assert {path.name for path in folder.iterdir()} >= {"config.json", "generation_config.json", "lora.json"}
    assert not verify(folder).failures()


@each(*halves.TARGETS)
def test_a_merged_adapter_answers_as_peft_does(arch, tmp_path):
    report = merge_onnx(halves.checkpoint(arch), halves.adapter(arch), tmp_path / "m", kv_cache=True)
    wanted = halves.reference(halves.adapted(arch), arch)
    agrees(halves.run(tmp_path / "m", arch), wanted)
    plain = halves.reference(halves.build(arch), arch)
    assert tiny.relative_error(plain.logits, wanted.logits) > 1e3 * TOLERANCE
    tensors = [name for row in report.plan.rows for name in row.tensors]
    assert sorted(tensors) == sorted(load_file(halves.adapter(arch) / "adapter_model.safetensors"))
    assert not verify(tmp_path / "m").failures()
    for half in ("encoder", "decoder"):
        again = tmp_path / "m" / f"{half}_model.onnx"
        with pytest.raises(GraphError, match="has this adapter merged into it already"):
            merge_onnx(again, halves.adapter(arch), tmp_path / "again.onnx", allow_unmatched=True)


@each(*halves.TARGETS)
def test_a_swapped_adapter_answers_as_peft_does(arch, tmp_path):
    adapter, out = halves.adapter(arch), tmp_path / "m"
    report = swap_onnx(halves.checkpoint(arch), out, adapter=adapter, kv_cache=True)
    graphs = {half: out / f"{half}_model.onnx" for half in ("encoder", "decoder")}
    fed = {half: exposed.tensors(graph, adapter) for half, graph in graphs.items()}
    wanted = halves.reference(halves.adapted(arch), arch)
    agrees(halves.run(out, arch, fed), wanted)
    # Without it, both are the base's.
    agrees(halves.run(out, arch), halves.reference(halves.build(arch), arch))
    # Each tensor is in one graph.
    tensors = [name for row in report.plan.rows for name in row.tensors]
    assert sorted(tensors) == sorted(load_file(adapter / "adapter_model.safetensors"))
    assert not set(fed["encoder"]) & set(fed["decoder"])
    if arch != "bart":
        assert not fed["decoder" if arch == "t5" else "encoder"]
    assert not verify(out).failures()


REFUSED = {
    "m.onnx": ([], "becomes two graphs with --kv-cache, an encoder's and a decoder's, and the output"),
    "a": (["--share-base"], "for which there is no --share-base"),
    "b": (["--trace", "outline"], "for which there is no --trace outline"),
    "c": (["--quantize", "int4"], "for which there is no --quantize"),
}


@pytest.mark.parametrize("output", REFUSED)
def test_what_two_graphs_do_not_have_is_refused(output, tmp_path, capsys):
    more, said = REFUSED[output]
    arguments = ["capture-onnx", str(halves.checkpoint("t5")), "--kv-cache", *more]
    assert _run([*arguments, "-o", str(tmp_path / output)], False) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx"])
def test_one_graph_is_no_output_of_two(verb, tmp_path, capsys):
    given = ["--base", str(halves.checkpoint("t5")), "--adapter", str(halves.adapter("t5"))]
    assert _run([verb, *given, "--kv-cache", "-o", str(tmp_path / "m.onnx")], False) == 1
    said = capsys.readouterr().err
    assert "becomes two graphs with --kv-cache, an encoder's and a decoder's, and the output" in said
    assert f"give a folder: -o {tmp_path / 'm'}" in said
    assert not list(tmp_path.iterdir())


def test_target_modules_are_refused_for_two_graphs(tmp_path, capsys):
    given = ["--base", str(halves.checkpoint("t5")), "--target-modules", "q", "--kv-cache"]
    assert _run(["swap-onnx", *given, "-o", str(tmp_path / "m")], False) == 1
    assert "for which there is no --target-modules" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx"])
def test_a_module_that_neither_graph_has_is_refused_before_a_capture(verb, tmp_path, capsys):
    given = ["--base", str(halves.checkpoint("t5")), "--adapter", str(halves.adapter("bart"))]
    assert _run([verb, *given, "--kv-cache", "-o", str(tmp_path / "m")], False) == 1
    assert "bart-adapter" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bank_of_two_graphs_is_refused(tmp_path, capsys):
    given = ["--base", str(halves.checkpoint("t5")), "--adapter", f"a={halves.adapter('t5')}"]
    assert _run(["bank-onnx", *given, "--kv-cache", "-o", str(tmp_path / "m.onnx")], False) == 1
    said = capsys.readouterr().err
    assert "omit --kv-cache" in said
    assert "bank-onnx writes one" in said
    assert not list(tmp_path.iterdir())


def test_an_encoder_decoder_that_generates_nothing_is_one_model_without_a_cache(tmp_path, capsys):
    kind, settings = "BartModel", halves.KINDS["bart"][1]
    model_class = getattr(transformers, kind)
    with tiny.quiet():
        model_class(model_class.config_class(**settings)).save_pretrained(tmp_path / "checkpoint")
    arguments = [str(tmp_path / "checkpoint"), "--kv-cache", "-o", str(tmp_path / "m.onnx")]
    assert _run(["capture-onnx", *arguments], False) == 1
    said = capsys.readouterr().err
    assert kind in said
    assert "omit --kv-cache" in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_half_of_a_model_that_has_none_is_refused(part, tmp_path):
    with pytest.raises(CheckpointError, match="no key-value cache of an encoder and a decoder"):
        capture_checkpoint(tiny.checkpoint("bert"), tmp_path / "m.onnx", part=part)
    assert not list(tmp_path.iterdir())
