"""The converted formats: written, read back, recognised by what they say, and every damaged file."""

import json
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from blake3 import blake3
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_graphs import adapter as adapter_of
from small_graphs import conv, embedding, linear, random

from lora_export import AdapterError, BackendUnavailable, LoraModule, load_adapter
from lora_export.binding.bind import bind_adapter
from lora_export.formats import WRITERS, writer_of
from lora_export.formats.provenance import Provenance, base_version
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member
from lora_export.reports.adapter.facts import inspect_adapter

BASE = "ab" * 32
# q's factors are square, of rank 2: only what the file says tells which way round they are.
SHAPES = {"model.q": (2, 2), "model.up": (6, 5)}


def graph(dtype="float32", dora=False):
    modules = [
        ExposedModule(
            name=path,
            kind="linear",
            in_dim=i,
            out_dim=o,
            dtype=dtype,
            members=(Member(path=path, start=0, out_dim=o),),
        )
        for path, (o, i) in SHAPES.items()
    ]
    return LoraRecord(
        mode="swap", base="base.onnx", base_sha256=BASE, modules=tuple(modules), max_rank=8, dora=dora
    )


def adapter():
    return adapter_of(*(linear(path, *shape) for path, shape in SHAPES.items()))


def provenance(ranks, **more):
    return Provenance(
        adapter="tiny",
        adapter_sha256="cd" * 32,
        base="base.onnx",
        base_sha256=BASE,
        ranks=ranks,
        version="0.1.0",
        **more,
    )


def written(folder, format, dtype="float32"):
    """Write the adapter in a format; return the file and the tensors."""
    writer = writer_of(format)
    bound = bind_adapter(adapter(), graph(writer.dtype or dtype), where="g")
    path = folder / f"out{writer.suffix}"
    writer.write(path, bound.tensors, provenance(bound.ranks))
    return path, bound.tensors


DTYPES = [
    *(("safetensors", dtype) for dtype in ("float32", "float16", "bfloat16", "float64")),
    *(("onnx_adapter", dtype) for dtype in ("float32", "float16", "bfloat16", "float64")),
    ("edge-llm", "float16"),
    ("genai", "bfloat16"),
]


@pytest.mark.parametrize(("format", "dtype"), DTYPES)
def test_what_is_written_is_read_and_binds_to_the_same_bits(tmp_path, format, dtype):
    path, tensors = written(tmp_path, format, dtype)
    read = load_adapter(path)
    assert read.format == ("converted" if format == "safetensors" else format)
    again = bind_adapter(read, graph(dtype), where="g").tensors
    assert again.keys() == tensors.keys()
    for name, values in tensors.items():
        assert again[name].dtype == values.dtype
        np.testing.assert_array_equal(again[name], values)
    for path, module in zip(SHAPES, read.modules.values(), strict=True):
        assert (module.path, module.scaling) == (path, 1.0)
        np.testing.assert_array_equal(module.lora_a, tensors[f"{path}.lora_A.weight"].T)
        np.testing.assert_array_equal(module.lora_b, tensors[f"{path}.lora_B.weight"].T)


@pytest.mark.parametrize("format", list(WRITERS))
def test_the_same_tensors_give_the_same_bytes(tmp_path, format):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path, _ = written(tmp_path / name, format)
        files.append([f.read_bytes() for f in (sorted(path.iterdir()) if path.is_dir() else [path])])
    assert files[0] == files[1]


@pytest.mark.parametrize("format", list(WRITERS))
def test_a_wrong_base_shows_in_every_format(tmp_path, format):
    read = load_adapter(written(tmp_path, format)[0])
    other = LoraRecord(
        mode="swap", base="other.onnx", base_sha256="ef" * 32, modules=graph().modules, max_rank=8
    )
    with pytest.raises(AdapterError, match="made for another base"):
        bind_adapter(read, other, where="g")
    assert not read.notes


@pytest.mark.parametrize("format", list(WRITERS))
def test_inspect_survives_every_format(tmp_path, format):
    read = load_adapter(written(tmp_path, format)[0])
    report = inspect_adapter(read)
    norms = {row.module: row.norm for row in report.modules}
    for module in adapter().modules.values():
        wanted = np.linalg.norm(module.scaling * module.lora_b @ module.lora_a)
        np.testing.assert_allclose(norms[module.path], wanted, rtol=1e-3)


# --- safetensors -------------------------------------------------------------------------------------


