"""Tiny diffusers models in their trainers' original names: diffusers itself says what they become.

Each `Family` has the original state dict's names and shapes, and diffusers' conversion of such a state dict.
A merge in the original names (plain arithmetic), converted, is compared with our merge into the diffusers
folder.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from lora_export.adapter import Adapter, LoraModule
from lora_export.cli import main

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]
HIDDEN = 16
RANK, ALPHA = 3, 2.0


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: For the test's id.
        shapes: The original names.
        convert: diffusers' conversion.
        model: Makes the diffusers model, into which the converted state dict has to fit exactly.
    """

    name: str
    shapes: Shapes
    convert: Callable[[State], State]
    model: Callable[[], torch.nn.Module]

    def random(self) -> State:
        """Return random values in the original names."""
        return {name: torch.randn(shape) * 0.3 for name, shape in self.shapes.items()}


def with_numbers(function: Callable[..., State], **numbers: tuple[str, str]) -> Callable[..., State]:
    """Return diffusers' function with its fixed width replaced by a tiny model's."""
    source = inspect.getsource(function)
    for old, new in numbers.values():
        assert old in source, f"diffusers' {function.__name__} has changed: {old}"
        source = source.replace(old, new)
    namespace = dict(vars(single_file_utils))
    exec(source, namespace)
    return namespace[function.__name__]


def linear(name: str, rows: int, cols: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, cols)} | ({f"{name}.bias": (rows,)} if bias else {})


def modules_of(family: Family, *parts: str) -> list[str]:
    """Return the paths of linear and convolution modules, in original names; all, or those with a part."""
    paths = [name.removesuffix(".weight") for name, shape in family.shapes.items() if len(shape) > 1]
    skipped = ("pos_embed", "head.modulation")
    paths = [path for path in paths if path not in skipped and not path.endswith(".modulation")]
    return [path for path in paths if not parts or any(part in path for part in parts)]


def trained(family: Family, paths: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return a random (A, B) for each path."""
    pairs = {}
    for path in paths:
        out, cols, *kernel = family.shapes[f"{path}.weight"]
        ones = [1] * len(kernel)
        pairs[path] = (torch.randn(RANK, cols, *kernel), torch.randn(out, RANK, *ones))
    return pairs


def delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the scaled product in float64, in the weight's shape."""
    left, right = b.double().reshape(len(b), -1), a.double().reshape(len(a), -1)
    return (ALPHA / RANK * left @ right).reshape(len(b), *a.shape[1:])


def kohya(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], prefix: str = "lora_unet_") -> State:
    """Return a kohya file's tensors."""
    tensors = {}
    for path, (a, b) in pairs.items():
        name = prefix + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def dotted(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], prefix: str = "diffusion_model.") -> Adapter:
    """Return what ComfyUI's and ai-toolkit's files hold."""
    modules = {}
    for path, (a, b) in pairs.items():
        names = tuple(f"{prefix}{path}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha"))
        kind = "conv" if a.ndim > 2 else "linear"
        module = LoraModule(f"{prefix}{path}", kind, a.numpy(), b.numpy(), ALPHA, RANK, tensor_names=names)
        modules[module.key] = module
    names = tuple(name for module in modules.values() for name in module.tensor_names)
    return Adapter("style", "style.safetensors", "plain", modules, tensor_names=names)


def write_base(folder: Path, state: State, model: torch.nn.Module) -> Path:
    """Write converted values as a diffusers folder, after they were seen to fit the model exactly."""
    model.load_state_dict(state, strict=True)
    folder.mkdir()
    values = {name: value.contiguous().clone() for name, value in state.items()}
    save_file(values, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": type(model).__name__}))
    return folder


def converted(family: Family, state: State) -> State:
    """Convert, and leave out what the model does not hold (the conversion of a UNet makes Nones)."""
    kept = set(family.model().state_dict())
    return {name: value for name, value in family.convert(dict(state)).items() if name in kept}


def compare(folder: Path, expected: State) -> None:
    """Compare every tensor with a merge in float64, rounded once."""
    merged = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert set(merged) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(merged[name].double(), values.double(), rtol=2e-6, atol=2e-6, msg=name)


def run(*arguments: object) -> object:
    """Run the command line and return its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def flux(depth: int = 2, single: int = 2, guidance: bool = True) -> Family:
    """FLUX.1 in Black Forest Labs' names."""
    from diffusers import FluxTransformer2DModel

    h, shapes = HIDDEN, Shapes()
    shapes |= linear("img_in", h, 8) | linear("txt_in", h, 12) | linear("final_layer.linear", 8, h)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * h, h)
    sizes = {"time_in": 256, "vector_in": 10} | ({"guidance_in": 256} if guidance else {})
    for name, size in sizes.items():
        shapes |= linear(f"{name}.in_layer", h, size) | linear(f"{name}.out_layer", h, h)
    for i in range(depth):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= linear(f"{block}_mod.lin", 6 * h, h) | linear(f"{block}_attn.qkv", 3 * h, h)
            shapes |= linear(f"{block}_attn.proj", h, h)
            shapes |= linear(f"{block}_mlp.0", 4 * h, h) | linear(f"{block}_mlp.2", h, 4 * h)
            shapes |= {f"{block}_attn.norm.{x}_norm.scale": (8,) for x in ("query", "key")}
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.linear1", 7 * h, h) | linear(f"{block}.linear2", h, 5 * h)
        shapes |= linear(f"{block}.modulation.lin", 3 * h, h)
        shapes |= {f"{block}.norm.{x}_norm.scale": (8,) for x in ("query", "key")}
    convert = with_numbers(
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
        width=("inner_dim = 3072", f"inner_dim = {h}"),
    )
    return Family(
        "flux",
        shapes,
        convert,
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=depth,
            num_single_layers=single,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        ),
    )


