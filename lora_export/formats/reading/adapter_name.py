"""Remove the adapter's name from PEFT's tensor names: ``….lora_A.default.weight``.

``save_pretrained`` leaves the name out; a state dict taken from the model itself has it, with one for each
adapter that was loaded. Only a file with one adapter can be read: a file does not tell which one is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMED = re.compile(
    r"^(?P<path>.+\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta))"
    r"(?:\.(?P<name>(?!(?:weight|bias|MatMul)(?:\.|$))[^.]+))?(?P<leaf>\.weight|\.bias)?$"
)
# (MatMul is not an adapter: onnxruntime-genai adds it, in graphs whose factors are transposed.)
# After these a leaf must follow: without one, lora_A is loralib's own parameter.
_LEAF_NEEDED = re.compile(r"\.lora_[AB]$")
_SAVED = ".modules_to_save."


def strip_adapter_name(paths: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Remove the adapter's name from the paths of one file.

    Args:
        paths: Tensor name → path without wrappers.

    Returns:
        The same with paths as ``save_pretrained`` writes them, and a problem if there are several names.
    """
    matches = {
        name: match
        for name, path in paths.items()
        if (match := _NAMED.match(path)) and (match["leaf"] or not _LEAF_NEEDED.search(match["path"]))
    }
    found = dict.fromkeys(match["name"] for match in matches.values())
    if len(found) > 1:
        listed = ", ".join(name or "(none)" for name in found)
        example = next(name for name in found if name)
        return dict(paths), [
            f"the file holds several adapters ({listed}); save one of them alone: "
            f"model.save_pretrained(FOLDER, selected_adapters=['{example}'])"
        ]
    own = next(iter(found), None)
    made = {
        name: f"{match['path']}{match['leaf'] or ''}" if (match := matches.get(name)) else path
        for name, path in paths.items()
    }
    # A module to save has a copy for each adapter, under the adapter's name.
    for name, path in made.items():
        for candidate in filter(None, (own, "default")):
            if f"{_SAVED}{candidate}." in path:
                made[name] = path.replace(f"{_SAVED}{candidate}.", _SAVED)
                break
    return made, []
