"""What libraries print on their own (ONNX Runtime's log, loggers, warnings) is nothing but text as well."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from harmless import is_harmless
from onnx import TensorProto, helper, numpy_helper

from lora_export.commands.printing import guard_libraries

NAME = "a\x1b[31mred\x1b]0;title\x07\n::error::owned\n##[error]b"


def _graph(folder: Path, name: str, *nodes: onnx.NodeProto) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])]
    held = [
        numpy_helper.from_array(np.array([3, 5]), "shape"),
        numpy_helper.from_array(np.ones(3, np.float32), f"unread{NAME}"),
    ]
    made = helper.make_graph(list(nodes), "g", inputs, outputs, held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


@pytest.mark.parametrize("way", ["fails when it runs", "can't be opened", "is warned of"])
def test_onnx_runtime_prints_no_name_of_a_node(way: str, tmp_path: Path) -> None:
    """A process of its own: what ONNX Runtime prints does not go through Python."""
    node = {
        "fails when it runs": helper.make_node("Reshape", ["x", "shape"], ["y"], name=NAME),
        "can't be opened": helper.make_node(f"No{NAME}", ["x"], ["y"], name=NAME, domain="own"),
        "is warned of": helper.make_node("Identity", ["x"], ["y"], name=NAME),
    }[way]
    graphs = [_graph(tmp_path, name, node) for name in ("a.onnx", "b.onnx")]
    np.savez(tmp_path / "feeds.npz", x=np.ones((2, 8), np.float32))
    words = ["parity", "--reference", graphs[0], "--candidate", graphs[1], "--feeds", tmp_path / "feeds.npz"]
    done = subprocess.run(
        [sys.executable, "-c", "from lora_export.cli import main; main()", *map(str, words)],
        capture_output=True,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == (0 if way == "is warned of" else 1), err
    assert "red" in err or way == "is warned of"
    assert is_harmless(out)
    assert is_harmless(err)


def test_loggers_and_warnings_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning
    logger, handler = logging.Logger("a library"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        guard_libraries()
        logger.warning("value %s not found", NAME)
        try:
            raise ValueError(NAME)
        except ValueError as error:
            logger.warning("failed: %s", NAME, exc_info=error)
        text = warnings.formatwarning(UserWarning(NAME), UserWarning, "library.py", 1)
        print(text, end="", file=sys.stderr)
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form
    err = capsys.readouterr().err
    assert err.count("red") >= 4
    assert "Traceback" in err
    assert is_harmless(err)
