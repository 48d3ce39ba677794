"""Look up parameter paths of a base for comparison with an adapter's, and the meaning of path components."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

from lora_export.formats.reading.wrappers import is_too_deep
from lora_export.formats.schemes.known import flatten
from lora_export.sites.naming.names import Prefix, common_form, per_expert, variants
from lora_export.sites.naming.towers import (
    Kinds,
    kinds_of_names,
    merged_kinds,
    other_kind,
    telling_components,
)

# Names of submodels that are beside others of their kind.
_SUBMODEL = re.compile(
    r"(?:\w*_)?(?:encoder|decoder|tower|unet|vae|prior|controlnet|generator|discriminator|teacher|student"
    r"|actor|critic|policy|reward|draft|ema)(?:_?\d+)?"
    r"|(?:text|vision|visual|image|audio|speech|video|protein|query|doc|document|user|item|code|graph)"
    r"_(?:model|backbone|branch|net|transformer|embedder)"
    r"|visual|vision|\w+_[2-9]"
)
# Names of a whole model inside a class with a head, or inside a wrapper: transformers' ``base_model_prefix``
# of its model classes (5.23), except those that are one of several submodels, and names of wrappers.
_OUTER_NAMES = """
    aimv2 albert align audio_spectrogram_transformer auto_model backbone base base_model beit bert bert_model
    biogpt bit blip bridgetower bros canine clap clip clvp convbert convnext convnextv2 cpmant cvt dac
    data2vec_audio data2vec_text data2vec_vision deberta decision_transformer deit dinat dinov2
    dinov2_with_registers distilbert donut dpt efficientnet electra ernie esm esmc flava fnet focalnet
    funnel git glpn gpt_neox gpt_neox_japanese groupvit hiera hubert ibert ijepa inner language_model
    layoutlm layoutlmv2 layoutlmv3 led levit lilt longformer luke lxmert markuplm mobilebert
    mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 model module mpnet mra net network nomic_bert
    nystromformer owlv2 owlvit perceiver poolformer prophetnet pvt pvt_v2 reformer regnet rembert resnet
    roberta roberta_prelayernorm roc_bert roformer rwkv sam segformer sew sew_d siglip siglip2 splinter
    swiftformer swin swin2sr swinv2 switch_transformers tapas timesformer timm_model transformer
    unispeech unispeech_sat videomae videomt vilt visual_bert vit vitdet vits vivit wav2vec2
    wav2vec2_bert wav2vec2_conformer wavlm wrapped wrapper x_clip yoso
