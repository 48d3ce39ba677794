"""Tiny diffusion transformers in their original names, and all families together."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from diffusers.loaders import single_file_utils
from scheme_bases import HIDDEN, Family, Shapes, State
from scheme_unets import UNETS, unet


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


def chroma() -> Family:
    """Chroma: FLUX.1's blocks, with layers that make their modulation."""
    from diffusers import ChromaTransformer2DModel

    h, kept = (
        HIDDEN,
        ("_attn", "_mlp", "linear1", "linear2", ".norm.", "img_in", "txt_in", "final_layer.linear"),
    )
    shapes = {name: shape for name, shape in flux(1, 1).shapes.items() if any(part in name for part in kept)}
    shapes |= linear("distilled_guidance_layer.in_proj", h, 4) | linear(
        "distilled_guidance_layer.out_proj", h, h
    )
    for name in ("in_layer", "out_layer"):
        shapes |= linear(f"distilled_guidance_layer.layers.0.{name}", h, h)
    shapes |= {"distilled_guidance_layer.norms.0.scale": (h,)}
    convert = with_numbers(
        single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers,
        width=("inner_dim = 3072", f"inner_dim = {h}"),
    )
    return Family(
        "chroma",
        shapes,
        convert,
        lambda: ChromaTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            axes_dims_rope=(2, 2, 4),
            approximator_num_channels=4,
            approximator_hidden_dim=h,
            approximator_layers=1,
        ),
    )


BLOCKS = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")


def z_image() -> Family:
    """Z-Image with its attention fused."""
    from diffusers import ZImageTransformer2DModel

    h = HIDDEN
    shapes: Shapes = {"x_pad_token": (1, h), "cap_pad_token": (1, h), "cap_embedder.0.weight": (12,)}
    shapes |= linear("x_embedder", h, 16) | linear("cap_embedder.1", h, 12)
    shapes |= linear("t_embedder.mlp.0", 1024, 256) | linear("t_embedder.mlp.2", h, 1024)
    shapes |= linear("final_layer.linear", 16, h) | linear("final_layer.adaLN_modulation.1", h, h)
    for block in BLOCKS:
        shapes |= linear(f"{block}.attention.qkv", 3 * h, h, False) | linear(
            f"{block}.attention.out", h, h, False
        )
        shapes |= {f"{block}.attention.{x}_norm.weight": (8,) for x in "qk"}
        shapes |= {f"{block}.feed_forward.w{n}.weight": (h, 42) if n == 2 else (42, h) for n in (1, 2, 3)}
        shapes |= {f"{block}.{kind}_norm{n}.weight": (h,) for kind in ("attention", "ffn") for n in (1, 2)}
        if "context" not in block:
            shapes |= linear(f"{block}.adaLN_modulation.0", 4 * h, h)
    return Family(
        "z-image",
        shapes,
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=h,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=12,
            axes_dims=[2, 2, 4],
            axes_lens=[8, 8, 8],
        ),
    )


def lumina2() -> Family:
    """Lumina 2, with fewer keys and values than queries."""
    from diffusers import Lumina2Transformer2DModel

    h = 24
    shapes: Shapes = linear("x_embedder", h, 16) | linear("cap_embedder.1", h, 12)
    shapes |= {"cap_embedder.0.weight": (12,)}
    shapes |= linear("t_embedder.mlp.0", h, 256) | linear("t_embedder.mlp.2", h, h)
    shapes |= linear("final_layer.linear", 16, h) | linear("final_layer.adaLN_modulation.1", h, h)
    for block in BLOCKS:
        shapes |= linear(f"{block}.attention.qkv", h + 16, h, False) | linear(
            f"{block}.attention.out", h, h, False
        )
        shapes |= {f"{block}.attention.{x}_norm.weight": (8,) for x in "qk"}
        shapes |= {f"{block}.feed_forward.w{n}.weight": (h, 96) if n == 2 else (96, h) for n in (1, 2, 3)}
        shapes |= {f"{block}.{kind}_norm{n}.weight": (h,) for kind in ("attention", "ffn") for n in (1, 2)}
        if "context" not in block:
            shapes |= linear(f"{block}.adaLN_modulation.1", 4 * h, h)
    convert = with_numbers(
        single_file_utils.convert_lumina2_to_diffusers,
        query=("q_dim = 2304", f"q_dim = {h}"),
        groups=("k_dim = v_dim = 768", "k_dim = v_dim = 8"),
    )
    return Family(
        "lumina2",
        shapes,
        convert,
        lambda: Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=h,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(2, 2, 4),
            axes_lens=(8, 8, 8),
            cap_feat_dim=12,
        ),
    )


def ltx() -> Family:
    """LTX-Video: its blocks have the names that diffusers gives them."""
    from diffusers import LTXVideoTransformer3DModel

    def model() -> LTXVideoTransformer3DModel:
        return LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=12,
        )

    renamed = {
        "proj_in": "patchify_proj",
        "time_embed": "adaln_single",
        "norm_q": "q_norm",
        "norm_k": "k_norm",
    }
    shapes: Shapes = {}
    for name, values in model().state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        shapes[name] = tuple(values.shape)
    return Family("ltx", shapes, single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers, model)


FAMILIES: dict[str, Callable[[], Family]] = {
    "flux": flux,
    "flux-schnell": lambda: flux(guidance=False),
    "flux2": flux2,
    "chroma": chroma,
    "z-image": z_image,
    "lumina2": lumina2,
    "ltx": ltx,
    "sd3": sd3,
    "wan": wan,
    "hunyuan-video": hunyuan_video,
    **{f"unet-{kind}": (lambda kind=kind: unet(kind)) for kind in UNETS},
}
