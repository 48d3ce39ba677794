"""`verify` finds one flipped bit anywhere in each kind of set that a verb writes, and says of which file."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import onnx_ir as ir
import pytest
import small_graphs as small
import tiny
from bench_runs import measured
from blake3 import blake3
from engine_graphs import product
from parity_reports import good

from lora_export import (
    LoraExportError,
    bank_onnx,
    build_engine,
    convert_adapter,
    merge_checkpoint,
    merge_onnx,
    swap_onnx,
    verify,
)
from lora_export.cli import main as command_line
from lora_export.demo.run import REPORT, save_report
from lora_export.engines.plan import BuildRequest
from lora_export.integrity import check
from lora_export.integrity.check import CheckedFile
from lora_export.modes.capture_onnx import capture_onnx
from lora_export.packages.build_kit import write_kits
from lora_export.storage.hashes import hash_file
from lora_export.storage.sums.full import full_hash
from lora_export.storage.sums.seal import find_seal, sealed_json

FLIPS = 6
WIDTH = 48
ADAPTER = small.adapter(small.linear("a", WIDTH, WIDTH), small.linear("b", WIDTH, WIDTH, seed=3))


def main(*arguments):
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        command_line(list(arguments))
    return stop.value.code


def base_graph(folder, seed=0):
    """Write a graph of two products, its weights in a file of their own."""
    nodes = "h = MatMul(x, a_weight) y = MatMul(h, b_weight)"
    text = f"g (float[N, {WIDTH}] x) => (float[N, {WIDTH}] y) {{ {nodes} }}"
    weights = {f"{name}.weight": small.random(WIDTH, WIDTH, seed=seed + i) for i, name in enumerate("ab")}
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(
        small.graph(text, weights), folder / "base.onnx", external_data="base.data", size_threshold_bytes=256
    )
    return folder / "base.onnx"


def genai_base(folder):
    """Give a base what onnxruntime-genai's builder writes beside one."""
    base = base_graph(folder)
    config = {"model": {"decoder": {"filename": "base.onnx"}, "type": "llama"}}
    (folder / "genai_config.json").write_text(json.dumps(config, indent=4))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return base


def merged(base, folder):
    merge_onnx(base, ADAPTER, folder / "m.onnx")
    return folder / "m.onnx"


def sharing(base, folder):
    own = base_graph(folder / "base")
    merge_onnx(own, small.adapter(small.linear("a", WIDTH, WIDTH)), folder / "m.onnx", share_base=True)
    own.unlink()  # of the base, only the weights belong to the set
    return folder / "m.onnx"


def swapped(base, folder):
    swap_onnx(base, folder / "m.onnx", adapter=ADAPTER)
    return folder / "m.onnx"


def banked(base, folder):
    bank_onnx(base, {"one": ADAPTER}, folder / "m.onnx")
    return folder / "m.onnx"


def for_genai(base, folder):
    own = genai_base(folder.parent / "genai base")
    options = ["--target-modules", "a,b", "--no-checkpoint", "--quiet"]
    assert main("swap-onnx", "--base", str(own), *options, "-o", str(folder / "m.onnx")) == 0
    return folder / "m.onnx"


def converted(name, format=None):
    def write(base, folder):
        graph = folder.parent / "graphs for adapters" / "m.onnx"
        if not graph.exists():
            swap_onnx(base, graph, adapter=ADAPTER)
        folder.mkdir()
        convert_adapter(ADAPTER, graph, folder / name, format=format)
        return folder / name

    return write


def captured(base, folder):
    folder.mkdir()
    with tiny.quiet():
        capture_onnx(tiny.checkpoint("bert"), folder / "c.onnx")
    return folder / "c.onnx"


