"""What is written is what is read; the same adapter gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from format_cases import GOOD, peft_folder, values
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.adapter import Adapter, LoraModule
from lora_export.formats import load_adapter, save_adapter
from lora_export.formats.reading.tensors import read_header, read_safetensors, write_safetensors

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn]


@st.composite
def modules(draw: st.DrawFn) -> dict[str, LoraModule]:
    made: dict[str, LoraModule] = {}
    rslora, dora, bias = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    for i in range(draw(st.integers(1, 4))):
        rank, out_dim, in_dim = (draw(st.integers(1, 6)) for _ in range(3))
        # PEFT has no bias of lora_B for an embedding.
        kinds = ["linear", "conv"] if bias and not dora else ["linear", "conv", "embedding"]
        kind = draw(st.sampled_from(kinds))
        kernel = (3,) * draw(st.integers(1, 3)) if kind == "conv" else ()
        dtype = draw(st.sampled_from(DTYPES))
        bias_here = values(out_dim) if bias and not dora else None
        module = LoraModule(
            path=f"block.{i}.m",
            kind=kind,  # type: ignore[arg-type]
            lora_a=values(rank, in_dim, *kernel, dtype=dtype),
            lora_b=values(out_dim, rank, *(1 for _ in kernel), dtype=dtype),
            alpha=draw(st.one_of(st.integers(1, 64), st.floats(0.1, 64))),
            rank=rank,
            rslora=rslora,
            magnitude=values(out_dim) if dora else None,
            lora_bias=bias_here,
        )
        made[module.key] = module
    return made


@given(modules())
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, made: Any) -> None:
    folder = tmp_path_factory.mktemp("a")
    save_adapter(Adapter(name="x", source="x", format="peft", modules=made), folder)
    again = load_adapter(folder).modules
    assert again.keys() == made.keys()
    for key, module in made.items():
        assert (again[key].alpha, again[key].rank, again[key].kind) == (
            module.alpha,
            module.rank,
            module.kind,
        )
        for name in ("lora_a", "lora_b", "magnitude", "lora_bias"):
            ours, theirs = getattr(again[key], name), getattr(module, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 3), max_size=3), max_size=5))
@settings(max_examples=60, deadline=None)
def test_our_safetensors_are_the_reference_readers_safetensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    from safetensors.numpy import load_file

    shapes.pop("__metadata__", None)
    file = tmp_path_factory.mktemp("a") / "x.safetensors"
    tensors = {name: values(*shape) for name, shape in shapes.items()}
    tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    write_safetensors(file, tensors, {"format": "pt"})
    theirs, ours = load_file(file), read_safetensors(file)[0]
    assert theirs.keys() == ours.keys() == read_header(file).named.keys() == tensors.keys()
    for name, wanted in tensors.items():
        np.testing.assert_array_equal(theirs[name], wanted)
        np.testing.assert_array_equal(ours[name], wanted)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    adapter = load_adapter(peft_folder(tmp_path, GOOD))
    for name in ("b", "c"):
        save_adapter(adapter, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
