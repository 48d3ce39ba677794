"""Vision–language models become three graphs with a cache, which generate what PyTorch generates."""

from __future__ import annotations

import exposed_models as exposed
import numpy as np
import onnx
import pytest
import tiny
import torch
import transformers
import vision_models as models
from peft import PeftModel
from safetensors.numpy import load_file

from lora_export import CheckpointError, GraphError, SiteError, capture_onnx, merge_onnx, swap_onnx, verify
from lora_export.base.capture import prove
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.base.capture.twin import small_config
from lora_export.cli import _run
from lora_export.graph.captured import Captured
from lora_export.graph.proof import Proof

TOLERANCE = 1e-5

pytestmark = [pytest.mark.slow, pytest.mark.proven]


def each(*archs):
    return pytest.mark.parametrize(
        "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(f"vision-{arch}")) for arch in archs]
    )


def agrees(got, wanted):
    assert np.array_equal(got.tokens, wanted.tokens)
    assert tiny.relative_error(got.logits, wanted.logits) < TOLERANCE


def graph_of(folder, part):
    return onnx.load(folder / f"{part}.onnx", load_external_data=False)


def metadata(folder, part):
    return {entry.key: entry.value for entry in graph_of(folder, part).metadata_props}


@each(*models.ARCHS)
def test_greedy_tokens_are_those_of_pytorch(arch):
    wanted = models.reference(models.build(arch), arch)
    agrees(models.run(models.captured(arch), arch), wanted)
    # Each step answers in its own way, as no state but its own gives.
    for step in range(1, models.NEW):
        assert tiny.relative_error(wanted.logits[:, step], wanted.logits[:, step - 1]) > 50 * TOLERANCE
    for part in models.PARTS:
        assert Proof.from_metadata(metadata(models.captured(arch), part)).of == "model"


@each(*models.ARCHS)
def test_a_merged_adapter_answers_as_peft_does(arch, tmp_path):
    report = merge_onnx(models.checkpoint(arch), models.adapter(arch), tmp_path / "m", kv_cache=True)
    wanted = models.reference(models.adapted(arch), arch)
    agrees(models.run(tmp_path / "m", arch), wanted)
    plain = models.reference(models.build(arch), arch)
    assert tiny.relative_error(plain.logits, wanted.logits) > 1e3 * TOLERANCE
    tensors = [name for row in report.plan.rows for name in row.tensors]
    assert sorted(tensors) == sorted(load_file(models.adapter(arch) / "adapter_model.safetensors"))
    assert not verify(tmp_path / "m").failures()
    for part in models.PARTS:
        again = tmp_path / "m" / f"{part}.onnx"
        with pytest.raises(GraphError, match="has this adapter merged into it already"):
            merge_onnx(again, models.adapter(arch), tmp_path / "again.onnx", allow_unmatched=True)


@each(*models.ARCHS)
def test_a_swapped_adapter_answers_as_peft_does(arch, tmp_path):
    adapter, out = models.adapter(arch), tmp_path / "m"
    report = swap_onnx(models.checkpoint(arch), out, adapter=adapter, kv_cache=True)
    fed = {part: exposed.tensors(out / f"{part}.onnx", adapter) for part in models.PARTS}
    wanted = models.reference(models.adapted(arch), arch)
    agrees(models.run(out, arch, fed), wanted)
    # Without it, all are the base's.
    agrees(models.run(out, arch), models.reference(models.build(arch), arch))
    # Each tensor is in one graph.
    tensors = [name for row in report.plan.rows for name in row.tensors]
    assert sorted(tensors) == sorted(load_file(adapter / "adapter_model.safetensors"))
    assert sum(map(len, fed.values())) == len(set().union(*fed.values()))
    assert bool(fed["embedding"]) == (arch == "llava")
    assert fed["vision"]
    assert fed["text"]
    assert not verify(out).failures()