def test_safetensors_metadata_say_where_the_file_belongs(tmp_path):
    path, tensors = written(tmp_path, "safetensors")
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    kind, digest = metadata.pop("lora_export.seal").rsplit(":", 1)
    assert kind == "lora-export:blake3-of-this-file"
    assert blake3(path.read_bytes().replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert metadata == {
        "format": "lora-export",
        "layout": "onnx",
        "scaling": "folded into lora_B",
        "adapter": "tiny",
        "adapter_sha256": "cd" * 32,
        "base": "base.onnx",
        "base_sha256": BASE,
        "ranks": '{"model.q":2,"model.up":2}',
        "kinds": "{}",
        "only_this_base": "false",
        "version": "0.1.0",
    }
    assert load_file(path).keys() == tensors.keys()
    assert load_adapter(path).base_model == "base.onnx"


def test_convolutions_embeddings_biases_and_doras_factor_come_back(tmp_path):
    e, c = embedding("e", 7, 3), conv("c", 4, 3, 2, 2)
    tensors = {
        "e.lora_A.weight": e.lora_a.T,
        "e.lora_B.weight": e.lora_b.T,
        "c.lora_A.weight": c.lora_a,
        "c.lora_B.weight": c.lora_b,
        "c.lora_scale.weight": random(4),
        "e.lora_B.bias": random(3, seed=4),
    }
    path = tmp_path / "out.safetensors"
    kinds = {"e": "embedding", "c": "conv"}
    writer_of("safetensors").write(path, tensors, provenance({"e": 2, "c": 2}, kinds=kinds))
    read = load_adapter(path)
    table, kernel = read.modules["e.weight"], read.modules["c.weight"]
    assert (table.kind, kernel.kind) == ("embedding", "conv")
    np.testing.assert_array_equal(table.lora_a, e.lora_a)
    np.testing.assert_array_equal(kernel.lora_a, c.lora_a)
    np.testing.assert_array_equal(kernel.scale, random(4))
    np.testing.assert_array_equal(table.lora_bias, random(3, seed=4))
    assert {row.module: row.dora for row in inspect_adapter(read).modules} == {"e": False, "c": True}
    assert read.parameter_count == sum(values.size for values in tensors.values())


def test_factors_of_ones_are_none(tmp_path):
    """Graphs may need a factor of every module (TensorRT's inputs have no default); it is no DoRA."""
    tensors = {}
    for path, scale in (("a", np.ones(4, np.float32)), ("b", np.array([1, 1, 1, 2], np.float32))):
        tensors |= {f"{path}.lora_A.weight": random(5, 2), f"{path}.lora_B.weight": random(2, 4)}
        tensors[f"{path}.lora_scale.weight"] = scale
    writer_of("safetensors").write(tmp_path / "a.safetensors", tensors, provenance({"a": 2, "b": 2}))
    read = load_adapter(tmp_path / "a.safetensors")
    assert read.modules["a.weight"].scale is None
    np.testing.assert_array_equal(read.modules["b.weight"].scale, tensors["b.lora_scale.weight"])
    assert set(read.tensor_names) == tensors.keys()
    # The plan speaks of the factor that was left away as well.
    module = ExposedModule(
        name="a",
        kind="linear",
        in_dim=5,
        out_dim=4,
        dtype="float32",
        members=(Member(path="a", start=0, out_dim=4),),
    )
    other = replace(module, name="b", members=(Member(path="b", start=0, out_dim=4),))
    bound = bind_adapter(
        read,
        LoraRecord(mode="swap", base="b", base_sha256=BASE, modules=(module, other), max_rank=8, dora=True),
        where="g",
    )
    assert "b.lora_scale.weight" in bound.tensors
    assert "a.lora_scale.weight" not in bound.tensors


def test_the_metadata_win_over_a_peft_config_beside_the_file(tmp_path):
    path, _ = written(tmp_path, "safetensors")
    path = path.rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    assert load_adapter(tmp_path).format == "converted"


def test_names_without_metadata_are_never_guessed(tmp_path):
    path, tensors = written(tmp_path, "safetensors")
    raw = tmp_path / "raw.safetensors"
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, raw)
    with pytest.raises(AdapterError, match=r"(?s)doesn't state alpha.*converted if it was converted"):
        load_adapter(raw)
    told = load_adapter(raw, format="converted")
    np.testing.assert_array_equal(
        told.modules["model.q.weight"].lora_a, load_adapter(path).modules["model.q.weight"].lora_a
    )
    assert "so this can't be checked" in told.notes[0]


