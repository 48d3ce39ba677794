"""GPUs as data: complete, consistent, and found by the names that people give them."""

import json
import re
import tomllib
from importlib.resources import files
from itertools import pairwise

import pytest
from click.testing import CliRunner

from lora_export.commands.targets import targets as command
from lora_export.errors import BackendError
from lora_export.machines.targets import (
    COMPILERS,
    PRECISIONS,
    RTX_COMPUTE_CAPABILITIES,
    find_target,
    gpus_of,
    known_compute_capabilities,
    load_targets,
    select_targets,
)

TARGETS = load_targets()
GIB = 2**30
each_target = pytest.mark.parametrize("target", [pytest.param(t, id=n) for n, t in TARGETS.items()])


def raw():
    return tomllib.loads((files("lora_export.machines") / "targets.toml").read_text(encoding="utf-8"))


@each_target
def test_every_entry_is_complete(target):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", target.name)
    assert target.label
    assert re.fullmatch(r"\d{1,2}\.\d", target.compute_capability)
    assert target.sm == f"sm{target.compute_capability.replace('.', '')}"
    assert GIB <= target.memory_bytes <= 1024 * GIB
    assert target.bandwidth_bytes_s is None or 10**10 < target.bandwidth_bytes_s < 10**14
    assert re.match(r"https://[a-z]+\.nvidia\.com/", target.source)


@each_target
def test_precisions_follow_the_compute_capability(target):
    major_minor = float(target.compute_capability)
    assert target.precisions <= set(PRECISIONS)
    assert {"fp32", "fp16", "int8"} <= target.precisions
    assert ("bf16" in target.precisions) == ("tf32" in target.precisions) == (major_minor >= 8.0)
    assert ("int4" in target.precisions) == (major_minor >= 8.0)
    assert ("fp8" in target.precisions) == (major_minor >= 8.9)
    assert ("fp4" in target.precisions) == (major_minor >= 10.0)


@each_target
def test_compilers_follow_the_rule(target):
    assert target.compilers
    assert set(target.compilers) <= set(COMPILERS)
    assert "tensorrt" in target.compilers
    if "tensorrt-rtx" in target.compilers:
        assert target.compute_capability in RTX_COMPUTE_CAPABILITIES
    # The vendor's pages promise RTX GPUs and DGX Spark, no others.
    assert ("tensorrt-rtx" in target.compilers) == target.name.startswith(("rtx-", "dgx-spark"))


@each_target
def test_only_jetson_and_spark_share_memory(target):
    assert target.shared_memory == ("Jetson" in target.label or "Spark" in target.label)


def test_names_are_there_once():
    names = [name for family in raw()["family"] for name in family["gpus"]]
    spelled = [
        alias
        for family in raw()["family"]
        for gpu in family["gpus"].values()
        for alias in gpu.get("aliases", ())
    ]
    assert len(names) == len(set(names)) == len(TARGETS)
    assert len({target.label for target in TARGETS.values()}) == len(TARGETS)
    for name in [*names, *spelled]:
        assert find_target(name).name in TARGETS
    assert not set(names) & set(spelled)
    for name in names:
        assert find_target(name).name == name
        assert find_target(TARGETS[name].label).name == name


def test_no_field_is_misspelled():
    family_keys = {"compute_capability", "compilers", "shared_memory", "source", "gpus"}
    gpu_keys = {"label", "memory_gb", "bandwidth_gb_s", "source", "aliases"}
    for family in raw()["family"]:
        assert set(family) <= family_keys
        for gpu in family["gpus"].values():
            assert {"label", "memory_gb"} <= set(gpu) <= gpu_keys


def test_the_gpus_that_people_ask_for_are_there():
    text = """
        orin-nano-4gb orin-nano-8gb orin-nano-super-8gb orin-nx-8gb orin-nx-16gb agx-orin-32gb agx-orin-64gb
        jetson-thor jetson-t4000 dgx-spark
        rtx-2060 rtx-2070 rtx-2080 rtx-2080-ti rtx-3050 rtx-3060 rtx-3070 rtx-3080 rtx-3090 rtx-3090-ti
        rtx-4060 rtx-4060-ti rtx-4070 rtx-4070-ti rtx-4080 rtx-4080-super rtx-4090
        rtx-5050 rtx-5060 rtx-5060-ti-16gb rtx-5070 rtx-5070-ti rtx-5080 rtx-5090
        rtx-3060-laptop rtx-3070-laptop rtx-3080-laptop rtx-4050-laptop rtx-4060-laptop rtx-4070-laptop
        rtx-4080-laptop rtx-4090-laptop rtx-5060-laptop rtx-5070-laptop rtx-5080-laptop rtx-5090-laptop
        rtx-a2000 rtx-a4000 rtx-a4500 rtx-a5000 rtx-a6000 rtx-2000-ada rtx-4000-ada rtx-5000-ada rtx-6000-ada
        rtx-pro-2000 rtx-pro-4000 rtx-pro-4500 rtx-pro-5000 rtx-pro-6000
        t4 a2 a10 a30 l4 l40s a100-40gb a100-80gb-pcie a100-80gb-sxm h100-pcie h100-sxm h200 b200
    """
    assert set(text.split()) <= set(TARGETS)


