"""Further modules of a sentence-transformers model that were trained beside an adapter are not lost."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lora_export.base.checkpoint import sentence_modules
from lora_export.cli import _run

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import modules  # noqa: E402

TEXTS = ["w1 w5 w9", "w3 w3 w20 w8", "w7"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 24,
}


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES)), ["query", "value"]


def mpnet():
    return transformers.MPNetModel(transformers.MPNetConfig(**SIZES)), ["q", "v"]


@pytest.fixture(params=[bert, mpnet])
def trained(request, tmp_path):
    """Save a model and the folder of an adapter that was trained in it; return both and a way to train."""
    torch.manual_seed(0)
    model, targets = request.param()
    model.save_pretrained(tmp_path / "hf")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(35))]
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    parts = [
        modules.Transformer(str(tmp_path / "hf")),
        modules.Pooling(16, pooling_mode="cls"),
        modules.Dense(16, 8),
    ]
    st.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "base"))

    def train(dense):
        """Train an adapter, and the Dense module or not; return what the model then computes."""
        whole = st.SentenceTransformer(str(tmp_path / "base"), device="cpu")
        whole.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets))
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if "lora_" in name or (dense and name.startswith("2.")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        whole.save(str(tmp_path / "adapter"))
        return whole.eval().encode(TEXTS)

    return tmp_path, train


def merge(path, base, *more):
    command = ["merge", "--base", path / base, "--adapter", path / "adapter", "-o", path / "out", *more]
    return _run([str(word) for word in command], False)


def check(path, expected):
    found = st.SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("base", ["base", "hf"])
def test_trained_modules_are_taken_along_as_the_hint_says(trained, base, capsys):
    path, train = trained
    expected = train(dense=True)
    assert merge(path, base) == 1
    error = capsys.readouterr().err
    copied = ["2_Dense", "modules.json"] + ["1_Pooling"] * (base == "hf")
    assert all(str(path / "adapter" / name) in error for name in copied)
    assert merge(path, base, "--allow-unmatched") == 0
    assert "2_Dense" in "".join(capsys.readouterr())
    shutil.rmtree(path / "out")
    shutil.copytree(path / base, path / "copy")
    for name in copied:
        source = path / "adapter" / name
        if source.is_dir():
            shutil.copytree(source, path / "copy" / name, dirs_exist_ok=True)
        else:
            shutil.copy(source, path / "copy" / name)
    assert merge(path, "copy") == 0
    check(path / "out", expected)


def test_equal_modules_are_no_fault(trained, capsys):
    """Whoever saved them, and whatever version wrote the settings."""
    path, train = trained
    expected = train(dense=False)
    assert merge(path, "base") == 0
    check(path / "out", expected)
    old = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (path / "base" / "1_Pooling" / "config.json").write_text(json.dumps(old))
    dense = path / "base" / "2_Dense" / "model.safetensors"
    values = {name: value.clone() for name, value in load_file(dense).items()}
    save_file(values, dense, metadata={"format": "pt", "by": "another"})
    assert merge(path, "base", "--force") == 0, capsys.readouterr().err
    check(path / "out", expected)


def test_another_pooling_is_one(trained, capsys):
    path, train = trained
    train(dense=False)
    settings = path / "base" / "1_Pooling" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pooling_mode": "mean"}))
    assert merge(path, "base") == 1
    assert "its settings are not those of" in capsys.readouterr().err


def test_modules_saved_as_pickles_are_copied(trained):
    path, train = trained
    expected = train(dense=True)
    for folder in ("base", "adapter"):
        dense = path / folder / "2_Dense"
        model = st.SentenceTransformer(str(path / "adapter"), device="cpu")
        torch.save(model[2].state_dict(), dense / "pytorch_model.bin")
        (dense / "model.safetensors").unlink()
    assert merge(path, "base") == 0
    assert (path / "out" / "2_Dense" / "pytorch_model.bin").exists()
    check(path / "out", expected)


def test_the_older_layout_names_its_folder(trained, capsys):
    path, train = trained
    expected = train(dense=False)
    old = path / "old"
    (old / "0_Transformer").mkdir(parents=True)
    for file in (path / "base").iterdir():
        if file.is_dir():
            shutil.copytree(file, old / file.name)
        else:
            own = file.name in ("modules.json", "config_sentence_transformers.json")
            shutil.copy(file, old if own else old / "0_Transformer")
    entries = json.loads((old / "modules.json").read_text())
    first, *others = copy.deepcopy(entries)
    (old / "modules.json").write_text(json.dumps([first | {"path": "0_Transformer"}, *others]))
    assert merge(path, "old") == 1
    assert str(old / "0_Transformer") in capsys.readouterr().err
    assert merge(path, "old/0_Transformer") == 0
    shutil.rmtree(old / "0_Transformer")
    shutil.move(path / "out", old / "0_Transformer")
    check(old, expected)


def test_files_of_any_size_are_compared(tmp_path):
    """Of other sizes they differ, and nothing is read; two that are equal are so piece by piece."""
    large, small, equal = (tmp_path / f"{name}.bin" for name in ("large", "small", "equal"))
    with large.open("wb") as file:
        file.truncate(1 << 41)  # it takes no room on the disk
    small.write_bytes(b"x" * 100_000)
    equal.write_bytes(b"x" * 100_000)
    assert not sentence_modules._is_equal(large, small)
    assert sentence_modules._is_equal(small, equal)
    equal.write_bytes(b"x" * 99_999 + b"y")
    assert not sentence_modules._is_equal(small, equal)