def checkpoint(base, folder):
    own = folder.parent / "checkpoint"
    shutil.copytree(tiny.checkpoint("bert"), own)
    (own / "1_Pooling").mkdir()
    (own / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (own / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    merge_checkpoint(own, tiny.adapter("bert"), folder)
    return folder


def engine(base, folder):
    build_engine(product(folder.parent / "p.onnx"), "sm89", folder, cache=False)
    return folder / "p.sm89.engine"


def kit(base, folder):
    (path,) = write_kits(
        product(folder.parent / "k.onnx"), BuildRequest(targets=["orin-nano-8gb"]), folder
    ).kits
    return path


def built_from_kit(base, folder):
    """The files that a kit's finish.py leaves, which has no BLAKE3."""
    made = kit(base, folder.parent / "kit to build")
    folder.mkdir()
    built, log = folder / "built", folder / "k.log"
    built.write_bytes(b"ftrt" + b"0" * 60)
    log.write_text("[I] TensorRT version: 10.13.3\n")
    arguments = [made / "record.json", built, log, folder / "k.engine"]
    subprocess.run([sys.executable, made / "finish.py", *map(str, arguments)], check=True)
    return folder / "k.engine"


def demo(base, folder):
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "model.safetensors").write_bytes(b"weights")
    merge_onnx(base, ADAPTER, folder / "m.onnx")
    save_report({"seconds": 1.0}, folder)
    return folder


# What writes a set → a path of it. The folder holds that set and nothing else.
KINDS = {
    "merged": merged,
    "sharing": sharing,
    "swapped": swapped,
    "banked": banked,
    "genai": for_genai,
    "onnx_adapter": converted("a.onnx_adapter"),
    "safetensors": converted("a.safetensors"),
    "edge-llm": converted("edge", "edge-llm"),
    "captured": captured,
    "checkpoint": checkpoint,
    "engine": engine,
    "kit": kit,
    "built from a kit": built_from_kit,
    "demo": demo,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return what writes a set of a kind, once."""
    made = {}
    base = base_graph(tmp_path_factory.mktemp("base"))

    def write(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "set"
            made[kind] = folder, KINDS[kind](base, folder)
        return made[kind]

    return write


@pytest.fixture(params=list(KINDS))
def one_set(request, written, tmp_path):
    """Return a copy of a set of each kind: its folder and the path to give."""
    folder, path = written(request.param)
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", tmp_path / "copy" / path.relative_to(folder)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_found(path, file):
    """Whether `verify` refuses a path and names a file, or what describes it."""
    try:
        failures = verify(path).failures()
    except LoraExportError as error:
        return str(file) in str(error)
    return any(file == found.path or file.name in found.by for found in failures)


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def places(file, rng):
    """Return bits to flip: at random, the first and the last, and in the seal's mark, digits and key."""
    size = 8 * file.stat().st_size
    if not size:
        return []
    bits = [0, 5, size - 1, *(rng.randrange(size) for _ in range(FLIPS))]
    if (seal := find_seal(file)) is not None:
        bits += [8 * (seal.start + byte) + rng.randrange(8) for byte in (-1, -20, -32, 0, 7, 63)]
        bits += [8 * (seal.start - 32 - byte) + rng.randrange(8) for byte in (3, 6) if seal.start > 40]
    return bits


def test_what_was_written_is_right(one_set):
    folder, path = one_set
    for given in (folder, path):
        report = verify(given)
        assert not report.failures()
        assert {found.path for found in report.files} == set(files_of(folder))
        assert {found.state for found in report.files} == {"ok"}


def test_one_flipped_bit(one_set, record_property):
    folder, path = one_set
    rng = random.Random(13)
    missed, tried = [], 0
    for file in files_of(folder):
        for bit in places(file, rng):
            flip(file, bit)
            tried += 1
            missed += [
                f"{file.name}: bit {bit}, {given}" for given in (folder, path) if not is_found(given, file)
            ]
            flip(file, bit)
    record_property("tried", tried)
    assert not missed
    assert not verify(folder).failures()


def test_a_missing_file(one_set):
    folder, _ = one_set
    for found in verify(folder).files:
        if found.by == [found.path.name]:
            continue  # nothing else speaks of it: that it is missing, nobody can know
        kept = found.path.read_bytes()
        found.path.unlink()
        assert is_found(folder, found.path)
        found.path.write_bytes(kept)


def test_no_file_of_a_set_is_lost_unseen(one_set):
    """Also those that describe the others: the rest is a set no more, whichever of it is given."""
    folder, path = one_set
    for file in files_of(folder):
        kept = file.read_bytes()
        file.unlink()
        for given in (folder, path):
            try:
                found = [*verify(given).failures()]
            except LoraExportError as error:
                found = [error.message]
            assert found, f"{file.name} of {given.name}"
        file.write_bytes(kept)


# What tools and hands do to a text, and what a full disk leaves: each way → content from content.
DAMAGES = {
    "emptied": lambda content: b"",
    "its first bytes lost": lambda content: content[100:],
    "a space before it": lambda content: b" " + content,
    "an empty object": lambda content: b"{}",
    "another object": lambda content: b'{"r": 4, "lora_alpha": 999}',
    "its seal left out": lambda content: b"{" + content.partition(b",")[2],
    "half of it": lambda content: content[: len(content) // 2],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description(one_set, damage):
    folder, path = one_set
    for file in files_of(folder):
        if file.suffix == ".json":
            kept = file.read_bytes()
            file.write_bytes(DAMAGES[damage](kept))
            for given in (folder, path):
                # Nothing tells whose a demo.json was: what it described is undescribed then.
                assert is_found(given, file) or (file.name == REPORT and verify(given).failures()), file.name
            file.write_bytes(kept)


@pytest.mark.parametrize("given", ["folder", "weights"])
def test_weights_for_edge_llm_without_their_config(given, written, tmp_path):
    shutil.copytree(written("edge-llm")[1], tmp_path / "edge")
    (tmp_path / "edge" / "config.json").unlink()
    path = tmp_path / "edge" if given == "folder" else next((tmp_path / "edge").iterdir())
    assert is_found(path, tmp_path / "edge" / "config.json")


@pytest.mark.parametrize("kind", ["merged", "swapped", "banked"])
def test_files_of_another_set_of_equal_names(kind, written, tmp_path):
    folder, _ = written(kind)
    other = KINDS[kind](base_graph(tmp_path / "other base", seed=7), tmp_path / "other").parent
    for name in ("m.onnx", "m.onnx.data", "m.lora.json"):
        mixed = tmp_path / f"mixed {name}"
        shutil.copytree(folder, mixed)
        shutil.copy(other / name, mixed)
        assert any(found.state == "changed" for found in verify(mixed / "m.onnx").failures()), name
        assert verify(mixed).failures()


def test_the_hashes_are_the_files(written, tmp_path):
    """By BLAKE3 and SHA-256 of the bytes as they lie there, computed here."""
    folder, _ = written("merged")
    listed = json.loads((folder / "m.lora.json").read_text())["files"]
    assert set(listed) == {"m.onnx", "m.onnx.data"}
    for place, said in listed.items():
        content = (folder / place).read_bytes()
        assert said["name"] == place
        assert said["size_bytes"] == len(content)
        assert said["blake3"] == blake3(content).hexdigest()
        assert said["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_large_file_is_read_as_a_whole(tmp_path):
    """Blocks, threads and all: what a sample does not see is seen."""
    content = bytearray(random.Random(1).randbytes(1 << 20) * 65 + b"end")
    file = tmp_path / "large.data"
    file.write_bytes(content)
    assert full_hash(file) == blake3(content).hexdigest()
    sampled = hash_file(file)
    assert sampled.sampled
    listed = {file.name: dataclasses.asdict(dataclasses.replace(sampled, blake3=full_hash(file)))}
    (tmp_path / "lora.json").write_bytes(sealed_json(json.dumps({"files": listed}, indent=1)))
    assert not verify(tmp_path).failures()
    flip(file, 8 * (len(content) // 2 + 100_000))
    assert hash_file(file) == sampled, "else this proves nothing"
    assert is_found(tmp_path, file)


def without_hashes(folder):
    """Make of a set what an earlier version wrote: no full hashes, no seals."""
    manifest = folder / "m.lora.json"
    data = json.loads(manifest.read_text())
    del data["files"], data["seal"]
    model = ir.load(folder / "m.onnx")
    del model.metadata_props["lora_export.seal"]
    entry = json.loads(model.metadata_props["lora_export.data"])
    del entry["blake3"]
    model.metadata_props["lora_export.data"] = json.dumps(entry)
    ir.save(model, folder / "m.onnx")
    if "identity" in data["outputs"]:
        hashes = sorted(
            hashlib.sha256((folder / f"m.onnx{end}").read_bytes()).hexdigest() for end in ("", ".data")
        )
        data["outputs"]["identity"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
    manifest.write_text(json.dumps(data))


@pytest.mark.parametrize("kind", ["merged", "swapped"])
def test_a_set_of_an_earlier_version(kind, written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written(kind)[0], folder)
    without_hashes(folder)
    report = verify(folder / "m.onnx")
    states = {found.path.name: found.state for found in report.files}
    assert states == {"m.onnx": "unhashed", "m.onnx.data": "ok", "m.lora.json": "unhashed"}
    assert len(report.failures()) == 2
    assert not report.failures(allow_sampled=True)
    flip(folder / "m.onnx.data", 999)
    assert [found.path.name for found in verify(folder).failures(allow_sampled=True)][-1] == "m.onnx.data"
    flip(folder / "m.onnx.data", 999)
    if kind == "merged":  # whose manifest has one hash of graph and data
        data = (folder / "m.onnx").read_bytes()
        (folder / "m.onnx").write_bytes(data + b"\x72\x04\x0a\x02no")
        assert verify(folder).failures(allow_sampled=True)


def test_an_engine_of_an_earlier_version(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written("engine")[0], folder)
    record = folder / "p.sm89.json"
    data = json.loads(record.read_text())
    del data["seal"], data["files"]
    record.write_text(json.dumps(data))
    report = verify(folder / "p.sm89.engine")
    assert {found.path.name: found.state for found in report.files} == {
        "p.sm89.engine": "ok",
        "p.sm89.json": "unhashed",
    }
    assert not report.failures(allow_sampled=True)
    flip(folder / "p.sm89.engine", 4000)
    assert [f.path.suffix for f in verify(folder).failures(allow_sampled=True)] == [".engine"]


def test_the_command(written, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(written("merged")[0], folder)
    assert main("verify", str(folder / "m.onnx")) == 0
    said = capsys.readouterr()
    assert said.out.count("ok ") == 3
    assert said.out.splitlines()[-1] == "3 files: 3 right by full hash"
    assert main("verify", str(folder), "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"]
    assert [row["state"] for row in data["files"]] == ["ok"] * 3
    flip(folder / "m.onnx.data", 77)
    wanted = blake3((written("merged")[0] / "m.onnx.data").read_bytes()).hexdigest()
    seen = blake3((folder / "m.onnx.data").read_bytes()).hexdigest()
    assert main("verify", str(folder)) == 1
    said = capsys.readouterr()
    assert said.out.splitlines()[0].startswith(f"changed       {folder / 'm.onnx.data'}")
    assert f"blake3 {seen}, wanted {wanted}" in said.err
    assert "1 of 3 files are not known to be what was written" in said.err
    assert main("verify", str(folder), "--json") == 1
    assert not json.loads(capsys.readouterr().out)["passed"]


def test_what_says_nothing_is_an_error(tmp_path, capsys):
    base = base_graph(tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (base, base.parent, tmp_path / "empty", tmp_path / "pipe", tmp_path / "none"):
        assert main("verify", str(path)) == 1
        said = capsys.readouterr().err
        assert str(path) in said
        assert "hint:" in said
        assert "Traceback" not in said


def test_weights_that_nothing_describes(written, tmp_path):
    """A graph of ours that was given further weights; beside it a file that no program loads."""
    folder = tmp_path / "copy"
    shutil.copytree(written("merged")[0], folder)
    (folder / "README.md").write_text("mine")
    report = verify(folder)
    assert not report.failures()
    assert [f.path.name for f in report.files if f.state == "not described"] == ["README.md"]
    (folder / "more.safetensors").write_bytes(b"weights")
    assert [f.path.name for f in verify(folder).failures()] == ["more.safetensors"]
    (folder / "more.safetensors").unlink()
    model = ir.load(folder / "m.onnx")
    tensor = ir.ExternalTensor(
        "further.bin", 0, 4, ir.DataType.FLOAT, shape=ir.Shape((1,)), name="w", base_dir=folder
    )
    model.graph.register_initializer(ir.Value(name="w", shape=tensor.shape, const_value=tensor))
    (folder / "further.bin").write_bytes(b"1234")
    del model.metadata_props["lora_export.seal"]  # with it, nothing that the graph says is believed
    ir.save(model, folder / "m.onnx")
    names = {found.path.name: found.state for found in verify(folder / "m.onnx").failures()}
    assert names == {"m.onnx": "changed", "further.bin": "not described"}


def manifest_of(folder, files):
    folder.mkdir(exist_ok=True)
    (folder / "lora.json").write_bytes(sealed_json(json.dumps({"files": files}, indent=1)))
    return folder


def entry(**changes):
    return {"name": "x", "size_bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()} | changes


def test_a_manifest_that_leads_out_of_its_folder(tmp_path, capsys):
    (tmp_path / "secret").write_bytes(b"secret")
    folder = manifest_of(tmp_path / "set", {})
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "deeper").symlink_to(tmp_path)
    out = [
        "../secret",
        str(tmp_path / "secret"),
        "link",
        "deeper/secret",
        "a/../../secret",
        "\0",
        "/dev/zero",
    ]
    manifest_of(folder, {place: entry() for place in out})
    states = [found.state for found in verify(folder / "lora.json").failures()]
    assert states == ["outside"] * len(out)
    assert main("verify", str(folder)) == 1
    said = capsys.readouterr()
    assert hashlib.sha256(b"secret").hexdigest() not in said.out + said.err, "what lies there is not read"


def test_absurd_entries_are_all_named(tmp_path):
    folder = manifest_of(tmp_path / "set", {})
    (folder / "x").write_bytes(b"secret")
    os.mkfifo(folder / "pipe")
    files = {
        "x": entry(size_bytes=1 << 62),
        "./x": entry(sha256=""),
        "pipe": entry(),
        "n" * 5000: entry(),
        ".": entry(),
        "": entry(),
        "x/y": entry(),
    }
    failures = verify(manifest_of(folder, files) / "lora.json").failures()
    assert {found.state for found in failures} == {"changed", "missing"}
    assert len(failures) == len(files) - 2, "two are one file, two the folder"
    numbers = [{"x": entry(size_bytes=size)} for size in (-1, 1 << 200)]
    for wrong in (*numbers, {"x": entry(sha256=3)}, {"x": {}}, ["x"], 3):
        (failure, *_) = verify(manifest_of(folder, wrong) / "lora.json").failures()
        assert failure.path.name == "lora.json"
        assert failure.details


def test_thousands_of_entries_read_a_file_once(tmp_path, monkeypatch, capsys):
    folder = manifest_of(tmp_path / "set", {})
    (folder / "x").write_bytes(b"secret")
    files = {"./" * n + "x": entry() for n in range(500)}
    files |= {f"\x1b[31m{n}\n::error::": entry() for n in range(1500)}
    manifest_of(folder, files)
    read = []
    monkeypatch.setattr(
        "lora_export.integrity.check.file_digest",
        lambda path, kind: read.append(path) or hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    assert main("verify", str(folder)) == 1
    assert len(read) == 1
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "\x1b" not in text
        assert "\n::" not in text
        assert len(text.splitlines()) < 200


def test_manifests_that_name_one_another(tmp_path):
    """A long chain, closed to a ring, ends."""
    folder = tmp_path / "set"
    folder.mkdir()
    count = 1100
    for number in range(count):
        place = f"{(number + 1) % count}.lora.json"
        files = {place: entry(size_bytes=0)}
        (folder / f"{number}.lora.json").write_bytes(sealed_json(json.dumps({"files": files}, indent=1)))
    assert len(verify(folder).failures()) == count


def test_the_seal_of_what_a_graph_is_made_from_is_not_taken_over(written, tmp_path):
    _, path = written("captured")
    merge_onnx(path, tiny.adapter("bert"), tmp_path / "m.onnx", checkpoint=False)
    model = ir.load(tmp_path / "m.onnx")
    seal = find_seal(tmp_path / "m.onnx")
    assert model.metadata_props["lora_export.seal"].endswith(seal.digest)
    assert seal.digest != find_seal(path).digest
    assert (tmp_path / "m.onnx").read_bytes().count(b"-of-this-file:") == 1
    assert not verify(tmp_path / "m.onnx").failures()


@pytest.fixture
def plain_set(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written("merged")[0], folder)
    return folder


LOADED = """
model.ort x.ONNX lib.so.1 w.onnx_data evil.pkl e.pyc evil.dll build.SH kernel.cubin t.h5 Vocab.TXT merges.txt
pytorch_model.bin.index.json config.json chat_template.jinja tokenizer.json model.unheard no_ending .hid.onnx
.hid/evil.onnx .hid/deep/Evil.PT sub/anything tokenizer.model
"""
SHOWN = """
README.md notes.TXT figure.png chart.svg parity.html build.log LICENSE junit.xml .gitignore .git/config
.DS_Store .cache/huggingface/x.metadata sub/README.md
"""


@pytest.mark.parametrize("name", LOADED.split())
def test_what_may_be_loaded_must_be_described(name, plain_set):
    file = plain_set / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x")
    assert [found.path for found in verify(plain_set).failures()] == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("name", LOADED.split())
def test_a_further_name_of_a_described_file_must_be_described(name, plain_set):
    """Programs load by names: ``model.safetensors`` in place of the index, whatever it leads to."""
    link = plain_set / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(plain_set / "m.onnx.data")
    assert [found.path for found in verify(plain_set).failures()] == [link]


@pytest.mark.parametrize("source", ["m.onnx", "m.lora.json"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "config.json", "pytorch_model.bin", "x.plan"]
)
def test_a_seal_says_nothing_of_a_name(source, name, plain_set):
    """A copy of a graph or a manifest under another file's name is sealed, but no file of the set."""
    assert not verify(plain_set).failures()
    (plain_set / name).write_bytes((plain_set / source).read_bytes())
    assert [found.path for found in verify(plain_set).failures()] == [plain_set / name]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_description_that_lies_elsewhere(plain_set, tmp_path):
    elsewhere = manifest_of(tmp_path / "elsewhere", {"x": entry()}) / "lora.json"
    (tmp_path / "elsewhere" / "x").write_bytes(b"secret")
    assert not verify(elsewhere).failures(allow_sampled=True)
    (plain_set / "more.lora.json").symlink_to(elsewhere)
    (found,) = verify(plain_set).failures()
    assert found.path.name == "more.lora.json"
    assert "is a link out of the folder" in found.details[0]


def test_a_file_that_is_claimed_very_often(tmp_path):
    state, count, began = CheckedFile(path=tmp_path), 40_000, time.process_time()
    for number in range(2 * count):
        state.add("changed", f"{number % count}", f"wanted {number % count}")
    assert time.process_time() - began < 10
    assert state.by == [f"{number}" for number in range(count)]
    assert state.details == [f"wanted {number}" for number in range(count)]


def test_what_is_only_shown_need_not_be(plain_set):
    for name in SHOWN.split():
        (plain_set / name).parent.mkdir(parents=True, exist_ok=True)
        (plain_set / name).write_bytes(b"x")
    assert not verify(plain_set).failures()


def test_no_path_is_no_set_without_a_fault():
    """A pattern that matches nothing."""
    with pytest.raises(LoraExportError, match="no path was given"):
        verify([])


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data", "m.lora.json", "other.bin"])
def test_a_file_that_can_not_be_read_is_named_and_the_others_are_checked(name, plain_set, monkeypatch):
    (plain_set / "other.bin").write_bytes(b"x")
    before = {found.path.name: found.state for found in verify(plain_set).files}

    def closed(path):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return find_seal(path)

    monkeypatch.setattr(check, "find_seal", closed)
    for given in (plain_set, plain_set / name):
        (found,) = [found for found in verify(given).failures() if found.path.name == name]
        assert found.state == "missing"
        assert any("can't be read: Permission denied" in detail for detail in found.details)
    after = {found.path.name: found.state for found in verify(plain_set).files}
    assert after.keys() == before.keys()


@pytest.mark.skipif(sys.platform == "win32", reason="has neither")
@pytest.mark.parametrize("kind", ["folder", "loop", "nothing", "pipe"])
def test_what_can_not_be_looked_at_is_named(kind, plain_set, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evil.onnx").write_bytes(b"x")
    odd = plain_set / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to({"folder": tmp_path / "other", "loop": plain_set, "nothing": tmp_path / "none"}[kind])
    (found,) = verify(plain_set).failures()
    assert found.path == odd
    assert found.state == "not described"
    assert found.details


def test_our_reports_may_lie_beside_a_set(plain_set, capsys):
    """A report has its keys and no others: a config that pretends to be one still matters."""
    reports = {"bench": measured(capsys, plain_set / "m.onnx"), "parity": good().as_dict()}
    for name, report in reports.items():
        file = plain_set / f"{name}.json"
        file.write_text(json.dumps(report))
        assert not verify(plain_set).failures()
        file.write_text(json.dumps({**report, "model_type": "llama"}))
        assert [found.path for found in verify(plain_set).failures()] == [file]
        file.unlink()
