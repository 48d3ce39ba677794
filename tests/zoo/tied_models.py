"""Models whose embedding and head are one weight, trained and read back."""

from __future__ import annotations

import tiny
import torch
import transformers

V, H = 40, 16


PLAIN = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2}


BART = {
    "vocab_size": V, "d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}  # fmt: skip


# Class → config, and what is targeted: input embedding, output head, a linear layer.
FAMILIES = {
    "Mamba2ForCausalLM": (
        {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 1, "state_size": 4, "head_dim": 8,
         "num_heads": 4, "n_groups": 1, "chunk_size": 4}, "backbone.embeddings", "lm_head", "in_proj"),
    "RwkvForCausalLM": (
        {"vocab_size": V, "hidden_size": H, "attention_hidden_size": H, "num_hidden_layers": 2},
        "rwkv.embeddings", "head", "receptance"),
    "XLNetLMHeadModel": (
        {"vocab_size": V, "d_model": H, "n_layer": 1, "n_head": 2, "d_inner": 24},
        "transformer.word_embedding", "lm_loss", "layer_1"),
    "CTRLLMHeadModel": (
        {"vocab_size": V, "n_positions": 32, "n_embd": H, "dff": 24, "n_layer": 1, "n_head": 2},
        "transformer.w", "lm_head", "Wq"),
    "FalconForCausalLM": (PLAIN, "transformer.word_embeddings", "lm_head", "query_key_value"),
    "BloomForCausalLM": (PLAIN, "transformer.word_embeddings", "lm_head", "query_key_value"),
    "GPTNeoXForCausalLM": (
        PLAIN | {"intermediate_size": 24}, "gpt_neox.embed_in", "lm_head", "query_key_value"),
    "OPTForCausalLM": (
        PLAIN | {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": H},
        "model.decoder.embed_tokens", "lm_head", "q_proj"),
    "BertForMaskedLM": (
        PLAIN | {"intermediate_size": 24},
        "bert.embeddings.word_embeddings", "cls.predictions.decoder", "query"),
    "RobertaForMaskedLM": (
        PLAIN | {"intermediate_size": 24, "max_position_embeddings": 40},
        "roberta.embeddings.word_embeddings", "lm_head.decoder", "query"),
    "BartForConditionalGeneration": (BART, "model.encoder.embed_tokens", "lm_head", "q_proj"),
    "MarianMTModel": (BART, "model.decoder.embed_tokens", "lm_head", "q_proj"),
}  # fmt: skip


def config_of(kind, options):
    return getattr(transformers, kind).config_class(**options, tie_word_embeddings=True)


def gemma3():
    text = PLAIN | {
        "intermediate_size": 24,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    vision = {
        "hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def inputs_of(model):
    ids = torch.arange(10)[None] + 3
    extra = {"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **extra}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def base_of(kind, config, folder):
    torch.manual_seed(0)
    with tiny.quiet():
        model = getattr(transformers, kind)(config).eval()
        model.save_pretrained(folder)
    return model


def reloaded(kind, folder, model):
    with tiny.quiet():
        merged, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return logits(merged.eval(), inputs_of(model))
