"""Each kind of model is captured from its folder as it was saved, and answers as PEFT does."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peaks
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_export import AdapterSession, CheckpointError, GraphError, capture_onnx, check_parity, swap_onnx
from lora_export.base.capture import work
from lora_export.base.capture.prepared import example_inputs
from lora_export.base.kinds import KINDS, kind_of
from lora_export.base.kinds.images import images
from lora_export.graph.captured import Captured

# One layer: what a kind knows is in front of the layers and behind them.
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TEXT = {**TOWER, "vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
SPEECH = {
    **TOWER,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "vocab_size": 20,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 60,
    "max_source_positions": 24,
    "max_target_positions": 20,
    "num_mel_bins": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
SEGFORMER = {
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "num_attention_heads": [1, 2],
    "sr_ratios": [4, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
    "num_encoder_blocks": 2,
    "decoder_hidden_size": 32,
    "num_labels": 5,
}
T5 = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 48, "d_kv": 16, "vocab_size": 60}
TROCR = {
    "d_model": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 20,
    "cross_attention_hidden_size": 32,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
}
AST = {**TOWER, "max_length": 48, "num_mel_bins": 32, "patch_size": 16}


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 60, (rows, tokens))


def ones(rows: int, tokens: int) -> torch.Tensor:
    return torch.ones(rows, tokens, dtype=torch.int64)


@dataclass(frozen=True)
class Case:
    """A family, and inputs of other sizes than the capture's example.

    Attributes:
        make: Returns the model.
        kind: Its key in `KINDS`.
        word: The graph's word for it.
        feeds: Returns the inputs.
        targets: PEFT's ``target_modules``.
        files: Name → content of files that its processor writes into the folder.
    """

    make: Callable[[], Any]
    kind: str
    word: str
    feeds: Callable[[], dict[str, torch.Tensor]]
    targets: list[str] | str
    files: dict[str, Any] = field(default_factory=dict)


QV, QUERY = ["q_proj", "v_proj"], ["query", "value"]
CASES = {
    "wav2vec2": Case(
        make=lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SPEECH)),
        kind="audio",
        word="audio",
        feeds=lambda: {"input_values": torch.randn(3, 333)},
        targets=QV,
    ),
    "wavlm": Case(
        make=lambda: transformers.WavLMForSequenceClassification(transformers.WavLMConfig(**SPEECH)),
        kind="audio",
        word="audio",
        feeds=lambda: {"input_values": torch.randn(1, 260)},
        # Its attention reads the weights of q_proj … out_proj itself: PEFT trains nothing there.
        targets=["intermediate_dense", "output_dense"],
    ),
    "ast": Case(
        make=lambda: transformers.ASTForAudioClassification(transformers.ASTConfig(**AST)),
        kind="spectrogram",
        word="audio",
        feeds=lambda: {"input_values": torch.randn(3, 48, 32)},
        targets=QV,
    ),
    "whisper": Case(
        make=lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)),
        kind="speech-to-text",
        word="encoder-decoder",
        feeds=lambda: {"input_features": torch.randn(1, 16, 48), "decoder_input_ids": ids(1, 9)},
        targets=QV,
    ),
    "whisper classifier": Case(
        make=lambda: transformers.WhisperForAudioClassification(transformers.WhisperConfig(**WHISPER)),
        kind="speech-to-text",
        word="audio",
        feeds=lambda: {"input_features": torch.randn(3, 16, 48)},
        targets=QV,
    ),
    "clip": Case(
        make=lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION)),
        kind="text-image",
        word="text-image",
        feeds=lambda: {
            "input_ids": ids(4, 9),
            "attention_mask": ones(4, 9),
            "pixel_values": torch.randn(3, 3, 32, 32),
        },
        targets=QV,
    ),
    "siglip": Case(
        make=lambda: transformers.SiglipModel(
            transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
        ),
        kind="text-image",
        word="text-image",
        feeds=lambda: {
            "input_ids": ids(1, 20),
            "attention_mask": ones(1, 20),
            "pixel_values": torch.randn(3, 3, 32, 32),
        },
        targets=QV,
    ),
    "trocr": Case(
        make=lambda: transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig(
                encoder=transformers.ViTConfig(**VISION).to_dict(),
                decoder=transformers.TrOCRConfig(**TROCR).to_dict(),
                decoder_start_token_id=1,
                pad_token_id=0,
            )
        ),
        kind="image-to-text",
        word="encoder-decoder",
        feeds=lambda: {"pixel_values": torch.randn(3, 3, 32, 32), "decoder_input_ids": ids(3, 9)},
        targets=["q_proj", "v_proj", "query", "fc1"],
    ),
    "segformer": Case(
        make=lambda: transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SEGFORMER)),
        kind="vision",
        word="vision",
        feeds=lambda: {"pixel_values": torch.randn(3, 3, 64, 48)},
        targets="all-linear",
        files={"preprocessor_config.json": {"size": {"height": 64, "width": 48}}},
    ),
    "wide vit": Case(
        make=lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**TOWER, image_size=[16, 32], patch_size=8)
        ),
        kind="vision",
        word="vision",
        feeds=lambda: {"pixel_values": torch.randn(3, 3, 16, 32)},
        targets="all-linear",
    ),
    # It refuses to have a cache, by which others tell a decoder.
    "t5 encoder": Case(
        make=lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
        kind="text",
        word="encoder",
        feeds=lambda: {"input_ids": ids(3, 4), "attention_mask": ones(3, 4)},
        targets=["q", "v"],
    ),
    # Its config says that it is an encoder and a decoder.
    "umt5 encoder": Case(
        make=lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**T5)),
        kind="text",
        word="encoder",
        feeds=lambda: {"input_ids": ids(3, 4), "attention_mask": ones(3, 4)},
        targets=["q", "v"],
    ),
    "t5": Case(
        make=lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**T5, decoder_start_token_id=0)
        ),
        kind="encoder-decoder",
        word="encoder-decoder",
        feeds=lambda: {
            "input_ids": ids(3, 4),
            "attention_mask": ones(3, 4),
            "decoder_input_ids": ids(3, 6),
        },
        targets=["q", "v"],
    ),
}


def trained(case: Case, folder: Any) -> Any:
    """Save a base and an adapter whose effect can be measured; return PEFT's model."""
    torch.manual_seed(0)
    model = case.make().eval()
    model.save_pretrained(folder / "base")
    for name, content in case.files.items():
        (folder / "base" / name).write_text(json.dumps(content))
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=case.targets)).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft.save_pretrained(folder / "adapter")
    return peft


