"""Translate Stability's sgm (and CompVis' ldm) names of a UNet to diffusers' UNet2DConditionModel.

sgm counts the layers of all blocks in one list, diffusers in each block: the mapping depends on the number of
layers of a block, which the base's names show. Source: https://github.com/Stability-AI/generative-models
``sgm/modules/diffusionmodules/openaimodel.py`` and diffusers ``loaders/single_file_utils.py``,
``convert_ldm_unet_checkpoint``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_export.adapter import Adapter
from lora_export.errors import AdapterError
from lora_export.formats.schemes.known import KnownModules, flatten
from lora_export.formats.schemes.rules import DENOISERS, Components, Counterpart, Lookup, inner, paths_of

_MARK = re.compile(r"(?:input_blocks|output_blocks)_\d+_\d+_|middle_block_\d+_")
_LAYER = re.compile(r"(?P<side>input_blocks|output_blocks)_(?P<index>\d+)_(?P<place>\d+)_(?P<rest>.+)")
_MIDDLE = re.compile(r"middle_block_(?P<index>\d+)_(?P<rest>.+)")
_SEEN = re.compile(
    r"(?P<prefix>(?:[^.\d]\w*\.)*?)(?P<side>down|up)_blocks\.(?P<block>\d+)"
    r"\.(?P<kind>resnets|attentions|downsamplers)\.(?P<layer>\d+)\."
)
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_FIXED = {
    "input_blocks_0_0": ("conv_in",),
    "time_embed_0": ("time_embedding.linear_1",),
    "time_embed_2": ("time_embedding.linear_2",),
    "label_emb_0_0": ("add_embedding.linear_1", "class_embedding.linear_1"),
    "label_emb_0_2": ("add_embedding.linear_2", "class_embedding.linear_2"),
    "out_0": ("conv_norm_out",),
    "out_2": ("conv_out",),
}
# (side, kind) → block → numbers of its layers.
_Seen = Mapping[tuple[str, str], Mapping[int, set[int]]]


@dataclass(frozen=True)
class _Layer:
    """An entry of sgm's list: a layer of a block, or the downsampler after the block's layers."""

    block: str
    layer: int
    is_last: bool = False
    is_downsampler: bool = False


@dataclass(frozen=True)
class _SgmUNet:
    name: str = "Stability's sgm"
    components: Components = DENOISERS
    structural: bool = True

    def recognises(self, adapter: Adapter) -> bool:
        """Return whether some path is in an input, middle or output block."""
        return any(_MARK.match(path) for path in paths_of(self, adapter))

    def explains(self, path: str) -> bool:
        """Return whether the path is in a block, or one of those around them."""
        return flatten(path) in _FIXED or _MARK.match(flatten(path)) is not None

    def lookup(self, known: KnownModules) -> Lookup:
        """Return a function that finds counterparts by the base's own structure."""
        lists = _lists_of(known)

        def find(path: str) -> Sequence[Counterpart]:
            if lists is None:
                return ()
            flat = flatten(inner(path))
            if flat in _FIXED:
                names = _FIXED[flat]
                return (Counterpart(next((name for name in names if known.find(name)), names[0])),)
            found = _in_block(flat, lists)
            return (Counterpart(found),) if found else ()

        return find


def _in_block(flat: str, lists: Mapping[str, Sequence[_Layer]]) -> str:
    """Return the counterpart of a flattened path, or ""."""
    if match := _MIDDLE.fullmatch(flat):
        index = int(match["index"])
        return _layer(f"mid_block.{'attentions' if index % 2 else 'resnets'}.{index // 2}", match["rest"])
    match = _LAYER.fullmatch(flat)
    layers = lists[match["side"]] if match else ()
    if match is None or int(match["index"]) >= len(layers):
        return ""
    layer, place, rest = layers[int(match["index"])], int(match["place"]), match["rest"]
    if layer.is_downsampler:
        return f"{layer.block}.downsamplers.0.conv" if (place, rest) == (0, "op") else ""
    if rest == "conv":
        # After the last layer, and after its attention if it has one.
        return f"{layer.block}.upsamplers.0.conv" if layer.is_last and place in (1, 2) else ""
    if place > 1:
        return ""
    return _layer(f"{layer.block}.{'attentions' if place else 'resnets'}.{layer.layer}", rest)


