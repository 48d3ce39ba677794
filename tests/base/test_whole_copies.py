"""Whole copies of parameters in adapters: which can be blended, and which would overwrite, against PEFT."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_export import (
    Adapter,
    AdapterError,
    AdapterSession,
    bank_onnx,
    merge_checkpoint,
    merge_onnx,
    swap_onnx,
)
from lora_export.base.ties.copies import untrained_note

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 30, "max_position_embeddings": 32, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.arange(2, 12)[None]
# Class, the LoRA's target, what modules_to_save trains, further settings.
MODELS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "olmo2": ("Olmo2ForCausalLM", "q_proj", "lm_head", {"num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", "dense_h_to_4h", "lm_head", {}),
    "electra": (
        "ElectraForSequenceClassification", "query", "classifier", {"embedding_size": 16, "num_labels": 3}
    ),
}  # fmt: skip
CAUSAL = [name for name in MODELS if name != "electra"]


def built(name: str) -> Any:
    cls, _, _, more = MODELS[name]
    config = getattr(transformers, cls.split("For")[0] + "Config")(**SIZES, **more)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval()
    model.set_attn_implementation("eager")
    return model


def trained(base: Path, name: str, folder: Path, seed: int, **config: Any) -> Path:
    """Save an adapter whose own tensors are random; PEFT adds the copies that it adds."""
    config = {"target_modules": [MODELS[name][1]], **config}
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(loaded(base, name), LoraConfig(r=2, lora_alpha=4, **config))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) * (0.3 if "lora" in key else 0.1)
        model.save_pretrained(folder)
    return folder


def loaded(folder: Path, name: str) -> Any:
    with tiny.quiet():
        model = getattr(transformers, MODELS[name][0]).from_pretrained(folder).eval()
    model.set_attn_implementation("eager")
    return model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.numpy()


def graph_of(base: Path, name: str, path: Path) -> Path:
    feeds = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    feeds |= {"use_cache": False} if name in CAUSAL else {}
    with tiny.quiet(), torch.no_grad():
        torch.onnx.export(
            loaded(base, name),
            (),
            str(path),
            kwargs=feeds,
            dynamo=True,
            verbose=False,
            output_names=["logits"],
        )
    return path


def ran(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path))
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    feeds = {port.name: given[port.name] for port in session.get_inputs()}
    return np.asarray(session.run(["logits"], feeds)[0])


Merged = Callable[..., np.ndarray]


@pytest.fixture(params=["merge", "merge-onnx"])
def merged(request: Any, tmp_path: Path) -> Merged:
    """Return what merges adapters into a base by one of the verbs and runs the result."""

    def run(base: Path, name: str, adapters: list[Path], weights: list[float] | None = None) -> np.ndarray:
        out = tmp_path / "out"
        if request.param == "merge":
            merge_checkpoint(base, adapters, out, weights=weights, force=True)
            return logits(loaded(out, name))
        graph = tmp_path / "base.onnx"
        if not graph.exists():
            graph_of(base, name, graph)
        merge_onnx(graph, adapters, out / "m.onnx", weights=weights, checkpoint=False, force=True)
        return ran(out / "m.onnx")

    return run


def saved(name: str, folder: Path) -> Path:
    with tiny.quiet():
        built(name).save_pretrained(folder)
    return folder


def by_peft(base: Path, name: str, adapters: list[Path], weights: list[float]) -> np.ndarray:
    """Return what PEFT's own blend computes."""
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(loaded(base, name), adapters[0], adapter_name="a0")
        for number, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, adapter_name=f"a{number}")
        names = [f"a{number}" for number in range(len(adapters))]
        model.add_weighted_adapter(names, weights, "all", combination_type="cat")
        model.set_adapter("all")
    return logits(model)


def one_by_one(base: Path, name: str, adapters: list[Path]) -> np.ndarray:
    """Return what PEFT computes when it merges one adapter after the other."""
    model = loaded(base, name)
    with tiny.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return logits(model)


def swap(base: Path, adapter: Path, out: Path) -> None:
    swap_onnx(base, out, adapter=adapter)


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return float(np.abs(got - wanted).max()) < 1e-5 * float(np.abs(wanted).max() + 1)


# --- blends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3]])
@pytest.mark.parametrize("name", CAUSAL)
def test_untrained_copies_of_both_are_the_bases_own(
    name: str, weights: list[float], merged: Merged, tmp_path: Path
) -> None:
    """LoRA on the head makes PEFT store embedding and head of both: the values of the base."""
    base = saved(name, tmp_path / "base")
    targets = {"target_modules": [MODELS[name][1], MODELS[name][2]]}
    adapters = [trained(base, name, tmp_path / f"a{n}", n, **targets) for n in (1, 2)]
    assert close(merged(base, name, adapters, weights), by_peft(base, name, adapters, weights))