def test_peft_files_are_not_taken_for_converted_ones(tmp_path):
    tensors = {
        "base_model.model.model.q.lora_A.weight": random(2, 2),
        "base_model.model.model.q.lora_B.weight": random(2, 2, seed=1),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    read = load_adapter(tmp_path)
    assert read.format == "peft"
    np.testing.assert_array_equal(read.modules["model.q.weight"].lora_a, random(2, 2))


def test_options_that_a_converted_file_has_no_use_for(tmp_path):
    path, _ = written(tmp_path, "safetensors")
    with pytest.raises(AdapterError) as caught:
        load_adapter(path, alpha=2.0, rslora=True, rank=3)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        *("alpha", "rslora", "model.q", "model.up"),
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"x.lora_A.weight": None}, "x: lora_A is missing (found: x.lora_B.weight, x.lora_scale.weight)"),
        ({"x.bias": random(3)}, "x.bias: not <module>.lora_A.weight (in_dim, rank), .lora_B.weight"),
        ({"x.lora_B.weight": random(3, 4)}, "x: lora_A (2, 5) and lora_B (4, 3) have no common rank"),
        ({"x.lora_A.weight": np.full((5, 2), np.nan, np.float32)}, "x lora_a: 10 of 10 values are NaN"),
        ({"x.lora_scale.weight": random(3)}, "x: lora_scale (3,), wanted one value for each of 4"),
        ({"x.lora_scale.weight": np.full(4, np.inf, np.float32)}, "x lora_scale: 4 of 4 values are NaN"),
    ],
)
def test_damaged_contents_are_said(tmp_path, change, problem):
    tensors = {
        "x.lora_A.weight": random(5, 2),
        "x.lora_B.weight": random(2, 4),
        "x.lora_scale.weight": random(4),
    } | change
    path = tmp_path / "bad.safetensors"
    kept = {name: values for name, values in tensors.items() if values is not None}
    save_file(kept, path, metadata=provenance({}).metadata())
    with pytest.raises(AdapterError) as caught:
        load_adapter(path)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_damaged_kinds_are_said(tmp_path):
    path = tmp_path / "bad.safetensors"
    metadata = provenance({}).metadata() | {"kinds": "[1"}
    save_file({"x.lora_A.weight": random(5, 2), "x.lora_B.weight": random(2, 4)}, path, metadata=metadata)
    with pytest.raises(AdapterError, match="metadata kinds: '\\[1' is not a JSON object"):
        load_adapter(path)


# --- onnx_adapter ------------------------------------------------------------------------------------


def test_onnxruntime_reads_what_we_write(tmp_path):
    path, tensors = written(tmp_path, "onnx_adapter")
    file = ort.AdapterFormat.read_adapter(str(path))
    found = {name: value.numpy() for name, value in file.get_parameters().items()}
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values)
    assert file.get_model_version() == base_version(BASE)


def test_onnxruntime_sees_bfloat16(tmp_path):
    path, tensors = written(tmp_path, "onnx_adapter", "bfloat16")
    found = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert {value.data_type() for value in found.values()} == {"tensor(bfloat16)"}
    name = "model.up.lora_B.weight"
    read = load_adapter(path).modules["model.up.weight"].lora_b
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, tensors[name].T)


def test_files_of_other_tools_bind_and_say_that_their_base_is_unknown(tmp_path):
    path, tensors = tmp_path / "olive.onnx_adapter", written(tmp_path, "onnx_adapter")[1]
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(v) for name, v in tensors.items()})
    file.export_adapter(str(path))
    read = load_adapter(path)
    assert "doesn't state the base it was converted for" in read.notes[0]
    assert bind_adapter(read, graph(), where="g").tensors.keys() == tensors.keys()


def test_an_embedding_binds_though_the_format_does_not_tell_its_kind(tmp_path):
    module = embedding("e", 7, 3)
    exposed = LoraRecord(
        mode="swap",
        base="b",
        base_sha256=BASE,
        modules=(
            ExposedModule(
                name="e",
                kind="embedding",
                in_dim=7,
                out_dim=3,
                dtype="float32",
                members=(Member(path="e", start=0, out_dim=3),),
            ),
        ),
        max_rank=8,
    )
    tensors = bind_adapter(adapter_of(module), exposed, where="g").tensors
    path = tmp_path / "e.onnx_adapter"
    writer_of("onnx_adapter").write(path, tensors, provenance({"e": 2}, kinds={"e": "embedding"}))
    again = bind_adapter(load_adapter(path), exposed, where="g").tensors
    for name, values in tensors.items():
        np.testing.assert_array_equal(again[name], values)