def sd3(depth: int = 2) -> Family:
    """Stable Diffusion 3.5 medium: its first block has a second attention, its last a short context block."""
    from diffusers import SD3Transformer2DModel

    h = HIDDEN
    shapes: Shapes = {
        "pos_embed": (1, 16, h),
        "x_embedder.proj.weight": (h, 4, 2, 2),
        "x_embedder.proj.bias": (h,),
    }
    shapes |= linear("t_embedder.mlp.0", h, 256) | linear("t_embedder.mlp.2", h, h)
    shapes |= linear("y_embedder.mlp.0", h, 10) | linear("y_embedder.mlp.2", h, h)
    shapes |= linear("context_embedder", h, 12)
    shapes |= linear("final_layer.linear", 16, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)
    for i in range(depth):
        last, x, context = i == depth - 1, f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        for block in (x, context):
            shapes |= linear(f"{block}.attn.qkv", 3 * h, h)
            shapes |= {f"{block}.attn.ln_{n}.weight": (8,) for n in "qk"}
        shapes |= linear(f"{x}.adaLN_modulation.1", (6 if i else 9) * h, h)
        shapes |= linear(f"{context}.adaLN_modulation.1", (2 if last else 6) * h, h)
        for block in (x,) if last else (x, context):
            shapes |= linear(f"{block}.attn.proj", h, h)
            shapes |= linear(f"{block}.mlp.fc1", 4 * h, h) | linear(f"{block}.mlp.fc2", h, 4 * h)
        if not i:
            shapes |= linear(f"{x}.attn2.qkv", 3 * h, h) | linear(f"{x}.attn2.proj", h, h)
            shapes |= {f"{x}.attn2.ln_{n}.weight": (8,) for n in "qk"}
    return Family(
        "sd3",
        shapes,
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=depth,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=h,
            pooled_projection_dim=10,
            out_channels=4,
            pos_embed_max_size=4,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
    )


def wan(depth: int = 2) -> Family:
    """Wan 2.1 from image to video."""
    from diffusers import WanTransformer3DModel

    h = HIDDEN
    shapes: Shapes = {"patch_embedding.weight": (h, 4, 1, 2, 2), "patch_embedding.bias": (h,)}
    shapes |= linear("text_embedding.0", h, 12) | linear("text_embedding.2", h, h)
    shapes |= linear("time_embedding.0", h, 10) | linear("time_embedding.2", h, h)
    shapes |= linear("time_projection.1", 6 * h, h) | linear("head.head", 16, h)
    shapes |= {"head.modulation": (1, 2, h)}
    shapes |= linear("img_emb.proj.1", 14, 14) | linear("img_emb.proj.3", h, 14)
    for n, size in ((0, 14), (4, h)):
        shapes |= {f"img_emb.proj.{n}.weight": (size,), f"img_emb.proj.{n}.bias": (size,)}
    for i in range(depth):
        block = f"blocks.{i}"
        for attention, leaves in (("self_attn", "qkvo"), ("cross_attn", (*"qkvo", "k_img", "v_img"))):
            for leaf in leaves:
                shapes |= linear(f"{block}.{attention}.{leaf}", h, h)
            shapes |= {f"{block}.{attention}.norm_{x}.weight": (h,) for x in "qk"}
        shapes |= {f"{block}.cross_attn.norm_k_img.weight": (h,), f"{block}.modulation": (1, 6, h)}
        shapes |= {f"{block}.norm3.weight": (h,), f"{block}.norm3.bias": (h,)}
        shapes |= linear(f"{block}.ffn.0", 20, h) | linear(f"{block}.ffn.2", h, 20)
    return Family(
        "wan",
        shapes,
        single_file_utils.convert_wan_transformer_to_diffusers,
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=10,
            ffn_dim=20,
            num_layers=depth,
            cross_attn_norm=True,
            image_dim=14,
            added_kv_proj_dim=h,
            rope_max_seq_len=8,
        ),
    )