@each("llava", "gemma3")
def test_names_and_dims_are_those_of_onnxruntime_genai(arch):
    graphs = {part: graph_of(models.captured(arch), part).graph for part in models.PARTS}
    features, embeds = ["image_tokens", models.WIDTH], ["batch", "sequence", models.WIDTH]
    ids, total = ["batch", "sequence"], ["batch", "total_sequence"]
    assert dims(graphs["vision"].input) == {"pixel_values": ["image_batch", 3, 28, 28]}
    assert dims(graphs["vision"].output) == {"image_features": [f"{models.EACH}*image_batch", models.WIDTH]}
    assert dims(graphs["embedding"].input) == {"input_ids": ids, "image_features": features}
    assert dims(graphs["embedding"].output) == {"inputs_embeds": embeds}
    layers = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    past, present = (["batch", 2, f"{word}_sequence", 8] for word in ("past", "total"))
    # In Gemma 3 the tokens of an image see each other, so its graph has to know which they are.
    more = {"input_ids": ids} if arch == "gemma3" else {}
    assert dims(graphs["text"].input) == {
        **more,
        "inputs_embeds": embeds,
        "attention_mask": total,
        "position_ids": ids,
        **{f"past_key_values.{layer}": past for layer in layers},
    }
    assert dims(graphs["text"].output) == {
        "logits": ["batch", "sequence", 99],
        **{f"present.{layer}": present for layer in layers},
    }


