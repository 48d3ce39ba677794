"""What a refusal proposes: nothing that was given already, nor the command that has just run."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from quantised_models import Convs, Gelu
from safetensors.torch import load_file, save_file
from small_graphs import adapter, conv, graph, linear, random, save
from torch import nn

import lora_export
from lora_export import GraphError, LoraExportError, bank_onnx, merge_checkpoint, merge_onnx, swap_onnx

MATMUL = "g (float[B,IN] x) => (float[B,N] y) { y = MatMul (x, fc_weight) }"
PACKAGE = Path(lora_export.__file__).parent
VERBS = {"merge-onnx": merge_onnx, "swap-onnx": swap_onnx, "bank-onnx": bank_onnx}


def refused(verb, base, given, tmp_path, **options):
    """Return the error of a command, whichever it is."""
    kwargs = {"merge-onnx": {"adapters": given}, "swap-onnx": {"adapter": given}}
    kwargs["bank-onnx"] = {"adapters": {"a": given}}
    with pytest.raises(LoraExportError) as caught:
        VERBS[verb](base, output=tmp_path / "out" / "o.onnx", **kwargs[verb], **options)
    return caught.value


def of_shape(folder):
    return save(graph(MATMUL, {"fc.weight": random(4, 6)}), folder), adapter(linear("fc", 5, 3))


def of_two_places(folder):
    """Two matrices under one name: which is meant?"""
    text = MATMUL.replace("{ y = MatMul (x, fc_weight)", "{ z = MatMul (x, one) y = MatMul (z, other)")
    base = graph(text, {"one": random(6, 6), "other": random(6, 6, seed=1)})
    for node in base.graph:
        node.name = "/fc/MatMul"
    return save(base, folder), adapter(linear("fc", 6, 6))


def of_another_model(folder):
    return save(graph(MATMUL, {"fc.weight": random(4, 6)}), folder), adapter(linear("h.0.attn", 6, 4))


def of_half_of_it(folder):
    given = adapter(linear("fc", 6, 4), linear("absent", 6, 4))
    return save(graph(MATMUL, {"fc.weight": random(4, 6)}), folder), given


def of_a_transposed_convolution(folder):
    text = "g (float[B,6,H] x) => (float[B,O,L] y) { y = ConvTranspose (x, fc_weight) }"
    return save(graph(text, {"fc.weight": random(6, 9, 3)}), folder), adapter(conv("fc", 9, 6, 3))


def of_integers(folder):
    text = "g (uint8[B,4] x) => (uint8[B,N] y) { y = QLinearMatMul (x, s, z, fc_weight, s, z, s, z) }"
    weights = {"fc.weight": np.ones((4, 6), np.uint8), "s": np.float32(0.1), "z": np.uint8(0)}
    return save(graph(text, weights), folder), adapter(linear("fc", 6, 4))


CASES = {
    "another shape": of_shape,
    "two places": of_two_places,
    "another model": of_another_model,
    "half of it": of_half_of_it,
    "ConvTranspose": of_a_transposed_convolution,
    "QLinearMatMul": of_integers,
}


@pytest.mark.parametrize("checked", [False, True], ids=["by name", "with a checkpoint"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", CASES)
def test_no_hint_leads_in_a_circle(case, verb, checked, tmp_path):
    base, given = CASES[case](tmp_path / "base")
    options = {}
    if checked:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        from safetensors.numpy import save_file

        save_file({"unrelated.weight": random(3, 3)}, folder / "model.safetensors")
        options["checkpoint"] = folder
    error = refused(verb, base, given, tmp_path, **options)
    assert error.hint
    assert verb not in error.hint
    if checked:
        assert "give --checkpoint" not in error.hint
    # Nor does it send from one to the other and back.
    if verb == "merge-onnx" and "swap-onnx" in error.hint and "QDQ" not in error.hint:
        swap_onnx(base, tmp_path / "swap.onnx", adapter=given)
    if verb != "merge-onnx" and "with merge-onnx" in error.hint:
        merge_onnx(base, given, tmp_path / "merged.onnx")


@pytest.mark.parametrize("verb", ["swap-onnx", "bank-onnx"])
def test_values_of_quantised_weights_are_not_proposed(verb, tmp_path):
    """The quantiser has dropped the names: a checkpoint would not bring them back."""
    text = (
        "g (float[B,4] x) => (float[B,N] y) { q, s, p = DynamicQuantizeLinear (x) "
        "i = MatMulInteger (q, w, p) c = Cast <to = 1> (i) f = Mul (s, scale) y = Mul (c, f) }"
    )
    weights = {"w": np.ones((4, 6), np.int8), "scale": np.float32(0.1)}
    base = save(graph(text, weights), tmp_path)
    error = refused(verb, base, adapter(linear("fc", 6, 4)), tmp_path)
    assert "--checkpoint" not in error.hint
    assert "quantise that" in error.hint


def test_dora_in_a_swap_graph_and_in_a_bank(tmp_path):
    base = save(graph(MATMUL, {"fc.weight": random(4, 6)}), tmp_path)
    given = adapter(linear("fc", 6, 4, magnitude=np.ones(6, np.float32)))
    assert "--dora" in refused("swap-onnx", base, given, tmp_path).hint
    assert "swap-onnx --dora" in refused("bank-onnx", base, given, tmp_path).hint


def test_no_hint_hangs_on_the_words_of_a_reason():
    """Every refusal has a kind: what is read out of a sentence breaks when the sentence is put better."""
    words = re.compile(
        r"(?:reason|problem|message)s?\.(?:startswith|endswith|partition|find)\("
        r"|(?:[\"'] |[A-Z_]+ )in (?:\w+\.)?reason\b"
    )
    placing = [
        "binding/*",
        "base/*",
        "base/planning/*",
        "base/checkpoint/*",
        "sites/*",
        "sites/*/*",
        "modes/branches/*",
    ]
    files = [path for name in placing for path in PACKAGE.glob(f"{name}.py")]
    assert len(files) > 30
    lines = [(path.name, line.strip()) for path in files for line in path.read_text("utf-8").splitlines()]
    found = [(name, line) for name, line in lines if words.search(line)]
    assert not found


# --- files and layouts of ONNX Runtime ---------------------------------------------------------------------


class Images(nn.Module):
    """Convolutions wide enough for ONNX Runtime's blocks of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 16, 3)

    def forward(self, x):
        """Map pixels to features."""
        return self.second(torch.relu(self.first(x)))