def _layer(module: str, rest: str) -> str:
    if ".attentions." in module:
        return f"{module}.{rest}"
    return f"{module}.{_RESNET[rest]}" if rest in _RESNET else ""


def _lists_of(known: KnownModules) -> Mapping[str, Sequence[_Layer]] | None:
    """Return sgm's two lists for a base; None if it is not such a UNet."""
    by_prefix: dict[str, dict[tuple[str, str], dict[int, set[int]]]] = {}
    for path in known.structure:
        if match := _SEEN.match(path):
            seen = by_prefix.setdefault(match["prefix"], defaultdict(lambda: defaultdict(set)))
            seen[match["side"], match["kind"]][int(match["block"])].add(int(match["layer"]))
    if not by_prefix:
        return None
    # A graph with exposed LoRA has its exposed modules under another prefix than its constants.
    whole = [seen for seen in by_prefix.values() if ("down", "resnets") in seen]
    found = [_lists(seen) for seen in whole or by_prefix.values()]
    if any(lists != found[0] for lists in found):
        where = ", ".join(sorted(prefix or "(none)" for prefix in by_prefix))
        raise AdapterError(
            "the adapter has Stability's sgm names, but the base holds several UNets of different structure",
            "give the folder or the graph of one of them",
            [f"found under the prefixes: {where}"],
        )
    return found[0]


def _lists(seen: _Seen) -> Mapping[str, Sequence[_Layer]]:
    depths = _depths(seen) if ("down", "resnets") in seen else _depths_of_attention(seen)
    down = [_Layer("", 0)]  # conv_in
    for block, depth in enumerate(depths):
        name = f"down_blocks.{block}"
        down += [_Layer(name, layer) for layer in range(depth)]
        if block + 1 < len(depths):
            down.append(_Layer(name, depth, is_downsampler=True))
    up = [
        _Layer(f"up_blocks.{block}", layer, is_last=layer == depth and block + 1 < len(depths))
        for block, depth in enumerate(reversed(depths))
        for layer in range(depth + 1)
    ]
    return {"input_blocks": down, "output_blocks": up}


def _depths(seen: _Seen) -> list[int]:
    """Return the layers of each down block; every up block has one more than the down block opposite it."""
    down, up = seen["down", "resnets"], seen.get(("up", "resnets"), {})
    depths = [len(down.get(block, ())) for block in range(len(down))]
    wanted_up = [depth + 1 for depth in reversed(depths)]
    problems = [
        f"{side}_blocks.{block}.resnets: {sorted(layers)}"
        for side, blocks in (("down", down), ("up", up))
        for block, layers in sorted(blocks.items())
        if layers != set(range(len(layers))) or block >= len(depths)
    ]
    if [len(up.get(block, ())) for block in range(len(up))] != wanted_up:
        counts = {block: len(layers) for block, layers in sorted(up.items())}
        problems.append(f"layers of the down blocks: {depths}; of the up blocks {counts}, wanted {wanted_up}")
    below = sorted(seen.get(("down", "downsamplers"), {}))
    if below != list(range(len(depths) - 1)):
        problems.append(f"downsamplers in the down blocks {below}, wanted in all but the last")
    if problems:
        raise _unclear(problems)
    return depths


def _depths_of_attention(seen: _Seen) -> list[int]:
    """Return the layers of each block if only attentions are known, as in a graph that exposes them.

    Every down block has the same number of layers, and every up block one more, in all published UNets.
    """
    down = [max(layers) + 1 for layers in seen.get(("down", "attentions"), {}).values()]
    up = [max(layers) for layers in seen.get(("up", "attentions"), {}).values()]
    if not down or not up or len({*down, *up}) > 1:
        raise _unclear([f"attentions in the down blocks: {down}, in the up blocks: {[n + 1 for n in up]}"])
    blocks = max(block for sides in seen.values() for block in sides) + 1
    # One block more than is known, which has no attentions.
    return [down[0]] * (blocks + 1)


def _unclear(problems: Sequence[str]) -> AdapterError:
    return AdapterError(
        "the adapter has Stability's sgm names, which count the layers of a UNet, but the base's names don't "
        "show how many layers each of its blocks has",
        "give the whole diffusers folder, as the base or as --checkpoint; make a graph with exposed LoRA "
        "with this adapter as --adapter",
        problems,
    )


SCHEME = _SgmUNet()
