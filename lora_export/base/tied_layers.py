"""Whether a model's class ties weights of numbered layers, as Zamba's shared blocks: read off its source.

Asking the class itself imports torch and takes seconds, and nearly no class ties any: parsing the one file of
transformers that defines it takes some hundredths of a second.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TABLE = "_tied_weights_keys"
# A parameter's path in which no module is numbered.
_PLAIN = re.compile(r"([A-Za-z_]\w*\.)*[A-Za-z_]\w*")


def may_tie_layers(config: Mapping[str, Any]) -> bool:
    """Whether the source of one of a config's models ties more than parameters of plain names.

    False where transformers, or the model's file in it, is not there: then nobody can be asked either.
    """
    models = _folder_of_models()
    if models is None:
        return False
    folders = dict.fromkeys(_folder(models, kind) for kind in _model_types(config))
    return any(_ties_others(file) for folder in folders if folder for file in folder.glob("modeling_*.py"))


def _folder_of_models() -> Path | None:
    try:
        spec = importlib.util.find_spec("transformers")
    except (ImportError, ValueError):
        return None
    places = (spec.submodule_search_locations or []) if spec else []
    return next((Path(place) / "models" for place in places), None)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _model_types(value)


def _folder(models: Path, kind: str) -> Path | None:
    """Return the folder of a model type: its own name, or that without the part's (``gemma3_text``)."""
    parts = kind.replace("-", "_").split("_")
    names = ("_".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((models / name for name in names if name and (models / name).is_dir()), None)


def _ties_others(file: Path) -> bool:
    try:
        text = file.read_text("utf-8")
        tree = ast.parse(text) if _TABLE in text else None
    except (OSError, ValueError, SyntaxError):
        return True
    return tree is not None and any(map(_is_other, ast.walk(tree)))


def _is_other(node: ast.AST) -> bool:
    """Whether code makes the table while it runs, or gives it a name with a number or a pattern."""
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
    except (ValueError, TypeError, AttributeError):  # put together, or no table of names
        return True
