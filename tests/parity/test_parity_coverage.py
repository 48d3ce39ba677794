"""Rows of embeddings that the adapter changes: a wrong one fails, or the report says that none reads it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import broken_exports as broken
import numpy as np
import onnx
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.t5.modeling_t5 import T5Attention

from lora_export import capture_onnx, load_adapter, merge_onnx, swap_onnx
from lora_export.parity.check import check_parity
from lora_export.reports.parity.to_html import report_html
from lora_export.reports.parity.to_json import report_json
from lora_export.reports.parity.to_text import check_lines

SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = 48


@dataclass(frozen=True)
class Model:
    """A model with tables that are read by position or by type.

    Attributes:
        make: Returns it.
        targets: What its adapter changes.
        tables: Graph's constant → how many rows its lookups can read.
    """

    make: Callable[[], torch.nn.Module]
    targets: tuple[str, ...]
    tables: dict[str, int]


def _bert(**more: Any) -> torch.nn.Module:
    options = {"intermediate_size": 40, "max_position_embeddings": ROWS, "type_vocab_size": 5}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **options, **more))


def _roberta() -> torch.nn.Module:
    # Positions begin behind the one of padding: two rows less can be read.
    options = {"intermediate_size": 40, "max_position_embeddings": ROWS + 2, "type_vocab_size": 1}
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, **options))


def _gpt2() -> torch.nn.Module:
    sizes = {"vocab_size": 90, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": ROWS}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "bert": Model(
        _bert,
        ("query", "position_embeddings", "token_type_embeddings"),
        {
            "bert.embeddings.position_embeddings.weight": ROWS,
            "bert.embeddings.token_type_embeddings.weight": 5,
        },
    ),
    "gpt2": Model(_gpt2, ("c_attn", "wpe"), {"transformer.wpe.weight": ROWS}),
    "roberta": Model(
        _roberta,
        ("query", "position_embeddings"),
        {"roberta.embeddings.position_embeddings.weight": ROWS + 2},
    ),
}
POSITIONS = {
    "bert": "bert.embeddings.position_embeddings",
    "gpt2": "transformer.wpe",
    "roberta": "roberta.embeddings.position_embeddings",
}


@functools.cache
def checkpoint(name: str) -> Path:
    folder = tiny.cache_folder() / f"coverage-{name}"
    torch.manual_seed(0)
    with tiny.quiet():
        model = MODELS[name].make().eval()
        model.save_pretrained(folder / "base")
        capture_onnx(folder / "base", folder / "base.onnx")
        tuned = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=list(MODELS[name].targets))
        )
        with torch.no_grad():
            for path, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) * (0.3 if "_A" in path else 0.1))
        tuned.save_pretrained(folder / "adapter")
    return folder


@functools.cache
def export(name: str, mode: str) -> Path:
    folder = checkpoint(name)
    output = folder / f"{mode}.onnx"
    with tiny.quiet():
        if mode == "merged":
            merge_onnx(folder / "base.onnx", load_adapter(folder / "adapter"), output)
        else:
            swap_onnx(folder / "base.onnx", output, adapter=load_adapter(folder / "adapter"))
    return output


def check(name: str, candidate: Path, reference: Path | None = None, **options: Any) -> Any:
    adapters = {"a": load_adapter(checkpoint(name) / "adapter")}
    return check_parity(
        reference or checkpoint(name) / "base", candidate, adapters, localise=False, **options
    )


def zeroed(name: str, table: str, rows: list[int], folder: Path) -> Path:
    """Return the merged graph with rows of a table wrong."""

    def change(values: np.ndarray) -> np.ndarray:
        values[rows] = 0
        return values

    return broken.edited(
        export(name, "merged"), folder / "wrong.onnx", broken.changed_constant(table, change)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["merged", "swap"])
def test_a_good_export_passes_with_every_row_read_that_can_be(name, mode):
    report = check(name, export(name, mode))
    assert report.passed, report.failed
    notes = [note for note in report.notes if "does not show" in note and "token ids" not in note]
    if name == "roberta":
        (note,) = notes
        assert f"{ROWS + 1} of {ROWS + 2} rows of {POSITIONS[name]}" in note
        assert "(0)" in note  # the one of the padding token is read by the token itself
        assert "no longer input fits the model" in note
    else:
        assert not notes


WRONG = [
    *(("bert", "bert.embeddings.position_embeddings.weight", row) for row in (17, ROWS - 1)),
    *(("gpt2", "transformer.wpe.weight", row) for row in (17, ROWS - 1)),
    ("roberta", "roberta.embeddings.position_embeddings.weight", ROWS + 1),
    ("bert", "bert.embeddings.token_type_embeddings.weight", 4),
]


@pytest.mark.parametrize(("name", "table", "row"), WRONG)
def test_one_wrong_row_fails(name, table, row, tmp_path):
    wrong = zeroed(name, table, [row], tmp_path)
    assert not check(name, wrong).passed
    # Compared with a graph, no PyTorch is at hand.
    assert not check(name, wrong, export(name, "merged"), base=checkpoint(name) / "base.onnx").passed


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("reference", ["checkpoint", "graph"])
def test_rows_that_the_chosen_inputs_leave_out_are_said_everywhere(name, reference, tmp_path):
    wrong = zeroed(name, f"{POSITIONS[name]}.weight", list(range(9, ROWS)), tmp_path)
    given: dict[str, Any] = {}
    if reference == "graph":
        given = {"reference": export(name, "merged"), "base": checkpoint(name) / "base.onnx"}
    report = check(name, wrong, sequences=[4, 9], **given)
    assert report.passed
    said = f"9 of {ROWS} rows of {POSITIONS[name]}, which the adapter changes, are read by the inputs"
    assert any(said in note and f"(9–{ROWS - 1})" in note for note in report.notes)
    for text in ("\n".join(check_lines(report)), report_json(report), report_html(report)):
        assert said in " ".join(text.split())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_feeds_of_the_user_are_counted_without_their_padding(name, tmp_path):
    ids, mask = np.ones((2, 20), np.int64), np.ones((2, 20), np.int64)
    mask[:, 12:] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    if name == "gpt2":
        del values["token_type_ids"]
    np.savez(tmp_path / "feeds.npz", **values)
    report = check(name, export(name, "merged"), feeds=tmp_path / "feeds.npz")
    assert any(f"12 of {ROWS} rows of {POSITIONS[name]}" in note for note in report.notes), report.notes


def test_buckets_of_distances_need_inputs_longer_than_their_table(tmp_path):
    """T5's 32 buckets reach to 128 tokens; of both directions one is of no distance at all."""
    folder = tmp_path / "t5"
    sizes = {"vocab_size": 90, "d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 1, "num_heads": 2}
    more = {"use_cache": False, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    with tiny.quiet():
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **more)).eval()
        model.save_pretrained(folder / "base")
        capture_onnx(folder / "base", folder / "base.onnx")
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q", "relative_attention_bias"]))
        with torch.no_grad():
            for path, parameter in tuned.named_parameters():
                if "lora_" in path:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        tuned.save_pretrained(folder / "adapter")
        merge_onnx(folder / "base.onnx", load_adapter(folder / "adapter"), folder / "merged.onnx")
    adapters = {"a": load_adapter(folder / "adapter")}
    good = check_parity(folder / "base", folder / "merged.onnx", adapters, localise=False)
    assert good.passed
    distances = torch.arange(-1000, 1000)
    for side, bidirectional in (("encoder", True), ("decoder", False)):
        bucket = T5Attention._relative_position_bucket(distances, bidirectional=bidirectional)
        never = sorted({*range(32)} - {*bucket.tolist()})
        notes = [note for note in good.notes if f"{side}.block" in note]
        assert len(notes) == bool(never)
        assert all(f"{32 - len(never)} of 32 rows" in note and f"({never[0]})" in note for note in notes)


