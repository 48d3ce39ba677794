"""Read PEFT's ``LoraConfig``: which keys matter for weights, which don't, which are refused.

Source: PEFT 0.21, ``tuners/lora/config.py`` (the keys) and ``tuners/lora/model.py`` (pattern matching).
Every key is accounted for: an unknown one that is not off is refused, because it may change the meaning of
the tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any

from lora_export.adapter import LoraModule
from lora_export.formats.reading.key_index import KeyIndex
from lora_export.formats.reading.pairs import ABSURD
from lora_export.formats.reading.patterns import check, remembered
from lora_export.formats.reading.source import ReadOptions

_PLAIN = re.compile(r"[A-Za-z0-9_.]{1,1000}")

# These change how the tensors are made or trained, not what they mean once saved.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
# Read by the formats that use this module.
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "fan_in_fan_out",
        "lora_alpha",
        "lora_bias",
        "r",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_rslora",
    }
)
# Settings that only PEFT has: a file of another format has no place for what comes with them.
PEFT_ONLY = frozenset({"target_parameters", "trainable_token_indices", "use_bdlora"})
# The adapter acts only on some tokens, which a merged weight can't do.
ALORA = "alora_invocation_tokens"
# Keys of adapters that are no sum of weights, so that PEFT can't merge them either → the way to use them.
UNMERGEABLE = {
    ALORA: "serve it with PEFT or vLLM, or train the adapter again without it",
    "arrow_config": "export the task adapters one by one",
    "use_qalora": "run it with PEFT on the quantised base that it was trained on, or train it again without "
    "use_qalora",
}
_REFUSED = {
    ALORA: "aLoRA acts only after its invocation tokens, which a merged or exported weight can't do",
    "arrow_config": "Arrow routes between adapters for each token",
    "enable_lora": "a MergedLinear of PEFT 0.2; load it with that version and save it per projection",
    "kasa_config": "KaSA truncates the base weights themselves; merge it with PEFT's merge_and_unload",
    "layer_replication": "the adapter belongs to a model with replicated layers; save that model as a "
    "base of its own and train or rename the adapter for it",
    "megatron_config": "Megatron's parallel layers may hold a shard of a factor; gather and save without it",
    "use_qalora": "QALoRA's lora_A works on pooled inputs of a GPTQ base; PEFT itself can't merge it",
}  # fmt: skip
# BD-LoRA's lists of words in the paths of modules whose factor is stacked blocks.
BLOCK_LISTS = ("target_modules_bd_a", "target_modules_bd_b")
_MOST_NAMES = 1024
# Initialisations that change the base weights: the saved tensors are relative to the changed base.
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def pattern_values(config: Mapping[str, Any], name: str, path: str) -> list[Any]:
    """Return the values of all keys that match ``path`` under PEFT's rule; the first one counts.

    Args:
        config: PEFT's config.
        name: ``rank_pattern`` or ``alpha_pattern``.
        path: Path of a module.

    The rule (``peft.utils.other.get_pattern_key``): a key matches the end of the path, from a dot on, as a
    regular expression; if none does, a key that is the path itself matches.
    """
    pattern = config.get(name)
    if not isinstance(pattern, Mapping):
        return []
    index, values = remembered(pattern, lambda: (KeyIndex(name, map(str, pattern)), list(pattern.values())))
    found = [values[number] for number in index.fitting(path)]
    if not found and path in pattern:
        return [pattern[path]]
    return found


class LoraRules:
    """The part of a ``LoraConfig`` that turns tensors into a change of weights.

    Args:
        config: The JSON object.
        options: The user's options; they may not contradict the config.
        unread: Keys that have no meaning in the file's format.

    Attributes:
        problems: A line for each key that is refused or invalid.
        notes: Notes on keys that were ignored.
    """

    def __init__(
        self, config: Mapping[str, Any], options: ReadOptions, unread: Set[str] = frozenset()
    ) -> None:
        self._config = config
        self._unread = unread
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.rslora = bool(config.get("use_rslora"))
        targets = config.get("target_parameters") or []
        self.target_parameters: list[str] = targets if isinstance(targets, list) else []
        self._check_types()
        self._check_numbers(options)
        self._check_keys()
        if options.rslora is not None and options.rslora != self.rslora:
            self.problems.append(
                f"use_rslora: the config says {self.rslora}, the option {options.rslora}; omit the option"
            )

    def alpha(self, path: str) -> float | None:
        """Return alpha of a module; None if the config has no usable number (already a problem)."""
        found = pattern_values(self._config, "alpha_pattern", path)
        value: Any = found[0] if found else self._config.get("lora_alpha")
        if any(other != value for other in found):
            # Seen with peft 0.21: save_pretrained sorts the keys, training used them as they were given.
            self.notes.append(
                f"{path}: several alpha_pattern keys match; read as PEFT reads the file, alpha {value}, "
                "but PEFT sorted the keys on saving, so training may have used another"
            )
        return None if _number_problem(value) else float(value)

    def rank(self, path: str) -> int | None:
        """Return the rank of a module; None if the config has no usable number (already a problem)."""
        found = pattern_values(self._config, "rank_pattern", path)
        value: Any = found[0] if found else self._config.get("r")
        return None if _number_problem(value, whole=True) else int(value)

    def _check_numbers(self, options: ReadOptions) -> None:
        for key, option in (("r", options.rank), ("lora_alpha", options.alpha)):
            value: Any = self._config.get(key)
            if problem := _number_problem(value, whole=key == "r"):
                self.problems.append(f"config {key}: {problem}")
            elif option is not None and option != value:
                self.problems.append(
                    f"{key}: the config says {value:g}, the option {option:g}; omit the option"
                )
        for key in ("rank_pattern", "alpha_pattern"):
            pattern = self._config.get(key)
            for name, value in pattern.items() if isinstance(pattern, Mapping) else ():
                problem = _number_problem(value, whole=key == "rank_pattern") or _pattern_problem(key, name)
                if problem:
                    self.problems.append(f"config {key} {name!r}: {problem}")

    def _check_types(self) -> None:
        for kind, what, keys in (
            (Mapping, "an object", ("rank_pattern", "alpha_pattern", "use_bdlora")),
            (list, "a list", ("target_parameters",)),
            (list | str, "a list or a string", ("target_modules", "exclude_modules", "modules_to_save")),
            (bool, "true or false", ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")),
        ):
            for key in keys:
                if (value := self._config.get(key)) is not None and not isinstance(value, kind):
                    self.problems.append(f"config {key}: {value!r}, wanted {what}")
        if not all(isinstance(target, str) for target in self.target_parameters):
            self.problems.append("config target_parameters: wanted a list of names")
            self.target_parameters = []

    def _check_keys(self) -> None:
        for key, value in self._config.items():
            if key in _REFUSED and value:
                self.problems.append(f"config {key}: {_REFUSED[key]}")
            elif key in self._unread and value:
                self.problems.append(
                    f"config {key}: {value!r} is read in an adapter folder of PEFT's only; save it with "
                    "save_pretrained"
                )
            elif key not in _HARMLESS | _READ | _REFUSED.keys() and value:
                self.problems.append(
                    f"config {key}: {value!r}; the key is unknown and may change the meaning of the tensors"
                )
        init = str(self._config.get("init_lora_weights", "")).lower()
        if init.startswith(_CHANGES_BASE):
            self.problems.append(
                f"config init_lora_weights: '{init}' changed the base weights, and the tensors are relative "
                "to them; save again with "
                "save_pretrained(…, path_initial_model_for_weight_conversion=INITIAL) (not for loftq: merge "
                "into its own base), or, if the base given here is the changed one, "
                "set init_lora_weights to true in the config"
            )
        if self._config.get("velora_config"):
            self.notes.append("VeLoRA changes only the backward pass: read as plain LoRA")
        if self._config.get("monteclora_config"):
            self.notes.append("Monteclora's sampling is omitted, as in PEFT's merge: read as plain LoRA")
        if self._config.get("ensure_weight_tying"):
            self.notes.append(
                "trained with tied embeddings: both ends carry the same change of one weight; it counts once"
            )


def check_switches(
    modules: Iterable[LoraModule], config: Mapping[str, Any], problems: list[str], where: str = "the config's"
) -> None:
    """Add a problem where tensors and switches disagree.

    PEFT loads a magnitude or a bias only where its switch is on, and makes a new one where it is missing.

    Args:
        modules: Modules that the config is for.
        config: PEFT's config, or another one with these switches.
        problems: List to add a line for each problem to.
        where: Owner of the switches, for messages.
    """
    modules = list(modules)
    for switch, attribute, kinds in (
        ("use_dora", "magnitude", ("linear", "conv", "embedding")),
        ("lora_bias", "lora_bias", ("linear", "conv")),
    ):
        for module in modules:
            there = getattr(module, attribute) is not None
            if there and not config.get(switch):
                problems.append(f"{module.path}: has a {attribute}, but {where} {switch} is off")
            elif config.get(switch) is True and not there and module.kind in kinds:
                problems.append(f"{module.path}: has no {attribute}, but {where} {switch} is on")


def too_many_names(config: Mapping[str, Any]) -> list[str]:
    """Return a line for each list of names that is longer than any that a training writes.

    Each of these names is compared with each of the file's and the base's modules.
    """
    given = {key: config.get(key) for key in ("modules_to_save", "trainable_token_indices")}
    if isinstance(blocks := config.get("use_bdlora"), Mapping):
        given |= {f"use_bdlora {key}": blocks.get(key) for key in BLOCK_LISTS}
    found = [
        f"config {key}: {len(listed)} names, at most {_MOST_NAMES} are read"
        for key, listed in given.items()
        if isinstance(listed, list | Mapping) and len(listed) > _MOST_NAMES
    ]
    if isinstance(targets := config.get("target_parameters"), list):
        modules = Counter(target.rpartition(".")[0] for target in {str(target) for target in targets})
        module, count = max(modules.items(), key=lambda one: one[1], default=("", 0))
        if count > _MOST_NAMES:
            found.append(
                f"config target_parameters: {count} parameters of {module or 'any module'}, at most "
                f"{_MOST_NAMES} are read"
            )
    return found


def _pattern_problem(key: str, pattern: str) -> str:
    """Return the reason why PEFT would fail at a key of a pattern, or ""."""
    if _PLAIN.fullmatch(pattern):
        return ""  # of plain names there may be one for each module
    try:
        check(key, rf"(.*\.)?({pattern})$")
    except re.error as error:
        return f"not a regular expression ({error}), which PEFT reads it as; for any name write .*"
    return ""


def _number_problem(value: Any, whole: bool = False) -> str:
    """Return the problem of a rank or an alpha, or ""."""
    wanted = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value % 1):
        return f"{value!r}, wanted {wanted}"
    # The upper bound keeps absurd JSON (1e999 is infinity) away from arithmetic.
    if ABSURD <= value < float("inf"):
        return f"{value!r}, wanted {wanted} below {ABSURD:g}"
    return "" if 0 < value < ABSURD else f"{value!r}, wanted {wanted} above 0"