def test_damaged_onnx_adapter_files(tmp_path):
    path, _ = written(tmp_path, "onnx_adapter")
    cut = tmp_path / "cut.onnx_adapter"
    cut.write_bytes(path.read_bytes()[:300])
    with pytest.raises(AdapterError, match=r"is not a complete \.onnx_adapter file"):
        load_adapter(cut)
    cut.write_text("no adapter at all")
    with pytest.raises(AdapterError, match=r"is not a complete \.onnx_adapter file"):
        load_adapter(cut)
    odd = ort.AdapterFormat()
    odd.set_parameters({"x.lora_A.weight": ort.OrtValue.ortvalue_from_numpy(np.ones((2, 2), np.int64))})
    odd.export_adapter(str(cut))
    with pytest.raises(AdapterError, match="tensors that are not floating-point"):
        load_adapter(cut)


def test_without_onnxruntime_the_pip_line_is_said(tmp_path, monkeypatch):
    path, _ = written(tmp_path, "onnx_adapter")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'lora-export\[cpu\]'"):
        load_adapter(path)
    with pytest.raises(BackendUnavailable):
        writer_of("onnx_adapter").write(tmp_path / "b", {}, provenance({}))


def test_other_formats_are_read_without_onnxruntime(tmp_path):
    path, _ = written(tmp_path, "safetensors")
    script = (
        f"import sys, lora_export; lora_export.load_adapter({str(path)!r}); "
        "assert 'onnxruntime' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- edge-llm ----------------------------------------------------------------------------------------


def test_edge_llms_folder_is_what_its_runtime_loads(tmp_path):
    path, tensors = written(tmp_path, "edge-llm")
    assert sorted(child.name for child in path.iterdir()) == [
        "config.json",
        "processed_adapter_model.safetensors",
    ]
    found = load_file(path / "processed_adapter_model.safetensors")
    assert {values.dtype for values in found.values()} == {np.dtype(np.float16)}
    assert found["model.up.lora_A.weight"].shape == (5, 2)
    assert found["model.up.lora_B.weight"].shape == (2, 6)
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values)
    config = json.loads((path / "config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["target_modules"] == ["model.q", "model.up"]
    assert load_adapter(path).name == "out"


def test_a_folder_of_edge_llms_own_converter_is_read(tmp_path):
    module = linear("model.up", 6, 5)
    folder = tmp_path / "emotion"
    folder.mkdir()
    save_file(
        {
            "model.up.lora_A.weight": np.ascontiguousarray(module.lora_a.T).astype(np.float16),
            "model.up.lora_B.weight": np.ascontiguousarray(module.lora_b.T * 1.5).astype(np.float16),
        },
        folder / "processed_adapter_model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    read = load_adapter(folder)
    assert (read.name, read.format) == ("emotion", "edge-llm")
    got = read.modules["model.up.weight"]
    assert isinstance(got, LoraModule)
    np.testing.assert_allclose(
        (got.scaling * got.lora_b @ got.lora_a).astype(np.float64),
        1.5 * module.lora_b @ module.lora_a,
        atol=2e-2,
    )


@pytest.mark.parametrize("metadata", [{"layout": "onnx"}, None])
def test_two_adapters_of_other_values_have_two_identities(tmp_path, metadata):
    """Also under one header, whoever wrote it."""
    written(tmp_path, "safetensors")
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "numpy") as opened:
        said = opened.metadata()
    first, hashes = load_adapter(file).sha256, set()
    tensors = load_file(file)
    for factor in (1, 3):
        save_file({name: value * factor for name, value in tensors.items()}, file, said)
        hashes.add(load_adapter(file).sha256)
    assert len(hashes) == 2
    assert first
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    for factor in (1, 3):
        name = "base_model.model.q.lora_{}.weight"
        values = {name.format("A"): np.full((2, 3), factor, "f4"), name.format("B"): np.ones((3, 2), "f4")}
        save_file(values, peft / "adapter_model.safetensors", metadata)
        hashes.add(load_adapter(peft).sha256)
    assert len(hashes) == 4
