"""Files that diffusers writes, and kohya files that diffusers reads: its own layers are the oracle."""

import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export import load_adapter
from lora_export.storage.patch import Placement, patch_from

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.xdist_group("diffusers")
WEIGHTS = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2"]


def unet(**options):
    """Return a tiny UNet with LoRA on linear and convolution layers, every value random."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def deltas(model):
    """Return module path → ΔW as diffusers' own (PEFT) layers compute it."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        return {
            name: layer.get_delta_weight(next(iter(layer.lora_A))).numpy() for name, layer in layers.items()
        }


def check(adapter, wanted, flattened=False):
    names = {name.replace(".", "_") if flattened else name: delta for name, delta in wanted.items()}
    modules = {module.path: module for module in adapter.modules.values()}
    assert modules.keys() == names.keys()
    assert len(modules) > 20
    for path, module in modules.items():
        rows = (0, module.matrix_shape[0])
        patch = patch_from(module, Placement(rows=rows), dtype=np.float64)
        got = (patch.left @ patch.right).reshape(module.weight_shape)
        assert np.linalg.norm(got - names[path]) <= 2e-6 * np.linalg.norm(names[path]), path


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv1": 3, "to_q": 1}}],
    ids=["plain", "rslora", "patterns"],
)
def test_a_models_own_save_lora_adapter(tmp_path, options):
    model = unet(**options)
    model.save_lora_adapter(tmp_path, adapter_name="default")
    check(load_adapter(tmp_path / WEIGHTS), deltas(model))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}}])
def test_a_pipelines_save_lora_weights(tmp_path, options):
    model = unet(**options)
    layers = peft.get_peft_model_state_dict(model)
    metadata = model.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=_plain(metadata)
    )
    adapter = load_adapter(tmp_path / WEIGHTS)
    assert {module.component for module in adapter.modules.values()} == {"unet"}
    check(adapter, deltas(model))


def _plain(config):
    values = {key: list(value) if isinstance(value, set) else value for key, value in config.items()}
    return {
        key: value for key, value in values.items() if isinstance(value, (str, int, float, list, dict, bool))
    }


def kohya(model, alpha):
    """Return the model's LoRA under kohya's names (kohya-ss/sd-scripts ``networks/lora.py``)."""
    tensors = {}
    for name, values in peft.get_peft_model_state_dict(model).items():
        path, _, end = name.rpartition(".lora_")
        flat = "lora_unet_" + path.replace(".", "_")
        tensors[f"{flat}.lora_{'down' if end.startswith('A') else 'up'}.weight"] = values.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def test_kohya_names_mean_what_diffusers_reads(tmp_path):
    model = unet()
    file = tmp_path / "kohya.safetensors"
    save_file(kohya(model, 3.0), file)
    state, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(file, unet_config=model.config)
    other = unet()
    other.delete_adapters("default")
    other.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    wanted = deltas(other)
    adapter = load_adapter(file)
    assert adapter.format == "kohya"
    check(adapter, wanted, flattened=True)
    assert {module.scaling for module in adapter.modules.values()} == {3.0 / 4}


def test_bare_names_without_metadata_mean_what_diffusers_reads(tmp_path):
    """A file that lost its metadata lost its alpha: diffusers reads it with scaling 1, and a note says so."""
    unet().save_lora_adapter(tmp_path, adapter_name="default")
    file = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / WEIGHTS), file)
    other = unet()
    other.delete_adapters("default")
    other.load_lora_adapter(load_file(file), prefix=None)
    adapter = load_adapter(file)
    check(adapter, deltas(other))
    assert any("scaling 1" in note for note in adapter.notes)
