"""What a file claims is compared with what it can hold, before memory is taken: peaks in a child process."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peaks
import pytest
import torch
from safetensors.numpy import save_file

from lora_export.errors import AdapterError, BackendError
from lora_export.formats.pickles import read_checkpoint
from lora_export.parity.feeds_file import refuse_npz
from lora_export.parity.reference import read_tensors

PREFIX = "base_model.model.q"
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"], "bias": "none"}


def good_peft(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    tensors = {
        f"{PREFIX}.lora_A.weight": np.ones((4, 8), np.float32),
        f"{PREFIX}.lora_B.weight": np.ones((8, 4), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def good_pt(path: Path) -> Path:
    torch.save({"q.lora_A": torch.ones(4, 8), "q.lora_B": torch.ones(8, 4), "alpha": 8}, path)
    return path


class _Reduced:
    """An object whose pickle is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _hex(times: int) -> _Reduced:
    import _codecs

    return _Reduced(_codecs.encode, _hex(times - 1) if times else "x" * 1000, "hex" if times else "latin1")


def _saved(content: Any, **options: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        path = folder / "adapter.pt"
        torch.save(content, path, **options)
        return path

    return save


def _views(count: int) -> dict[str, torch.Tensor]:
    stored = torch.ones(1 << 18)
    return {f"m{i}.lora_A": stored.view(1, -1) for i in range(count)}


def _deflated(folder: Path) -> Path:
    path, packed = folder / "plain.pt", folder / "adapter.pt"
    torch.save({"q.lora_A": torch.zeros(4, 30_000_000), "alpha": 8}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    path.unlink()
    return packed


def _huge_pickle(folder: Path) -> Path:
    path = folder / "adapter.pt"
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in contents.items():
            lists = b"\x80\x02(" + b"]" * 8_000_000 + b"t."
            new.writestr(name, lists if name.endswith("data.pkl") else content)
    return path


def _header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def _wide_header(folder: Path) -> Path:
    entries = (f'"{i:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(250_000))
    return _weights(folder, _header(f"{{{','.join(entries)}}}".encode()))


def _many_lists(folder: Path) -> Path:
    return _weights(folder, _header(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"))


def _weights(folder: Path, content: bytes) -> Path:
    good_peft(folder / "peft")
    (folder / "peft" / "adapter_model.safetensors").write_bytes(content)
    return folder / "peft"


def _bd_lora(folder: Path) -> Path:
    blocks = {"target_modules_bd_a": ["q"], "target_modules_bd_b": [], "nblocks": 16_000}
    peft = good_peft(folder / "peft", r=16_000, use_bdlora=blocks)
    tensors = {
        f"{PREFIX}.lora_A.weight": np.ones((16_000, 1), np.float32),
        f"{PREFIX}.lora_B.weight": np.ones((1, 16_000), np.float32),
    }
    save_file(tensors, peft / "adapter_model.safetensors")
    return peft


def _costly_config(folder: Path) -> Path:
    peft = good_peft(folder / "peft")
    text = json.dumps(CONFIG)[:-1] + ', "rank_pattern": [' + "[]," * 5_000_000 + "[]]}"
    (peft / "adapter_config.json").write_text(text)
    return peft


def _enable_lora(folder: Path) -> Path:
    switches = [True, True, *[False] * 3000]
    content = {"q.lora_A": torch.ones(16, 64), "q.lora_B": torch.ones(2048, 8), "enable_lora": switches}
    return _saved(content | {"alpha": 8})(folder)


def _sparse_zero(folder: Path) -> Path:
    """A file of which everything is there, but nothing on the disk: the values alone are large."""
    path = folder / "adapter.pt"
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, protocol=2)
        file.write(b"\x80\x02M\xe9\x03.")
        pickle.dump({"little_endian": True}, file, protocol=2)
        file.write(b"\x80\x02c__builtin__\nbytearray\nJ\x00\xca\x9a\x3b\x85R.")
    return path


STRIDED = torch.ones(4).as_strided((20_000, 40_000), (0, 0))
HOSTILE: dict[str, Callable[[Path], Path]] = {
    "stride 0": _saved({"q.lora_A": STRIDED, "alpha": 8}),
    "stride 0, old layout": _saved({"q.lora_A": STRIDED}, _use_new_zipfile_serialization=False),
    "one storage, many tensors": _saved(_views(400)),
    "a parameter": _saved({"q.lora_A": torch.nn.Parameter(STRIDED, requires_grad=False)}),
    "bytearray": _saved({"a": _Reduced(bytearray, 900_000_000)}),
    "bytearray, old layout": _sparse_zero,
    "a tensor of a size": _saved({"a": _Reduced(torch.Tensor, 1 << 28)}),
    "hex of hex": _saved({"a": _hex(20)}),
    "deflated zeros": _deflated,
    "a pickle of empty lists": _huge_pickle,
    "a header of empty tensors": _wide_header,
    "a header of empty lists": _many_lists,
    "BD-LoRA": _bd_lora,
    "a config of empty lists": _costly_config,
    "MergedLinear of many parts": _enable_lora,
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_adapters_take_no_more_than_ten_times_their_size(tmp_path: Path) -> None:
    paths = {}
    for name, make in HOSTILE.items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        paths[name] = make(folder)
    warm = [["inspect", good_peft(tmp_path / "good")], ["inspect", good_pt(tmp_path / "good.pt")]]
    found = peaks.measured(warm, [["inspect", path] for path in paths.values()])
    wrong = []
    for (name, path), (code, _, err, peak, seconds) in zip(paths.items(), found, strict=True):
        print(f"{name:30} {code} {peak / 1e6:8.1f} MB of {peaks.allowed(path) / 1e6:6.1f}  {seconds:.1f} s")
        if code != 1 or peak > peaks.allowed(path) or "hint: " not in err:
            wrong.append(f"{name}: code {code}, peak {peak / 1e6:.0f} MB\n{err[:600]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("new_layout", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"q.lora_A": torch.ones(4, 8), "q.lora_B": torch.nn.Parameter(torch.ones(8, 4)), "alpha": 8},
        {"q.lora_A": torch.ones(8, 4).T, "q.lora_B": torch.ones(100)[10:42].view(8, 4)},
        {
            "q.lora_A": torch.ones(1).expand(4, 8),
            "epoch": 3,
            "step_bytes": b"bytes",
            "q.lora_B": torch.ones(8, 4),
        },
        {"q.lora_A": torch.ones(4, 8).bfloat16(), "q.lora_B": torch.ones(8, 4).half()},
        {
            "state_dict": {"q.lora_A": torch.ones(4, 8)},
            "optimizer": {"state": {0: torch.zeros(3)}, "on": {1}},
        },
        torch.nn.Linear(3, 3).state_dict(),
    ],
)
def test_what_people_save_is_read_as_torch_reads_it(content: Any, new_layout: bool, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new_layout)
    wanted = torch.load(path, weights_only=True)
    wanted = wanted.get("state_dict", wanted)
    found = read_checkpoint(path).tensors
    for name, values in found.items():
        assert np.array_equal(values.astype(np.float32), wanted[name].detach().float().numpy())
    assert found.keys() == {name for name, value in wanted.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("count", [5, 100, 1 << 20])
@pytest.mark.parametrize("new_layout", [True, False])
def test_no_tensor_holds_more_than_its_storage(count: int, new_layout: bool, tmp_path: Path) -> None:
    """Torch enlarges the storage of the old layout for it, by whatever lies in memory there."""
    path = tmp_path / "adapter.pt"
    torch.save({"q.lora_A": torch.arange(4.0)}, path, _use_new_zipfile_serialization=new_layout)
    claim = b"J" + count.to_bytes(4, "little")
    raw = path.read_bytes()
    changed = raw.replace(b"Q" + b"K\x00K\x04\x85", b"Q" + b"K\x00" + claim + b"\x85")
    assert changed != raw
    if new_layout:
        with zipfile.ZipFile(path) as old:
            contents = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, content in contents.items():
                new.writestr(name, content.replace(b"QK\x00K\x04\x85", b"QK\x00" + claim + b"\x85"))
    else:
        path.write_bytes(changed)
    with pytest.raises(AdapterError) as caught:
        read_checkpoint(path)
    assert f"needs {count} values, its storage" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"alpha": float("nan")}, "alpha: NaN, wanted a finite number"),
        ({"alpha": float("inf")}, "alpha: Infinity, wanted a finite number"),
        ({"alpha": 2**2000}, "alpha: a number of 2001 bits, wanted a finite number"),
        ({"lora_config": {"r": 1.5}}, "lora_config/r: 1.5, wanted a whole number"),
        ({"enable_lora": [True, "x"]}, "enable_lora: an array of 2, wanted a list of true and false"),
        ({"rslora": 3}, "rslora: 3, wanted true or false"),
    ],
)
def test_settings_are_checked_by_type(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    torch.save({"q.lora_A": torch.ones(4, 8), "q.lora_B": torch.ones(8, 4), **settings}, path)
    with pytest.raises(AdapterError) as caught:
        read_checkpoint(path)
    assert says in caught.value.problems


@pytest.mark.parametrize("members", [1, 40])
def test_an_npz_that_unpacks_to_much_more_is_refused(members: int, tmp_path: Path) -> None:
    path = tmp_path / "feeds.npz"
    zeros = np.zeros(64_000_000 // members, np.int64)
    np.savez_compressed(path, **{f"x{i}": zeros for i in range(members)})
    for read in (refuse_npz, read_tensors):
        with pytest.raises(BackendError, match="claims more than it holds"):
            read(path)
    np.savez_compressed(path, x=np.zeros((4, 512), np.int64))
    assert read_tensors(path)["x"].shape == (4, 512)
