"""The zoo's animals: one tiny model with random weights for each architecture, and its inputs. No downloads.

Every architecture has at least one square projection, so that a forgotten transposition shows in the
numbers instead of in a shape error, and fewer key than query heads where it has such heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

HIDDEN, VOCAB, LAYERS, LABELS = 64, 100, 2, 5
HEADS, KV_HEADS, MLP = 4, 2, 48
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """One model of the zoo.

    Attributes:
        make: Returns the model, with whatever weights its library gives it.
        inputs: Returns the inputs in the order of ``forward``, batch 2.
        dynamic: Input → its dynamic axes and their names.
        targets: What a plain adapter changes: PEFT's ``target_modules``.
        head: The module that ``modules_to_save`` trains whole.
        embedding: The embedding that the feature ``embedding`` changes.
        features: The adapter features that PEFT itself can train *and merge* here; see `tiny.make_adapter`.
        parameters: PEFT's ``target_parameters``.
        causal: A decoder with a tokenizer beside it, as onnxruntime-genai's builder needs.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensors]
    dynamic: dict[str, dict[int, str]]
    targets: list[str]
    head: str
    features: tuple[str, ...]
    embedding: str = ""
    parameters: list[str] = field(default_factory=list)
    causal: bool = False


def build(arch: str) -> nn.Module:
    """Return the model ``arch`` in float32 and eval mode; the same weights at every call."""
    torch.manual_seed(0)
    model = ARCHITECTURES[arch].make().float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _fill(module, name, parameter, generator)
        for name, buffer in model.named_buffers():
            # Running statistics of a fresh batch norm are 0 and 1: folding it would change nothing.
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def _fill(module: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if name == "weight" and parameter.dim() == 1:
        parameter.copy_(1 + 0.2 * noise)
    elif parameter.dim() == 1:
        parameter.copy_(0.2 * noise)
    elif isinstance(module, nn.Embedding):
        parameter.copy_(0.3 * noise)
    else:
        # Conv1D, GPT-2's layer, stores (in, out); stacked experts have their inputs last.
        fan_in = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter[0].numel()
        fan_in = parameter.shape[-1] if parameter.dim() == 3 and name != "weight" else fan_in
        parameter.copy_(0.7 * noise / math.sqrt(fan_in))


def _decoder(config: str, model: str, **changes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        options = {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            "use_cache": False,
        }
        return getattr(transformers, model)(getattr(transformers, config)(**(options | changes)))

    return make


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=64,
        num_labels=LABELS,
    )
    return BertForSequenceClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        num_labels=LABELS,
    )
    return ViTForImageClassification(config)


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,
        use_cache=False,
        # With another attention the exporter fails: "Cannot view a tensor".
        attn_implementation="eager",
    )
    return T5ForConditionalGeneration(config)


class ConvBlock(nn.Module):
    """Convolutions of each kind, one of them folded with its batch norm by every exporter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.series = nn.Conv1d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, LABELS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map pixels ``(batch, 3, 12, 12)`` to logits ``(batch, labels)``."""
        x = torch.relu(self.norm(self.conv(pixel_values)))
        x = torch.tanh(self.depthwise(torch.relu(self.pointwise(x))))
        x = torch.relu(self.strided(x)).flatten(2)
        return self.head(torch.relu(self.series(x)).mean(-1))


def _ids(sequence: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, sequence), generator=torch.Generator().manual_seed(seed))


def _text() -> Tensors:
    ids = _ids(7, 2)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _padded_text() -> Tensors:
    inputs = _text()
    inputs["attention_mask"][1, 5:] = 0
    return inputs | {"token_type_ids": (torch.arange(7) > 3).long().repeat(2, 1)}


def _pair() -> Tensors:
    # In the order of T5's forward, because the TorchScript exporter passes them by position.
    return _text() | {"decoder_input_ids": _ids(5, 3)}


def _image(size: int) -> Callable[[], Tensors]:
    generator = torch.Generator().manual_seed(4)
    return lambda: {"pixel_values": torch.randn((2, 3, size, size), generator=generator.manual_seed(4))}


TEXT_AXES = {0: "batch", 1: "sequence"}
PROMPT = {"input_ids": TEXT_AXES, "attention_mask": TEXT_AXES}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED_MLP = ["gate_proj", "up_proj", "down_proj"]
SHARED_EXPERT = [f"shared_expert.{name}" for name in GATED_MLP]
COMMON = ("plain", "rslora", "patterns", "dora", "modules_to_save")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        make=_decoder("LlamaConfig", "LlamaForCausalLM"),
        inputs=_text,
        dynamic=PROMPT,
        targets=[*ATTENTION, *GATED_MLP],
        head="lm_head",
        embedding="embed_tokens",
        features=(*COMMON, "embedding"),
        causal=True,
    ),
    "qwen2": Architecture(
        make=_decoder("Qwen2Config", "Qwen2ForCausalLM", tie_word_embeddings=True),
        inputs=_text,
        dynamic=PROMPT,
        targets=[*ATTENTION, *GATED_MLP],
        head="norm",
        features=(*COMMON, "bias"),
        causal=True,
    ),
    "phi3": Architecture(
        make=_decoder("Phi3Config", "Phi3ForCausalLM", original_max_position_embeddings=64),
        inputs=_text,
        dynamic=PROMPT,
        targets=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        head="lm_head",
        embedding="embed_tokens",
        features=(*COMMON, "embedding"),
        causal=True,
    ),
    "gpt2": Architecture(
        make=_gpt2,
        inputs=_text,
        dynamic=PROMPT,
        targets=["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        head="ln_f",
        features=(*COMMON, "bias", "lora_bias"),
        causal=True,
    ),
    "bert": Architecture(
        make=_bert,
        inputs=_padded_text,
        dynamic=PROMPT | {"token_type_ids": TEXT_AXES},
        targets=["query", "key", "value", "dense"],
        head="classifier",
        embedding="word_embeddings",
        features=(*COMMON, "bias", "lora_bias", "embedding"),
    ),
    "vit": Architecture(
        make=_vit,
        inputs=_image(16),
        dynamic={"pixel_values": {0: "batch"}},
        targets=["projection", *ATTENTION, "fc1", "fc2"],
        head="classifier",
        features=(*COMMON, "bias", "lora_bias"),
    ),
    "t5": Architecture(
        make=_t5,
        inputs=_pair,
        dynamic=PROMPT | {"decoder_input_ids": {0: "batch", 1: "decoder_sequence"}},
        targets=["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
        head="decoder.final_layer_norm",
        features=COMMON,
    ),
    "conv": Architecture(
        make=ConvBlock,
        inputs=_image(12),
        dynamic={"pixel_values": {0: "batch"}},
        targets=["conv", "pointwise", "strided", "series", "head"],
        head="head",
        features=(*COMMON, "bias"),
    ),
    "qwen2_moe": Architecture(
        make=_decoder(
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=HIDDEN,
        ),
        inputs=_text,
        dynamic=PROMPT,
        targets=[*ATTENTION, *SHARED_EXPERT],
        head="lm_head",
        embedding="embed_tokens",
        parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        features=(*COMMON, "embedding", "target_parameters"),
        causal=True,
    ),
}
