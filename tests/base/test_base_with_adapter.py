"""A base that holds an adapter: its layers, by name; or the same file, merged part by part."""

import copy
import functools
import json
import shutil

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_export import AdapterSession, bank_onnx, capture_onnx, convert_adapter, merge_onnx, swap_onnx
from lora_export.base.history.in_graph import merged_parts
from lora_export.cli import _run
from lora_export.errors import AdapterError, GraphError
from lora_export.formats.reading.scope import overlap

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 3}


def opt():
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        vocab_size=40,
        pad_token_id=0,
    )
    return transformers.OPTForCausalLM(config), ["q_proj", "v_proj"]


def bert():
    return transformers.BertModel(transformers.BertConfig(**TEXT, vocab_size=40)), ["query", "output.dense"]


def random(model, targets, **options):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(copy.deepcopy(model), config).eval()


def merge(base, adapter, out, *more):
    return _run(["merge", "--base", str(base), "--adapter", str(adapter), "-o", str(out), *more], False)


@pytest.mark.parametrize("make", [opt, bert])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("whole", [False, True], ids=["inner model", "with PEFT's names"])
def test_a_base_that_was_saved_with_an_adapter(make, dora, whole, tmp_path, capsys):
    torch.manual_seed(0)
    model, targets = make()
    model.save_pretrained(tmp_path / "base")
    saved = random(model, targets, use_dora=dora)
    state = saved.state_dict() if whole else saved.get_base_model().state_dict()
    state = {name: value.clone() for name, value in state.items()}
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    other = random(model, targets)
    other.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--allow-unmatched") == 1
    error = capsys.readouterr().err
    assert "contains an adapter already" in error
    assert "rename" not in error
    command = ["merge-onnx", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter"]
    assert _run([str(word) for word in [*command, "-o", tmp_path / "out.onnx"]], False) == 1
    assert "contains an adapter already" in capsys.readouterr().err
    # The hint, followed, and PEFT's own merge of the second adapter into that.
    plain = copy.deepcopy(saved).merge_and_unload()
    plain.save_pretrained(tmp_path / "base")
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)


def llava():
    vision = transformers.CLIPVisionConfig(**TEXT, **IMAGES, projection_dim=16)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, vocab_size=32, pad_token_id=0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config), {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
    }


def vipllava():
    vision = transformers.CLIPVisionConfig(**TEXT, **IMAGES, projection_dim=16)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, vocab_size=32, pad_token_id=0)
    config = transformers.VipLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=31, vision_feature_layers=[-1]
    )
    return transformers.VipLlavaForConditionalGeneration(config), {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
    }


@pytest.mark.parametrize("make", [llava, vipllava])
def test_two_parts_of_one_file_go_into_one_base(make, tmp_path, capsys):
    """Towers of equal sizes: each part has its own place, and none the other's."""
    torch.manual_seed(0)
    model, older = make()
    model = model.eval()
    model.save_pretrained(tmp_path / "base")
    random(model, ["q_proj"]).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for new, old in older.items():
        tensors = {
            name.replace(f"base_model.model.{new}", f"base_model.model.{old}"): v
            for name, v in tensors.items()
        }
    save_file(tensors, file)
    # PEFT loads transformers 4's names into the model of transformers 5.
    expected = (
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").merge_and_unload().state_dict()
    )
    before = model.state_dict()
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole") == 0, capsys.readouterr().err
    found = type(model).from_pretrained(tmp_path / "whole").state_dict()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)
    base = tmp_path / "base"
    for number, part in enumerate(("language_model", "vision_tower.vision_model")):
        out = tmp_path / f"out{number}"
        assert merge(base, tmp_path / "adapter", out, "--component", part) == 0, capsys.readouterr().err
        found = type(model).from_pretrained(out).state_dict()
        for name, values in expected.items():
            done = number == 1 or "vision" not in name
            torch.testing.assert_close(found[name], values if done else before[name], rtol=1e-5, atol=1e-5)
        # The same part again, and the whole file, are refused.
        capsys.readouterr()
        for more in ([], ["--component", part], ["--component", f"{part}.layers.0"] if number == 0 else []):
            assert merge(out, tmp_path / "adapter", tmp_path / "none", *more) == 1
            assert "merged into it already" in capsys.readouterr().err
        base = out


