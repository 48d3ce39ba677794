"""Read the tensors of a torch checkpoint (``.bin``, ``.pt``, ``.pth``, ``.ckpt``) without running its code.

People save a bare state dict, or a dict that holds one beside alpha, rank and bookkeeping. Both are read as
tensors and the few numbers that decide their scaling. A number counts only if its name or its place shows
that it is LoRA's: a training run's dictionaries are full of others called alpha, rank or scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lora_export.adapter import Array
from lora_export.errors import AdapterError, BackendUnavailable, install_line
from lora_export.formats.reading.pickle_claims import claim_problems
from lora_export.formats.reading.pickle_contents import Contents, TangledError
from lora_export.untrusted.documents import open_regular
from lora_export.untrusted.fields import seen
from lora_export.untrusted.shown import printable

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# Keys of dicts with tensors. Values beside the first ones may belong to the whole training run.
_GENERAL_NESTS = ("state_dict", "model_state_dict", "model", "weights", "module")
_LORA_NESTS = ("lora_state_dict", "lora", "adapter")
# Keys of dicts without tensors that are only about LoRA.
_LORA_CONFIGS = ("lora_config", "lora_args", "lora_params", "lora_parameters", "peft_config",
                 "adapter_config", "lora", "peft", "adapter")  # fmt: skip
# Spellings of the numbers that we need. These names are only LoRA's …
_CLEAR = {
    "lora_alpha": "alpha",
    "lora_r": "rank", "lora_rank": "rank",
    "lora_scaling": "scaling",
    "rslora": "rslora", "use_rslora": "rslora",
    "enable_lora": "enable_lora",
}  # fmt: skip
# … and these may be others: alpha may be mixup's or an optimizer's, rank a process's, scale a loss's.
_PLAIN = {"alpha": "alpha", "r": "rank", "rank": "rank", "scaling": "scaling", "scale": "scaling"}
# Settings that change the meaning of the factors, which these formats can't express.
_MEANINGFUL = ("use_dora", "dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication")
# Words in names that are about an adapter.
_OF_LORA = ("lora", "adapter", "target_modules", "base_model")
_BOOKKEEPING = ("optim", "sched", "epoch", "step", "rng", "loss", "callbacks", "loops", "version", "metric",
                "scaler", "amp_")  # fmt: skip


@dataclass(kw_only=True)
class PickleContents:
    """The contents of a torch checkpoint.

    Attributes:
        tensors: Name → values.
        settings: The file's ``alpha``, ``rank``, ``scaling``, ``rslora``, ``enable_lora``, as far as stated.
        ignored: Keys that are bookkeeping of a training run.
        mentions: Places and values of numbers called alpha that may be LoRA's or not.
        problems: Unknown keys, and settings that contradict each other.
    """

    tensors: dict[str, Array] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    mentions: list[tuple[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_checkpoint(path: Path) -> PickleContents:
    """Read a torch checkpoint with ``weights_only=True``.

    Raises:
        BackendUnavailable: torch is not installed.
        AdapterError: The file is damaged, holds other objects than tensors and plain values, or is not a
            dict.
    """
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(
            f"reading {path.name} needs torch, which is not installed",
            f"{install_line('hf')}, or save the adapter as .safetensors",
        ) from error
    try:
        # One open file for both: the name may mean another file by the time that torch opens it.
        with open_regular(path) as file:
            if problems := claim_problems(file):
                raise AdapterError(
                    f"{path} claims more than it holds, or holds what no adapter does",
                    "save the state dict alone, best as .safetensors",
                    problems,
                )
            content = torch.load(file, map_location="cpu", weights_only=True)
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error}", "check the path and its permissions") from error
    # torch raises many kinds of error from its zip reader or unpickler: RuntimeError, EOFError, …
    except Exception as error:
        # In front of its reason torch advises to load the file without weights_only.
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        first = said.splitlines()[0]
        raise AdapterError(
            f"{path} can't be loaded with weights_only=True: {first}",
            "it is damaged, or holds Python objects (refused: loading them would run their code); "
            "save the state dict alone, best as .safetensors",
        ) from error
    if not isinstance(content, Mapping):
        raise AdapterError(
            f"{path} holds a {type(content).__name__}, wanted a dict of tensors",
            "save it with torch.save(model.state_dict(), path)",
        )
    checkpoint = PickleContents()
    try:
        contents = Contents(content, torch.Tensor)
    except TangledError as error:
        raise AdapterError(
            f"{path} can't be read: {error}", "save the state dict alone, best as .safetensors"
        ) from error
    _Collector(checkpoint, contents, torch.Tensor).collect(content, "")
    if checkpoint.problems:
        raise AdapterError(
            f"{path} holds entries that are neither tensors nor known settings",
            "save only the LoRA tensors, alpha and r",
            checkpoint.problems,
        )
    return checkpoint


class _Collector:
    """Sort the entries of a checkpoint's dictionaries, each dictionary once in each of its roles.

    Args:
        into: Checkpoint that the entries are added to.
        contents: Facts on the contents of the dictionaries.
        tensor_type: torch's tensor type.
    """

    def __init__(self, into: PickleContents, contents: Contents, tensor_type: type) -> None:
        self._into, self._contents, self._tensor_type = into, contents, tensor_type
        self._done: set[tuple[int, str, bool]] = set()

    def collect(self, content: Mapping[Any, Any], where: str, of_model: bool = False) -> None:
        """Sort the entries of a dict that holds tensors, or holds a dict that does.

        Args:
            content: The dict.
            where: Path of the dict, with a slash at the end.
            of_model: True if the dict is a model's state dict, in which alpha is a parameter of the model.
        """
        if not self._is_new(content, "tensors", of_model):
            return
        into, tensor_type = self._into, self._tensor_type
        of_lora = _is_about_lora(content, tensor_type)
        spellings = _CLEAR | _PLAIN if of_lora else _CLEAR
        for key, value in content.items():
            name = _path(where, key)
            # A tensor of one element under such a key is the number; a key like "lora_unet….alpha" differs.
            one: Any = value
            is_number = isinstance(value, tensor_type) and one.numel() == 1 and not of_model
            number = _number(one) if is_number else value
            if str(key) in spellings and isinstance(number, (bool, int, float, list, tuple)):
                _set(into, spellings[str(key)], number, name)
            elif isinstance(value, tensor_type):
                self._take_tensor(str(key), value, name)
            elif key in _GENERAL_NESTS + _LORA_NESTS and self._contents.has_tensors(value):
                self.collect(value, f"{name}/", of_model=key in _GENERAL_NESTS)
            elif key in _MEANINGFUL:
                if value:
                    into.problems.append(f"{name}: {seen(value)} is not supported in this format")
            elif _is_bookkeeping(key) or isinstance(value, (str, type(None))):
                into.ignored.append(name)
            elif isinstance(value, Mapping) and not self._contents.has_tensors(value):
                if key not in _LORA_CONFIGS:
                    into.ignored.append(name)
                self._collect_settings(value, name, of_lora=key in _LORA_CONFIGS)
            elif (not of_lora or _is_of_lora(key)) and self._contents.is_plain(value):
                _mention(into, str(key), value, name)
                into.ignored.append(name)
            else:
                into.problems.append(f"{name}: {type(value).__name__}")

    def _is_new(self, content: Mapping[Any, Any], role: str, meaning: bool) -> bool:
        """Return whether a dict was not yet sorted in a role; it may occur under several names."""
        count = len(self._done)
        self._done.add((id(content), role, meaning))
        return len(self._done) > count

    def _take_tensor(self, key: str, tensor: Any, name: str) -> None:
        if key in self._into.tensors:
            self._into.problems.append(f"{name}: a second tensor of this name")
        try:
            self._into.tensors[key] = _array(tensor)
        # torch raises one of these for a sparse, quantised or meta tensor.
        except (RuntimeError, TypeError, NotImplementedError) as error:
            self._into.problems.append(f"{name}: {str(error).splitlines()[0]}")

    def _collect_settings(self, content: Mapping[Any, Any], where: str, of_lora: bool) -> None:
        """Take LoRA's numbers from a dict without tensors; everything else in it belongs to the training."""
        if not self._is_new(content, "settings", of_lora):
            return
        into, spellings = self._into, _CLEAR | _PLAIN if of_lora else _CLEAR
        for key, value in content.items():
            name = _path(f"{where}/", key)
            if key in _MEANINGFUL and value:
                into.problems.append(f"{name}: {seen(value)} is not supported in this format")
            elif str(key) in spellings and isinstance(value, (bool, int, float, list)):
                _set(into, spellings[str(key)], value, name)
            elif isinstance(value, Mapping) and not _is_bookkeeping(key):
                # PEFT's own dict has a level for each adapter: {"default": {"r": 8, …}}.
                self._collect_settings(value, name, of_lora or key in _LORA_CONFIGS)
            else:
                _mention(into, str(key), value, name)