@pytest.mark.parametrize("name", MODELS)
def test_two_trained_copies_are_refused_as_by_peft(name: str, merged: Merged, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    more = {"modules_to_save": [MODELS[name][2]]}
    adapters = [trained(base, name, tmp_path / f"a{n}", n, **more) for n in (1, 2)]
    with pytest.raises(ValueError, match="modules_to_save"):
        by_peft(base, name, adapters, [1.0, 1.0])
    with pytest.raises(AdapterError) as refused:
        merged(base, name, adapters)
    assert any("'a1' and 'a2' each hold a whole copy" in problem for problem in refused.value.problems)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("first", [True, False], ids=["copy first", "copy last"])
@pytest.mark.parametrize("name", MODELS)
def test_one_trained_copy_beside_plain_lora(name: str, first: bool, merged: Merged, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    copy = trained(base, name, tmp_path / "copy", 1, modules_to_save=[MODELS[name][2]])
    plain = trained(base, name, tmp_path / "plain", 2)
    adapters = [copy, plain] if first else [plain, copy]
    assert close(merged(base, name, adapters), one_by_one(base, name, adapters))
    with pytest.raises(AdapterError) as refused:
        merged(base, name, adapters, [0.5, 0.5])
    assert any("with weight 1 only, not 0.5" in problem for problem in refused.value.problems)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_change_of_what_another_replaces_is_refused(name: str, merged: Merged, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    head = MODELS[name][2]
    copy = trained(base, name, tmp_path / "copy", 1, modules_to_save=[head])
    lora = trained(base, name, tmp_path / "lora", 2, target_modules=[head])
    for adapters in ([copy, lora], [lora, copy]):
        with pytest.raises(AdapterError) as refused:
            merged(base, name, adapters)
        assert any("'copy' replaces it" in p and "'lora'" in p for p in refused.value.problems)


def test_two_adapters_of_one_name_are_two(merged: Merged, tmp_path: Path) -> None:
    base = saved("olmo2", tmp_path / "base")
    copy = trained(base, "olmo2", tmp_path / "one" / "adapter", 1, modules_to_save=["lm_head"])
    lora = trained(base, "olmo2", tmp_path / "two" / "adapter", 2, target_modules=["lm_head"])
    with pytest.raises(AdapterError) as refused:
        merged(base, "olmo2", [copy, lora])
    assert "was trained to change another one" in refused.value.problems[0]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 0.75]])
@pytest.mark.parametrize("name", CAUSAL)
def test_equal_copies_of_all_are_one(name: str, weights: list[float], merged: Merged, tmp_path: Path) -> None:
    """Both were trained on the base with another head, which both store: the head is no matter of weights."""
    base, head = saved(name, tmp_path / "base"), MODELS[name][2]
    other = loaded(base, name)
    torch.manual_seed(9)
    with torch.no_grad():
        getattr(other, head).weight += torch.randn(30, 16) * 0.1
    with tiny.quiet():
        other.save_pretrained(tmp_path / "other")
    targets = {"target_modules": [MODELS[name][1], head]}
    adapters = [trained(tmp_path / "other", name, tmp_path / f"a{n}", n, **targets) for n in (1, 2)]
    wanted = by_peft(tmp_path / "other", name, adapters, weights)
    assert close(merged(base, name, adapters, weights), wanted)


