"""What a file claims is compared with what it can hold, before memory is taken: peaks in a child process."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peaks
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from lora_export.cli import main
from lora_export.errors import AdapterError, BackendError, GraphError
from lora_export.formats.reading.ort_file import read_ort_file, write_ort_file
from lora_export.formats.reading.pickles import read_checkpoint
from lora_export.graph.onnx_file import load_graph
from lora_export.parity.feeds.array_files import read_arrays
from lora_export.parity.sides.reference import read_tensors

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
    assert f"needs {count} values, but its storage" in str(caught.value)


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


def _archive(members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


def _verdicts(good: bytes) -> bytes:
    return json.dumps(json.loads(good) | {"verdicts": [{}] * 20_000, "metrics": [0] * 500_000}).encode()


# A name's suffix → what it holds, by a good file of this kind; what is said.
PARITY: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "zeros": (".npz", lambda _: _archive([("x.npy", _npy("(2, 9999999)") + bytes(79_999_992))]), "unpack to"),
    "a claim": (".npz", lambda _: _archive([("x.npy", _npy("(2, 100000000000)"))]), "x: "),
    "a claim of text": (".npz", lambda _: _archive([("x.npy", _npy("(9,)", "'<U900000000'"))]), "x: "),
    "no bytes each": (".npz", lambda _: _archive([("x.npy", _npy("(500000000,)", "'<U0'"))]), "x: "),
    "no archive": (".npz", lambda _: _npy("(2, 4000000000)"), "not a zip archive"),
    "empty members": (".npz", lambda _: _archive((f"{i}", b"") for i in range(2_000)), "0: "),
    "labels": (".npz", lambda _: _archive((f"{i}/x", _npy("(0, 8)")) for i in range(12_000)), "no values"),
    "wide": (
        ".safetensors",
        lambda _: _header(
            b'{"x":{"dtype":"F32","shape":[0,8],"data_offsets":[0,0]}' + b"".join(
                f',"{i:x}/x":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.encode()
                for i in range(250_000)
            ) + b"}"
        ),
        "its header",
    ),
    "lists": (".json", lambda _: b'{"format": [' + b"[]," * 5_000_000 + b"[]]}", "in memory"),
    "verdicts": (".json", _verdicts, "a damaged one"),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_feeds_and_baselines_take_no_more_than_ten_times_their_size(tmp_path: Path) -> None:
    graphs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for graph in graphs:
        graph.write_bytes(_graph([PRODUCT, END], []))
    sides = ["parity", "--reference", graphs[0], "--candidate", graphs[1]]
    feeds, report = tmp_path / "good.npz", tmp_path / "good.json"
    np.savez(feeds, x=np.ones((2, 8), np.float32))
    save_file({"x": np.ones((2, 8), np.float32)}, feeds.with_suffix(".safetensors"))
    saved = tmp_path / "saved.npz"
    np.savez(saved, y=np.ones((2, 8), np.float32))
    warm = [
        [*sides, "--feeds", feeds, "--report", report],
        [*sides, "--feeds", feeds.with_suffix(".safetensors"), "--baseline", report],
        ["parity", "--reference", saved, "--candidate", graphs[1], "--feeds", feeds],
    ]
    with pytest.raises(SystemExit):
        main([str(word) for word in warm[0]])
    warm[0].append("--force")
    runs, paths, says = [], [], []
    for name, (kind, make, said) in PARITY.items():
        path = tmp_path / f"{name.replace(' ', '_')}{kind}"
        path.write_bytes(make(report.read_bytes()))
        one = [*sides, "--feeds", path] if kind != ".json" else [*sides, "--feeds", feeds, "--baseline", path]
        runs.append(one)
        paths.append(path)
        says.append(said)
        if name in ("zeros", "a claim", "empty members", "wide"):
            runs.append(["parity", "--reference", path, "--candidate", graphs[1], "--feeds", feeds])
            paths.append(path)
            says.append(said.removeprefix("x"))
    wrong = []
    found = peaks.measured(warm, runs)
    for path, said, (code, _, err, peak, seconds) in zip(paths, says, found, strict=True):
        print(
            f"{path.name:30} {code} {peak / 1e6:8.1f} MB of {peaks.allowed(path) / 1e6:6.1f}  {seconds:.1f} s"
        )
        if code != 1 or peak > peaks.allowed(path) or said not in err or seconds > 20:
            wrong.append(f"{path.name}: code {code}, peak {peak / 1e6:.0f} MB, {seconds:.0f} s\n{err[:600]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("members", [1, 40])
def test_an_npz_that_unpacks_to_much_more_is_refused(members: int, tmp_path: Path) -> None:
    path = tmp_path / "feeds.npz"
    zeros = np.zeros(64_000_000 // members, np.int64)
    np.savez_compressed(path, **{f"x{i}": zeros for i in range(members)})
    for read in (read_arrays, read_tensors):
        with pytest.raises(BackendError, match="is not unpacked"):
            read(path)
    np.savez_compressed(path, x=np.zeros((4, 512), np.int64))
    assert read_tensors(path)["x"].shape == (4, 512)


def _graph(nodes: list[Any], functions: list[Any], **more: Any) -> bytes:
    inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8])]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 8])]
    weights = [numpy_helper.from_array(np.eye(8, dtype=np.float32), "q.weight"), *more.get("weights", ())]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    made = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(made, opset_imports=opsets, ir_version=10, functions=functions)
    return bytes(model.SerializeToString())


PRODUCT = helper.make_node("MatMul", ["x", "q.weight"], ["h"], name="/q/MatMul")
END = helper.make_node("Identity", ["h"], ["y"])


def _function(i: int, calls: str, times: int) -> Any:
    domain = "" if calls == "Identity" else "own"
    nodes = [helper.make_node(calls, [f"v{k}"], [f"v{k + 1}"], domain=domain) for k in range(times)]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_function("own", f"f{i}", ["v0"], [f"v{times}"], nodes, opsets)


def _functions(depth: int, times: int, recursive: bool = False) -> bytes:
    last = "f0" if recursive else "Identity"
    functions = [_function(i, f"f{i + 1}" if i + 1 < depth else last, times) for i in range(depth)]
    return _graph([PRODUCT, helper.make_node("f0", ["h"], ["y"], domain="own")], functions)


def _moves(kind: str, count: int, reads: int) -> bytes:
    """Return a graph of a long way behind one constant, or one activation, that many products read."""
    first = "k.weight" if kind != "Squeeze" else "x"
    ways = [helper.make_node(kind, [f"w{i}" if i else first], [f"w{i + 1}"]) for i in range(count)]
    last = f"w{count}"
    read = [["x", last] if first != "x" else [last, "k.weight"] for _ in range(reads)]
    products = [helper.make_node("MatMul", names, [f"p{i}"]) for i, names in enumerate(read)]
    end = helper.make_node("Sum", ["h", *(f"p{i}" for i in range(reads))], ["y"])
    weight = helper.make_tensor("k.weight", onnx.TensorProto.FLOAT, (8, 8), [1.0] * 64)
    return _graph([PRODUCT, *ways, *products, end], [], weights=[weight])


def _claiming(sizes: tuple[int, ...], **data: Any) -> bytes:
    weight = onnx.TensorProto(name="k.weight", data_type=onnx.TensorProto.FLOAT, dims=sizes, **data)
    return _graph([PRODUCT, END], [], weights=[weight])


GRAPHS: dict[str, tuple[Callable[[], bytes], str]] = {
    "functions of functions": (lambda: _functions(40, 2), "more than 2000000 nodes"),
    "many nodes of functions": (lambda: _functions(16, 2), "nodes, for 34 in the file"),
    "many nodes of one name": (lambda: _functions(14, 2), "have one name"),
    "a function that calls itself": (lambda: _functions(3, 1, recursive=True), "calls itself"),
    **{
        f"a long way of {kind}": (lambda kind=kind: _moves(kind, 3000, 3000), "more than 64 nodes")
        for kind in ("Identity", "Transpose", "Squeeze")
    },
    "more values than there are": (
        lambda: _claiming((1 << 20, 1 << 20), raw_data=b"\0" * 4), "needs 4398046511104",
    ),
    "no values": (lambda: _claiming((50_000, 50_000)), "holds 0 bytes"),
    "typed values": (lambda: _claiming((9,), float_data=[1.0] * 8), "holds 32 bytes"),
    "negative sizes": (lambda: _claiming((-4, 8), raw_data=b"\0" * 4), "wanted sizes of 0 or more"),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_graphs_and_checkpoints_take_no_more_than_ten_times_their_size(tmp_path: Path) -> None:
    adapter = good_peft(tmp_path / "good")
    out, good = tmp_path / "o.onnx", tmp_path / "m.onnx"
    good.write_bytes(_graph([PRODUCT, END], [_function(0, "Identity", 1)]))
    runs, paths, says = [], [], []
    for name, (make, said) in GRAPHS.items():
        path = tmp_path / f"{name.replace(' ', '_')}.onnx"
        path.write_bytes(make())
        runs.append(["swap-onnx", "--base", path, "--adapter", adapter, "-o", out, "--dry-run"])
        paths.append(path)
        says.append(said)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"q.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
    wide = (_wide_header(tmp_path) / "adapter_model.safetensors").read_bytes()
    for number, (file, content, said) in enumerate((
        ("model.safetensors", wide, "its header"),
        ("config.json", b'{"model_type": [' + b"{}," * 5_000_000 + b"{}]}", "in memory"),
        ("model.safetensors.index.json", b'{"weight_map": [' + b"[]," * 5_000_000 + b"[]]}", "in memory"),
    )):  # fmt: skip
        folder = tmp_path / f"base{number}"
        folder.mkdir()
        weights = "model-00001-of-00001.safetensors" if "index" in file else "model.safetensors"
        (folder / weights).write_bytes((base / "model.safetensors").read_bytes())
        (folder / file).write_bytes(content)
        runs.append(["merge", "--base", folder, "--adapter", adapter, "-o", tmp_path / "merged", "--dry-run"])
        paths.append(folder)
        says.append(said)
    warm = [
        ["swap-onnx", "--base", good, "--adapter", adapter, "-o", out, "--dry-run"],
        ["merge", "--base", base, "--adapter", adapter, "-o", tmp_path / "merged", "--dry-run"],
    ]
    wrong = []
    found = peaks.measured(warm, runs)
    for path, said, (code, _, err, peak, seconds) in zip(paths, says, found, strict=True):
        print(f"{path.name:40} {code} {peak / 1e6:8.1f} MB of {peaks.allowed(path) / 1e6:6.1f}")
        if code != 1 or peak > peaks.allowed(path) or said not in err or seconds > 20:
            wrong.append(f"{path.name}: code {code}, peak {peak / 1e6:.0f} MB, {seconds:.0f} s\n{err[:600]}")
    assert not wrong, "\n".join(wrong)


TENSOR = numpy_helper.from_array(np.ones(1))


def _branch(count: int) -> Any:
    outputs = [helper.make_tensor_value_info(f"b{i}", onnx.TensorProto.FLOAT, None) for i in range(count)]
    return helper.make_graph(
        [helper.make_node("Identity", ["h"], [f"b{i}"]) for i in range(count)], "b", [], outputs
    )


# Nodes that the onnx package has no schema for, at the graph's opset or at all, or that it doesn't check.
BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        f"{op_type} of too few inputs": (
            lambda op_type=op_type, domain=domain, inputs=inputs: helper.make_node(
                op_type, ["h"] * inputs, ["y"], domain=domain
            ),
            "input",
        )
        for op_type, domain, inputs in (
            ("SimplifiedLayerNormalization", "", 1),
            ("RMSNormalization", "", 1),
            ("DequantizeLinear", "com.microsoft", 0),
            ("QuantizeLinear", "com.microsoft", 1),
            ("MatMulNBits", "com.microsoft", 2),
            ("FusedMatMul", "com.microsoft", 1),
        )
    },
    "an attribute of floats": (
        lambda: helper.make_node("FusedMatMul", ["h", "h"], ["y"], domain="com.microsoft", alpha=[1.0, 2.0]),
        "alpha is of type FLOATS",
    ),
    "an attribute that the operator has not": (
        lambda: helper.make_node("MatMul", ["h", "q.weight"], ["y"], transA=[1, 2]), "transA is of type INTS",
    ),
    "a body that is a constant": (
        lambda: helper.make_node("Scan", ["h"], ["y"], domain="own", body=TENSOR),
        "body is of type TENSOR",
    ),
    "a branch without outputs": (
        lambda: helper.make_node("If", ["h"], ["y"], then_branch=_branch(1), else_branch=_branch(0)),
        "else_branch has 0 outputs, wanted 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_node_that_no_operator_is_like_is_refused(name: str, tmp_path: Path) -> None:
    make, said = BROKEN[name]
    path = tmp_path / "m.onnx"
    path.write_bytes(_graph([PRODUCT, make()], []))
    with pytest.raises(GraphError, match="is not a valid graph") as caught:
        load_graph(path)
    assert any(said in problem for problem in caught.value.problems)


@pytest.mark.parametrize("sizes", [(8, 3), (8, 400), (1 << 20, 1 << 20), (-8, 4)])
def test_an_onnx_adapter_claims_no_more_than_it_holds(sizes: tuple[int, int], tmp_path: Path) -> None:
    """ONNX Runtime's reader looks at it; its bytes are taken by the shape."""
    path = tmp_path / "a.onnx_adapter"
    write_ort_file(path, {"q.lora_A.weight": np.ones((8, 4), np.float32)}, 3, only_this_base=False)
    good, bad = ((struct.pack("<qq", *one)) for one in ((8, 4), sizes))
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, bad))
    with pytest.raises(AdapterError, match=r"not a complete \.onnx_adapter file: (Lora Param|Integer over)"):
        read_ort_file(path)
