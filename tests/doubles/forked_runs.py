"""Kill the command line at every call, or let two run at once, in forks of this small process.

``python forked_runs.py killed FOLDER`` and ``python forked_runs.py races FOLDER`` print one line of JSON for
each run; `test_forked_runs` judges them. pytest's own process has threads, and is not to be forked.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faults
import output_cases
from half_graphs import small_adapter
from unsynced import unsynced

import lora_export.storage.outputs
from lora_export import cli
from lora_export.storage.commit.lock import locked

VERBS = (
    *("merge", "merge-onnx", "swap-onnx", "quantize-onnx"),
    *("convert-adapter", "convert-adapter to a folder"),
)
RACES = 30
Files = dict[str, bytes]


def killed(top: Path) -> None:
    """Kill each verb at each of its calls, and let another run come by."""
    for verb in VERBS:
        assert output_cases.run(output_cases.CASES[verb], top, top / verb / "good") == 0
        new = faults.snapshot(top / verb / "good")
        for fault in faults.KILLS:
            for old in ({}, output_cases.old_of(new)):
                numbers = itertools.count()
                while _killed_at(top, verb, fault, next(numbers), old, new):
                    pass


def _killed_at(top: Path, verb: str, fault: str, number: int, old: Files, new: Files) -> bool:
    """Kill a verb at its call of a number; return whether there was one."""
    case, place = output_cases.CASES[verb], top / verb / fault / ("replaced" if old else "new") / str(number)
    (place / "out").mkdir(parents=True)
    (place / "tmp").mkdir()
    output_cases.fill(place / "out", old)

    def act() -> int:
        tempfile.tempdir = str(place / "tmp")
        with faults.Injector(place, fault, range(number, number + 1)).armed():
            return output_cases.run(case, top, place / "out", *(["--force"] if old else []))

    if _ended(_fork(act)) == 0:
        return False
    left = faults.snapshot(place / "out")
    said, rest = _come_by(place)
    others = [name for name in rest if name not in {*old, *new}]
    _print(
        {"where": f"{verb}, {fault} {number}, {'replaced' if old else 'new'}", "said": said}
        | {"before": _states(case, left, old, new), "after": _states(case, rest, old, new)}
        | {"others": others, "tmp": [path.name for path in (place / "tmp").iterdir()]}
    )
    return True


def _come_by(place: Path) -> tuple[str, Files]:
    """Run a verb that would write into the folder, and finds nothing to read."""
    tempfile.tempdir = str(place / "tmp")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        cli._run(["inspect", str(place / "nothing"), "--plot", str(place / "out" / "nothing.html")], False)
    return said.getvalue(), faults.snapshot(place / "out")


def _states(case: output_cases.Case, files: Files, old: Files, new: Files) -> list[Any]:
    """Return what each group is: ``old``, ``new``, or what of it is there."""
    states: list[Any] = []
    for prefixes in case.groups:
        here, was, will = (
            {name: held[name] for name in held if name.startswith(prefixes) and name in {*old, *new}}
            for held in (files, old, new)
        )
        kinds = {name: "old" if content == was.get(name) else "new" for name, content in here.items()}
        states.append("old" if here == was else "new" if here == will else kinds)
    return states


def races(top: Path) -> None:
    """Let two processes write one output, both with --force or both without; from all that they read two."""
    words = {}
    for name, value in (("first", 0.01), ("second", 0.5)):
        place = top / name
        place.mkdir()
        graph, adapter = output_cases.inputs(place)
        if name == "second":
            shutil.rmtree(adapter)
            small_adapter(adapter, value)
        for verb in ("merge-onnx", "swap-onnx"):
            words[verb, name] = [str(word) for word in output_cases.CASES[verb].arguments(place, top)[:-1]]
        # Each base has a tokenizer of its own, as models of one name have.
        graph.with_name("tokenizer.json").write_text(json.dumps({"of": name}))
    for verb in ("merge-onnx", "swap-onnx"):
        wanted = {}
        for name in ("first", "second"):
            _write(words[verb, name], top / verb / name)
            wanted[name] = faults.snapshot(top / verb / name)
        both = (words[verb, "first"], words[verb, "second"])
        for number in range(RACES):
            found = _one_race(both, top / verb / "races" / str(number), wanted, force=bool(number % 2))
            _print({"verb": verb, **found})


def _one_race(
    both: tuple[list[str], list[str]], out: Path, wanted: dict[str, Files], force: bool
) -> dict[str, Any]:
    out.mkdir(parents=True)
    ready, go = os.pipe()
    children = [_fork(partial(_race, words, out, ["--force"] * force, ready, go)) for words in both]
    os.close(go)
    os.close(ready)
    codes = list(map(_ended, children))
    found = faults.snapshot(out)
    said = found.pop("said", b"").decode()
    whose = [name for name, files in wanted.items() if files == found]
    return {"force": force, "codes": codes, "whose": whose, "names": list(found), "said": said}


def _race(words: list[str], out: Path, force: list[str], ready: int, go: int) -> int:
    """Run a verb; both processes ask for the lock at the same moment, as near as it goes."""

    @contextlib.contextmanager
    def at_once(folders: Any) -> Any:
        os.close(go)  # the pipe ends when both have come here
        os.read(ready, 1)
        with locked(folders):
            yield

    lora_export.storage.outputs.locked = at_once
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = _write(words, out, *force)
    if code:
        (out / "said").write_text(said.getvalue())
    return code


def _write(words: list[str], out: Path, *more: str) -> int:
    return cli._run([*words, str(out / "m.onnx"), "--quiet", *more], False)


def _fork(act: Callable[[], int]) -> int:
    """Do something in a fork; return its process's number."""
    if child := os.fork():
        return child
    code = 99
    try:
        sys.stdout = sys.stderr = io.StringIO()
        code = act()
    finally:
        os._exit(code)


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    unsynced()
    gc.freeze()  # a fork's garbage collector would copy the memory that it goes through
    {"killed": killed, "races": races}[sys.argv[1]](Path(sys.argv[2]))
