"""Benchmarks from the command line, and decoders to run them on."""

import functools
import json
from pathlib import Path

import pytest
import tiny

from lora_export import (
    bank_onnx,
    load_adapter,
    merge_onnx,
    swap_onnx,
)
from lora_export.base.capture.capture import capture_checkpoint
from lora_export.cli import _run

cached_llama = pytest.mark.xdist_group("llama")


# An interval is never so narrow: time ends it.
QUICK = ["--seconds", "0.4", "--narrow", "1e-9", "--threads", "1", "--quiet"]


def bench(capsys, *arguments, quick=True):
    """Run the command; return its exit code, stdout and stderr."""
    code = _run(["bench", *(QUICK if quick else []), *map(str, arguments)], debug=False)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def measured(capsys, *arguments):
    code, out, err = bench(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@functools.cache
def decoders() -> dict[str, Path]:
    """A decoder with its cache: base, merged, swap, bank; and two adapters."""
    folder = tiny.cache_folder() / "llama" / "bench"
    folder.mkdir(parents=True)
    base = capture_checkpoint(tiny.checkpoint("llama"), folder / "base.onnx", kv_cache=True)
    one, two = tiny.adapter("llama"), tiny.adapter("llama", seed=1)
    merge_onnx(base, [load_adapter(one)], folder / "merged.onnx")
    swap_onnx(base, folder / "swap.onnx", adapter=load_adapter(one))
    bank_onnx(base, {"one": load_adapter(one), "two": load_adapter(two)}, folder / "bank.onnx")
    return {path.stem: path for path in folder.glob("*.onnx")} | {"one": one, "two": two}
