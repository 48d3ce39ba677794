"""Named pipes where files are expected are refused: nobody waits for what never comes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_export.errors import LoraExportError
from lora_export.formats.reading.pickles import read_checkpoint
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


def test_files_and_links_to_them_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"x"
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path)
