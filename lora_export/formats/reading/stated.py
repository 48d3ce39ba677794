"""Find the scaling that a file states beside its tensors: a torch checkpoint's numbers, a header's metadata.

Metadata are text → text. Trainers write alpha and rank as plain keys (``lora_alpha``, ``alpha``,
``network_alpha``; sd-scripts ``ss_network_alpha``, ``ss_network_dim``) or after the component
(SimpleTuner: ``transformer.lora_alpha``, ``transformer.r``). Few programs read them, but scaling 1 in their
place is wrong by alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lora_export.adapter import LoraModule
from lora_export.errors import AdapterError
from lora_export.formats.reading.source import AdapterSource, ReadOptions
from lora_export.untrusted.documents import json_of
from lora_export.untrusted.numbers import decimal_number

_ALPHAS = ("lora_alpha", "network_alpha", "ss_network_alpha")
_BARE_ALPHA = "alpha"
_RANKS = ("lora_rank", "lora_r", "r", "rank", "network_dim", "ss_network_dim")
_RSLORA = ("use_rslora", "rslora")
# LyCORIS calls it ``dora_wd``; sd-scripts put a trainer's arguments there as one JSON object.
_DORA = ("use_dora", "dora", "dora_wd")
_ARGUMENTS = "ss_network_args"
_ON = ("true", "1")


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The scaling that file and user together state.

    Attributes:
        alpha: Numerator; None if neither states it.
        rank: Rank of every module.
        scaling: The whole factor, if a file states that instead.
        rslora: Divide alpha by √rank instead of rank.
        notes: Notes on the origin of the numbers, if it is not the user.
    """

    alpha: float | None = None
    rank: int | None = None
    scaling: float | None = None
    rslora: bool = False
    notes: tuple[str, ...] = ()

    def alpha_of(self, rows: int | None) -> float | None:
        """Return alpha of a module with ``rows`` rows in ``lora_A``; None if it is unknown."""
        if self.alpha is not None or self.scaling is None or rows is None:
            return self.alpha
        return self.scaling * (math.sqrt(rows) if self.rslora else rows)


def stated_of(
    source: AdapterSource,
    options: ReadOptions,
    problems: list[str],
    component: str | None = None,
    ranks: Collection[int] = (),
    of_diffusion: bool = False,
) -> Stated:
    """Return the stated scaling for the modules of ``component``.

    Args:
        source: The file.
        options: The user's options; they may not contradict the file.
        problems: List to add contradictions to.
        component: Part of a file for several models.
        ranks: Ranks of the tensors; metadata with another rank belong to another file.
        of_diffusion: True if a diffusion tool wrote the file: ``alpha`` in its metadata is then LoRA's.
    """
    settings = source.settings
    alpha, rank, scaling = (settings.get(key) for key in ("alpha", "rank", "scaling"))
    rslora = settings.get("rslora")
    notes = []
    if alpha is None and scaling is None:
        found = _Metadata(source.metadata, component, set(ranks), of_diffusion)
        # Metadata describe the file as a trainer wrote it, maybe its parents: the user knows better.
        alpha, note = found.alpha(options.alpha, problems)
        notes += [note] if note else []
        rslora = rslora or found.first(_RSLORA)[0].lower() in _ON
    stated = Stated(
        alpha=options.alpha if alpha is None else alpha,
        rank=options.rank or rank,
        scaling=scaling,
        rslora=bool(rslora if options.rslora is None else options.rslora),
        notes=tuple(notes),
    )
    _check(stated, options, ranks, problems)
    return stated


def check_alpha_tensors(alphas: Collection[float | None], options: ReadOptions, problems: list[str]) -> None:
    """Add a problem if every module has an ``.alpha`` tensor and the user states another number.

    Args:
        alphas: Value of each module's tensor; None without one, and then the option is for those modules.
        options: The user's options.
        problems: List to add the problem to.
    """
    stated = sorted({alpha for alpha in alphas if alpha is not None})
    if options.alpha is None or None in alphas or stated in ([], [options.alpha]):
        return
    shown = ", ".join(f"{alpha:g}" for alpha in stated[:4]) + (", …" if len(stated) > 4 else "")
    problems.append(
        f"alpha: the file's .alpha tensors say {shown}, the option {options.alpha:g}; omit the option"
    )


