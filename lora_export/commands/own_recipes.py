"""Find the recipes that come with lora-export: in a wheel inside the package, in a checkout beside it."""

from __future__ import annotations

import difflib
from pathlib import Path

from lora_export.errors import RecipeError
from lora_export.untrusted.places import exists, is_folder, is_link, listed

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


def find_recipe(given: Path) -> Path:
    """Return the file of a recipe, given as a path or as the name of one of ours.

    Raises:
        RecipeError: There is neither.
    """
    # What is there under this name is the user's, a folder as well, which the reader refuses.
    if exists(given) or is_link(given) or given.suffix or len(given.parts) != 1:
        return given
    own = own_recipes()
    if given.name in own:
        return own[given.name]
    near = difflib.get_close_matches(given.name, own, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"there is no file {given}, and no recipe of this name comes with lora-export",
        f"{hint}those that come with it: {', '.join(own) or 'none'}",
    )


def own_recipes() -> dict[str, Path]:
    """Return name → file."""
    folder = next((folder for folder in _FOLDERS if is_folder(folder)), None)
    return {} if folder is None else {path.stem: path for path in listed(folder, "*.yaml")}
