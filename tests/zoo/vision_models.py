"""Tiny vision–language models, and their three graphs in onnxruntime beside PyTorch's own ``generate``."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_export import capture_onnx

Array = tiny.Array
PARTS = ("vision", "embedding", "text")
ROWS, EACH, NEW, WIDTH, IMAGE = 3, 4, 6, 32, 98
# Tokens before and behind each image.
BEFORE, BEHIND = 3, 5
# The image's token is the last one, so that the others keep their numbers without it.
_TEXT = {
    "vocab_size": 99,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def _llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_seq_length=EACH,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**_TEXT, head_dim=8, sliding_window=5, layer_types=kinds),
        image_token_index=IMAGE,
        mm_tokens_per_image=EACH,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _aya() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.AyaVisionConfig(
        vision_config=transformers.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=transformers.Cohere2Config(**_TEXT, sliding_window=5, layer_types=kinds),
        image_token_index=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    return transformers.AyaVisionForConditionalGeneration(config)


def _internvl() -> Any:
    tower = _VISION | {"image_size": [28, 28], "patch_size": [7, 7]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**tower),
        text_config=transformers.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=EACH,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _llama4() -> Any:
    width = {f"{name}_dim": WIDTH for name in ("vision_output", "projector_input", "projector_output")}
    tower = _VISION | {"intermediate_size": 4 * WIDTH, "patch_size": 7} | width
    text = _TEXT | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = transformers.Llama4Config(vision_config=tower, text_config=text, image_token_index=IMAGE)
    return transformers.Llama4ForConditionalGeneration(config)


# The first two are run in all tests.
_MADE = {"llava": _llava, "gemma3": _gemma3, "aya": _aya, "internvl": _internvl, "llama4": _llama4}
ARCHS = ("llava", "gemma3")


@functools.cache
def _weights(arch: str) -> Mapping[str, torch.Tensor]:
    """Return random weights of which each counts; tied ones are one."""
    generator = torch.Generator().manual_seed(1)
    model = _MADE[arch]()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(2 * noise / parameter[0].numel() ** 0.5)
    return dict(model.state_dict())


def build(arch: str) -> Any:
    """Return a model; the same at every call."""
    model = _MADE[arch]().eval()
    model.load_state_dict(_weights(arch))
    return model


@functools.cache
def checkpoint(arch: str) -> Path:
    """Return the folder that a model was saved to."""
    folder = tiny.cache_folder() / "vision-language" / arch
    with tiny.quiet():
        build(arch).save_pretrained(folder)
    return folder


@functools.cache
def captured(arch: str) -> Path:
    """Return the folder of a model's three graphs."""
    folder = tiny.cache_folder() / "vision-language" / f"{arch}-graphs"
    capture_onnx(checkpoint(arch), folder, kv_cache=True)
    return folder


def inputs(arch: str) -> dict[str, torch.Tensor]:
    """Return texts with an image each, one of them padded on the left."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, IMAGE, (ROWS, BEFORE + BEHIND), generator=generator)
    image = torch.full((ROWS, EACH), IMAGE)
    ids = torch.cat([text[:, :BEFORE], image, text[:, BEFORE:]], 1)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    pixels = torch.randn(ROWS, 3, _VISION["image_size"], _VISION["image_size"], generator=generator)
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return given | ({"token_type_ids": (ids == IMAGE).long()} if arch == "gemma3" else {})


# What adapters change, as PEFT's ``target_modules``: modules of all three graphs, the projector among them,
# but not of the tower's last layer, which LLaVA does not read; modules of two graphs.
TARGETS: dict[str, list[str] | str] = {
    "llava": r"(?!.*vision_tower.*layers\.1\.).*\.(q_proj|fc1|down_proj|linear_1|embed_tokens)|lm_head",
    "gemma3": ["q_proj", "fc1", "down_proj"],
}


@functools.cache
def adapter(arch: str, targets: str = "") -> Path:
    """Return an adapter's folder, as PEFT saves it; ``targets``: a pattern, or the end of modules' paths."""
    name = f"{arch}-adapter{zlib.crc32(targets.encode()) if targets else ''}"
    folder = tiny.cache_folder() / "vision-language" / name
    chosen = (targets if "." in targets else [targets]) if targets else TARGETS[arch]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=chosen, init_lora_weights=False)
    torch.manual_seed(5)
    with tiny.quiet():
        get_peft_model(build(arch), config).save_pretrained(folder)
    return folder


@functools.cache
def adapter_of_language_model(arch: str) -> Path:
    """Return the folder of an adapter whose paths begin inside of the language model."""
    folder = tiny.cache_folder() / "vision-language" / f"{arch}-language-model-adapter"
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(6)
    with tiny.quiet():
        get_peft_model(build(arch).model.language_model, config).save_pretrained(folder)
    return folder


@functools.cache
def adapter_with_copy(arch: str, module: str) -> Path:
    """Return the folder of an adapter of the language model that replaces another module whole."""
    folder = tiny.cache_folder() / "vision-language" / f"{arch}-{module}-copy"
    targets = r".*language_model.*q_proj"
    config = LoraConfig(r=3, target_modules=targets, modules_to_save=[module], init_lora_weights=False)
    torch.manual_seed(8)
    with tiny.quiet(), torch.no_grad():
        model = get_peft_model(build(arch), config)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    return folder


def adapted(arch: str, folder: Path | None = None) -> Any:
    """Return the model with an adapter, as PEFT computes it."""
    with tiny.quiet():
        return PeftModel.from_pretrained(build(arch), folder or adapter(arch))


@dataclass(frozen=True)
class Answer:
    """Greedy tokens ``[rows, NEW]`` and the scores ``[rows, NEW, vocab]`` that they were chosen by."""

    tokens: Array
    logits: Array


def reference(model: Any, arch: str) -> Answer:
    """Return what PyTorch generates, also with PEFT's model around the model."""
    plain = getattr(model, "get_base_model", lambda: model)()
    # As published models do: an image's token is no word.
    plain.generation_config = transformers.GenerationConfig(
        pad_token_id=0, max_new_tokens=NEW, suppress_tokens=[IMAGE]
    )
    with tiny.quiet(), torch.no_grad():
        found = plain.eval().generate(**inputs(arch), output_logits=True, return_dict_in_generate=True)
    return Answer(found.sequences[:, -NEW:].numpy(), torch.stack(found.logits, 1).numpy())


