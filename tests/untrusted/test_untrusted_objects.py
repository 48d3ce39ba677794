"""What torch makes when it loads a checkpoint: only what trainers write, and no more than the file holds."""

from __future__ import annotations

import _codecs
import collections
import io
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peaks
import pytest
import torch

from lora_export.errors import AdapterError
from lora_export.formats.reading.pickles import read_checkpoint

GOOD = {"q.lora_A": torch.randn(4, 8), "q.lora_B": torch.randn(8, 4), "alpha": 8}
REBUILD = torch._utils
COUNT = 8 << 20
ONE = torch.ones(1, dtype=torch.uint8)
HOOKS: OrderedDict[str, Any] = OrderedDict()


class Call:
    """An object whose pickle is a call, what the made object is filled with, and its items."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None, items: Any = None) -> None:
        self.call = (function, arguments, state, None, items)

    def __reduce__(self) -> Any:
        return self.call


def bytes_storage(dtype: torch.dtype = torch.uint8) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(
        wrap_storage=torch.zeros(16, dtype=torch.uint8).untyped_storage(), dtype=dtype, _internal=True
    )


def typed(dtype: torch.dtype) -> Call:
    arguments = (bytes_storage(), 0, (4, COUNT), (0, 0), False, HOOKS, dtype)
    return Call(REBUILD._rebuild_tensor_v3, *arguments)


def moved(dtype: torch.dtype) -> Call:
    wide = ONE.expand(4, COUNT)
    return Call(REBUILD._rebuild_device_tensor_from_cpu_tensor, wide, dtype, "cpu", False)


PAIRS = [[f"{n:05}", 1] for n in range(20_000)]
NUMBERS = list(range(60_000))
TEXT = "x" * 500_000
FILLED = (bytes_storage(torch.float32), 0, (4, COUNT), (0, 0))
# One small file each, of gigabytes or close to it, in the ways that weights_only allows.
LARGE: dict[str, Any] = {
    "a shape": Call(torch.FloatTensor, torch.Size([4, 2 * COUNT])),
    "a shape of a shape": Call(torch.Tensor, torch.Size(torch.Size([4, 2 * COUNT]))),
    "bytes as float64": typed(torch.float64),
    "bytes as complex": typed(torch.complex128),
    "converted to float64": moved(torch.float64),
    "converted to complex": moved(torch.complex128),
    "filled by a list": Call(torch.FloatTensor, state=list(FILLED)),
    "filled, of another type": Call(torch.DoubleTensor, state=FILLED),
    "one list in many dicts": [Call(OrderedDict, PAIRS) for _ in range(3000)],
    "one list in many sets": [Call(set, NUMBERS) for _ in range(3000)],
    "one list in many counters": [Call(collections.Counter, NUMBERS) for _ in range(3000)],
    "one text in many bytes": [Call(_codecs.encode, TEXT, "latin1") for _ in range(3000)],
    "one text in many arrays": [Call(bytearray, TEXT, "latin1") for _ in range(3000)],
}


def saved(content: Any, new_layout: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new_layout)
    return buffer.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_object_is_larger_than_its_file_allows(tmp_path: Path) -> None:
    good, paths = tmp_path / "good.pt", []
    good.write_bytes(saved(GOOD))
    for name, value in LARGE.items():
        for new_layout in (True, False):
            paths.append(tmp_path / f"{name.replace(' ', '_')}{'' if new_layout else '.old'}.pt")
            paths[-1].write_bytes(saved(GOOD | {"q.lora_A": value}, new_layout))
    wrong = []
    found = peaks.measured([["inspect", good]], [["inspect", path] for path in paths])
    for path, (code, _, err, peak, seconds) in zip(paths, found, strict=True):
        print(f"{path.name:40} {code} {peak / 1e6:.1f} MB of {peaks.allowed(path) / 1e6:.1f} {seconds:.1f} s")
        if code != 1 or peak > peaks.allowed(path) or seconds > 10 or "hint: " not in err:
            wrong.append(f"{path.name}: code {code}, peak {peak / 1e6:.0f} MB, {seconds:.0f} s\n{err[:600]}")
    assert not wrong, "\n".join(wrong)


def parameter(**attributes: Any) -> Call:
    arguments = (
        REBUILD._rebuild_parameter,
        torch.nn.Parameter,
        (torch.randn(4, 8), False, HOOKS),
        attributes,
    )
    return Call(torch._tensor._rebuild_from_type_v2, *arguments)


def of_bytes(dtype: torch.dtype, count: int = 1) -> torch.Tensor:
    return torch.zeros(count * dtype.itemsize, dtype=torch.uint8).view(dtype)


def odd_tensors() -> Iterator[tuple[str, Any]]:
    """Yield tensors of one element and more that have no values, or none that are read."""
    for count in (1, 3):
        yield f"meta {count}", torch.empty(count, device="meta")
        yield f"float4 {count}", of_bytes(torch.float4_e2m1fn_x2, count)
        yield f"sparse {count}", torch.ones(count).to_sparse()
        yield f"quantised {count}", torch.quantize_per_tensor(torch.ones(count), 0.1, 0, torch.qint8)
        yield f"nested {count}", torch.nested.nested_tensor([torch.ones(count)])


@pytest.mark.parametrize("key", ["alpha", "r", "x", "q.lora_A", "use_dora"])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_without_values_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    for name, tensor in odd_tensors():
        path.write_bytes(saved(GOOD | {key: tensor}))
        with pytest.raises(AdapterError) as caught:
            read_checkpoint(path)
        assert caught.value.hint, name


# What hides a method, or fills what no checkpoint fills.
FILLINGS: dict[str, Any] = {
    "values of a dict": Call(OrderedDict, state={"values": 5}, items=iter(GOOD.items())),
    "values of a dict, as pairs": Call(OrderedDict, state=[("values", 5)], items=iter(GOOD.items())),
    "items of a dict": Call(OrderedDict, state={"items": set}, items=iter(GOOD.items())),
    "values of a counter": Call(collections.Counter, state={"values": 5}),
    "a parameter's detach": parameter(detach=bytearray),
    "a parameter's numel": parameter(numel=bytearray),
    "a parameter's __setstate__": parameter(__setstate__=set),
    "a storage's type": Call(bytes_storage, state={"dtype": torch.float64}),
    "a parameter": Call(torch.nn.Parameter, torch.ones(3)),
    "a parameter of a shape": Call(REBUILD._rebuild_parameter, torch.Size([3]), False, HOOKS),
    "a layout": Call(torch.serialization._get_layout, "torch.strided"),
}


@pytest.mark.parametrize("new_layout", [True, False])
@pytest.mark.parametrize("name", FILLINGS)
def test_no_attribute_hides_a_method(name: str, new_layout: bool, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    for content in (GOOD | {"lora_config": FILLINGS[name]}, {"state_dict": FILLINGS[name]}):
        path.write_bytes(saved(content, new_layout))
        with pytest.raises(AdapterError) as caught:
            read_checkpoint(path)
        assert caught.value.hint


def with_attributes() -> dict[str, Any]:
    made = {
        name: torch.nn.Parameter(value) for name, value in GOOD.items() if isinstance(value, torch.Tensor)
    }
    for value in made.values():
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        value.tensor_model_parallel = False  # type: ignore[attr-defined]
    return made | {"alpha": 8}


def with_metadata() -> dict[str, Any]:
    made = OrderedDict(GOOD)
    made._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return made


# What people save, beside plain tensors.
PLAIN: dict[str, Any] = {
    "a state dict's metadata": with_metadata(),
    "attributes of parameters": with_attributes(),
    "a state dict of Python 2": Call(OrderedDict, [[name, value] for name, value in GOOD.items()]),
    "from XLA": GOOD | {
        name: Call(REBUILD._rebuild_device_tensor_from_cpu_tensor, GOOD[name], torch.float32, "cpu", False)
        for name in ("q.lora_A", "q.lora_B")
    },
    "a training run": {
        "state_dict": OrderedDict(GOOD),
        "rng_state": torch.get_rng_state(),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "shape": torch.Size([3]), "on": torch.device("cpu")}},
            "names": {"a", "b"}, "bytes": b"\x00\xff", "array": bytearray(b"\x00\xff"), "j": 1j,
            "dtype": torch.bfloat16, "counts": collections.Counter("abca"),
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("new_layout", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_what_trainers_write_is_read(name: str, new_layout: bool, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    path.write_bytes(saved(PLAIN[name], new_layout))
    wanted = torch.load(path, weights_only=True)
    wanted = wanted.get("state_dict", wanted)
    found = read_checkpoint(path)
    for key in ("q.lora_A", "q.lora_B"):
        assert np.array_equal(found.tensors[key], wanted[key].detach().numpy())
    assert found.settings["alpha"] == 8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16])
def test_types_without_a_storage_of_their_own_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    path.write_bytes(saved({"q.lora_A": torch.arange(32).reshape(4, 8).to(dtype)[1:, ::2]}))
    wanted = torch.load(path, weights_only=True)["q.lora_A"].float().numpy()
    assert np.array_equal(read_checkpoint(path).tensors["q.lora_A"].astype(np.float32), wanted)
