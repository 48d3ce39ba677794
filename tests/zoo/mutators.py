"""Hostile neighbours of good files, as hypothesis strategies: one or a few things changed, the rest right.

Random bytes are refused by the first reader. What reaches the code behind it is a file that is right but for
a shape without axes, a name that is another's, a number where a list is wanted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from google.protobuf.message import Message
from hypothesis import strategies as st

# A few kinds of everything that JSON holds, legal and not.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 2**31, 2**63, 10**30, 10**400, float("inf"), float("nan"),
    "", "x", "q",
        "(a+)+$", "[", "\x1b[31m", "é" * 50, [], {}, [[]], [None], [1, 2], ["q", 3], {"q": "x"}, {"q": -1},
    {"": 0}, {"q": {"q": []}}, [{}], "../../etc", "none", "all", "all-linear", 64, 4, 8,
]  # fmt: skip
NAMES = ["", ".", "q", "lora_A", ".lora_A.weight", "base_model.model.", "q.lora_A.default.weight", "x" * 300,
         "a\nb", "lora_unet_", "transformer.", "q.alpha", "q.dora_scale", "q.lora_magnitude_vector",
         "q.base_layer.weight", "q.lora_embedding_A", "q.lora_B.bias", "modules_to_save.q.weight",
         "q.experts.0.lora_A.weight", "0", "q..weight", "é\u202e"]  # fmt: skip
SHAPES = [(), (0,), (1,), (4,), (8,), (0, 8), (8, 0), (4, 8), (8, 4), (3, 8), (1, 1), (4, 8, 1), (4, 8, 1, 1),
          (2, 4, 8), (8, 4, 3, 3), (4, 8, 1, 1, 1), (1,) * 9, (64, 64)]  # fmt: skip
DTYPES = [np.float32, np.float16, np.float64, np.int64, np.uint8, np.bool_, ml_dtypes.bfloat16,
          ml_dtypes.float8_e4m3fn]  # fmt: skip

Tensors = dict[str, np.ndarray[Any, Any]]


def places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in plain data."""
    yield place
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, inner in entries:
        yield from places(inner, (*place, key))


def replaced(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return plain data with another value at a path; ``...`` takes it away."""
    if not place:
        return data if value is ... else value
    made = copy.deepcopy(data)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return made


@st.composite
def plain_data(draw: st.DrawFn, good: Any, keys: tuple[str, ...] = ()) -> Any:
    """Return plain data with one to three values changed, taken away or, under known keys, added."""
    data = good
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(places(data))))
        inner = data
        for key in place:
            inner = inner[key]
        if isinstance(inner, dict) and keys and draw(st.booleans()):
            data = replaced(data, (*place, draw(st.sampled_from(keys))), draw(st.sampled_from(VALUES)))
        else:
            data = replaced(data, place, draw(st.sampled_from([..., *VALUES])))
    return data


@st.composite
def tensors(draw: st.DrawFn, good: Tensors) -> Tensors:
    """Return a file's tensors, one to three of them renamed, reshaped, of another dtype or value, or gone."""
    made = dict(good)
    for _ in range(draw(st.integers(1, 3))):
        if not made:
            break
        name = draw(st.sampled_from(sorted(made)))
        values = made[name]
        how = draw(st.sampled_from(["drop", "rename", "copy", "shape", "dtype", "value", "swap"]))
        if how == "drop":
            del made[name]
        elif how in ("rename", "copy"):
            part = draw(st.sampled_from(NAMES))
            cut = draw(st.integers(0, len(name)))
            other = draw(st.sampled_from([part, name + part, part + name, name[:cut] + part + name[cut:]]))
            made[other] = values if how == "copy" else made.pop(name)
        elif how == "shape":
            made[name] = np.ones(draw(st.sampled_from(SHAPES)), values.dtype)
        elif how == "dtype":
            made[name] = np.ones(values.shape, draw(st.sampled_from(DTYPES)))
        elif how == "value":
            made[name] = np.full(
                values.shape, draw(st.sampled_from([np.nan, np.inf, 0, -1, 1e30])), np.float32
            )
        else:
            other = draw(st.sampled_from(sorted(made)))
            made[name], made[other] = made[other], made[name]
    return made


def messages(message: Message) -> Iterator[Message]:
    """Yield a protobuf message and all that lie in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Message) is False else [value]:
                if isinstance(inner, Message):
                    yield from messages(inner)


@st.composite
def protos(draw: st.DrawFn, good: Message) -> Message:
    """Return a protobuf message with one to three fields, anywhere in it, set, cleared, doubled or cut."""
    made = type(good)()
    made.CopyFrom(good)
    for _ in range(draw(st.integers(1, 3))):
        found = [one for one in messages(made) if one.ListFields()]
        message = draw(st.sampled_from(found))
        field, value = draw(st.sampled_from(message.ListFields()))
        many = not isinstance(value, str | bytes | int | float | Message)
        how = draw(st.sampled_from(["clear", "set", "set", "double", "shorten"]))
        if how == "clear" or (many and not len(value)):
            message.ClearField(field.name)
        elif many and how == "double":
            value.extend(list(value)[: draw(st.integers(1, 3))])
        elif many and how == "shorten":
            del value[draw(st.integers(0, len(value) - 1)) :]
        elif field.message_type is not None:
            continue
        else:
            other = draw(st.sampled_from(_others(field)))
            try:
                if many:
                    value[draw(st.integers(0, len(value) - 1))] = other
                else:
                    setattr(message, field.name, other)
            except (ValueError, TypeError):
                continue
    return made


def _others(field: Any) -> list[Any]:
    kinds: dict[Any, list[Any]] = {
        "text": ["", "x", "W", "MatMul", "Gemm", "Constant", "../x", "\x1b[31m", "é" * 300, "ai.onnx", "0"],
        "bytes": [b"", b"\x00", b"\xff" * 7, b"abcd" * 64],
        "float": [0.0, -1.0, float("nan"), float("inf"), 1e30],
        "int": [0, 1, -1, 2, 7, 16, 23, 100, 2**31 - 1, 2**40, 2**62, -(2**62)],
    }
    if field.cpp_type == field.CPPTYPE_STRING:
        return kinds["bytes" if field.type == field.TYPE_BYTES else "text"]
    return kinds["float" if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE) else "int"]
