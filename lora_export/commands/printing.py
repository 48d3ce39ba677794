"""Print to the terminal: every verb prints through here, so that no control character reaches a terminal.

Strangers choose the names of tensors, nodes and files (`lora_export.untrusted.shown`). JSON stays exact: a
character that a terminal would act on becomes a JSON escape.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from lora_export.errors import LoraExportError
from lora_export.progress import spoken
from lora_export.untrusted.shown import MAX_LINE, error_lines, limited, shown_lines

# "##[" and "##vso[", which CI services obey anywhere in a line.
_ANYWHERE = re.compile(r"##(?:\w+)?\[")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")

# Number of characters that are looked up once: there are a million of them.
_KEPT = 1 << 14


class _Acting(dict[int, str]):
    """Characters in a JSON text that a terminal may act on, each with its escape, as `str.translate` asks."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character != "\n" and not character.isprintable():
            character = _json_escape(character)
        if len(self) < _KEPT:
            self[code] = character
        return character


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


class _ShownRecord(logging.LogRecord):
    """A library's log record, safe to print: transformers, onnx_ir and others quote strangers' files."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.exc_info and self.exc_info[0] is not None:
            self.exc_text = _shown("".join(traceback.format_exception(*self.exc_info)))

    def getMessage(self) -> str:
        """Return the message with each line made safe to print."""
        return _shown(super().getMessage())


@dataclass
class JsonAnswer:
    """The document that a program gets on stdout if it asked for JSON.

    Attributes:
        is_given: True if it was printed: an error after it is not another one.
    """

    is_given: bool = False


def guard_libraries() -> None:
    """Make the log records and warnings of libraries safe to print, whoever prints them, on any terminal."""
    _open_streams()
    _take_any_text()
    logging.setLogRecordFactory(_ShownRecord)
    warnings.formatwarning = _formatted_warning


def _open_streams() -> None:
    """Let standard streams that the process was started without (``2>&-``, services) lead nowhere.

    Otherwise the next file that is opened takes the number of one, an output perhaps: what a library in C
    logs to stderr would be written into it.
    """
    closed = {n: name for n, name in enumerate(("stdin", "stdout", "stderr")) if getattr(sys, name) is None}
    for number in closed:
        handle = os.open(os.devnull, os.O_RDWR)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(handle, number)
        if handle != number:
            os.close(handle)
        os.set_inheritable(number, True)  # as those are that a process is started with
    # Only now: a file that is opened before takes one of the numbers itself.
    for number, name in closed.items():
        setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115, PTH123


def _take_any_text() -> None:
    """Let standard streams write what their encoding (ISO-8859-1, cp1252) doesn't have as an escape.

    Otherwise a report of an hour's work, or a help text, would end in an error at its first arrow.
    """
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _formatted_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {_shown(str(message))}\n"


def _shown(text: str) -> str:
    # Further lines are set in: none of them, which may be a name's, begins as a line of ours does.
    return "\n  ".join(shown_lines(text.rstrip("\n").split("\n")))


def print_lines(lines: Iterable[str], err: bool = False, most: int = MAX_LINE) -> None:
    """Print lines, to stderr if ``err``; longer ones than ``most`` are cut in the middle."""
    text = "\n".join(shown_lines(lines, most))
    spoken(lambda: click.echo(text, err=err), err)


def print_warnings(lines: Iterable[str]) -> None:
    """Print warnings to stderr; if there are thousands, only the first ones."""
    if found := list(lines):
        print_lines(limited(found, "warnings"), err=True)


def print_json(text: str) -> None:
    """Print a JSON text to stdout, escaped for terminals, with the same data."""
    exact = text.translate(_Acting())
    if _ANYWHERE.search(exact):
        exact = exact.replace("##", "\\u0023\\u0023")
    if not _is_utf8(getattr(sys.stdout, "encoding", None)):
        exact = _BEYOND_ASCII.sub(lambda found: _json_escape(found[0]), exact)
    context = click.get_current_context(silent=True)
    if context is not None and isinstance(context.obj, JsonAnswer):
        context.obj.is_given = True
    spoken(lambda: click.echo(exact))


def _is_utf8(encoding: str | None) -> bool:
    return encoding is None or codecs.lookup(encoding).name == "utf-8"


def print_error(error: LoraExportError) -> None:
    """Print an error to stderr: its message, some of its problems, the hint."""
    print_lines(("Error: " + error.message, *_below(error)), err=True)


def print_json_error(
    kind: str, code: int, message: str, problems: Sequence[str] = (), hint: str = ""
) -> None:
    """Print an error to stdout as ``{"error": …}``, every problem in full.

    Args:
        kind: Name of the error's class.
        code: Exit code.
        message: Rule that failed.
        problems: The failures, one by one.
        hint: Way out.
    """
    error = {"kind": kind, "exit_code": code, "message": message, "problems": list(problems), "hint": hint}
    print_json(json.dumps({"error": error}, indent=1, ensure_ascii=False))


def print_plain_error(message: str, hint: str = "") -> None:
    """Print an error that is not a `LoraExportError` to stderr."""
    print_lines(error_lines(message, (), hint), err=True)


def _below(error: LoraExportError) -> list[str]:
    return error_lines("", error.problems, error.hint)[1:]