"""
_OUTER = frozenset(_OUTER_NAMES.split())
_FLAT_OUTER = re.compile(rf"(?:{'|'.join(_OUTER)})(?:_(?:{'|'.join(_OUTER)}))*")

# Number of experts, each with its own weights in the graph, that prove a stack of experts.
EXPERTS = 2
# Largest numbers of changes of prefix for one adapter, and of pairs of similar names by which they are found;
# more are not a naming. A change costs a tenth of a millisecond, a pair some microseconds.
_MOST_CHANGES, _MOST_PAIRS = 2**16, 2**19


class KnownNames:
    """Parameter paths of a base, prepared for comparison.

    Args:
        names: Dotted paths without wrappers; those deeper than any parameter's path are ignored.
        shape_of: Function that looks up the shape of a path; it returns None if that is unknown.
        kinds: Function that returns the base's kinds of model by other evidence than names, see `towers`.
    """

    def __init__(
        self,
        names: Iterable[str],
        shape_of: Callable[[str], tuple[int, ...] | None] = lambda _: None,
        kinds: Callable[[], Kinds] = frozenset,
    ) -> None:
        self.names = frozenset(name for name in names if not is_too_deep(name))
        self._shape_of, self._stated = shape_of, kinds
        self._submodels_below: dict[str, frozenset[str]] = {}

    @cached_property
    def kinds(self) -> Kinds:
        """Kinds of model that the base is, as far as known."""
        return merged_kinds(self._stated(), kinds_of_names(self.names))

    @cached_property
    def _telling(self) -> frozenset[str]:
        return telling_components(self.names)

    @cached_property
    def _children(self) -> dict[str, set[str]]:
        children: dict[str, set[str]] = defaultdict(set)
        for name in self.names:
            parts = name.split(".")
            for end in range(len(parts) - 1):
                children[".".join(parts[:end])].add(parts[end])
        return children

    @cached_property
    def _by_flat(self) -> dict[str, list[str]]:
        flat: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names):
            flat[flatten(name)].append(name)
        return flat

    @cached_property
    def _by_flat_tail(self) -> dict[str, set[str]]:
        """Flattened end of a path → the texts in front of it."""
        tails: dict[str, set[str]] = defaultdict(set)
        for name in self.names:
            parts = name.split(".")
            for end in range(1, len(parts) - 1):
                tails[flatten(".".join(parts[end:]))].add(".".join(parts[:end]))
        return tails

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self.names)

    @cached_property
    def _sorted_forms(self) -> list[str]:
        return sorted(map(common_form, self.names))

    @cached_property
    def _outermost(self) -> tuple[str, ...]:
        """First and last path of the numbered blocks, or of all paths if there are no blocks."""
        # Only dots count, because exporters number constants without a name (``val_12``).
        blocks = [name for name in self.names if any(map(str.isdigit, name.split(".")))] or self.names
        return (min(blocks), max(blocks)) if blocks else ()

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """Last component of a path that has parameters under it → such paths."""
        ends: dict[str, list[str]] = defaultdict(list)
        for path in self._children:
            ends[path.rpartition(".")[2]].append(path)
        return ends

    def has(self, key: str) -> bool:
        """Return True if the base has a parameter under this path, or under a builder's name for it."""
        if key in self.names:
            return True
        named = (*variants(key), *per_expert(key, EXPERTS))
        return any(all(name in self.names for name in variant.keys) for variant in named)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter under this very path; None if it is unknown."""
        return self._shape_of(name) if name in self.names else None

    def under(self, scope: str) -> list[str]:
        """Return the paths that end in ``scope`` and have parameters under them."""
        paths = self._by_end.get(scope.rpartition(".")[2], ())
        return sorted(path for path in paths if path == scope or path.endswith(f".{scope}"))

    def count_below(self, path: str, flattened: bool) -> int:
        """Return the number of parameters that `tails_below` yields."""
        return len(self._span(path, flattened)[1]) if path else len(self.names)

    def tails_below(self, path: str, flattened: bool) -> Iterator[str]:
        """Yield the rest of the path of each parameter below a path; all are below the empty path.

        Args:
            path: The path.
            flattened: True if the base's paths stay as they are; else they are in `common_form`.
        """
        names, span = self._span(path, flattened)
        start = len(path if flattened else common_form(path)) + 1 if path else 0
        return (names[number][start:] for number in span)

    def _span(self, path: str, flattened: bool) -> tuple[list[str], range]:
        names = self._sorted if flattened else self._sorted_forms
        path = path if flattened else common_form(path)
        ends = (f"{path}.", f"{path}/") if path else ("",)
        first, *last = (bisect_left(names, end) for end in ends)
        return names, range(first, *last or [len(names)])

    def other_kind(self, part: str) -> str:
        """Return the kind of model that a part's path denotes and the base isn't; "" if it may be that."""
        return other_kind(part, self.kinds, self._telling)

    def is_inside(self, path: str) -> bool:
        """Return True if all of the base's numbered blocks, or without blocks all paths, are below a path."""
        # All paths between the two in alphabetical order begin as they do.
        return all(name.startswith(f"{path}.") for name in self._outermost)

    def has_rivals(self, path: str) -> bool:
        """Return True if a submodel on the way down a path has another submodel beside it."""
        parts = path.split(".")
        for end, part in enumerate(parts):
            if is_submodel(part) and self._submodels(".".join(parts[:end])) - {part}:
                return True
        return False

    def _submodels(self, path: str) -> frozenset[str]:
        """Return the submodels right below a path."""
        if path not in self._submodels_below:
            self._submodels_below[path] = frozenset(filter(is_submodel, self._children.get(path, ())))
        return self._submodels_below[path]

    def changes(self, keys: Iterable[str]) -> set[Prefix] | None:
        """Return the changes under which one of some dotted paths is a parameter's; no index is removed.

        None if there are more than an adapter and its base can have.
        """
        by_rest: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            for variant in variants(key):
                for name in variant.keys:
                    by_rest[_behind_first_index(name)].append(name)
        found: set[Prefix] = set()
        pairs = 0
        for known in self.names:
            theirs = known.split(".")
            for start in range(len(theirs) - 1):
                alike = by_rest.get(".".join(theirs[start:]), ())
                pairs += len(alike)
                if pairs > _MOST_PAIRS or len(found) > _MOST_CHANGES:
                    return None
                for name in alike:
                    parts = name.split(".")
                    same = _common_end(parts, theirs)
                    found.add(Prefix(".".join(parts[:-same]), ".".join(theirs[:-same])))
        return found

    def flat_changes(self, keys: Iterable[str]) -> set[Prefix] | None:
        """Return the changes for flattened paths; the removed text has underscores."""
        found: set[Prefix] = set()
        pairs = 0
        for key in keys:
            text, before = flatten(key), -1
            for at in [-1, *(match.start() for match in re.finditer("_", text))]:
                strip, rest = text[: max(at, 0)], text[at + 1 :]
                if strip[before + 1 :].isdigit():
                    break
                before = at
                fronts = self._by_flat_tail.get(rest, ())
                pairs += len(fronts)
                if pairs > _MOST_PAIRS or len(found) > _MOST_CHANGES:
                    return None
                found.update(Prefix(strip, add) for add in fronts)
                if rest in self._by_flat:
                    found.add(Prefix(strip))
        return found

    def unflatten(self, key: str, change: Prefix) -> list[str]:
        """Return the paths that a flattened one may stand for under a change."""
        text = flatten(key)
        if change.strip and text.startswith(f"{change.strip}_"):
            text = text[len(change.strip) + 1 :]
        elif change.strip:
            return self._by_flat.get(text, [])
        if not change.add:
            return self._by_flat.get(text, [])
        whole = self._by_flat.get(f"{flatten(change.add)}_{text}", [])
        return [name for name in whole if name.startswith(f"{change.add}.")]


