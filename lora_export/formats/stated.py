"""What a file says of its scaling beside the tensors: a torch checkpoint's numbers, a header's metadata.

Metadata are text → text. Trainers write alpha and rank as plain keys (``lora_alpha``, ``alpha``,
``network_alpha``; sd-scripts ``ss_network_alpha``, ``ss_network_dim``) or behind the component
(SimpleTuner: ``transformer.lora_alpha``, ``transformer.r``). Few programs read them; scaling 1 in their place
is wrong by alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_export.formats.source import Options, Source

_ALPHAS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
_RANKS = ("lora_rank", "lora_r", "r", "rank", "network_dim", "ss_network_dim")
_RSLORA = ("use_rslora", "rslora")


@dataclass(frozen=True)
class Stated:
    """What file and user together say of the scaling.

    Attributes:
        alpha: Numerator; None where neither says it.
        rank: Rank of every module.
        scaling: The whole factor, where a file says that instead.
        rslora: Divide by √rank.
        notes: Where the numbers come from, if not from the user.
    """

    alpha: float | None = None
    rank: int | None = None
    scaling: float | None = None
    rslora: bool = False
    notes: tuple[str, ...] = ()

    def alpha_of(self, rows: int | None) -> float | None:
        """Return alpha of a module with ``rows`` rows in ``lora_A``; None where nothing tells it."""
        if self.alpha is not None or self.scaling is None or rows is None:
            return self.alpha
        return self.scaling * (math.sqrt(rows) if self.rslora else rows)


def stated_of(
    source: Source,
    options: Options,
    problems: list[str],
    component: str | None = None,
    ranks: Iterable[int] = (),
) -> Stated:
    """Return what is stated for the modules of ``component``.

    Args:
        source: The file.
        options: What the user states; it may not contradict the file.
        problems: Gets a line for each contradiction.
        component: Part of a file that serves several models.
        ranks: Ranks that the tensors have: metadata of which none is true are of another file.
    """
    settings = source.settings
    alpha, rank, scaling = (settings.get(key) for key in ("alpha", "rank", "scaling"))
    if options.alpha is not None and alpha not in (None, options.alpha):
        problems.append(f"alpha: the file says {alpha:g}, the option {options.alpha:g}; omit the option")
    rslora, notes = settings.get("rslora"), []
    if alpha is None and scaling is None:
        # Metadata speak of the file as a trainer wrote it, maybe of its parents: the user knows better.
        alpha, note = _from_metadata(source.metadata, component, set(ranks), options.alpha, problems)
        notes += [note] if note else []
        rslora = rslora or _first(source.metadata, component, _RSLORA)[0].lower() in ("true", "1")
    return Stated(
        alpha=options.alpha if alpha is None else alpha,
        rank=options.rank or rank,
        scaling=scaling,
        rslora=bool(rslora if options.rslora is None else options.rslora),
        notes=tuple(notes),
    )


def where_to_look(source: Source) -> str:
    """Return, for the refusal of a file without alpha, the numbers in it that may be LoRA's."""
    if not source.mentions:
        return ""
    where, value = source.mentions[0]
    return f" ({where} is {value:g}: if that is LoRA's, give --alpha {value:g})"


def _first(metadata: Mapping[str, str], component: str | None, keys: Iterable[str]) -> tuple[str, str]:
    fronts = (f"{component}.", "") if component else ("",)
    for key in (f"{front}{key}" for front in fronts for key in keys):
        if key in metadata:
            return metadata[key], key
    return "", ""


def _from_metadata(
    metadata: Mapping[str, str],
    component: str | None,
    ranks: set[int],
    option: float | None,
    problems: list[str],
) -> tuple[float | None, str]:
    """Return alpha and a note of its origin; None where the metadata have none, or are of another file."""
    numbers: dict[str, float] = {}
    for key in _ALPHAS:
        text, where = _first(metadata, component, (key,))
        if (value := _number(text)) is not None:
            numbers[where] = value
    if not numbers:
        return None, ""
    said = ", ".join(f"{key} {value:g}" for key, value in numbers.items())
    if option is not None:
        differs = set(numbers.values()) != {option}
        return option, f"alpha {option:g} as given; the file's metadata say {said}" if differs else ""
    if len(set(numbers.values())) > 1:
        problems.append(f"alpha: the metadata contradict themselves ({said}); give --alpha")
        return None, ""
    where, alpha = next(iter(numbers.items()))
    rank_text, rank_key = _first(metadata, component, _RANKS)
    rank = _number(rank_text)
    if ranks and rank is not None and rank not in ranks:
        shown = ", ".join(map(str, sorted(ranks)))
        problems.append(
            f"alpha: the metadata's {where} {alpha:g} goes with {rank_key} {rank:g}, but the tensors have "
            f"rank {shown} (resized or merged since?); give the --alpha that goes with these tensors"
        )
        return None, ""
    return alpha, f"alpha {alpha:g} from the file's metadata ({where})"


def _number(text: str) -> float | None:
    """Return a number above 0; None for anything else (sd-scripts write "Dynamic" and "None")."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