def hunyuan_video(depth: int = 2) -> Family:
    """HunyuanVideo, whose text has a refiner of its own."""
    from diffusers import HunyuanVideoTransformer3DModel

    h = HIDDEN
    shapes: Shapes = {"img_in.proj.weight": (h, 4, 1, 2, 2), "img_in.proj.bias": (h,)}
    for name, size in (("time_in.mlp", 256), ("guidance_in.mlp", 256), ("txt_in.t_embedder.mlp", 256)):
        shapes |= linear(f"{name}.0", h, size) | linear(f"{name}.2", h, h)
    shapes |= linear("vector_in.in_layer", h, 10) | linear("vector_in.out_layer", h, h)
    shapes |= linear("txt_in.input_embedder", h, 12)
    shapes |= linear("txt_in.c_embedder.linear_1", h, 12) | linear("txt_in.c_embedder.linear_2", h, h)
    block = "txt_in.individual_token_refiner.blocks.0"
    shapes |= linear(f"{block}.self_attn_qkv", 3 * h, h) | linear(f"{block}.self_attn_proj", h, h)
    shapes |= linear(f"{block}.mlp.fc1", 4 * h, h) | linear(f"{block}.mlp.fc2", h, 4 * h)
    shapes |= linear(f"{block}.adaLN_modulation.1", 2 * h, h)
    for norm in ("norm1", "norm2"):
        shapes |= {f"{block}.{norm}.weight": (h,), f"{block}.{norm}.bias": (h,)}
    shapes |= linear("final_layer.linear", 16, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)
    for i in range(depth):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= linear(f"{block}_mod.linear", 6 * h, h) | linear(f"{block}_attn_qkv", 3 * h, h)
            shapes |= linear(f"{block}_attn_proj", h, h)
            shapes |= linear(f"{block}_mlp.fc1", 4 * h, h) | linear(f"{block}_mlp.fc2", h, 4 * h)
            shapes |= {f"{block}_attn_{x}_norm.weight": (8,) for x in "qk"}
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.linear1", 7 * h, h) | linear(f"{block}.linear2", h, 5 * h)
        shapes |= linear(f"{block}.modulation.linear", 3 * h, h)
        shapes |= {f"{block}.{x}_norm.weight": (8,) for x in "qk"}
    return Family(
        "hunyuan-video",
        shapes,
        with_numbers(
            single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
            width=("hidden_size = 3072", f"hidden_size = {h}"),
        ),
        lambda: HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=depth,
            num_single_layers=depth,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=12,
            pooled_projection_dim=10,
            rope_axes_dim=(2, 2, 4),
        ),
    )


def flux2(depth: int = 2) -> Family:
    """FLUX.2, whose single blocks stay fused in diffusers."""
    from diffusers import Flux2Transformer2DModel

    h, shapes = HIDDEN, Shapes()
    shapes |= linear("img_in", h, 8, False) | linear("txt_in", h, 12, False)
    shapes |= linear("final_layer.linear", 8, h, False)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * h, h, False)
    for name in ("time_in", "guidance_in"):
        shapes |= linear(f"{name}.in_layer", h, 256, False) | linear(f"{name}.out_layer", h, h, False)
    for name, size in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        shapes |= linear(f"{name}.lin", size * h, h, False)
    shapes |= linear("single_stream_modulation.lin", 3 * h, h, False)
    for i in range(depth):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= linear(f"{block}_attn.qkv", 3 * h, h, False) | linear(f"{block}_attn.proj", h, h, False)
            shapes |= linear(f"{block}_mlp.0", 6 * h, h, False) | linear(f"{block}_mlp.2", h, 3 * h, False)
            shapes |= {f"{block}_attn.norm.{x}_norm.scale": (8,) for x in ("query", "key")}
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.linear1", 9 * h, h, False) | linear(f"{block}.linear2", h, 4 * h, False)
        shapes |= {f"{block}.norm.{x}_norm.scale": (8,) for x in ("query", "key")}
    return Family(
        "flux2",
        shapes,
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
        lambda: Flux2Transformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=depth,
            num_single_layers=depth,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            timestep_guidance_channels=256,
            mlp_ratio=3.0,
            axes_dims_rope=(2, 2, 2, 2),
        ),
    )