def two_parts(path, prefixes):
    """Write a file for two models, with changes of the same size in each."""
    tensors = {}
    for prefix, module in prefixes:
        a, b = torch.randn(2, 16), torch.randn(16, 2)
        kohya = prefix.startswith("lora_")
        name = prefix + (module.replace(".", "_") if kohya else module)
        tensors |= {f"{name}.lora_down.weight" if kohya else f"{name}.lora_A.weight": a}
        tensors |= {f"{name}.lora_up.weight" if kohya else f"{name}.lora_B.weight": b}
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("fronts", [("lora_unet_", "lora_te1_"), ("unet.", "text_encoder.")])
def test_components_of_one_file_go_into_one_base(fronts, tmp_path, capsys):
    unet, text = "input_blocks.4.1.proj.attn1.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
    stored = {f"model.diffusion_model.{unet}.weight": torch.randn(16, 16)}
    stored[f"clip.transformer.{text}.weight"] = torch.randn(16, 16)
    (tmp_path / "base").mkdir()
    save_file(stored, tmp_path / "base" / "model.safetensors")
    pairs = list(two_parts(tmp_path / "a.safetensors", zip(fronts, (unet, text), strict=True)).values())
    base, adapter = tmp_path / "base", tmp_path / "a.safetensors"
    parts = ("unet:model.diffusion_model", "text_encoder:clip.transformer")
    for number, part in enumerate(parts):
        assert merge(base, adapter, tmp_path / f"out{number}", "--component", part) == 0, (
            capsys.readouterr().err
        )
        base = tmp_path / f"out{number}"
        assert merge(base, adapter, tmp_path / "none", "--component", part.partition(":")[0]) == 1
        assert "merged into it already" in capsys.readouterr().err
    found = load_file(base / "model.safetensors")
    for number, (name, values) in enumerate(stored.items()):
        a, b = pairs[2 * number : 2 * number + 2]
        torch.testing.assert_close(found[name], values + b @ a, rtol=1e-5, atol=1e-5)


def test_an_old_manifest_means_the_whole_file(tmp_path, capsys):
    model, targets = bert()
    model.save_pretrained(tmp_path / "base")
    random(model, targets).save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    assert (
        merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "none", "--component", "encoder.layer.0")
        == 1
    )
    assert "merged into it already" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [True, False], ids=["with its manifest", "the graph alone"])
def test_a_graph_knows_the_part_of_a_file(kept, tmp_path):
    model, targets = bert()
    model.save_pretrained(tmp_path / "base")
    random(model, targets).save_pretrained(tmp_path / "adapter")
    graph, _ = capture_onnx(tmp_path / "base", tmp_path / "base.onnx")
    adapter = tmp_path / "adapter"
    for number in range(2):
        part = f"encoder.layer.{number}"
        out = tmp_path / f"out{number}.onnx"
        merge_onnx(graph, adapter, out, component=part, checkpoint=False)
        if not kept:
            out.with_suffix(".lora.json").unlink()
        for again in (None, part, f"{part}.attention"):
            with pytest.raises(GraphError, match="merged into it already"):
                merge_onnx(out, adapter, tmp_path / "none.onnx", component=again, checkpoint=False)
        graph = out
    merge_onnx(tmp_path / "base.onnx", adapter, tmp_path / "whole.onnx", checkpoint=False)
    import onnxruntime as ort

    ids = torch.randint(0, 40, (1, 6)).numpy()
    sessions = [ort.InferenceSession(str(tmp_path / name)) for name in ("out1.onnx", "whole.onnx")]
    feeds = {
        i.name: ids if i.name == "input_ids" else ids * 0 + (i.name == "attention_mask")
        for i in sessions[0].get_inputs()
    }
    one, two = (session.run(None, feeds)[0] for session in sessions)
    torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(two), rtol=1e-4, atol=1e-5)


@functools.cache
def two_adapters(make):
    """Save, once, a base and two adapters; merge the first into the base's folder and into its graph."""
    folder = tiny.cache_folder() / f"two-adapters-{make.__name__}"
    torch.manual_seed(0)
    model, targets = make()
    model.save_pretrained(folder / "base")
    for name in ("a", "b"):
        random(model, targets).save_pretrained(folder / name)
    assert merge(folder / "base", folder / "a", folder / "merged") == 0
    merge_onnx(folder / "base", folder / "a", folder / "merged.onnx")
    return folder


