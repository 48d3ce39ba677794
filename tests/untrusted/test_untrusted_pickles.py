"""A torch checkpoint is checked as torch reads it, and what its dictionaries share is walked once."""

from __future__ import annotations

import io
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peaks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_export.errors import AdapterError
from lora_export.formats.reading.pickle_contents import Contents
from lora_export.formats.reading.pickles import read_checkpoint

GOOD = {"q.lora_A": torch.ones(4, 8), "q.lora_B": torch.ones(8, 4), "alpha": 8}
# Four bytes of values, said to be 1.6 GB.
LARGE = GOOD | {"q.lora_A": torch.ones(1).as_strided((4, 100_000_000), (0, 0))}


def saved(content: Any, new_layout: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new_layout)
    return buffer.getvalue()


def zipped(entries: list[tuple[str, bytes]], comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def entries_of(content: Any) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def pickle_of(content: Any) -> bytes:
    return dict(entries_of(content))["archive/data.pkl"]


def renamed(entries: list[tuple[str, bytes]], old: str, new: str) -> list[tuple[str, bytes]]:
    return [(name.replace(old, new), content) for name, content in entries]


# What torch loads is not what another reader finds.
TWO_READERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "an archive behind the old layout": (
        lambda: saved(GOOD, new_layout=False) + saved(GOOD), "follows after its beginning",
    ),
    "capitals": (
        lambda: zipped(
            [*renamed(entries_of(LARGE), "data.pkl", "DATA.PKL"), ("archive/b/data.pkl", pickle_of(GOOD))]
        ),
        "archive/data.pkl",
    ),
    "both": (
        lambda: zipped([("archive/DATA.pkl", pickle_of(LARGE)), *entries_of(GOOD)]),
        "2 entries 'archive/data.pkl'",
    ),
    "another folder first": (
        lambda: zipped([*renamed(entries_of(LARGE), "archive/", "a/"), *entries_of(GOOD)]),
        "several folders",
    ),
    "no folder": (lambda: zipped([("data.pkl", pickle_of(GOOD)), *entries_of(GOOD)]), "or in none"),
    "an end of a name": (
        lambda: zipped([("archive/data.pkl_x", pickle_of(GOOD)), *entries_of(LARGE)]).replace(
            b"data.pkl_x", b"data.pkl\0x"
        ),
        "several entries of one name",
    ),
    "an archive behind an archive": (lambda: saved(LARGE) + saved(GOOD), "before or after"),
    "a comment": (lambda: zipped(entries_of(GOOD), b"x" * 22), "before or after"),
    "an archive in a comment": (
        lambda: zipped(entries_of(GOOD), zipped(entries_of(LARGE))),
        "before or after",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_READERS)
def test_what_two_readers_read_differently_is_refused(name: str, tmp_path: Path) -> None:
    make, says = TWO_READERS[name]
    path = tmp_path / "adapter.pt"
    path.write_bytes(make())
    with pytest.raises(AdapterError) as caught:
        read_checkpoint(path)
    assert says in str(caught.value)
    assert caught.value.hint


def test_archives_that_were_packed_again_are_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    for content in (zipped(entries_of(GOOD)), zipped([("archive/", b""), *entries_of(GOOD)])):
        path.write_bytes(content)
        found = read_checkpoint(path)
        wanted = torch.load(path, weights_only=True)
        assert {name: values.tolist() for name, values in found.tensors.items()} == {
            name: value.tolist() for name, value in wanted.items() if isinstance(value, torch.Tensor)
        }


def test_the_file_that_was_checked_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file of the name is there when torch begins to read."""
    path, other, load = tmp_path / "adapter.pt", tmp_path / "other.pt", torch.load
    path.write_bytes(saved(GOOD))
    other.write_bytes(saved(GOOD | {"alpha": 3}))

    def replaced(file: Any, **options: Any) -> Any:
        other.replace(path)
        return load(file, **options)

    monkeypatch.setattr(torch, "load", replaced)
    assert read_checkpoint(path).settings["alpha"] == 8


class _Reduced:
    """An object whose pickle is a call, and what the made object is filled with."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def shared_dicts(levels: int, leaf: Any, keys: tuple[Any, Any] = ("a", "b")) -> Any:
    for _ in range(levels):
        leaf = dict.fromkeys(keys, leaf)
    return leaf


def shared_lists(levels: int) -> Any:
    made: list[Any] = [1]
    for _ in range(levels):
        made = [made, made]
    return made


def shared_tuples(levels: int) -> Any:
    made: tuple[Any, ...] = (1,)
    for _ in range(levels):
        made = (made, made)
    return made


def of_itself(made: Any) -> Any:
    made["a"] = made
    return made


LEVELS, LONG_KEY = 40, "x" * 200_000
# Content → what is said; nothing where it is read, as it always was with fewer levels.
TANGLED: dict[str, tuple[Callable[[], Any], str]] = {
    "dicts": (lambda: GOOD | {"args": shared_dicts(LEVELS, {"z": 1})}, ""),
    "lists": (lambda: GOOD | {"args": shared_lists(LEVELS)}, "args: list"),
    "lists of training": (lambda: {"state_dict": GOOD, "args": shared_lists(LEVELS)}, ""),
    "state dicts": (lambda: {"state_dict": shared_dicts(LEVELS, {"z": 1})}, "has no tensors"),
    "nests": (lambda: shared_dicts(LEVELS, GOOD, ("model", "weights")), ""),
    "settings": (lambda: GOOD | {"lora_config": shared_dicts(LEVELS, {"z": 1})}, ""),
    "deep": (lambda: GOOD | {"args": shared_dicts(800, 1, ("a", "a"))}, "deeper than 64 levels"),
    "a dict of itself": (lambda: GOOD | {"args": of_itself({})}, "holds itself"),
    "a state dict of itself": (lambda: {"state_dict": of_itself(dict(GOOD))}, "holds itself"),
    "a setting": (lambda: GOOD | {"use_dora": shared_lists(LEVELS)}, "use_dora: an array of 2"),
    "switches": (lambda: GOOD | {"enable_lora": shared_lists(LEVELS)}, "enable_lora: an array of 2"),
    "an argument": (lambda: {"a": _Reduced(bytearray, shared_tuples(LEVELS))}, "1048576 values"),
    "a shorter argument": (lambda: {"a": _Reduced(bytearray, shared_tuples(18))}, "bytes of an array of 2"),
    "a key": (lambda: {shared_tuples(12): 1}, "more than 64 values"),
    "a key of an ordered dict": (lambda: OrderedDict({shared_tuples(12): 1}), "more than 64 values"),
    "a member": (lambda: GOOD | {"a": {shared_tuples(12)}}, "more than 64 values"),
    "long names": (
        lambda: GOOD | {"args": {n: shared_dicts(30, {}, (LONG_KEY, LONG_KEY)) for n in range(500)}},
        "a key in it has 200000 letters",
    ),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_shared_is_walked_once(tmp_path: Path) -> None:
    good, paths = tmp_path / "good.pt", []
    good.write_bytes(saved(GOOD))
    for name, (make, _) in TANGLED.items():
        paths.append(tmp_path / f"{name.replace(' ', '_')}.pt")
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)  # of the pickler
        try:
            paths[-1].write_bytes(saved(make()))
        finally:
            sys.setrecursionlimit(limit)
    wrong = []
    found = peaks.measured([["inspect", good]], [["inspect", path] for path in paths])
    for path, (_, says), (code, _, err, peak, seconds) in zip(paths, TANGLED.values(), found, strict=True):
        print(f"{path.name:30} {code} {peak / 1e6:.1f} MB of {peaks.allowed(path) / 1e6:.1f} {seconds:.1f} s")
        fits = code == (1 if says else 0) and says in err
        if not fits or peak > peaks.allowed(path) or seconds > 10:
            wrong.append(f"{path.name}: code {code}, peak {peak / 1e6:.0f} MB, {seconds:.0f} s\n{err[:600]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("new_layout", [True, False])
def test_a_tensor_that_is_filled_later_holds_no_more_than_its_storage(
    new_layout: bool, tmp_path: Path
) -> None:
    """``torch.Tensor.set_`` enlarges a storage for what a BUILD says."""
    path = tmp_path / "adapter.pt"
    storage = torch.arange(4.0).storage()
    for count in (4, 5, 1 << 26):
        tensor = _Reduced(torch.FloatTensor, state=(storage, 0, (count,), (1,)))
        path.write_bytes(saved({"q.lora_A": tensor}, new_layout))
        if count == 4:
            assert read_checkpoint(path).tensors["q.lora_A"].tolist() == [0, 1, 2, 3]
            continue
        with pytest.raises(AdapterError, match=rf"shape \[{count}\].* needs {count} values"):
            read_checkpoint(path)


TENSOR = torch.ones(1)
VALUES = st.recursive(
    st.sampled_from([1, 2.5, True, "x", None, TENSOR]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=12,
)


def has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(one, torch.Tensor) or has_tensors(one) for one in value.values()
    )


def is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, str) or is_plain(one) for one in value)
    return isinstance(value, (int, float))


@settings(deadline=None, max_examples=200)
@given(value=VALUES)
def test_contents_are_what_recursion_finds(value: Any) -> None:
    content = {"whole": value, "again": [value, value]}
    found, todo = Contents(content, torch.Tensor), [content]
    while todo:
        one = todo.pop()
        assert found.has_tensors(one) == has_tensors(one)
        assert found.is_plain(one) == is_plain(one)
        todo += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