def _number(tensor: Any) -> Any:
    """Return the value of a tensor of one element, or the tensor where it has none."""
    try:
        return tensor.item()
    except (RuntimeError, TypeError, NotImplementedError):
        return tensor


def _path(where: str, key: Any) -> str:
    """Return the place of an entry, shortened in the middle: keys may be shared and long."""
    return printable(f"{where}{str(key)[:_LONGEST_PATH]}", _LONGEST_PATH)


def _is_about_lora(content: Mapping[Any, Any], tensor_type: type) -> bool:
    """Return whether numbers in this dict with an ambiguous name can only be LoRA's.

    They are if the dict itself holds tensors, or a dict of tensors and otherwise only entries of LoRA: beside
    anything of a training run (an ``ema``, its settings, a name) they may mean something else.
    """
    if any(isinstance(value, tensor_type) for value in content.values()):
        return True
    if any(key in _LORA_NESTS for key in content):
        return True
    own = {*_GENERAL_NESTS, *_LORA_CONFIGS, *_CLEAR, *_PLAIN, *_MEANINGFUL}
    return all(key in own or _is_of_lora(key) for key in content)


def _is_of_lora(key: Any) -> bool:
    return _has_word(key, _OF_LORA)


def _is_bookkeeping(key: Any) -> bool:
    return _has_word(key, _BOOKKEEPING)


