"""A config can't make transformers build more than the weights are for, whatever its keys are called."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import peaks
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lora_export.base.capture.loading import load_model
from lora_export.base.capture.twin import save_twin
from lora_export.base.checkpoint.checkpoint import Checkpoint
from lora_export.base.checkpoint.layer_counts import refuse_large_numbers, refuse_many_layers
from lora_export.base.checkpoint.meta_model import build_model
from lora_export.base.checkpoint.module_counts import few_modules
from lora_export.errors import CheckpointError

MANY = 100_000
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
# Each has modules whose number stands under a key of its own.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "feed-forward networks": (
        "MobileBert",
        {**SMALL, "vocab_size": 32, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8},
        {"num_feedforward_networks": MANY},
    ),
    "hash functions": (
        "Canine",
        {**SMALL, "num_hash_buckets": 16, "num_hash_functions": 1},
        {"num_hash_functions": MANY},
    ),
    "stages": (
        "ResNet",
        {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8},
        {"hidden_sizes": [8] * 60_000, "depths": [1] * 60_000},
    ),
}


@pytest.fixture
def folder(request, tmp_path):
    name, small, change = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**small)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return path.parent


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_what_a_config_makes_is_counted(folder):
    with pytest.raises(CheckpointError, match=r"asks for a model of more than 16\d+ modules and tensors"):
        build_model(Checkpoint.open(folder))
    with pytest.raises(CheckpointError, match=r"asks for a model of more than 16\d+ modules and tensors"):
        load_model(folder, "float32")


@pytest.mark.parametrize("folder", ["hash functions"], indirect=True)
def test_what_a_twin_makes_is_counted(folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"asks for a model of more than 16\d+ modules and tensors"):
        save_twin(transformers.CanineModel, config, tmp_path / "twin", folder)


@pytest.mark.parametrize("folder", ["feed-forward networks"], indirect=True)
def test_a_merge_does_not_wait(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    path = "base_model.model.embeddings.embedding_transformation"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 24), f"{path}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embedding_transformation"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    words = ["--base", folder, "--adapter", tmp_path / "adapter"]
    runs = [["merge", *words, "-o", tmp_path / "m"], ["merge-onnx", *words, "-o", tmp_path / "m.onnx"]]
    merged, graph = peaks.measured([], runs)
    assert merged[0] == 0  # its names are those of the file: transformers need not be asked
    assert graph[0] == 1
    assert "asks for a model of more than" in graph[2]
    assert max(merged[4], graph[4]) < 60  # imports included; it was minutes


def test_other_threads_are_not_counted(tmp_path):
    done = []

    def build():
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(20_000))
        done.append(True)

    with few_modules(tmp_path):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(10_000))
        with pytest.raises(CheckpointError):
            torch.nn.ModuleList(torch.nn.Identity() for _ in range(10_000))
    assert done
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(20_000))


@pytest.mark.parametrize("points", [30_000_000, [10_000_000] * 3])
def test_numbers_that_are_none_of_modules(points):
    """DEIMv2 makes a list of so many numbers; 30 million of them took 3.4 GB."""
    config = transformers.AutoConfig.for_model("deimv2", decoder_n_points=points)
    with pytest.raises(CheckpointError, match="larger than in any model") as caught:
        refuse_large_numbers(Path("base"), config)
    assert caught.value.problems == ("decoder_n_points: 30000000, wanted at most 131072",)


def test_numbers_that_no_model_reads_are_not_looked_at():
    config = transformers.LlamaConfig.from_dict({"tokens_seen": 3 * 10**12, "best_loss": 10**9})
    assert config.best_loss == 10**9
    refuse_large_numbers(Path("base"), config)


def test_numbers_of_every_kind_of_model_pass():
    configs = [*map(_default, CONFIG_MAPPING)]
    for config in filter(None, configs):
        refuse_large_numbers(Path("base"), config)
        refuse_many_layers(Path("base"), config.to_dict())
    assert len(configs) > 300


def _default(kind: str) -> Any:
    try:
        return CONFIG_MAPPING[kind]()
    except Exception:  # a config of parts, which have no defaults, or one whose packages are missing
        return None


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("generation_config.json", '{"x": [' + "[]," * 5_000_000 + "[]]}", "has more than 524288 bytes"),
        ("generation_config.json", '{"x": [' + "[]," * 170_000 + "[]]}", None),
        ("generation_config.json", '{"a":' * 100 + "1" + "}" * 100, "nested deeper than 64 levels"),
        ("pytorch_model.bin.index.json", '{"x": [' + "[]," * 5_000_000 + "[]]}", "can't be read as JSON"),
    ],
)
def test_what_else_transformers_reads_of_a_folder(name, text, says, tmp_path):
    """15 MB took 1.1 GB and 36 s."""
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=32)
    for folder in ("good", "base"):
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / folder)
    (tmp_path / "base" / name).write_text(text)
    # Twice, because the first takes 20 MB that stay.
    ((code, _, said, peak, seconds),) = peaks.measured(
        [["capture-onnx", tmp_path / "good", "-o", tmp_path / f"{number}.onnx"] for number in range(2)],
        [["capture-onnx", tmp_path / "base", "-o", tmp_path / "m.onnx"]],
    )
    assert code == (1 if says else 0)
    assert (says or "writing the graph") in said
    assert peak < peaks.allowed(tmp_path / "base")
    assert seconds < 20


TABLES = {
    "marian": ("MarianConfig", {"d_model": 256}, "MarianMTModel"),
    "distilbert": ("DistilBertConfig", {"dim": 256, "sinusoidal_pos_embds": True}, "DistilBertModel"),
    "xlm": ("XLMConfig", {"emb_dim": 256, "sinusoidal_embeddings": True}, "XLMModel"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_is_not_made_for_a_few_weights(name, tmp_path):
    """Its values are numbers of Python: 60 bytes each, which no count of tensors sees."""
    config_name, sizes, kind = TABLES[name]
    config = getattr(transformers, config_name)(**sizes)
    config.architectures = [kind]
    config.max_position_embeddings = 20_000
    config.save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(16, 16)}, tmp_path / "model.safetensors")
    for build in (lambda: load_model(tmp_path, "float32"), lambda: build_model(Checkpoint.open(tmp_path))):
        with pytest.raises(CheckpointError, match="a table of 20000 positions of 256 values"):
            build()


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_are_made(name):
    config_name, _, _ = TABLES[name]
    refuse_large_numbers(Path(), getattr(transformers, config_name)())
