"""Named pipes where files are expected are refused: nobody waits for what never comes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_export.errors import LoraExportError
from lora_export.formats.reading.pickles import read_checkpoint
from lora_export.formats.reading.tensors import read_safetensors
from lora_export.graph.read_model import read_model
from lora_export.integrity.claims import description_of
from lora_export.packages.build_kit import _check_kit
from lora_export.parity.sides.merged import _manifest
from lora_export.storage.hashes import hash_file, sha256_of
from lora_export.storage.safetensors import read_file_header
from lora_export.storage.sums.full import file_digest
from lora_export.storage.sums.seal import find_seal
from lora_export.untrusted.documents import compose_yaml, open_regular, read_json

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """Make a named pipe; after some seconds whoever waits for it gets nothing, so that no test hangs."""
    path = tmp_path / "file"
    os.mkfifo(path)

    def answer() -> None:
        handle = os.open(path, os.O_RDWR)
        done.wait(1)
        os.close(handle)

    done = threading.Event()
    timer = threading.Timer(5, answer)
    timer.start()
    yield path
    timer.cancel()
    done.set()


@pytest.mark.parametrize(
    "read", [read_json, read_checkpoint, lambda path: compose_yaml(path, LoraExportError, "recipe")]
)
def test_a_pipe_is_no_file(read, pipe: Path) -> None:
    with pytest.raises(LoraExportError, match="it is not a regular file") as caught:
        read(pipe)
    assert caught.value.hint


def manifest_beside(path: Path) -> None:
    """Read the manifest of a graph, as parity does; what is wrong with it is a note."""
    path.rename(path.with_suffix(".lora.json"))
    notes: list[str] = []
    assert _manifest(path.with_suffix(".onnx"), notes) is None
    raise OSError(*notes)


def kit_in(path: Path) -> None:
    """Replace a kit whose list of files is a pipe."""
    (path.parent / "kit").mkdir()
    path.rename(path.parent / "kit/SHA256SUMS")
    _check_kit(path.parent / "kit")


def sums(path: Path) -> None:
    path.rename(path.parent / "SHA256SUMS")
    description_of(path.parent / "SHA256SUMS", path.parent)


READERS = [
    hash_file,
    lambda path: file_digest(path, "sha256"),
    find_seal,
    sha256_of,
    read_file_header,
    read_safetensors,
    read_model,
    manifest_beside,
    kit_in,
    sums,
]


@pytest.mark.parametrize("read", READERS)
def test_no_reader_of_files_waits_for_a_pipe(read, pipe: Path) -> None:
    started = time.monotonic()
    with pytest.raises((LoraExportError, OSError)):
        read(pipe)
    assert time.monotonic() - started < 4


def test_files_and_links_to_them_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"x"
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path)


def test_an_interrupt_while_a_file_is_opened_stays_one(tmp_path, monkeypatch):
    """The file object is made, and lost with the frame that the signal broke into."""
    path, real = tmp_path / "x.json", os.fdopen
    path.write_text("{}")

    def interrupted(handle, mode):
        real(handle, mode).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdopen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_regular(path)