def run(folder: Path, arch: str, fed: Mapping[str, Mapping[str, Array]] | None = None) -> Answer:
    """Return what the three graphs generate: that of images once, the others for each token.

    Args:
        folder: Their folder.
        arch: The model.
        fed: Part → LoRA tensors for its graph.
    """
    chain = _Chain(folder, fed or {})
    given = {name: value.numpy() for name, value in inputs(arch).items()}
    features = chain.ask("vision", {"pixel_values": given["pixel_values"]})["image_features"]
    ids, mask, tokens, logits = given["input_ids"], given["attention_mask"], [], []
    for _ in range(NEW):
        logits.append(chain.step(ids, mask, features)[:, -1])
        words = np.delete(logits[-1], IMAGE, axis=1)
        ids, features = words.argmax(-1)[:, None], features[:0]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        tokens.append(ids)
    return Answer(np.concatenate(tokens, 1), np.stack(logits, 1))


def in_two_calls(folder: Path, given: Mapping[str, torch.Tensor]) -> Array:
    """Return the scores ``[1, tokens, vocab]`` of a text with two images, the second one behind a past."""
    chain, ids = _Chain(folder, {}), given["input_ids"][:1].numpy()
    pixels, logits = given["pixel_values"].numpy(), []
    for number in (0, 1):
        features = chain.ask("vision", {"pixel_values": pixels[number : number + 1]})["image_features"]
        mask = np.ones((1, (number + 1) * ids.shape[1]), np.int64)
        logits.append(chain.step(ids, mask, features))
    return np.concatenate(logits, 1)


class _Chain:
    """The three graphs, of which one's outputs are the next one's inputs, and the cache."""

    def __init__(self, folder: Path, fed: Mapping[str, Mapping[str, Array]]) -> None:
        self._sessions = {part: opened(folder, part) for part in PARTS}
        self._fed, self._state = fed, dict[str, Array]()

    def step(self, ids: Array, mask: Array, features: Array) -> Array:
        """Return the scores of new tokens ``ids``, behind a past that the mask has as well."""
        words = {"input_ids": ids, "image_features": features}
        embeds = self.ask("embedding", words)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        for port in self._sessions["text"].get_inputs():
            if port.name.startswith("past_key_values."):
                empty = np.zeros((len(ids), port.shape[1], 0, port.shape[3]), np.float32)
                self._state.setdefault(port.name, empty)
        read = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = self.ask("text", embeds | read | self._state)
        logits = found.pop("logits")
        self._state = {name.replace("present.", "past_key_values."): value for name, value in found.items()}
        return logits

    def ask(self, part: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs of a graph, which reads some of the feeds, and its LoRA tensors."""
        session = self._sessions[part]
        names = [port.name for port in session.get_outputs()]
        wanted = {port.name for port in session.get_inputs()}
        known = {name: value for name, value in feeds.items() if name in wanted}
        found = session.run(names, known | dict(self._fed.get(part, {})))
        return dict(zip(names, found, strict=True))


def opened(folder: Path, part: str) -> ort.InferenceSession:
    """Return a part's graph in onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(folder / f"{part}.onnx"), options, providers=["CPUExecutionProvider"])