def unet(kind: str) -> Family:
    """A UNet in Stability's sgm names, with the block structure of a published model."""
    from diffusers import UNet2DConditionModel

    config = UNETS[kind]
    with torch.device("meta"):
        shapes = {name: tuple(v.shape) for name, v in UNet2DConditionModel(**config).state_dict().items()}

    def convert(state: State) -> State:
        prefixed = {f"{single_file_utils.LDM_UNET_KEY}{name}": values for name, values in state.items()}
        return single_file_utils.convert_ldm_unet_checkpoint(prefixed, dict(defaults, **config))

    defaults = {"class_embed_type": None, "addition_embed_type": None, "num_class_embeds": None}
    # The conversion moves values as they are: asked with names in place of values it tells the names.
    names = convert({name: name for name in sgm_names(config)})
    assert {name for name, value in names.items() if value is not None} >= set(shapes)
    originals = {original: shapes[name] for name, original in names.items() if name in shapes}
    return Family(f"unet-{kind}", originals, convert, lambda: UNet2DConditionModel(**config))


def sgm_names(config: dict) -> Iterator[str]:
    """Yield the parameter names that sgm's ``openaimodel.UNetModel`` makes when built, and some more."""
    yield from (
        f"{name}.{leaf}" for name in ("time_embed.0", "time_embed.2", "out.0", "out.2") for leaf in LEAVES
    )
    yield from (
        f"{name}.{leaf}" for name in ("label_emb.0.0", "label_emb.0.2", "input_blocks.0.0") for leaf in LEAVES
    )
    kinds, depth = config["down_block_types"], config["layers_per_block"]
    layers = config.get("transformer_layers_per_block", 1)
    layers = [layers] * len(kinds) if isinstance(layers, int) else list(layers)
    index = 1
    for level, kind in enumerate(kinds):
        for _ in range(depth):
            yield from _resnet(f"input_blocks.{index}.0")
            if "Attn" in kind:
                yield from _transformer(f"input_blocks.{index}.1", layers[level])
            index += 1
        if level < len(kinds) - 1:
            yield from (f"input_blocks.{index}.0.op.{leaf}" for leaf in LEAVES)
            index += 1
    yield from _resnet("middle_block.0")
    yield from _transformer("middle_block.1", layers[-1])
    yield from _resnet("middle_block.2")
    index = 0
    for level, kind in reversed(list(enumerate(kinds))):
        for layer in range(depth + 1):
            yield from _resnet(f"output_blocks.{index}.0")
            if "Attn" in kind:
                yield from _transformer(f"output_blocks.{index}.1", layers[level])
            if level and layer == depth:
                place = 2 if "Attn" in kind else 1
                yield from (f"output_blocks.{index}.{place}.conv.{leaf}" for leaf in LEAVES)
            index += 1


LEAVES = ("weight", "bias")


def _resnet(name: str) -> Iterator[str]:
    parts = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    yield from (f"{name}.{part}.{leaf}" for part in parts for leaf in LEAVES)


def _transformer(name: str, layers: int) -> Iterator[str]:
    yield from (f"{name}.{part}.{leaf}" for part in ("norm", "proj_in", "proj_out") for leaf in LEAVES)
    attention = [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    for layer in range(layers):
        for part in (*attention, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"):
            yield from (f"{name}.transformer_blocks.{layer}.{part}.{leaf}" for leaf in LEAVES)


def _unet(down: str, **more: object) -> dict:
    """``D`` is a block without attention, ``A`` one with it."""
    names = {"D": "DownBlock2D", "A": "CrossAttnDownBlock2D"}
    up = {"D": "UpBlock2D", "A": "CrossAttnUpBlock2D"}
    common = {
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 24, 24)[: len(down)],
        "down_block_types": tuple(names[kind] for kind in down),
        "up_block_types": tuple(up[kind] for kind in reversed(down)),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "sample_size": 8,
    }
    return {**common, **more}


_ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
    "use_linear_projection": True,
}
UNETS = {
    "sd15": _unet("AAAD"),
    "sd2": _unet("AAAD", use_linear_projection=True),
    "sdxl": _unet("DAA", transformer_layers_per_block=(1, 2, 3), **_ADDED),
    "refiner": _unet("DAAD", transformer_layers_per_block=2, **_ADDED),
    "sdxl-small": _unet("DA", transformer_layers_per_block=(1, 2), layers_per_block=1, **_ADDED),
    "one-layer": _unet("DAA", layers_per_block=1),
    "three-layers": _unet("AD", layers_per_block=3),
}