def _looked_up(graph: Path, rows: int) -> list[str]:
    """Return the constants of so many rows that a Gather reads."""
    model = onnx.load(graph)
    tables = {tensor.name for tensor in model.graph.initializer if tensor.dims[:1] == [rows]}
    return [
        node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables
    ]


@pytest.mark.parametrize(("name", "table"), [("bert", "word_embeddings"), ("gpt2", "wte")])
def test_a_small_vocabulary_is_read_to_its_last_row(name, table, tmp_path):
    """Two samples read few of the ids; one input more reads the others."""
    folder = tmp_path / name
    with tiny.quiet():
        model = transformers.AutoModel.from_pretrained(checkpoint(name) / "base")
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=[table, MODELS[name].targets[0]]))
        torch.manual_seed(1)
        with torch.no_grad():
            for path, parameter in tuned.named_parameters():
                if "lora_" in path:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        tuned.save_pretrained(folder)
        merged = folder / "merged.onnx"
        merge_onnx(checkpoint(name) / "base.onnx", load_adapter(folder), merged)
    adapters = {"a": load_adapter(folder)}
    good = check_parity(checkpoint(name) / "base", merged, adapters, samples=2, localise=False)
    assert good.passed
    assert not [note for note in good.notes if "does not show" in note], good.notes
    (constant,) = _looked_up(merged, 90)

    def change(values: np.ndarray) -> np.ndarray:
        values[77] = 0
        return values

    wrong = broken.edited(merged, folder / "wrong.onnx", broken.changed_constant(constant, change))
    assert not check_parity(checkpoint(name) / "base", wrong, adapters, samples=2, localise=False).passed
