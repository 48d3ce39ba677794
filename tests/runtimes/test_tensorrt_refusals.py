"""Engines that can't run here, options that can't be used, and the files beside an engine."""

import sys

import engine_files
import pytest
from engine_files import engine_of, rewrite_record
from safetensors.numpy import save_file
from session_graphs import P, Q, feeds, swap

import lora_export.engines.record as records
from lora_export import AdapterSession, BackendError, BackendUnavailable, OutputError
from lora_export.engines import compiler_of
from lora_export.engines.record import BuildOptions, record_path
from lora_export.machines.packages import PACKAGES
from lora_export.runtimes.tensorrt import engine as tensorrt_engine
from lora_export.runtimes.tensorrt.engine import gpu_compute_capability

machine = engine_files.machine


def swap_engine(tmp_path, **options):
    return engine_of(swap(tmp_path, flavour="tensorrt"), **options)


def refusal(engine, **options):
    with pytest.raises(BackendError) as refused:
        AdapterSession(engine, **options)
    return refused.value


def test_everything_in_the_way_is_said_at_once(machine, tmp_path):
    machine.cuda.compute_capability = "9.0"
    engine = swap_engine(tmp_path, builder_version="1.6.0.1", platform="windows-amd64")
    found = refusal(engine)
    assert found.problems[0] == "it was built by TensorRT-RTX 1.6.0.1, but 1.7.1.116 is installed"
    assert found.problems[1].startswith("the engine is for windows-amd64, this machine is ")
    assert found.problems[2] == (
        "the GPU has compute capability 9.0, which TensorRT-RTX does not support: it runs on "
        "7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    )
    assert found.hint == "install TensorRT-RTX 1.6.0.1, or build the engine again"
    assert not machine.calls, "TensorRT was asked"


def test_another_gpu(machine, tmp_path):
    machine.cuda.compute_capability = "8.6"
    found = refusal(swap_engine(tmp_path, compute_capabilities=("8.9", "12.0")))
    assert found.problems == ("the GPU has compute capability 8.6, the engine is for 8.9 or 12.0",)


@pytest.mark.parametrize(("here", "runs"), [("8.0", True), ("9.0", True), ("7.5", False)])
def test_hardware_compatible_engines_run_from_ampere_on(machine, tmp_path, here, runs):
    machine.cuda.compute_capability = here
    options = BuildOptions(hardware_compatible=True)
    engine = swap_engine(tmp_path, backend="tensorrt", options=options, compute_capabilities=("8.6",))
    if runs:
        AdapterSession(engine)
    else:
        assert refusal(engine).problems == ("the GPU has compute capability 7.5, the engine is for 8.6",)


@pytest.mark.parametrize(("built", "runs"), [("1.2.0", True), ("2.0.0", False)])
def test_version_compatible_engines_run_within_their_major_version(machine, tmp_path, built, runs):
    options = BuildOptions(version_compatible=True)
    engine = swap_engine(tmp_path, backend="tensorrt", options=options, builder_version=built)
    if runs:
        AdapterSession(engine)
    else:
        assert refusal(engine).problems == ("it was built by TensorRT 2.0.0, but 1.7.1.116 is installed",)


@pytest.mark.parametrize(("built", "runs"), [("1.7.1", True), ("1.7.2", False), ("1.7.1.117", False)])
def test_a_kits_engine_has_the_version_that_trtexec_says(machine, tmp_path, built, runs):
    """One number less than the package's."""
    engine = swap_engine(tmp_path, backend="tensorrt", builder_version=built)
    if runs:
        AdapterSession(engine)
    else:
        assert refusal(engine).problems == (f"it was built by TensorRT {built}, but 1.7.1.116 is installed",)


def test_an_engine_without_weights_is_not_run(machine, tmp_path):
    engine = swap_engine(tmp_path, options=BuildOptions(strip_weights=True))
    assert "holds no weights" in refusal(engine).message
    assert "MergedEngine" in refusal(engine).hint


def test_no_gpu(machine, tmp_path):
    machine.cuda.devices = 0
    found = refusal(swap_engine(tmp_path))
    assert found.problems == (
        "CUDA could not find a GPU: cudaErrorNoDevice: no CUDA-capable device is detected",
    )
    assert gpu_compute_capability() is None
    machine.cuda.devices = 1
    assert gpu_compute_capability() == "8.9"
    assert refusal(swap_engine(tmp_path / "b"), device_id=1).problems == ("there is no GPU 1: CUDA sees 1",)


@pytest.mark.parametrize(("backend", "extra"), [("tensorrt-rtx", "rtx"), ("tensorrt", "tensorrt")])
def test_packages_that_are_missing(machine, tmp_path, monkeypatch, backend, extra):
    engine = swap_engine(tmp_path, backend=backend)
    kind = type(compiler_of(backend))
    monkeypatch.setitem(PACKAGES, kind.package, ("no-such-distribution",))
    monkeypatch.setattr(kind, "version", kind.__mro__[1].version)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailable, match="can't run here") as refused:
        AdapterSession(engine)
    assert refused.value.problems[0] == f"{backend} is not installed"
    assert refused.value.problems[1].startswith("running an engine needs cuda-bindings")
    assert refused.value.hint == f"pip install 'lora-export[{extra}]'; pip install cuda-bindings"