@pytest.mark.parametrize("name", CASES)
def test_a_folder_is_captured_as_it_was_saved(name, tmp_path):
    case = CASES[name]
    peft = trained(case, tmp_path)
    kind = kind_of(peft.base_model.model)
    assert f"{type(kind).__module__}:{type(kind).__name__}" == KINDS[case.kind]
    swap_onnx(tmp_path / "base", tmp_path / "m.onnx", adapter=tmp_path / "adapter")
    captured = Captured.from_metadata(
        {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    )
    assert captured is not None
    assert captured.kind == case.word
    assert (captured.vocab_size is None) == (not any(key.endswith("input_ids") for key in case.feeds()))
    feeds = case.feeds()
    values = {key: value.numpy() for key, value in feeds.items()}
    with AdapterSession(tmp_path / "m.onnx") as session, torch.no_grad():
        session.load_adapter("a", tmp_path / "adapter")
        adapted = session.run(values, adapter="a")
        plain = session.run(values)
        wanted = peft(**feeds)
        with peft.disable_adapter():
            base = peft(**feeds)
    # The module's own outputs under their own names, and no others.
    assert set(adapted) == {key for key, value in wanted.items() if isinstance(value, torch.Tensor)}
    moved = 0.0
    for key, found in adapted.items():
        scale = wanted[key].abs().max().item()
        np.testing.assert_allclose(found, wanted[key].numpy(), rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(plain[key], base[key].numpy(), rtol=0, atol=1e-5 * scale)
        moved = max(moved, (wanted[key] - base[key]).abs().max().item() / scale)
    assert moved > 1e-2


@pytest.mark.parametrize("name", ["LongT5EncoderModel", "SwitchTransformersEncoderModel", "T5EncoderModel"])
def test_encoders_of_configs_of_both_halves(name):
    made = getattr(transformers, name)
    with torch.device("meta"):
        model = made(made.config_class(**T5))
        kind = kind_of(model)
        assert set(kind.example_inputs(model, Path("none"))) <= set(
            inspect.signature(model.forward).parameters
        )


@pytest.mark.proven
def test_sounds_that_a_graph_is_for(tmp_path):
    """Wav2Vec2-Conformer's graph fails on some lengths; PyTorch makes its table longer for long ones."""
    settings = {"position_embeddings_type": "relative", "max_source_positions": 25, "conv_dim": (16,) * 7}
    settings |= {"conv_stride": (5, 2, 2, 2, 2, 2, 2), "conv_kernel": (10, 3, 3, 3, 3, 2, 2)}
    settings |= {"num_feat_extract_layers": 7}
    model = transformers.Wav2Vec2ConformerModel(transformers.Wav2Vec2ConformerConfig(**SPEECH | settings))
    model.eval().save_pretrained(tmp_path / "base")
    longest = kind_of(model).largest(model)["samples"]
    frames = [int(model._get_feat_extract_output_lengths(size)) for size in (longest, longest + 1)]
    assert frames == [25, 26]
    with pytest.raises(GraphError, match=r"can't run the graph on input_values \["):
        capture_onnx(tmp_path / "base", tmp_path / "m.onnx")
    graph, _ = capture_onnx(tmp_path / "base", tmp_path / "m.onnx", twin=False)
    dims = Captured.from_metadata({entry.key: entry.value for entry in onnx.load(graph).metadata_props})
    assert dims.largest == {"samples": longest}


def test_parity_makes_sounds_of_several_lengths(tmp_path):
    trained(CASES["wav2vec2"], tmp_path)
    swap_onnx(tmp_path / "base", tmp_path / "m.onnx", adapter=tmp_path / "adapter")
    report = check_parity(tmp_path / "base", tmp_path / "m.onnx", tmp_path / "adapter", samples=4)
    assert report.passed
    lengths = {feed["shapes"]["input_values"][1] for feed in report.feeds}
    assert len(lengths) > 2
    # Two frames: (10 + 2 * 5) samples for three outputs of the first convolution, and one step more.
    assert min(lengths) >= 30


def test_parity_of_scores_of_all_pairs(tmp_path):
    """A score of a text and an image is in no row alone: the laws of rows hold for the embeddings only."""
    trained(CASES["clip"], tmp_path)
    swap_onnx(tmp_path / "base", tmp_path / "m.onnx", adapter=tmp_path / "adapter")
    report = check_parity(tmp_path / "base", tmp_path / "m.onnx", tmp_path / "adapter", samples=2)
    assert report.passed
    assert any("logits_per_image, logits_per_text" in note for note in report.notes)


class OfSize:
    """What `images` reads of a model."""

    dtype, device, main_input_name = torch.float32, torch.device("cpu"), "pixel_values"


@pytest.mark.parametrize(
    ("config", "processor", "wanted"),
    [
        ({"image_size": 24}, None, (24, 24)),
        ({"image_size": [16, 24]}, None, (16, 24)),
        ({"image_size": (16, 24)}, {"size": 99}, (16, 24)),
        ({}, {"size": {"height": 16, "width": 24}}, (16, 24)),
        ({}, {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, (32, 32)),
        ({}, {"size": {"shortest_edge": 40}}, (40, 40)),
        ({}, {"size": 20}, (20, 20)),
    ],
)
def test_the_size_of_images(config, processor, wanted, tmp_path):
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = images(OfSize(), transformers.PretrainedConfig(**config, num_channels=4), tmp_path)
    assert found.shape == (2, 4, *wanted)


@pytest.mark.parametrize(
    ("config", "processor", "text"),
    [
        ({}, None, "states how large the images are"),
        ({"image_size": None}, {"size": {"longest_edge": 20}}, "states how large the images are"),
        ({"image_size": True}, {"size": "20"}, "states how large the images are"),
        ({"image_size": 0}, None, "2 × 3 × 0 × 0 values"),
        (
            {"image_size": [16, 1 << 40]},
            None,
            r"1099511627776 values .* at most 33554432 bytes for these weights",
        ),
        ({}, {"size": {"height": -3, "width": 8}}, "2 × 3 × -3 × 8 values"),
        ({}, [], "states how large the images are"),
    ],
)
def test_a_size_that_is_missing_or_absurd(config, processor, text, tmp_path):
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match=text):
        images(OfSize(), transformers.PretrainedConfig(**config), tmp_path)


SMALL = ("ConvNextModel", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32})
SOUND = ("Wav2Vec2Model", {**SPEECH, "num_hidden_layers": 1})
# Bases, and what their configs state besides.
STATED: dict[str, tuple[tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "images of 8192 pixels": (SMALL, {"image_size": 8192}),
    "long strides": (SOUND, {"conv_stride": [65_000, 65_000]}),
    "a long product of strides": (SOUND, {"conv_stride": [10_000, 1_000]}),
    "a negative stride": (SOUND, {"conv_stride": [5, -100]}),
}
PIXELS = {**SEGFORMER, "sr_ratios": [1, 1], "strides": [1, 2]}
FRAMES = {**WHISPER, "d_model": 4, "encoder_attention_heads": 1, "decoder_attention_heads": 1}
# Bases that are as they state, and what makes small ones of them.
MUCH = {
    "pixels": (
        *("SegformerModel", {**PIXELS, "image_size": 500}),
        {"image_size": 32, "strides": SEGFORMER["strides"]},
    ),
    "frames": (
        *("WhisperForConditionalGeneration", {**FRAMES, "max_source_positions": 12_000}),
        {"max_source_positions": WHISPER["max_source_positions"]},
    ),
}


def save_base(folder: Path, name: str, config: dict[str, Any]) -> Path:
    kind = getattr(transformers, name)
    kind(kind.config_class(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Capture every base in one process, whose start takes longest; return its folder and what was measured.

    Usual ones are captured before, so that no import counts.
    """
    top = tmp_path_factory.mktemp("measured")
    usual = [save_base(top / name, name, config) for name, config in (SMALL, SOUND)]
    bases = {}
    for number, (text, (made, change)) in enumerate(STATED.items()):
        bases[text] = save_base(top / str(number), *made)
        stated = bases[text] / "config.json"
        stated.write_text(json.dumps(json.loads(stated.read_text()) | change))
    for text, (name, config, small) in MUCH.items():
        usual.append(save_base(top / name, name, config | small))
        bases[text] = save_base(top / text, name, config)
    warm, runs = (
        [["capture-onnx", base, "-o", base.with_name(f"{base.name}.onnx")] for base in folders]
        for folders in (usual, bases.values())
    )
    found = peaks.measured(warm, runs)
    return {text: (base, *run) for (text, base), run in zip(bases.items(), found, strict=True)}


@pytest.mark.parametrize("text", STATED)
def test_a_config_does_not_choose_how_large_an_example_is(text, measured):
    """20 kB of weights: 4 GB and half a minute for images of 8192 pixels; 1.3 TB for strides of 65,000."""
    base, code, _, said, peak, seconds = measured[text]
    assert code == 1
    assert "of the stated size would be 2 × " in said
    assert peak < peaks.allowed(base)
    assert seconds < 10


@pytest.mark.parametrize("text", MUCH)
def test_a_config_does_not_choose_how_much_is_computed(text, measured):
    """Attention of each pixel, or frame, to each other: hours for 50 kB of weights, 2.3 GB for 200 kB."""
    base, code, _, said, peak, seconds = measured[text]
    assert code == 1
    assert f"{MUCH[text][0]} would compute " in said
    assert peak < peaks.allowed(base)
    assert seconds < 20


TOKENS = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1}
# Class, config, a config that makes of fourteen tokens as many as its window or chunk has, and what it says.
PADDED = {
    "Mamba-2": (
        "Mamba2ForCausalLM",
        {**TOKENS, "num_heads": 2, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        {"chunk_size": 12_000},
        "a tensor of 144000000 bytes",  # bools of each token to each
    ),
    # Its code looks at values.
    "Longformer": (
        "LongformerModel",
        {**TOKENS, "num_attention_heads": 2, "intermediate_size": 16, "attention_window": [8]},
        {"attention_window": [100_000]},
        "a tensor of ",
    ),
    "Funnel": (
        "FunnelBaseModel",
        {"vocab_size": 60, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "num_decoder_layers": 1}
        | {"block_sizes": [1], "block_repeats": [1]},
        {"block_repeats": [130_000]},
        "steps on ",
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_a_few_tokens_do_not_become_much_work(name, tmp_path):
    """16 kB of weights took more than 8 GB, or hours: the example of a text model was not looked at."""
    kind, config, change, text = PADDED[name]
    model = getattr(transformers, kind)
    model(model.config_class(**config)).save_pretrained(tmp_path)
    loaded = model.from_pretrained(tmp_path).eval()
    assert example_inputs(loaded, tmp_path)["input_ids"].shape == (2, 7)
    hostile = model(model.config_class(**config | change)).eval()
    with pytest.raises(CheckpointError, match=f"{kind} would compute .*{text}"):
        example_inputs(hostile, tmp_path)


def test_the_largest_work_of_published_models_is_within_the_limit():
    config = transformers.SegformerConfig(image_size=1024, num_labels=150)  # B0's sizes are the defaults
    with torch.device("meta"):
        model = transformers.SegformerForSemanticSegmentation(config)
    kind = kind_of(model)
    assert kind is not None
    stored = 2 * sum(values.numel() for values in model.parameters())
    count, largest = work._work_of(model, kind, Path("none"), stored)
    assert 0.4 < count / (work._SMALL_COUNT + work._COUNT_EACH * stored) < 1
    assert 0.4 < largest / (work._SMALL_BYTES + work._BYTES_EACH * stored) < 1


@pytest.mark.parametrize(("stated", "known"), [(20, 20), (2**31, None), (10**30, None)])
def test_positions_without_a_limit_are_not_written_as_one(stated, known):
    """A graph's record with 10³⁰ was refused by every reader, "capture the checkpoint again"."""
    config = transformers.LlamaConfig(
        **TOWER, num_key_value_heads=2, vocab_size=60, max_position_embeddings=stated
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    kind = kind_of(model)
    assert kind is not None
    assert kind.largest(model).get("sequence") == known
