"""`export_onnx`: any nn.Module, with an adapter merged into what is exported."""

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from torch import nn

from lora_export import GraphError, SiteError, export_onnx


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