def test_figures_that_are_easily_mixed_up():
    """A laptop's GPU is another chip, and a module's mode another memory clock."""
    assert TARGETS["rtx-4070"].memory_bytes == 12 * GIB
    assert TARGETS["rtx-4070-laptop"].memory_bytes == 8 * GIB
    assert TARGETS["orin-nano-8gb"].bandwidth_bytes_s == 68 * 10**9
    assert TARGETS["orin-nano-super-8gb"].bandwidth_bytes_s == 102 * 10**9
    assert TARGETS["rtx-6000-ada"].compute_capability == "8.9"
    assert TARGETS["rtx-a6000"].compute_capability == "8.6"
    assert TARGETS["rtx-pro-6000"].compute_capability == "12.0"
    assert TARGETS["jetson-thor"].compute_capability == "11.0"


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("RTX-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-laptop"),
        ("GeForce RTX 4060 Ti 16GB", "rtx-4060-ti-16gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("Tesla T4", "t4"),
        ("NVIDIA GB10", "dgx-spark"),
        ("NVIDIA Thor", "jetson-thor"),
        ("Jetson Orin Nano 8GB", "orin-nano-8gb"),
        ("L40s", "l40s"),
    ],
)
def test_spellings(spelled, name):
    assert find_target(spelled) is TARGETS[name]


@pytest.mark.parametrize("spelled", ["sm89", "SM_89", "sm 89", "8.9", " 8.9 "])
def test_a_compute_capability_stands_for_all_of_its_gpus(spelled):
    found = find_target(spelled)
    assert (found.name, found.sm, found.compute_capability) == ("sm89", "sm89", "8.9")
    assert found.memory_bytes is None
    assert found.bandwidth_bytes_s is None
    assert found.compilers == ("tensorrt-rtx", "tensorrt")
    assert found.precisions == TARGETS["rtx-4090"].precisions


@pytest.mark.parametrize("compute_capability", known_compute_capabilities())
def test_compute_capabilities(compute_capability):
    found = find_target(compute_capability)
    assert found.compute_capability == compute_capability
    assert ("tensorrt-rtx" in found.compilers) == (compute_capability in RTX_COMPUTE_CAPABILITIES)
    assert gpus_of(compute_capability), "listed, and no GPU has it"
    assert {t.compute_capability for t in gpus_of(compute_capability)} == {compute_capability}


def test_compute_capabilities_are_in_order_and_those_of_rtx_are_known():
    known = known_compute_capabilities()
    assert all(float(a) < float(b) for a, b in pairwise(known))
    assert set(RTX_COMPUTE_CAPABILITIES) <= set(known)
    assert {t.compute_capability for t in TARGETS.values()} == set(known)
    assert gpus_of("1.0") == ()


@pytest.mark.parametrize(
    ("asked", "offered"),
    [
        ("rtx-4095", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("h100", "h100-pcie or h100-sxm or h100-nvl"),
        ("orin-nano", "orin-nano-4gb or orin-nano-8gb"),
        ("sm70", "7.5, 8.0, 8.6"),
        ("9.9", "7.5, 8.0, 8.6"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(asked, offered):
    with pytest.raises(BackendError) as caught:
        find_target(asked)
    assert offered in caught.value.message
    assert caught.value.hint == "lora-export targets lists them"


@pytest.mark.parametrize("asked", ["", "-", "quux", "sm", "8.", "gtx-1080"])
def test_nonsense_is_refused(asked):
    with pytest.raises(BackendError, match="no GPU is called"):
        find_target(asked)


def test_rtx_compute_capabilities_are_the_packages_own():
    trt = pytest.importorskip("tensorrt_rtx")
    members = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    assert [f"{name[:-1]}.{name[-1]}" for name in members] == list(RTX_COMPUTE_CAPABILITIES)


def test_selection():
    assert [t.name for t in select_targets(["laptop", "5090"])] == ["rtx-5090-laptop"]
    assert {t.name for t in select_targets(["spark"])} == {"dgx-spark"}
    large = select_targets(compiler="tensorrt-rtx", precision="fp4", min_memory_gb=32)
    assert {"rtx-5090", "rtx-pro-6000", "dgx-spark"} <= {t.name for t in large}
    assert all(t.memory_bytes >= 32 * GIB for t in large)
    assert select_targets(compute_capability="sm89") == list(gpus_of("8.9"))
    assert select_targets() == list(TARGETS.values())
    with pytest.raises(BackendError, match=r"6\.1"):
        select_targets(compute_capability="6.1")


def test_command_prints_a_table_and_says_how_to_build():
    done = CliRunner().invoke(command, ["4090", "--min-memory", "20"])
    assert done.exit_code == 0
    assert re.search(
        r"rtx-4090 +GeForce RTX 4090 +8\.9 +24 GB +1008 GB/s +fp16 bf16 int8 fp8 int4", done.stdout
    )
    assert "laptop" not in done.stdout
    assert "lora-export build-engine model.onnx --target rtx-4090" in done.stderr
    assert "shared" in CliRunner().invoke(command, ["orin"]).stdout


def test_command_prints_json():
    (row,) = json.loads(CliRunner().invoke(command, ["dgx", "--json"]).stdout)
    assert row["name"] == "dgx-spark"
    assert row["shared_memory"] is True
    assert row["precisions"] == list(PRECISIONS)
    assert row["source"].startswith("https://")


def test_command_says_when_nothing_fits():
    done = CliRunner().invoke(command, ["4090", "--compute-capability", "8.6"])
    assert isinstance(done.exception, BackendError)
    assert done.exception.exit_code == 1
    assert "no GPU meets" in str(done.exception)
    assert done.stdout == ""


def test_the_data_is_in_the_wheel():
    """Hatchling takes all files of the package; one that git ignored would be left out."""
    assert (files("lora_export.machines") / "targets.toml").is_file()