def check_claims(source: AdapterSource, modules: Iterable[LoraModule], problems: list[str]) -> None:
    """Add a problem for each module without a magnitude where the metadata say that it was trained as DoRA.

    Read as plain LoRA it would be another change of the weight.

    Args:
        source: The file.
        modules: Modules that were made from its tensors.
        problems: List to add the lines to.
    """
    stated = _arguments(source)
    for module in modules:
        if module.magnitude is not None:
            continue
        for where, metadata in (("the metadata's", source.metadata), (f"{_ARGUMENTS}'", stated)):
            text, key = _Metadata(metadata, module.component, set(), of_diffusion=True).first(_DORA)
            if text.lower() in _ON:
                problems.append(f"{module.path}: has no magnitude, but {where} {key} is on (DoRA)")
                break


def _arguments(source: AdapterSource) -> dict[str, str]:
    """Return the arguments that a trainer was given; nothing where they are not a JSON object."""
    try:
        given = json_of(source.metadata.get(_ARGUMENTS, ""), _ARGUMENTS, AdapterError)
    except AdapterError:
        return {}
    return {key: str(value) for key, value in given.items()} if isinstance(given, dict) else {}


def where_to_look(source: AdapterSource) -> str:
    """Return a text, for the refusal of a file without alpha, on a number in it that may be LoRA's."""
    bare = _number(source.metadata.get(_BARE_ALPHA, ""))
    for where, value in (*source.mentions, *([("the metadata's alpha", bare)] if bare else [])):
        return f" ({where} is {value:g}: if that is LoRA's, give --alpha {value:g})"
    return ""


def _check(stated: Stated, options: ReadOptions, ranks: Collection[int], problems: list[str]) -> None:
    """Add a problem if the file contradicts the user or itself."""
    if options.alpha is not None and stated.alpha != options.alpha:
        problems.append(
            f"alpha: the file says {stated.alpha:g}, the option {options.alpha:g}; omit the option"
        )
    if stated.alpha is None or stated.scaling is None:
        return
    for rank in set(ranks) - {0}:
        made = stated.alpha / (math.sqrt(rank) if stated.rslora else rank)
        if not math.isclose(made, stated.scaling, rel_tol=1e-4):
            fix = "omit the option" if options.alpha is not None else "save the file with one of them"
            problems.append(
                f"scaling: the file says {stated.scaling:g}, but alpha {stated.alpha:g} makes {made:g} "
                f"with rank {rank}; {fix}"
            )


class _Metadata:
    """A header's metadata, for one component of a file."""

    def __init__(
        self, metadata: Mapping[str, str], component: str | None, ranks: set[int], of_diffusion: bool
    ) -> None:
        self._metadata = metadata
        self._fronts = (f"{component}.", "") if component else ("",)
        self._ranks = ranks
        self._of_diffusion = of_diffusion

    def first(self, keys: Iterable[str]) -> tuple[str, str]:
        """Return the text of the first key that exists, and the key as it is written."""
        for key in (f"{front}{key}" for front in self._fronts for key in keys):
            if key in self._metadata:
                return self._metadata[key], key
        return "", ""

    def alpha(self, option: float | None, problems: list[str]) -> tuple[float | None, str]:
        """Return alpha and a note on its origin; None if there is none, or it contradicts the file."""
        text, rank_key = self.first(_RANKS)
        rank = _number(text)
        numbers = self._numbers(known=self._of_diffusion or rank in self._ranks)
        if not numbers:
            return None, ""
        listed = ", ".join(f"{key} {value:g}" for key, value in numbers.items())
        if option is not None:
            differs = set(numbers.values()) != {option}
            return option, f"alpha {option:g} as given; the file's metadata say {listed}" if differs else ""
        where, alpha = next(iter(numbers.items()))
        if len(set(numbers.values())) > 1:
            problems.append(f"alpha: the metadata contradict themselves ({listed}); give --alpha")
        elif self._ranks and rank is not None and rank not in self._ranks:
            shown = ", ".join(map(str, sorted(self._ranks)))
            problems.append(
                f"alpha: the metadata's {where} {alpha:g} goes with {rank_key} {rank:g}, but the tensors "
                f"have rank {shown} (resized or merged since?); give the --alpha that goes with these tensors"
            )
        else:
            return alpha, f"alpha {alpha:g} from the file's metadata ({where})"
        return None, ""

    def _numbers(self, known: bool) -> dict[str, float]:
        """Return each key and its number; plain ``alpha`` counts only if it is known to be LoRA's."""
        numbers = {}
        for key in (*_ALPHAS, *([_BARE_ALPHA] if known else [])):
            text, where = self.first((key,))
            if (value := _number(text)) is not None:
                numbers[where] = value
        return numbers


def _number(text: str) -> float | None:
    """Return a number above 0; None for anything else (sd-scripts write "Dynamic" and "None")."""
    value = decimal_number(text)
    return value if value is not None and 0 < value < math.inf else None