def _has_word(key: Any, words: tuple[str, ...]) -> bool:
    text = str(key).lower()
    return any(word in text for word in words)


def _mention(into: PickleContents, key: str, value: Any, name: str) -> None:
    if _PLAIN.get(key) == "alpha" and _is_number(value):
        into.mentions.append((name.replace("/", "."), float(value)))


def _is_number(value: Any) -> bool:
    """Return whether a value is a number that a float holds; Python's booleans don't count."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= _LARGEST and math.isfinite(value)


def _are_switches(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(one, bool) or (isinstance(one, int) and one in (0, 1)) for one in value
    )


_LARGEST = 2**100
_LONGEST_PATH = 300
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rslora": (lambda value: isinstance(value, bool), "true or false"),
    "enable_lora": (_are_switches, "a list of true and false"),
    "rank": (lambda value: _is_number(value) and value == int(value), "a whole number"),
}


def _set(into: PickleContents, key: str, value: Any, name: str) -> None:
    fits, what = _SETTINGS.get(key, (_is_number, "a finite number"))
    if not fits(value):
        into.problems.append(f"{name}: {seen(value)}, wanted {what}")
    elif into.settings.setdefault(key, value) != value:
        into.problems.append(
            f"{name}: {seen(value)}, but {key} is {seen(into.settings[key])} elsewhere in the file"
        )


def _array(tensor: Any) -> Array:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    kind = str(tensor.dtype)
    # numpy has no bfloat16 or float8: the bits are kept under ml_dtypes' types.
    for torch_name, bits, dtype in (
        ("torch.bfloat16", "int16", ml_dtypes.bfloat16),
        ("torch.float8_e4m3fn", "int8", ml_dtypes.float8_e4m3fn),
        ("torch.float8_e5m2", "int8", ml_dtypes.float8_e5m2),
    ):
        if kind == torch_name:
            import torch

            raw: Array = tensor.view(getattr(torch, bits)).numpy()
            return raw.view(dtype)
    array: Array = np.asarray(tensor.numpy())
    return array