def optimised(path, out, level=None, ort_format=False):
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(out), 3
    if level is not None:
        options.graph_optimization_level = level
    if ort_format:
        options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def exported(model, shape, targets, folder, *, dynamo=False):
    with tiny.quiet():
        x = torch.randn(shape)
        torch.onnx.export(model.eval(), (x,), folder / "base.onnx", input_names=["x"], dynamo=dynamo)
        get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(folder / "peft")
    return folder / "base.onnx", folder / "peft"


class Classified(nn.Module):
    """A Linear behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 32, 3), nn.Linear(32, 8)

    def forward(self, x):
        """Map pixels to scores."""
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("checked", [False, True], ids=["by name", "with a checkpoint"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("make", "targets"),
    [(Images, ["first", "second"]), (Convs, ["up", "next", "down"]), (Classified, ["conv", "fc"])],
)
def test_blocks_of_channels_are_named(make, targets, verb, checked, tmp_path):
    model = make()
    # With dynamo's names, constants in blocks look like computed ones.
    base, given = exported(model, (2, 3, 10, 10), targets, tmp_path, dynamo=make is Classified)
    level = ort.GraphOptimizationLevel
    full = optimised(base, tmp_path / "all.onnx", level.ORT_ENABLE_ALL)
    if not any(node.domain == "com.microsoft.nchwc" for node in onnx.load(full).graph.node):
        pytest.skip("this machine's ONNX Runtime has no blocked layout")
    options = {}
    if checked:
        options["checkpoint"] = tmp_path / "checkpoint"
        options["checkpoint"].mkdir()
        weights = {name.replace(".base_layer", ""): values for name, values in model.state_dict().items()}
        save_file(
            {n: v for n, v in weights.items() if "lora_" not in n}, tmp_path / "checkpoint/model.safetensors"
        )
    error = refused(verb, full, given, tmp_path, **options)
    assert "NCHWc Conv" in error.message
    assert "ORT_ENABLE_EXTENDED" in error.hint
    assert "--checkpoint" not in error.hint


@pytest.mark.parametrize("named", ["model.ort", "model.onnx"])
@pytest.mark.parametrize(("make", "shape"), [(Gelu, (2, 3, 32)), (Convs, (2, 3, 10, 10))])
def test_the_format_of_onnx_runtime_is_named(make, shape, named, tmp_path):
    base, given = exported(make(), shape, ["up", "down"], tmp_path)
    file = optimised(base, tmp_path / named, ort_format=True)
    for verb in VERBS:
        error = refused(verb, file, given, tmp_path)
        assert ".ort" in error.message
        assert "converted from" in error.hint


@pytest.mark.parametrize("suffix", [".engine", ".pt", ".gguf"])
def test_other_files_are_named(suffix, tmp_path):
    (tmp_path / f"model{suffix}").write_bytes(b"something else")
    with pytest.raises(GraphError, match="not an ONNX file"):
        merge_onnx(tmp_path / f"model{suffix}", adapter(linear("fc", 6, 4)), tmp_path / "out.onnx")


class Branching(nn.Module):
    """One module in both branches: the exporter keeps no names in subgraphs."""

    def __init__(self, layer):
        super().__init__()
        self.shared, self.out = layer(), nn.Linear(8, 4)

    def forward(self, x):
        y = torch.cond(x.sum() > 0, lambda z: self.shared(z).tanh(), lambda z: self.shared(z * 2), (x,))
        return self.out(y)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: nn.Linear(8, 8, bias=False)])
def test_a_module_in_both_branches_may_be_merged_before_the_export(layer, tmp_path):
    model, x = Branching(layer), torch.randn(3, 8)
    file = tmp_path / "base.onnx"
    with tiny.quiet():
        torch.onnx.export(model, (x,), file, dynamo=True, optimize=False)
        folder = tmp_path / "base"
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["shared"], init_lora_weights=False))
        tuned.save_pretrained(tmp_path / "adapter")
    error = refused("merge-onnx", file, tmp_path / "adapter", tmp_path, checkpoint=folder)
    assert "ambiguous" in " ".join(error.problems)
    assert "lora-export merge" in error.hint
    merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "merged")
    got = load_file(tmp_path / "merged" / "model.safetensors")["shared.weight"]
    wanted = tuned.merge_and_unload().state_dict()["shared.weight"]
    assert torch.allclose(got, wanted, atol=1e-6)
