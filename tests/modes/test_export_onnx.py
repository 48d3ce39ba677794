"""`export_onnx`: any nn.Module, with an adapter merged into what is exported."""

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from lora_export import GraphError, LoraExportError, SiteError, export_onnx, load_adapter


class Tower(nn.Module):
    """Not a transformers model: two inputs, a module called twice, a tuple of outputs."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.mid = nn.Linear(16, 16, bias=False)
        self.table = nn.Embedding(10, 8)

    def forward(self, x, ids):
        y = torch.relu(self.up(x + self.table(ids)))
        return self.mid(torch.relu(self.mid(y))), y


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return Tower().eval()


def trained(module, folder, targets):
    model = peft.get_peft_model(module, peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def inputs():
    return torch.randn(4, 8), torch.randint(0, 10, (4,))


def test_agrees_with_peft_and_leaves_the_module_alone(tower, tmp_path):
    import copy

    model = trained(copy.deepcopy(tower), tmp_path / "a", ["up", "mid", "table"])
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    batch = torch.export.Dim("batch")
    report = export_onnx(
        tower, tmp_path / "a", inputs(), tmp_path / "m.onnx", dynamic_shapes=({0: batch}, {0: batch})
    )
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert [row.parameter for row in report.plan.rows if row.action == "merge"] == [
        "mid.weight",
        "table.weight",
        "up.weight",
    ]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x, ids = torch.randn(7, 8), torch.randint(0, 10, (7,))
    names = [value.name for value in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy(), ids.numpy()), strict=True)))
    with torch.no_grad():
        wanted = [value.numpy() for value in model(x, ids)]
        base = tower(x, ids)[0].numpy()
    for ours, theirs in zip(got, wanted, strict=True):
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 2e-6
    assert np.linalg.norm(base - wanted[0]) / np.linalg.norm(wanted[0]) > 1e-2


def test_another_modules_adapter_is_refused(tower, tmp_path):
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    trained(other, tmp_path / "a", ["0", "1"])
    with pytest.raises(SiteError, match="made for another model"):
        export_onnx(tower, tmp_path / "a", inputs(), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_a_module_that_torch_cannot_export(tower, tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    trained(Branch(), tmp_path / "a", ["fc"])
    # The reason, not how to write to PyTorch's developers.
    with pytest.raises(GraphError, match=r"torch\.onnx can't export Branch: .*data-dependent"):
        export_onnx(Branch().eval(), tmp_path / "a", (torch.randn(2, 8),), tmp_path / "m.onnx")
    assert not list(tmp_path.glob("m.*"))


def test_a_module_that_is_traced_on_another_way(tmp_path, monkeypatch):
    """Masks are left out by transformers only where it sees their values: the trace is compared."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x if torch.onnx.is_in_onnx_export() else x.flip(1))

    # What the tests keep of an earlier export has nothing to compare.
    monkeypatch.setattr(torch.onnx, "export", getattr(torch.onnx.export, "__wrapped__", torch.onnx.export))
    trained(Other(), tmp_path / "a", ["fc"])
    with pytest.raises(GraphError, match="answers otherwise than the model"):
        export_onnx(Other(), tmp_path / "a", {"x": torch.randn(2, 8)}, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


# --- refused before an export, which takes a minute ------------------------------------------------------


def llama(**sizes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, **sizes}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=24, vocab_size=32)
    return transformers.LlamaForCausalLM(config).eval()


def vit(**sizes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, **sizes}
    config = transformers.ViTConfig(
        **sizes, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config).eval()


FAMILIES = {"llama": (llama, ["q_proj"]), "vit": (vit, ["query", "q_proj"])}
# (sizes of the adapter's model, what is said).
OTHERS = {"wider": ({"hidden_size": 32}, "shapes differ"), "deeper": ({"num_hidden_layers": 2}, "not found")}


@pytest.fixture
def no_export(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("exported")

    monkeypatch.setattr("lora_export.base.capture.capture.capture_module", fail)


def kohya(folder):
    """Write a PEFT folder's adapter as a kohya file."""
    tensors = {}
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        path = name.removeprefix("base_model.model.").partition(".lora_")[0].replace(".", "_")
        tensors[f"lora_te_{path}.lora_{'down' if 'lora_A' in name else 'up'}.weight"] = values
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


@pytest.mark.parametrize("form", [lambda folder: folder, kohya], ids=["peft", "kohya"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_size_is_refused_before_the_export(family, other, form, no_export, tmp_path):
    (make, targets), (sizes, said) = FAMILIES[family], OTHERS[other]
    trained(make(**sizes), tmp_path / "a", targets)
    given = form(tmp_path / "a")
    with pytest.raises(SiteError, match=said) as caught:
        export_onnx(make(), given, (), tmp_path / "m.onnx")
    assert "--checkpoint" not in caught.value.hint  # There is no such option here.
    assert ("allow_unmatched=True" in caught.value.hint) == (other == "deeper")
    if other == "deeper":
        with pytest.raises(AssertionError, match="exported"):
            export_onnx(make(), given, (), tmp_path / "m.onnx", allow_unmatched=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_is_refused_before_the_export(family, no_export, tmp_path):
    (other,) = FAMILIES.keys() - {family}
    make, targets = FAMILIES[other]
    trained(make(), tmp_path / "a", targets)
    with pytest.raises(SiteError, match=r"another model|another way") as caught:
        export_onnx(FAMILIES[family][0](), tmp_path / "a", (), tmp_path / "m.onnx")
    assert "--checkpoint" not in caught.value.hint


class Normed(nn.Module):
    """A module whose weight is no parameter of that name."""

    def __init__(self):
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        return self.fc(x)


def of_two_models():
    """Return a module with an encoder and a decoder, of which a graph may have one."""
    both = nn.Module()
    both.encoder, both.decoder = nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleList([nn.Linear(8, 8)])
    return both


@pytest.mark.parametrize(
    ("make", "path"),
    [(Normed, "fc"), (lambda: torch.compile(nn.Sequential(nn.Linear(8, 8))), "0"), (of_two_models, "0")],
    ids=["parametrized", "compiled", "one of two"],
)
def test_what_the_graph_may_have_is_exported_first(make, path, no_export, tmp_path):
    a = {f"{path}.lora_A": torch.randn(2, 8), f"{path}.lora_B": torch.randn(8, 2)}
    torch.save(a, tmp_path / "a.pt")
    given = load_adapter(tmp_path / "a.pt", alpha=2)
    with pytest.raises(AssertionError, match="exported"):
        export_onnx(make(), given, (), tmp_path / "m.onnx")


def test_a_module_that_has_an_adapter_is_called_so_by_its_graph(tmp_path):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(LoraExportError, match="contains an adapter"):
        export_onnx(model.eval(), tmp_path / "a", (torch.randn(2, 8),), tmp_path / "m.onnx")
