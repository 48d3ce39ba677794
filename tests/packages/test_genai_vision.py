"""onnxruntime-genai runs the three graphs of a vision–language model, and gives PyTorch's scores.

It has no processor's help here: pixels and ids are given as they are, for one row, as it takes no more.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
import vision_models as models

og = pytest.importorskip("onnxruntime_genai")

TOLERANCE = 1e-5
# genai has no type for LLaVA; it runs one image of a size of its own as Phi-3's.
TYPES = {"llava": "phi3v", "gemma3": "gemma3"}

pytestmark = [pytest.mark.slow, pytest.mark.proven]


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.xdist_group(f"vision-{arch}")) for arch in TYPES]
)
def test_it_generates_what_pytorch_does(arch, tmp_path):
    shutil.copytree(models.captured(arch), tmp_path / "m")
    (tmp_path / "m" / "genai_config.json").write_text(json.dumps(config(arch, tmp_path / "m")))
    given = {name: values[:1] for name, values in models.inputs(arch).items()}
    model = models.build(arch)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, max_new_tokens=models.NEW)
    with tiny.quiet(), torch.no_grad():
        wanted = model.generate(**given, output_logits=True, return_dict_in_generate=True)
    count = given["input_ids"].shape[1]
    tokens, logits = by_genai(tmp_path / "m", given)
    assert tokens == wanted.sequences[0, count:].tolist()
    assert tiny.relative_error(logits, torch.cat(wanted.logits).numpy()) < TOLERANCE


def by_genai(folder: Path, given: dict[str, torch.Tensor]) -> tuple[list[int], Any]:
    """Return the tokens that genai chooses, and the scores that it chose them by."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=given["input_ids"].shape[1] + models.NEW, do_sample=False)
    generator, inputs = og.Generator(model, params), og.NamedTensors()
    inputs["input_ids"] = given["input_ids"].numpy().astype(np.int32)
    inputs["pixel_values"] = given["pixel_values"].numpy()
    inputs["num_image_tokens"] = np.array([models.EACH], np.int64)
    generator.set_inputs(inputs)
    tokens, logits = [], []
    while len(tokens) < models.NEW:
        logits.append(generator.get_logits().reshape(-1, generator.get_logits().shape[-1])[-1])
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, np.stack(logits)


def config(arch: str, folder: Path) -> dict[str, Any]:
    """Return the ``genai_config.json`` that a user writes, which the folder's own config says all of."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    heads = text["num_attention_heads"]
    cache = {
        f"{side}_{part}_names": f"{name}.%d.{part}"
        for side, name in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    past, present = (
        {key: value for key, value in cache.items() if key.startswith(side)} for side in ("past", "present")
    )
    decoder = {
        "filename": "text.onnx",
        "hidden_size": text["hidden_size"],
        "head_size": text.get("head_dim") or text["hidden_size"] // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": text["num_key_value_heads"],
        "num_hidden_layers": text["num_hidden_layers"],
        "inputs": past,
        "outputs": present,
        "session_options": {"provider_options": []},
    }
    tokens = {f"{name}_token_id": text[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": text["vocab_size"], "context_length": text["max_position_embeddings"]}
    parts = {"vision": {"filename": "vision.onnx"}, "embedding": {"filename": "embedding.onnx"}}
    return {
        "model": {"type": TYPES[arch], **tokens, **sizes, "decoder": decoder, **parts},
        "search": {"do_sample": False, "max_length": sizes["context_length"]},
    }
