"""What a machine can do, told from fake drivers and fake packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from lora_export.commands.doctor import doctor as command
from lora_export.doctor import doctor
from lora_export.doctor.checks import Machine, capabilities
from lora_export.machines import local_gpus as gpus_module
from lora_export.machines.local_gpus import LocalGpus, local_gpus
from lora_export.machines.packages import PACKAGES, Package, probe, read_lines
from lora_export.machines.targets import RTX_COMPUTE_CAPABILITIES
from lora_export.reports.doctor import doctor_lines

ROOT = Path(__file__).resolve().parents[2]
RTX_4090 = "NVIDIA GeForce RTX 4090, 8.9, 24564 MiB, 580.65.06"
H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 570.86.15"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put an `nvidia-smi` on the path that prints this."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=None)

    def install(output, code=0, before=""):
        script = folder / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{before}\n/bin/cat <<'END'\n{output}\nEND\nexit {code}\n")
        script.chmod(0o755)

    return install


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Put packages on the path that do this when they are imported."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    def install(**code):
        for name, text in code.items():
            folder = tmp_path / "site" / name
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(text)

    return install


def machine(gpus=(), **statuses):
    """Return a machine on which everything is installed but what is said to be otherwise."""
    details = {
        "onnxruntime": {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]},
        "tensorrt_rtx": {"compute_capabilities": list(RTX_COMPUTE_CAPABILITIES)},
        "torch": {"cuda": None},
    }
    found = {
        name: Package(
            name=name,
            status=statuses.get(name.replace(".", "_"), "ok"),
            version="1.0",
            reason="boom",
            details=details.get(name, {}),
        )
        for name in PACKAGES
    }
    return Machine(LocalGpus(tuple(gpus), "" if gpus else "no NVIDIA GPU found"), found)


def by_name(on):
    return {capability.name: capability for capability in capabilities(on)}


def test_a_gpu_is_read_from_the_driver(driver):
    driver(RTX_4090)
    found = local_gpus()
    (gpu,) = found.gpus
    assert found.problem == ""
    assert (gpu.name, gpu.compute_capability, gpu.driver) == ("NVIDIA GeForce RTX 4090", "8.9", "580.65.06")
    assert gpu.memory_bytes == 24564 * 2**20
    assert gpu.target == "rtx-4090"


def test_several_gpus_and_memory_that_the_cpu_shares(driver):
    driver(f"{RTX_4090}\nNVIDIA GB10, 12.1, [N/A], 580.95.05\nOrin (nvgpu), [N/A], [N/A], N/A")
    _, spark, orin = local_gpus().gpus
    assert (spark.target, spark.memory_bytes) == ("dgx-spark", None)
    assert (orin.target, orin.compute_capability) == (None, None)


def test_a_known_gpu_has_a_compute_capability_if_the_driver_has_none(driver):
    driver("NVIDIA Thor, [N/A], [N/A], 580.00")
    assert local_gpus().gpus[0].compute_capability == "11.0"


@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("Hello there", 0, "can't read this line of nvidia-smi: 'Hello there'"),
        ("<html>, 1, 2, 3", 0, "can't read this line of nvidia-smi"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver.", 9, "couldn't communicate"),
        ('Field "compute_cap" is not a valid field to query.', 2, "not a valid field"),
        ("", 12, "exit code 12"),
        ("", 0, "lists none"),
    ],
)
def test_a_driver_that_does_not_answer(driver, output, code, said):
    driver(output, code)
    found = local_gpus()
    assert found.gpus == ()
    assert said in found.problem


def test_what_can_be_read_stays_beside_what_can_not(driver):
    driver(f"{RTX_4090}\ngarbage")
    found = local_gpus()
    assert [gpu.target for gpu in found.gpus] == ["rtx-4090"]
    assert "'garbage'" in found.problem


def test_a_driver_that_hangs_or_is_no_program(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(gpus_module, "_TIMEOUT_S", 0.2)
    driver(RTX_4090, before="/bin/sleep 5")
    assert "did not answer" in local_gpus().problem
    (tmp_path / "bin" / "nvidia-smi").write_bytes(b"\x7fELF no program")
    assert "can't be run" in local_gpus().problem


@pytest.mark.usefixtures("driver")
def test_no_driver():
    assert local_gpus() == LocalGpus((), "no NVIDIA GPU found (nvidia-smi is missing)")


def test_everything_works_on_an_rtx_gpu(driver):
    driver(RTX_4090)
    found = by_name(machine(local_gpus().gpus))
    assert all(capability.works for capability in found.values())
    assert not any(capability.fix for capability in found.values())
    assert "NVIDIA GeForce RTX 4090 (8.9)" in found["run-tensorrt-rtx"].reason
    assert "needs no GPU" in found["build-tensorrt-rtx"].reason


def test_tensorrt_rtx_does_not_run_on_hopper(driver):
    driver(H100)
    found = by_name(machine(local_gpus().gpus))
    run = found["run-tensorrt-rtx"]
    assert not run.works
    assert "NVIDIA H100 80GB HBM3 has 9.0" in run.reason
    assert "use classic TensorRT" in run.reason
    assert found["build-tensorrt-rtx"].works
    assert found["build-tensorrt"].works
    assert found["run-cuda"].works


def test_without_a_gpu_everything_but_running_on_one_works():
    found = by_name(machine())
    dead = {name for name, capability in found.items() if not capability.works}
    assert dead == {"run-cuda", "run-tensorrt-rtx", "build-tensorrt", "run-tensorrt"}
    assert all("no NVIDIA GPU found" in found[name].reason for name in dead)


def test_nothing_installed_leaves_merging_and_says_what_to_install(driver):
    driver(RTX_4090)
    nothing = {name.replace(".", "_"): "missing" for name in PACKAGES}
    found = by_name(machine(local_gpus().gpus, **nothing))
    assert [name for name, capability in found.items() if capability.works] == ["merge"]
    for name, extra in {
        "read-pickles": "hf",
        "capture": "hf",
        "run-cpu": "cpu",
        "run-cuda": "gpu",
        "genai": "genai",
        "demo": "demo",
        "build-tensorrt-rtx": "rtx",
        "run-tensorrt-rtx": "rtx",
        "build-tensorrt": "tensorrt",
        "run-tensorrt": "tensorrt",
    }.items():
        assert found[name].fix == f"pip install 'lora-export[{extra}]'"
        assert "not installed" in found[name].reason


def test_every_extra_that_is_named_exists():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    nothing = {name.replace(".", "_"): "missing" for name in PACKAGES}
    for capability in capabilities(machine(**nothing)):
        if capability.fix:
            assert capability.fix.split("[")[1].split("]")[0] in extras


def test_broken_and_missing_packages_are_told_apart():
    found = by_name(machine(torch="broken", onnxscript="missing"))["capture"]
    assert found.reason == "torch is broken: boom; onnxscript is not installed"
    assert found.fix == "pip install --force-reinstall torch && pip install 'lora-export[hf]'"


def test_what_runs_engines_beside_tensorrt(driver):
    driver(RTX_4090)
    found = by_name(machine(local_gpus().gpus, cuda_bindings="missing"))
    assert found["build-tensorrt"].works
    for name in ("run-tensorrt-rtx", "run-tensorrt"):
        assert found[name].reason == "cuda-bindings is not installed"
        extra = "rtx" if name.endswith("rtx") else "tensorrt"
        assert found[name].fix == f"pip install 'lora-export[{extra}]'"


def test_onnxruntime_without_cuda_has_to_go_first(driver):
    driver(RTX_4090)
    on = machine(local_gpus().gpus)
    on.packages["onnxruntime"] = Package(
        name="onnxruntime", status="ok", version="1.0", details={"providers": ["CPUExecutionProvider"]}
    )
    found = by_name(on)["run-cuda"]
    assert not found.works
    assert found.fix == "pip uninstall onnxruntime && pip install 'lora-export[gpu]'"


BROKEN = "raise ImportError('libnvinfer.so.11: cannot open shared object file:\\n No such file')"


def test_broken_packages_are_reported(packages):
    packages(
        tensorrt=BROKEN,
        torch="import ctypes; ctypes.CDLL('libnothing.so')",
        peft="raise SystemExit(3)",
        transformers="class E(BaseException): pass\nraise ValueError('x' * 1000)",
        onnxscript="import not_there_at_all",
    )
    names = ["tensorrt", "torch", "peft", "transformers", "onnxscript"]
    found = {package.name: package for package in doctor.probe_packages(names)}
    assert {package.status for package in found.values()} == {"broken"}
    assert found["tensorrt"].reason == (
        "ImportError: libnvinfer.so.11: cannot open shared object file: No such file"
    )
    assert found["torch"].reason.startswith("OSError: libnothing.so")
    assert len(found["transformers"].reason) <= 300
    assert "not_there_at_all" in found["onnxscript"].reason


def test_a_package_that_ends_the_process_is_the_only_one_lost(packages):
    packages(
        torch="__version__ = '1'\nclass version: cuda = '13.0'",
        peft="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        transformers="import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(7)",
        onnxscript="print('noise on stdout')",
    )
    torch, peft, transformers, onnxscript = doctor.probe_packages(
        ["torch", "peft", "transformers", "onnxscript"]
    )
    assert (torch.status, torch.details) == ("ok", {"cuda": "13.0"})
    assert (peft.status, peft.reason) == ("broken", "Python was ended by SIGSEGV while importing it")
    assert transformers.reason == "Python ended with exit code 7 while importing it: last words"
    assert onnxscript.status == "ok"


def test_a_package_that_hangs(packages, monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 3)
    packages(torch="class version: cuda = None", peft="import time; time.sleep(60)")
    torch, peft = doctor.probe_packages(["torch", "peft"])
    assert torch.status == "ok"
    assert peft.reason == "its import was not done after 3 s"


def test_python_itself_does_not_start(monkeypatch):
    monkeypatch.setattr(
        doctor, "_run_probe", lambda names: ("", "Python ended with exit code 1: no encodings")
    )
    found = doctor.probe_packages(["torch", "peft"])
    assert [package.status for package in found] == ["broken", "broken"]
    assert "no encodings" in found[1].reason


def test_folders_of_the_user_are_no_packages(packages, tmp_path, monkeypatch):
    packages(peft=BROKEN)
    (tmp_path / "site" / "tensorrt").mkdir()
    monkeypatch.chdir(tmp_path / "site")
    monkeypatch.delenv("PYTHONPATH")
    tensorrt, peft = doctor.probe_packages(["tensorrt", "peft"])
    assert "libnvinfer" not in peft.reason
    assert probe("a_folder_that_is_not_there").status == "missing"
    if not tensorrt.distribution:
        assert tensorrt.status == "missing"


def test_the_probe_without_any_package():
    """-S: Python without its site-packages."""
    command = [sys.executable, "-S", "-m", "lora_export.machines.packages"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found, importing = read_lines(done.stdout)
    assert importing == ""
    assert {package.name: package.status for package in found} == dict.fromkeys(PACKAGES, "missing")


def test_the_probe_says_what_it_is_and_loads_nothing():
    script = (
        "import runpy, sys; sys.argv = ['probe', '--help']\n"
        "runpy.run_module('lora_export.machines.packages', run_name='__main__')\n"
        "loaded = {'numpy', 'torch', 'onnx_ir', 'click', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m lora_export.machines.packages" in done.stdout


def test_a_line_that_was_cut_off_names_no_package():
    whole = Package(name="torch", status="ok", version="2").to_json()
    assert read_lines(f'{whole}\n{{"importing": "peft"}}\n{{"name": "pe') == (
        [Package(name="torch", status="ok", version="2")],
        "peft",
    )


def test_the_report_as_text(driver):
    driver(f"{H100}\nNVIDIA GB10, 12.1, [N/A], 580.95.05")
    on = machine(local_gpus().gpus, tensorrt="broken", peft="missing")
    report = doctor.DoctorReport(
        version="0",
        python="3.11",
        platform="Linux x86_64",
        gpus=on.gpus,
        packages=tuple(on.packages.values()),
        capabilities=capabilities(on),
    )
    text = "\n".join(doctor_lines(report))
    assert "NVIDIA H100 80GB HBM3  compute capability 9.0   79.6 GiB" in text
    assert "--target h100-sxm" in text
    assert "memory shared with the CPU" in text
    assert "broken: boom" in text
    assert "yes  run engines of TensorRT-RTX" in text
    assert "no   build engines with classic TensorRT" in text
    assert "fix it: pip install --force-reinstall tensorrt" in text


def test_the_command_on_this_machine(driver, packages):
    """Everything real but the driver and one package; nothing may raise, and the exit code is 0."""
    driver("garbage")
    packages(tensorrt=BROKEN)
    done = CliRunner().invoke(command, ["--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["gpus"] == {"gpus": [], "problem": "can't read this line of nvidia-smi: 'garbage'"}
    assert [package["name"] for package in data["packages"]] == list(PACKAGES)
    broken = {package["name"] for package in data["packages"] if package["status"] == "broken"}
    assert broken == {"tensorrt"}
    works = {capability["name"]: capability["works"] for capability in data["capabilities"]}
    assert works["merge"]
    assert not works["run-cuda"]


def test_usage_errors_are_2():
    assert CliRunner().invoke(command, ["--nothing"]).exit_code == 2