def is_submodel(name: str) -> bool:
    """Return True if a path component denotes one of several models, by its name."""
    return _SUBMODEL.fullmatch(name) is not None


def is_outer(path: str) -> bool:
    """Return True if a path has only names of a whole model inside a class with a head, or inside a wrapper.

    A language model is called ``language_model`` inside a vision–language model, or ``text_model`` inside
    ``model`` (Idefics 3, SmolVLM; CLIP's text model has no ``model`` around it).
    """
    parts = path.split(".")
    # A Sequential may be around the whole model (SentenceTransformer's ``0.auto_model``).
    parts = parts[1:] if parts[0].isdigit() and len(parts) > 1 else parts
    return all(part in _OUTER or _is_language(before, part) for before, part in pairwise(["", *parts]))


def is_flat_outer(text: str) -> bool:
    """Return True if a flattened path has only names as of `is_outer`."""
    return _FLAT_OUTER.fullmatch(text) is not None


def has_language_model(path: str) -> bool:
    """Return True if a path leads into the language model of a vision–language model."""
    return any(_is_language(before, part) for before, part in pairwise(["", *path.split(".")]))


def submodels_of(path: str) -> list[str]:
    """Return the submodels on the way down a path, except the language model of a vision–language model."""
    pairs = pairwise(["", *path.split(".")])
    return [part for before, part in pairs if is_submodel(part) and not _is_language(before, part)]


def has_submodel(text: str) -> bool:
    """Return True if some of the words of a flattened path are the name of a submodel."""
    words = text.split("_")
    spans = (words[start:end] for end in range(1, len(words) + 1) for start in range(end))
    return any(is_submodel("_".join(span)) for span in spans)


def _is_language(before: str, part: str) -> bool:
    return part == "language_model" or (before, part) == ("model", "text_model")


def has_index(name: str) -> bool:
    """Return True if a path, dotted or flattened, goes through a numbered block."""
    return any(part.isdigit() for part in re.split(r"[._]", name))


def _behind_first_index(name: str) -> str:
    """Return a path from its first index on, not counting a leading one; without any, from its module on."""
    parts = name.split(".")
    start = next((at for at, part in enumerate(parts) if at and part.isdigit()), len(parts) - 2)
    return ".".join(parts[max(0, min(start, len(parts) - 2)) :])


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return same
