"""Records of strangers are checked field by field: every problem at once, each with its path."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from engine_files import RECORD
from hypothesis import given, settings
from hypothesis import strategies as st
from mutators import places, replaced

from lora_export.demo.greedy import Expected, Greedy
from lora_export.engines.record import EngineRecord
from lora_export.errors import GraphError, LoraExportError
from lora_export.graph.captured import DIMS_KEY, MODEL_KEY, Captured
from lora_export.graph.data_identity import KEY as DATA_KEY
from lora_export.graph.data_identity import DataIdentity, refuse_changed_data
from lora_export.graph.exposed import ExposedModule, LoraRecord, Member, StoredRows
from lora_export.storage.hashes import FileHash
from lora_export.storage.manifest import Manifest
from lora_export.untrusted.fields import (
    Axes,
    Count,
    FieldError,
    Keys,
    Later,
    Number,
    Size,
    WholeMatch,
    from_plain,
)


@dataclass(frozen=True)
class Inner:
    start: Count
    word: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class Numbers:
    value: Number
    many: tuple[Number, ...] = ()
    maybe: Number | None = None
    code: Annotated[str, WholeMatch("[a-f]+", "letters from a to f")] = "a"
    about: Annotated[Mapping[str, Any], Keys({"path": str, "n": Count}, {"more": list[Number]})] = field(
        default_factory=dict
    )
    new: Annotated[Count, Later()] = 7


@dataclass(frozen=True)
class Outer:
    name: str
    inner: tuple[Inner, ...]
    pair: tuple[int, int] = (1, 2)
    share: float = 0.5
    sizes: Annotated[tuple[Size, ...], Axes(0, 3)] = ()
    either: int | str | None = None
    on: bool = False
    more: Mapping[str, list[Inner]] = field(default_factory=dict)
    anything: Any = None


NUMBERS: dict[str, Any] = {
    "value": "inf", "many": [1, "-inf"], "maybe": None, "code": "fa",
    "about": {"path": "", "n": 0, "more": [2]}, "new": 0,
}  # fmt: skip


def test_numbers_texts_and_keys_are_read() -> None:
    wanted = Numbers(math.inf, (1.0, -math.inf), None, "fa", {"path": "", "n": 0, "more": [2.0]}, 0)
    assert from_plain(Numbers, NUMBERS, complete=True) == wanted
    assert type(from_plain(Numbers, NUMBERS).many[0]) is float
    assert math.isnan(from_plain(Numbers, {"value": "nan"}).value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"value": "Infinity"}, 'value: "Infinity", wanted a number, nan, inf or -inf'),
        ({"value": True}, "value: true, wanted a number, nan, inf or -inf"),
        ({"value": None}, "value: null, wanted a number, nan, inf or -inf"),
        ({"value": 10**400}, "value: a number of 1329 bits, wanted a finite number"),
        ({"many": ["nan", []]}, "many[1]: an array of 0, wanted a number, nan, inf or -inf"),
        ({"maybe": "x"}, 'maybe: "x", wanted a number, nan, inf or -inf'),
        ({"code": "fag"}, 'code: "fag", wanted letters from a to f'),
        ({"code": "a\n"}, 'code: "a\\n", wanted letters from a to f'),
        ({"code": 3}, "code: 3, wanted a string"),
        ({"about": []}, "about: an array of 0, wanted an object"),
        ({"about": {"path": "x"}}, "about.n: is missing"),
        ({"about": {"path": "x", "n": -1}}, "about.n: -1, wanted 0 or more"),
        ({"about": {"path": "x", "n": 1, "odd": 1}}, "about.odd: is not known"),
        (
            {"about": {"path": "x", "n": 1, "more": [""]}},
            'about.more[0]: "", wanted a number, nan, inf or -inf',
        ),
    ],
)
def test_what_numbers_texts_and_keys_are_not(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError) as caught:
        from_plain(Numbers, NUMBERS | change)
    assert caught.value.problems == (problem,)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_complete_record_lacks_only_what_came_later(name: str) -> None:
    data = {key: value for key, value in NUMBERS.items() if key != name}
    if name == "new":
        assert from_plain(Numbers, data, complete=True).new == 7
        return
    with pytest.raises(FieldError, match=f"{name}: is missing"):
        from_plain(Numbers, data, complete=True)
    if name != "value":
        from_plain(Numbers, data)


def test_good_data_is_the_record() -> None:
    data = {
        "name": "x", "inner": [{"start": 0}, {"start": 3, "word": "two"}], "pair": [3, 4], "share": 1,
        "sizes": [1, 2], "either": "a", "on": True, "more": {"k": [{"start": 1}]}, "anything": [{}],
    }  # fmt: skip
    wanted = Outer("x", (Inner(0), Inner(3, "two")), (3, 4), 1.0, (1, 2), "a", True, {"k": [Inner(1)]}, [{}])
    assert from_plain(Outer, json.loads(json.dumps(data))) == wanted


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": 3}, "name: 3, wanted a string"),
        ({"inner": [{"start": "x"}]}, 'inner[0].start: "x", wanted an integer'),
        ({"inner": [{"start": 0}, {"start": -1}]}, "inner[1].start: -1, wanted 0 or more"),
        ({"inner": [{"start": True}]}, "inner[0].start: true, wanted an integer"),
        ({"inner": [{"start": 1.0}]}, "inner[0].start: 1.0, wanted an integer"),
        ({"inner": [{}]}, "inner[0].start: is missing"),
        ({"inner": [{"start": 1, "stop": 2}]}, "inner[0].stop: is not known"),
        ({"inner": [[1]]}, "inner[0]: an array of 1, wanted an object"),
        ({"inner": {"start": 1}}, "inner: an object of 1, wanted a list"),
        ({"inner": [{"start": 1, "word": "three"}]}, 'inner[0].word: "three", wanted one of one, two'),
        ({"pair": [1]}, "pair: an array of 1, wanted a list of 2"),
        ({"pair": [1, None]}, "pair[1]: null, wanted an integer"),
        ({"share": "1"}, 'share: "1", wanted a number'),
        ({"share": float("nan")}, "share: NaN, wanted a finite number"),
        ({"share": 10**400}, "share: a number of 1329 bits, wanted a finite number"),
        ({"sizes": [1, 2, 3, 4]}, "sizes: an array of 4, wanted 0 to 3 entries"),
        ({"sizes": [0]}, "sizes[0]: 0, wanted 1 or more"),
        ({"either": 1.5}, "either: 1.5, wanted an integer or a string"),
        ({"on": 1}, "on: 1, wanted true or false"),
        ({"more": {"k\n": [{"start": None}]}}, "more['k\\n'][0].start: null, wanted an integer"),
        ({"more": []}, "more: an array of 0, wanted an object"),
    ],
)
def test_each_problem_has_its_path(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError) as caught:
        from_plain(Outer, {"name": "x", "inner": [], **change})
    assert caught.value.problems == (problem,)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(FieldError) as caught:
        from_plain(Outer, {"inner": [{"start": "x"}, 3], "pair": None})
    assert len(caught.value.problems) == 4


SWAP = LoraRecord(
    mode="swap",
    base="m.onnx",
    base_sha256="0" * 64,
    modules=(
        ExposedModule(
            name="q",
            kind="linear",
            in_dim=8,
            out_dim=8,
            dtype="float32",
            members=(
                Member(path="q", start=0, out_dim=8, ranks=(), stored=(StoredRows(weight="W", rows=(0, 8)),)),
            ),
        ),
    ),
    max_rank=8,
)
MANIFEST = Manifest(
    mode="merge-onnx",
    base=[FileHash(name="m.onnx", size_bytes=3, sha256="0" * 64)],
    adapters=[{"name": "a", "sha256": ""}],
    plan={"rows": [], "notes": [], "warnings": []},
    rounding={"total": {}},
    outputs={"graph": "m.onnx"},
    versions={"onnx": "1"},
)
CAPTURED = Captured(kind="decoder", kv_cache=True, dtype="float16", vocab_size=100, largest={"sequence": 8})
IDENTITY = DataIdentity("x", {"m.onnx.data": "0" * 64})
EXPECTED = Expected(((1, 2),), (Greedy("", ((3,),)),))


def _identity(data: Any, path: Path) -> None:
    refuse_changed_data({DATA_KEY: json.dumps(data)}, path / "m.onnx", lambda: "")


def _expected(data: Any, path: Path) -> Expected:
    (path / "greedy.json").write_text(json.dumps(data))
    return Expected.load(path)


def _saved(folder: Path) -> Any:
    EXPECTED.save(folder)
    return json.loads((folder / "greedy.json").read_text())


READERS: dict[str, Any] = {
    "LoRA record": lambda data, _: LoraRecord.from_json(json.dumps(data)),
    "engine's record": lambda data, _: EngineRecord.from_json(json.dumps(data), "engine.json"),
    "manifest": lambda data, _: Manifest.from_json(json.dumps(data)),
    "captured": lambda data, _: Captured.from_metadata({MODEL_KEY: json.dumps(data)}),
    "captured dims": lambda data, _: Captured.from_metadata(
        CAPTURED.to_metadata() | {DIMS_KEY: json.dumps(data)}
    ),
    "data's identity": _identity,
    "the demo's answers": _expected,
}


def _good(reader: str, folder: Path) -> Any:
    texts = {
        "LoRA record": SWAP.to_json(),
        "engine's record": EngineRecord(**{**vars(RECORD), "exposed": SWAP}).to_json(),
        "manifest": MANIFEST.to_json(),
        "captured": CAPTURED.to_metadata()[MODEL_KEY],
        "captured dims": CAPTURED.to_metadata()[DIMS_KEY],
        "data's identity": json.dumps(vars(IDENTITY)),
    }
    return json.loads(texts[reader]) if reader in texts else _saved(folder)


@pytest.mark.parametrize("reader", READERS)
def test_what_we_write_is_read(reader: str, tmp_path: Path) -> None:
    READERS[reader](_good(reader, tmp_path), tmp_path)


@pytest.mark.parametrize("value", [..., None, True, -1, 1.5, 2**70, "x", "", [], {}, [[]], {"a": 1}, [None]])
@pytest.mark.parametrize("reader", READERS)
def test_any_value_in_any_place_is_read_or_the_users_error(reader: str, value: Any, tmp_path: Path) -> None:
    """What `dataclass(**json)` took, and what then failed far from the file, is refused here."""
    good, refused = _good(reader, tmp_path), 0
    for place in places(good):
        if place or value is not ...:
            try:
                READERS[reader](replaced(good, place, value), tmp_path)
            except LoraExportError as error:
                refused += error.exit_code == 1 and error.hint != ""
    assert refused >= 1


def test_the_kind_of_every_field_is_checked() -> None:
    """A list in the place of a scalar, a scalar in the place of a list or an object: each refused."""
    good = json.loads(SWAP.to_json())
    for place in places(good):
        inner: Any = good
        for key in place:
            inner = inner[key]
        other: Any = 3 if isinstance(inner, list | dict) else [3]
        with pytest.raises(LoraExportError) as caught:
            LoraRecord.from_json(json.dumps(replaced(good, place, other)))
        last = next((str(key) for key in reversed(place) if isinstance(key, str)), "record")
        assert last in str(caught.value)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["name", "inner", "start", "pair", "more", "x"]), inner, max_size=4
    ),
))  # fmt: skip
def test_any_data_is_a_record_or_a_list_of_problems(data: Any) -> None:
    with contextlib.suppress(FieldError):
        assert isinstance(from_plain(Outer, data), Outer)


def test_the_problems_of_a_file_have_an_end() -> None:
    """What is looked for is the memory of a problem for each of a million entries."""
    for many in (
        {"name": "x", "inner": [{}] * 100_000},
        {"name": "x", "inner": [], **dict.fromkeys(map(str, range(100_000)))},
    ):
        with pytest.raises(FieldError) as caught:
            from_plain(Outer, many)
        assert len(caught.value.problems) == 1000
    with pytest.raises(FieldError, match="name: 3, wanted a string") as caught:
        from_plain(Outer, {"name": 3, "inner": [{"start": "x"}] * 5})
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(("kind", "groups"), [("linear", 2), ("linear", 20_000_000), ("conv", 3)])
def test_groups_that_no_graph_can_have(kind: str, groups: int) -> None:
    """Zeros for an adapter are made in a group's rank: a record of 3 kB asked for gigabytes."""
    member = Member(path="m", start=0, out_dim=4)
    module = ExposedModule(
        name="m", kind=kind, in_dim=4, out_dim=4, dtype="float32", members=(member,), groups=groups
    )
    record = LoraRecord(mode="swap", base="b.onnx", base_sha256="00", modules=(module,), max_rank=4)
    with pytest.raises(GraphError) as refused:
        LoraRecord.from_json(record.to_json())
    assert any(f"groups: {groups}, for {kind} of 4 outputs" in line for line in refused.value.problems)
