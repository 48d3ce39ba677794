"""Translate Lightricks' names of LTX-Video and LTX-2 to diffusers' LTX transformers.

Source: diffusers ``loaders/single_file_utils.py``, ``convert_ltx_transformer_checkpoint_to_diffusers``, and
``loaders/lora_conversion_utils.py``, ``_convert_non_diffusers_ltx2_lora_to_diffusers``. Blocks have the same
names in both.
"""

from __future__ import annotations

from lora_export.formats.schemes.rules import TableScheme

# Modules that compute a norm's shifts and scales from the time step, or from the prompt.
_ADAPTIVE = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_INSIDE = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")

SCHEME = TableScheme(
    name="Lightricks' LTX",
    table={
        "patchify_proj": "proj_in",
        "audio_patchify_proj": "audio_proj_in",
        **{f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in _ADAPTIVE.items() for leaf in _INSIDE},
    },
    mark=r"(?:audio_)?patchify_proj$|(?:\w+_)?adaln_single_(?:emb_timestep|linear$)",
    anchors=(("proj_in",), ("time_embed.linear",)),
)