@pytest.mark.parametrize("make", [opt, bert])
@pytest.mark.parametrize("how", ["graph", "captured", "captured and its folder"])
def test_an_adapter_in_the_weights_goes_beside_them_no_second_time(how, make, tmp_path):
    made = two_adapters(make)
    inside, other, base, checkpoint = made / "a", made / "b", made / "merged.onnx", False
    if how != "graph":
        base, _ = capture_onnx(made / "merged", tmp_path / "captured.onnx")
        checkpoint = made / "merged" if how != "captured" else False
    for expose in (
        lambda adapter, out: swap_onnx(base, out, adapter=adapter, checkpoint=checkpoint),
        lambda adapter, out: bank_onnx(base, {"a": adapter}, out, checkpoint=checkpoint, resident="inputs"),
        lambda adapter, out: merge_onnx(base, adapter, out, checkpoint=checkpoint),
    ):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}.onnx"
        with pytest.raises((AdapterError, GraphError), match="merged into it already"):
            expose(inside, out)
        assert not out.exists()
        expose(other, out)
    swap, bank, _ = sorted(tmp_path.glob("out*.onnx"), key=lambda path: int(path.stem[3:]))
    with pytest.raises(AdapterError, match="would act twice"):
        convert_adapter(inside, swap, tmp_path / "a.safetensors")
    convert_adapter(other, swap, tmp_path / "b.safetensors")
    for graph in (swap, bank):
        place = {"slot": "a", "replace": True} if graph == bank else {}
        with AdapterSession(graph) as session:
            with pytest.raises(AdapterError, match="would act twice"):
                session.load_adapter("x", inside, **place)
            session.load_adapter("x", other, **place)


def test_a_converted_file_of_an_adapter_in_the_weights(tmp_path):
    made = two_adapters(bert)
    inside = made / "a"
    plain, _ = capture_onnx(made / "base", tmp_path / "plain.onnx")
    for name, base in (("one", plain), ("two", made / "merged.onnx")):
        swap_onnx(base, tmp_path / f"{name}.onnx", target_modules=["query"], checkpoint=False)
    convert_adapter(
        inside, tmp_path / "one.onnx", tmp_path / "a.safetensors", component="encoder.layer.0.attention.self"
    )
    for any_base in (False, True):
        with (
            AdapterSession(tmp_path / "two.onnx") as session,
            pytest.raises(AdapterError, match="would act twice"),
        ):
            session.load_adapter("a", tmp_path / "a.safetensors", any_base=any_base)


@pytest.mark.parametrize("make", [opt, bert])
@pytest.mark.parametrize("verb", ["merge", "swap"])
def test_another_adapter_onto_a_merged_graph_is_not_compared_with_the_base_it_names(verb, make, tmp_path):
    made, other = two_adapters(make), tmp_path / "b"
    shutil.copytree(made / "b", other)
    config = json.loads((other / "adapter_config.json").read_text())
    for folder, compared in (("base", False), ("merged", True)):
        text = json.dumps(config | {"base_model_name_or_path": str(made / folder)})
        (other / "adapter_config.json").write_text(text)
        out = tmp_path / f"{folder}-out.onnx"
        if verb == "merge":
            report = merge_onnx(made / "merged.onnx", other, out)
        else:
            report = swap_onnx(made / "merged.onnx", out, adapter=other)
        said = " ".join(report.plan.notes)
        assert ("values compared with" in said) == compared
        assert ("'a' merged into it" in said) != compared


@pytest.mark.parametrize("part", ["None:encoder", ":encoder"])
def test_earlier_manifests_write_none_before_a_part(part):
    assert overlap(part, ":encoder.layers", flattened=False)
    assert not overlap(part, ":decoder", flattened=False)
    assert overlap("unet", "unet:encoder", flattened=False)
    assert merged_parts(f"a sha256=1 weight=1.0 part={part}", "1") == [":encoder"]


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_a_single_module_is_a_part(module, tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, vocab_size=40, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    trained = random(model, ["q_proj", "lm_head", "embed_tokens"])
    trained.save_pretrained(tmp_path / "adapter")
    expected, before = trained.merge_and_unload().state_dict(), model.state_dict()
    part = ("--component", module)
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", *part) == 0, (
        capsys.readouterr().err
    )
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        done = name == f"{module}.weight"
        torch.testing.assert_close(values, (expected if done else before)[name], rtol=1e-5, atol=1e-5)
    assert (expected[f"{module}.weight"] - before[f"{module}.weight"]).norm() > 0.1
    assert merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "none", *part) == 1
    assert (
        merge(tmp_path / "out", tmp_path / "adapter", tmp_path / "more", "--component", "model.layers") == 0
    )