def test_what_tensorrt_rtx_says_of_the_header(machine, tmp_path):
    engine = swap_engine(tmp_path)
    machine.validity, machine.diagnostics = 2, 4 | 16
    assert refusal(engine).problems == ("old cuda driver", "insufficient gpu memory")
    machine.validity = 1
    with pytest.warns(RuntimeWarning, match="may be faster here"):
        AdapterSession(engine)


@pytest.mark.skipif(gpu_compute_capability() is not None, reason="there is a GPU")
def test_the_real_tensorrt_rtx_says_that_there_is_no_gpu(tmp_path, monkeypatch):
    """The one thing that the real package does here: it refuses, through our logger."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx-cu13 is not installed")
    engine = swap_engine(tmp_path)
    monkeypatch.setattr(tensorrt_engine, "_checked_device", lambda path, record, device_id: None)
    with pytest.raises(BackendError, match="says that this engine is not valid here") as refused:
        tensorrt_engine.load_engine(engine, records.read_engine(engine))
    assert "CUDA driver version is insufficient" in refused.value.problems[0]
    monkeypatch.setattr(tensorrt_engine, "_check_validity", lambda *_, **__: None)
    with pytest.raises(BackendError, match="could not open it") as refused:
        tensorrt_engine.load_engine(engine, records.read_engine(engine))
    assert any("Serialization" in problem for problem in refused.value.problems)


def test_an_engine_that_tensorrt_does_not_open(machine, tmp_path):
    engine = swap_engine(tmp_path)
    machine.fails = {"deserialize_cuda_engine"}
    found = refusal(engine)
    assert "TensorRT could not open it" in found.message
    assert found.problems == ("deserialize_cuda_engine failed",)
    machine.fails = {"create_execution_context"}
    assert "could not make an execution context" in refusal(engine).message


def test_files_that_are_no_engine_of_ours(machine, tmp_path):
    engine = swap_engine(tmp_path)
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1])
    assert "it is cut short" in refusal(engine).message
    engine.write_bytes(whole[:-1] + b"x")
    assert ": sha256 " in refusal(engine).message
    records.record_path(engine).unlink()
    assert "has no record beside it" in refusal(engine).message
    foreign = tmp_path / "foreign.plan"
    foreign.write_bytes(b"ftrt and so on")
    assert "has no record beside it" in refusal(foreign).message
    assert "no engine at" in refusal(tmp_path / "none.engine").message


def test_options_of_the_other_kind(machine, tmp_path):
    engine = swap_engine(tmp_path)
    found = refusal(engine, provider="cpu", threads=2, session_options=object(), max_adapters=0, device_id=-1)
    assert found.problems == (
        "max_adapters is 0, wanted at least 1",
        "device_id is -1, wanted at least 0",
        "provider is 'cpu': an engine runs on a GPU",
        "threads is for ONNX Runtime only, and swap.rtx-4090.engine is an engine",
        "session_options is for ONNX Runtime only, and swap.rtx-4090.engine is an engine",
    )
    onnx = tmp_path / "swap.onnx"
    options = {"profile": "default", "runtime_cache": "c", "source": onnx, "weight_streaming_budget_bytes": 0}
    assert refusal(onnx, **options, device_id=1).problems == (
        *(
            f"{name} is for engines only, and swap.onnx is a graph"
            for name in ("profile", "runtime_cache", "weight_streaming_budget_bytes", "source")
        ),
        "device_id is 1 with provider 'cpu'",
    )
    assert AdapterSession(engine, provider="cuda").adapters == []
    with pytest.raises(BackendError, match="only a TensorRT-RTX engine has a runtime cache"):
        AdapterSession(onnx).save_runtime_cache()


# --- weight streaming, the runtime cache ---------------------------------------------------------------


def test_weight_streaming(machine, tmp_path):
    engine = swap_engine(tmp_path, options=BuildOptions(weight_streaming=True))
    AdapterSession(engine, weight_streaming_budget_bytes=400)
    assert machine.named("weight_streaming_budget_v2") == [("weight_streaming_budget_v2", 400)]
    machine.contexts = 0
    AdapterSession(engine, weight_streaming_budget_bytes=1 << 40)
    assert machine.named("weight_streaming_budget_v2")[1:] == [("weight_streaming_budget_v2", 1000)]
    machine.contexts, machine.fails = 0, {"weight_streaming_budget_v2"}
    assert "could not stream its weights" in refusal(engine, weight_streaming_budget_bytes=400).message
    rewrite_record(engine, options=BuildOptions())
    assert "was not built for weight streaming" in refusal(engine, weight_streaming_budget_bytes=0).message


def test_the_runtime_cache_is_read_and_written(machine, tmp_path):
    engine, file = swap_engine(tmp_path), tmp_path / "deep" / "kernels.cache"
    with AdapterSession(engine, runtime_cache=file) as session:
        session.run(feeds())
        assert not file.exists()
        session.save_runtime_cache()
        first = file.read_bytes()
        session.run(feeds(2))
    second = file.read_bytes()
    assert first.startswith(b"cache:")
    assert len(second) > len(first)
    with AdapterSession(engine, runtime_cache=file) as session:
        pass
    assert file.read_bytes() == second
    assert [path.name for path in file.parent.iterdir()] == ["kernels.cache"]
    file.write_bytes(b"another GPU's")
    with AdapterSession(engine, runtime_cache=file) as session:
        session.run(feeds())
    assert file.read_bytes() == first
    with pytest.raises(BackendError, match="has no runtime cache"):
        AdapterSession(engine).save_runtime_cache()
    classic = swap_engine(tmp_path / "classic", backend="tensorrt")
    assert "classic TensorRT, which has no runtime cache" in refusal(classic, runtime_cache=file).message


def test_the_runtime_cache_is_none_of_what_is_read(machine, tmp_path):
    onnx = swap(tmp_path, flavour="tensorrt")
    engine = engine_of(onnx)
    adapter = tmp_path / "adapter.safetensors"
    save_file({"p.lora_A.weight": P[:2, :4].copy(), "p.lora_B.weight": Q.T[:, :2].copy()}, adapter)
    link = tmp_path / "kernels.cache"
    link.hardlink_to(onnx)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for file in (engine, record_path(engine), onnx, link):
        with pytest.raises(OutputError, match="would replace a file that is read"):
            AdapterSession(engine, source=onnx, runtime_cache=file)
    with AdapterSession(engine, runtime_cache=tmp_path / "new" / ".." / "other.cache") as session:
        session.load_adapter("a", adapter, alpha=2)
    link.unlink()
    link.hardlink_to(adapter)
    session = AdapterSession(engine, runtime_cache=link)
    with pytest.raises(OutputError, match="would replace a file that is read"):
        session.load_adapter("a", adapter, alpha=2)
    assert all(path.read_bytes() == data for path, data in before.items() if path != link)


def test_a_cache_is_written_whole_or_not_at_all(machine, tmp_path, monkeypatch):
    file = tmp_path / "kernels.cache"
    file.write_bytes(b"cache:old")
    session = AdapterSession(swap_engine(tmp_path), runtime_cache=file)
    session.run(feeds())

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_export.storage.outputs.sync_path", full)
    with pytest.raises(OutputError, match="kernels"):
        session.close()
    assert file.read_bytes() == b"cache:old"
    with pytest.raises(BackendError, match="is closed"):
        session.run(feeds())