# --- one after the other ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_a_copy_over_what_an_earlier_merge_changed_is_refused(name: str, tmp_path: Path) -> None:
    """The second adapter's copy of the original head would undo the first's."""
    base, head = saved(name, tmp_path / "base"), MODELS[name][2]
    first = trained(base, name, tmp_path / "first", 1, modules_to_save=[head])
    second = trained(base, name, tmp_path / "second", 2, target_modules=[MODELS[name][1], head])
    merge_checkpoint(base, [first], tmp_path / "merged")
    with pytest.raises(AdapterError, match="would undo an earlier merge") as refused:
        merge_checkpoint(tmp_path / "merged", [second], tmp_path / "out")
    assert any(f"{head}.weight" in p and "'first'" in p for p in refused.value.problems)
    for verb in (merge_onnx, swap):
        with pytest.raises(AdapterError, match="would undo an earlier merge"):
            verb(tmp_path / "merged", second, tmp_path / "captured.onnx")
        with pytest.raises(AdapterError, match="merged into it already"):
            verb(tmp_path / "merged", first, tmp_path / "captured.onnx")
    graph = graph_of(base, name, tmp_path / "base.onnx")
    merge_onnx(graph, [first], tmp_path / "merged.onnx", checkpoint=base)
    with pytest.raises(AdapterError, match="would undo an earlier merge"):
        merge_onnx(tmp_path / "merged.onnx", [second], tmp_path / "out.onnx", checkpoint=False)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_was_merged_before_the_last_merge_is_known(name: str, tmp_path: Path) -> None:
    base, head = saved(name, tmp_path / "base"), MODELS[name][2]
    first = trained(base, name, tmp_path / "first", 1, modules_to_save=[head])
    second = trained(base, name, tmp_path / "second", 2)
    third = trained(base, name, tmp_path / "third", 3, modules_to_save=[head])
    merge_checkpoint(base, [first], tmp_path / "one")
    merge_checkpoint(tmp_path / "one", [second], tmp_path / "two")
    with pytest.raises(AdapterError, match="would undo an earlier merge") as refused:
        merge_checkpoint(tmp_path / "two", [third], tmp_path / "three")
    assert "'first'" in refused.value.problems[0]
    with pytest.raises(AdapterError, match="merged into it already"):
        merge_checkpoint(tmp_path / "two", [first], tmp_path / "three")
    merge_onnx(graph_of(base, name, tmp_path / "zero.onnx"), [first], tmp_path / "one.onnx", checkpoint=base)
    merge_onnx(tmp_path / "one.onnx", [second], tmp_path / "two.onnx", checkpoint=False)
    with pytest.raises(AdapterError, match="would undo an earlier merge"):
        merge_onnx(tmp_path / "two.onnx", [third], tmp_path / "three.onnx", checkpoint=False)


@pytest.mark.parametrize("whole", [False, True], ids=["stored", "trained"])
@pytest.mark.parametrize("name", CAUSAL)
def test_what_was_trained_on_the_merged_base_is_taken(name: str, whole: bool, tmp_path: Path) -> None:
    """PEFT's copy of the merged head changes nothing; a head trained further replaces it."""
    base, head = saved(name, tmp_path / "base"), MODELS[name][2]
    first = trained(base, name, tmp_path / "first", 1, modules_to_save=[head])
    merge_checkpoint(base, [first], tmp_path / "merged")
    more = {"modules_to_save": [head]} if whole else {"target_modules": [MODELS[name][1], head]}
    second = trained(tmp_path / "merged", name, tmp_path / "second", 2, **more)
    merge_checkpoint(tmp_path / "merged", [second], tmp_path / "out")
    wanted = one_by_one(tmp_path / "merged", name, [second])
    assert close(logits(loaded(tmp_path / "out", name)), wanted)
    # Elsewhere, a trained head can't be told from one of the original base.
    shutil.copytree(tmp_path / "merged", tmp_path / "moved")
    if whole:
        with pytest.raises(AdapterError, match="would undo an earlier merge") as refused:
            merge_checkpoint(tmp_path / "moved", [second], tmp_path / "none")
        assert "remove lora.json" in refused.value.hint
        (tmp_path / "moved" / "lora.json").unlink()
    merge_checkpoint(tmp_path / "moved", [second], tmp_path / "again")
    assert close(logits(loaded(tmp_path / "again", name)), wanted)


@pytest.mark.parametrize("name", CAUSAL)
def test_an_untrained_copy_that_differs_from_the_base_is_said(name: str, tmp_path: Path) -> None:
    """Of a base that was trained elsewhere no manifest tells; PEFT replaces its head, and says nothing."""
    base, head = saved(name, tmp_path / "base"), MODELS[name][2]
    given = trained(base, name, tmp_path / "given", 2, target_modules=[MODELS[name][1], head])
    other = loaded(base, name)
    with torch.no_grad():
        getattr(other, head).weight[3:5] += 0.5
    with tiny.quiet():
        other.save_pretrained(tmp_path / "other")
    report = merge_checkpoint(tmp_path / "other", [given], tmp_path / "out")
    warning, trained_on = report.plan.warnings
    assert f"'given' names {base} as its base" in trained_on
    assert "'given' stores a copy" in warning
    assert "2 of 30 rows differ" in warning
    assert close(logits(loaded(tmp_path / "out", name)), one_by_one(tmp_path / "other", name, [given]))
    graph = graph_of(tmp_path / "other", name, tmp_path / "other.onnx")
    report = merge_onnx(graph, [given], tmp_path / "out.onnx", checkpoint=tmp_path / "other")
    assert any("2 of 30 rows differ" in warning for warning in report.plan.warnings)
    assert close(ran(tmp_path / "out.onnx"), one_by_one(tmp_path / "other", name, [given]))
    assert not merge_checkpoint(base, [given], tmp_path / "same").plan.warnings


