"""What keys and letters of a JSON document take in memory is estimated before it is read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peaks
import pytest

from lora_export.errors import LoraExportError
from lora_export.untrusted.documents import DocumentError, parse_json, read_json

MB = 1 << 20
EMOJI = "\U0001f600"


def keys(letters: int, count: int, value: str = "1") -> str:
    return "{" + ",".join(f'"{n:0{letters}x}":{value}' for n in range(count)) + "}"


# Document → whether it is read.
DOCUMENTS: dict[str, tuple[str, bool]] = {
    "short keys": (keys(6, 20 * MB // 11), False),
    "longer keys": (keys(12, 30 * MB // 17), False),
    "keys of empty dicts": (keys(6, 20 * MB // 12, "{}"), False),
    "keys of dicts": (keys(6, 20 * MB // 18, '{"a":1}'), False),
    "a key twice": (keys(6, 300_000)[:-1] + ',"000001":1}', False),
    "a vocabulary": (json.dumps({f"token {n}": n for n in range(260_000)}), True),
    "one wide letter": (f'["{"a" * 20 * MB}","{EMOJI}"]', True),
    "wide texts": ('["\\u0041","' + '","'.join([EMOJI + "a" * 2000] * (20 * MB // 2007)) + '"]', True),
    "one wide text": (f'["{"a" * 20 * MB}{EMOJI}\\u0041"]', True),
    "wide by an escape": (f'["{"a" * 20 * MB}\\ud83d\\ude00"]', True),
    "short wide texts": ("[" + ",".join([f'"a{EMOJI}"'] * (20 * MB // 8)) + "]", False),
    "short keys in a wide document": (keys(24, 20 * MB // 29)[:-1] + f',"{EMOJI}":1}}', True),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_take_no_more_than_ten_times_their_size(name: str, tmp_path: Path) -> None:
    text, is_read = DOCUMENTS[name]
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with peaks.within(path):
        if is_read:
            read_json(path)
        else:
            with pytest.raises(LoraExportError, match=r"in memory|occurs twice"):
                read_json(path)


@pytest.mark.parametrize(
    "value", [["\ud800"], {"a": [{"\udfff": 1}]}, "\ud800", [[], {}, "a", {"b": "\ude00"}]]
)
def test_halves_of_pairs_are_found_wherever_they_are(value: Any) -> None:
    with pytest.raises(DocumentError, match="half of a surrogate pair"):
        parse_json(json.dumps(value))
    whole = json.dumps([value]).replace("\\ud800", "x").replace("\\udfff", "x").replace("\\ude00", "x")
    assert parse_json(whole + " ") == json.loads(whole)
    assert parse_json(json.dumps([EMOJI, {EMOJI: None}])) == [EMOJI, {EMOJI: None}]


def test_all_keys_that_occur_twice_are_named() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json('{"a":1,"b":2,"a":3,"b":4,"a":5,"c":{"d":1,"d":2,"e":3}}')
    assert sorted(caught.value.problems) == [f"the key '{key}' occurs twice" for key in "abd"]
