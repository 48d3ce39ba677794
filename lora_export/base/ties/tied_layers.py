"""Read from its source whether a model's class ties weights of numbered layers, as Zamba's shared blocks.

Asking the class itself imports torch and takes seconds, and nearly no class ties any: parsing the one file of
transformers that defines it takes some hundredths of a second.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.base.checkpoint.families import model_types, source_folder
from lora_export.untrusted.places import listed

_TABLE = "_tied_weights_keys"
# Matches a parameter's path in which no module is numbered.
_PLAIN = re.compile(r"([A-Za-z_]\w*\.)*[A-Za-z_]\w*")


def may_tie_layers(config: Mapping[str, Any]) -> bool:
    """Return True if the source of one of a config's models ties more than parameters of plain names.

    False if transformers, or the model's file in it, is missing, so that it can't be asked either.
    """
    folders = dict.fromkeys(source_folder(kind) for kind in model_types(config))
    return any(_ties_others(file) for folder in folders if folder for file in listed(folder, "modeling_*.py"))


def _ties_others(file: Path) -> bool:
    try:
        text = file.read_text("utf-8")
        tree = ast.parse(text) if _TABLE in text else None
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return True
    return tree is not None and any(map(_is_other, ast.walk(tree)))


def _is_other(node: ast.AST) -> bool:
    """Return True if code makes the table while it runs, or gives it a name with a number or a pattern."""
    if isinstance(node, ast.FunctionDef):
        return node.name == _TABLE
    if isinstance(node, ast.Attribute):
        return node.attr == _TABLE
    if not isinstance(node, ast.Assign):
        return False
    if not any(isinstance(target, ast.Name) and target.id == _TABLE for target in node.targets):
        return False
    try:
        table = ast.literal_eval(node.value) or {}
        return any(_PLAIN.fullmatch(name) is None for name in (*table, *table.values()))
    except (
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        RecursionError,
        MemoryError,
    ):  # computed, or not a table of names
        return True