# --- verbs that keep adapters apart -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["electra", "gpt_neox"])
def test_each_slot_of_a_bank_has_its_own_head(name: str, tmp_path: Path) -> None:
    """Nothing is blended in a bank: two heads stay two."""
    base = saved(name, tmp_path / "base")
    heads = {"modules_to_save": [MODELS[name][2]]}
    adapters = {f"a{n}": trained(base, name, tmp_path / f"a{n}", n, **heads) for n in (1, 2)}
    graph = graph_of(base, name, tmp_path / "base.onnx")
    bank_onnx(graph, adapters, tmp_path / "bank.onnx", checkpoint=base)
    session = AdapterSession(tmp_path / "bank.onnx")
    given = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
    names = {value.name for value in ir.load(tmp_path / "bank.onnx").graph.inputs}
    feeds = {name: values for name, values in given.items() if name in names}
    for slot, adapter in adapters.items():
        got = session.run(feeds, adapters=[slot])["logits"]
        assert close(got, one_by_one(base, name, [adapter]))


# --- single rows, and DoRA, over an earlier merge -----------------------------------------------------------

EMBEDDINGS = {"olmo2": "embed_tokens", "gpt_neox": "embed_in"}


@pytest.mark.parametrize("how", ["whole", "rows", "LoRA"])
@pytest.mark.parametrize("name", CAUSAL)
def test_rows_over_what_an_earlier_merge_changed_are_refused(name: str, how: str, tmp_path: Path) -> None:
    base, table = saved(name, tmp_path / "base"), EMBEDDINGS[name]
    rows = {"trainable_token_indices": {table: [3, 6]}}
    earlier: dict[str, Any] = {
        "whole": {"modules_to_save": [table]},
        "rows": rows,
        "LoRA": {"target_modules": [MODELS[name][1], table]},
    }[how]
    first = trained(base, name, tmp_path / "first", 1, **earlier)
    second = trained(base, name, tmp_path / "second", 2, **rows)
    merge_checkpoint(base, [first], tmp_path / "merged")
    with pytest.raises(AdapterError, match="would undo an earlier merge") as refused:
        merge_checkpoint(tmp_path / "merged", [second], tmp_path / "out")
    assert any("2 single rows" in line and "'first'" in line for line in refused.value.problems)
    with pytest.raises(AdapterError, match="would undo an earlier merge"):
        merge_onnx(tmp_path / "merged", second, tmp_path / "captured.onnx")
    # Of the merged base, or where nothing was changed there, they are what they say.
    third = trained(tmp_path / "merged", name, tmp_path / "third", 3, **rows)
    merge_checkpoint(tmp_path / "merged", [third], tmp_path / "further")
    assert close(logits(loaded(tmp_path / "further", name)), one_by_one(tmp_path / "merged", name, [third]))
    plain = trained(base, name, tmp_path / "plain", 4)
    merge_checkpoint(base, [plain], tmp_path / "other")
    merge_checkpoint(tmp_path / "other", [second], tmp_path / "both")
    assert close(logits(loaded(tmp_path / "both", name)), one_by_one(base, name, [plain, second]))


@pytest.mark.parametrize("name", MODELS)
def test_dora_over_what_an_earlier_merge_changed_is_refused(name: str, tmp_path: Path) -> None:
    """As in one go: its magnitude is of the weight without the other's change."""
    base = saved(name, tmp_path / "base")
    plain = trained(base, name, tmp_path / "plain", 1)
    dora = trained(base, name, tmp_path / "dora", 2, use_dora=True)
    with pytest.raises(AdapterError, match="can't be merged so"):
        merge_checkpoint(base, [plain, dora], tmp_path / "out")
    merge_checkpoint(base, [plain], tmp_path / "merged")
    for verb in (merge_checkpoint, merge_onnx):
        with pytest.raises(AdapterError, match="would undo an earlier merge") as refused:
            verb(tmp_path / "merged", dora, tmp_path / "out.onnx")
        assert any("is DoRA" in line and "'plain'" in line for line in refused.value.problems)
    further = trained(tmp_path / "merged", name, tmp_path / "further", 3, use_dora=True)
    merge_checkpoint(tmp_path / "merged", [further], tmp_path / "out")
    assert close(logits(loaded(tmp_path / "out", name)), one_by_one(tmp_path / "merged", name, [further]))


def test_a_copy_of_a_layer_is_not_blamed_on_an_embedding():
    """A file of a whole model holds every weight; PEFT's save_embedding_layers is about embeddings alone."""
    copy, stored = np.ones((4, 3), np.float32), np.zeros((4, 3), np.float32)
    for key, blamed in (("model.layers.0.mlp.up_proj.weight", False), ("model.embed_tokens.weight", True)):
        given = Adapter("a", "a", "peft", {}, extras={key: copy}, config={"modules_to_save": None})
        note = untrained_note(given, key, copy, stored)
        assert "4 of 4 rows differ" in note
        assert ("save_embedding_layers" in note) == blamed