def dims(ports):
    return {
        port.name: [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in ports
    }


@each("llava")
def test_each_graph_says_what_it_is_and_has_its_own_weights(arch):
    folder = models.captured(arch)
    found = {part: Captured.from_metadata(metadata(folder, part)) for part in models.PARTS}
    assert [one.kind for one in found.values()] == ["vision", "embedding", "decoder"]
    assert [one.kv_cache for one in found.values()] == [False, False, True]
    assert set(found["text"].largest) == {"sequence", "past_sequence", "total_sequence"}
    names = [
        {value.name for value in graph_of(folder, part).graph.initializer if value.name.endswith(".weight")}
        for part in models.PARTS
    ]
    assert sum(map(len, names)) == len(set().union(*names))
    assert names[1] == {"model.language_model.embed_tokens.weight"}
    read = {name for name, _ in models.build(arch).named_parameters() if name.endswith("_proj.weight")}
    assert {name for one in names for name in one if name.endswith("_proj.weight")} == {
        name for name in read if "vision_tower.encoder.layers.1" not in name
    }
    assert {path.name for path in folder.iterdir()} >= {"config.json", "generation_config.json", "lora.json"}
    assert not verify(folder).failures()


@each("llava")
def test_too_few_features_are_an_error_and_surplus_ones_are_ignored(arch):
    session = models.opened(models.captured(arch), "embedding")
    ids = models.inputs(arch)["input_ids"][:1].numpy()
    features = np.arange((models.EACH + 2) * models.WIDTH, dtype=np.float32).reshape(-1, models.WIDTH)

    def embeds(count):
        return session.run(None, {"input_ids": ids, "image_features": features[:count]})[0]

    right = embeds(models.EACH)
    assert np.array_equal(right[ids == models.IMAGE], features[: models.EACH])
    assert np.array_equal(embeds(models.EACH + 2), right)
    for count in (0, 1, models.EACH - 1):
        with pytest.raises(Exception, match="ScatterND"):
            embeds(count)


@each("gemma3")
def test_an_image_behind_a_past_is_seen_as_by_the_whole_model(arch):
    given = models.inputs(arch)
    twice, model = torch.cat([given["input_ids"][:1]] * 2, 1), models.build(arch)
    both = {"input_ids": twice, "pixel_values": given["pixel_values"][:2]}
    with torch.no_grad():
        wanted = model(**both, token_type_ids=(twice == models.IMAGE).long()).logits.numpy()
        one_way = model(**both).logits.numpy()
    assert tiny.relative_error(models.in_two_calls(models.captured(arch), given), wanted) < TOLERANCE
    # Its tokens see each other.
    assert tiny.relative_error(one_way, wanted) > 1e3 * TOLERANCE


@each("llava")
def test_an_adapter_of_the_language_model_alone_is_not_the_towers(arch, tmp_path):
    """The tower has layers of the same names, if these begin with ``layers``."""
    adapter = models.adapter_of_language_model(arch)
    swap(models.checkpoint(arch), adapter, tmp_path / "m", kv_cache=True)
    fed = {part: exposed.tensors(tmp_path / "m" / f"{part}.onnx", adapter) for part in models.PARTS}
    assert [len(fed[part]) for part in models.PARTS] == [0, 0, 4]
    model = models.build(arch)
    with tiny.quiet():
        PeftModel.from_pretrained(model.model.language_model, adapter)
    agrees(models.run(tmp_path / "m", arch, fed), models.reference(model, arch))


@each("llava")
def test_a_whole_copy_goes_into_the_graph_that_reads_it(arch, tmp_path):
    adapter, model = models.adapter_with_copy(arch, "multi_modal_projector"), models.build(arch)
    with tiny.quiet():
        wanted = models.reference(PeftModel.from_pretrained(model, adapter), arch)
    merge_onnx(models.checkpoint(arch), adapter, tmp_path / "m", kv_cache=True)
    agrees(models.run(tmp_path / "m", arch), wanted)
    swap(models.checkpoint(arch), adapter, tmp_path / "s", kv_cache=True)
    fed = {part: exposed.tensors(tmp_path / "s" / f"{part}.onnx", adapter) for part in models.PARTS}
    assert all(".multi_modal_projector." in name for name in fed["vision"])
    agrees(models.run(tmp_path / "s", arch, fed), wanted)


@each("llava")
def test_a_module_that_no_graph_reads_is_refused(arch, tmp_path):
    """LLaVA reads the answer of its tower's last layer but one."""
    lost = "model.vision_tower.encoder.layers.1.self_attn.q_proj"
    folder = models.adapter(arch, "q_proj")
    plain = models.adapter(arch, r"(?!.*vision_tower.*layers\.1\.).*\.q_proj")
    base, given = models.checkpoint(arch), {"kv_cache": True}
    for write in (merge_onnx, swap):
        with pytest.raises(SiteError, match="1 modules that none of the graphs reads") as caught:
            write(base, folder, tmp_path / "m", **given)
        assert [lost in problem for problem in caught.value.problems] == [True]
        assert not list(tmp_path.iterdir())
    report = merge_onnx(base, folder, tmp_path / "m", **given, allow_unmatched=True)
    assert any(lost in warning for warning in report.plan.warnings)
    wanted = models.reference(models.adapted(arch, folder), arch)
    agrees(models.run(tmp_path / "m", arch), wanted)
    report = swap(base, folder, tmp_path / "s", **given, allow_unmatched=True)
    fed = {part: exposed.tensors(tmp_path / "s" / f"{part}.onnx", plain) for part in models.PARTS}
    assert not any(lost in name for one in fed.values() for name in one)


def swap(base, adapter, output, **options):
    return swap_onnx(base, output, adapter=adapter, **options)


def test_a_converted_adapter_is_one_for_each_graph(tmp_path):
    adapter = models.adapter("llava")
    swap(models.checkpoint("llava"), adapter, tmp_path / "m", kv_cache=True)
    found = []
    for part in models.PARTS:
        graph, out = tmp_path / "m" / f"{part}.onnx", tmp_path / f"{part}.safetensors"
        arguments = ["convert-adapter", str(adapter), "--for", str(graph), "-o", str(out)]
        assert _run([*arguments, "--format", "safetensors"], False) == 0
        wanted = exposed.tensors(graph, adapter)
        got = load_file(out)
        assert got.keys() == wanted.keys()
        assert all(np.array_equal(got[name], wanted[name]) for name in got)
        found += got
    # Beside its tensors, PEFT's file has the weights of embedding and head.
    tensors = [name for name in load_file(adapter / "adapter_model.safetensors") if ".lora_" in name]
    assert len(found) == len(set(found)) == len(tensors)


REFUSED = {
    "a": (["--share-base"], "for which there is no --share-base"),
    "b": (["--trace", "outline"], "for which there is no --trace outline"),
    "c": (["--quantize", "int4"], "for which there is no --quantize"),
    "d": (["--runtime", "ort-cuda"], "for which there is no --runtime"),
}


@pytest.mark.parametrize("output", REFUSED)
def test_what_three_graphs_do_not_have_is_refused(output, tmp_path, capsys):
    more, said = REFUSED[output]
    arguments = ["capture-onnx", str(models.checkpoint("llava")), "--kv-cache", *more]
    assert _run([*arguments, "-o", str(tmp_path / output)], False) == 1
    found = capsys.readouterr().err
    assert said in found
    assert "give -o NAME.onnx, for the graph of its language model" in found
    assert not list(tmp_path.iterdir())


def test_three_graphs_need_the_cache(tmp_path, capsys):
    arguments = ["capture-onnx", str(models.checkpoint("llava")), "-o", str(tmp_path / "m")]
    assert _run(arguments, False) == 1
    said = capsys.readouterr().err
    assert "becomes three graphs with --kv-cache, of vision, embedding and text" in said
    assert "give --kv-cache" in said
    assert not list(tmp_path.iterdir())


def test_a_graph_as_output_is_the_language_model_alone(tmp_path):
    written = capture_onnx(models.checkpoint("llava"), tmp_path / "m.onnx", kv_cache=True)
    assert written[0] == tmp_path / "m.onnx"
    names = [port.name for port in onnx.load(written[0], load_external_data=False).graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]


@pytest.mark.parametrize("verb", ["merge-onnx", "swap-onnx"])
def test_a_module_that_the_model_lacks_is_refused_before_a_capture(verb, tmp_path, capsys):
    given = ["--base", str(models.checkpoint("gemma3")), "--adapter", str(models.adapter("llava"))]
    assert _run([verb, *given, "--kv-cache", "-o", str(tmp_path / "m")], False) == 1
    said = capsys.readouterr().err
    assert "linear_1" in said
    assert not list(tmp_path.iterdir())


@each("aya", "internvl")
def test_the_capture_itself_compares_other_families(arch):
    for part in models.PARTS:
        assert Proof.from_metadata(metadata(models.captured(arch), part)).of == "model"


def test_a_model_without_features_of_images_is_refused(tmp_path):
    """Llama 4 projects what its tower answers in its own forward."""
    with pytest.raises(CheckpointError, match="its get_image_features gives no features of pixels alone"):
        capture_onnx(models.checkpoint("llama4"), tmp_path / "m", kv_cache=True)
    assert not list(tmp_path.iterdir())


UNCUT = {
    "Qwen2VLForConditionalGeneration": "beside the pixels, it reads image_grid_thw",
    "LlavaNextForConditionalGeneration": "beside the pixels, it reads image_sizes",
    "PaliGemmaForConditionalGeneration": "token_type_ids of another meaning say how it attends",
}


@pytest.mark.parametrize("name", UNCUT)
@pytest.mark.parametrize("verb", ["capture-onnx", "merge-onnx", "swap-onnx"])
def test_a_model_that_can_not_be_cut_is_refused_by_name(verb, name, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    config = getattr(transformers, name).config_class(architectures=[name])
    config.save_pretrained(base)
    adapter = ["--adapter", str(models.adapter("llava"))]
    given = [str(base)] if verb == "capture-onnx" else ["--base", str(base), *adapter]
    assert _run([verb, *given, "--kv-cache", "-o", str(tmp_path / "m")], False) == 1
    said = capsys.readouterr().err
    assert f"{name} can't be cut into the graphs of vision, embedding and text: {UNCUT[name]}" in said
    assert "give -o NAME.onnx, for the graph of its language model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("part", models.PARTS)
def test_a_part_of_a_model_that_has_none_is_refused(part, tmp_path):
    with pytest.raises(CheckpointError, match="can't be cut into the graphs of vision, embedding and text"):
        capture_checkpoint(tiny.checkpoint("llama"), tmp_path / "m.onnx", part=part)
    assert not list(tmp_path.iterdir())


def test_a_bank_of_three_graphs_is_refused(tmp_path, capsys):
    given = ["--base", str(models.checkpoint("llava")), "--adapter", f"a={models.adapter('llava')}"]
    assert _run(["bank-onnx", *given, "--kv-cache", "-o", str(tmp_path / "m")], False) == 1
    said = capsys.readouterr().err
    assert "becomes three graphs with --kv-cache" in said
    assert "bank-onnx writes one" in said
    assert not list(tmp_path.iterdir())


@each("llava", "gemma3")
def test_a_large_model_is_proven_by_a_twin(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(prove, "_OWN_BYTES", 0)
    capture_onnx(models.checkpoint(arch), tmp_path / "m", kv_cache=True)
    for part in models.PARTS:
        assert Proof.from_metadata(metadata(tmp_path / "m", part)).of == "twin"
    agrees(models.run(tmp_path / "m", arch), models.reference(models.build(arch), arch))


@each("llava", "gemma3")
def test_attention_as_one_node_answers_the_same(arch, tmp_path):
    capture_onnx(models.checkpoint(arch), tmp_path / "m", kv_cache=True, fused=True)
    for part, count in zip(models.PARTS, ("vision", 0, "text"), strict=True):
        nodes = [node.op_type for node in graph_of(tmp_path / "m", part).graph.node]
        assert ("Attention" in nodes) == bool(count)
    agrees(models.run(tmp_path / "m", arch), models.reference(models.build(arch), arch))


def test_the_image_token_of_a_twin_is_in_its_vocabulary():
    config = transformers.LlavaConfig(image_token_index=32000, pad_token_id=32001)
    small = small_config(config, [])
    assert small.image_token_id < small.text_config.vocab_size < 32000
