"""Read adapter files as `Adapter`: format → ``module:attribute``, imported when a file is read.

A new format is one module with one `Format`, and one line here. Listing the names (a command's help) imports
nothing, numpy included.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import AdapterError

if TYPE_CHECKING:
    from lora_export.adapter import Adapter
    from lora_export.formats.provenance import Writer
    from lora_export.formats.reading.source import AdapterSource, Format

__all__ = ["FORMATS", "WRITERS", "as_adapter", "load_adapter", "save_adapter", "writer_of"]

FORMATS: dict[str, str] = {
    "peft": "lora_export.formats.peft:FORMAT",
    "diffusers": "lora_export.formats.diffusers:FORMAT",
    "kohya": "lora_export.formats.kohya:FORMAT",
    "loralib": "lora_export.formats.loralib:FORMAT",
    "mlx": "lora_export.formats.mlx:FORMAT",
    "plain": "lora_export.formats.plain:FORMAT",
    "edge-llm": "lora_export.formats.edge_llm:FORMAT",
    "converted": "lora_export.formats.converted:FORMAT",
    "genai": "lora_export.formats.genai:FORMAT",
    "onnx_adapter": "lora_export.formats.onnx_adapter:FORMAT",
}
# Formats that `convert-adapter` writes; the format in the same module reads each back.
WRITERS: dict[str, str] = {
    "safetensors": "lora_export.formats.converted:WRITER",
    "onnx_adapter": "lora_export.formats.onnx_adapter:WRITER",
    "edge-llm": "lora_export.formats.edge_llm:WRITER",
    "genai": "lora_export.formats.genai:WRITER",
}
_SHOWN = 8


def load_adapter(
    path: str | Path,
    *,
    alpha: float | None = None,
    rank: int | None = None,
    rslora: bool | None = None,
    format: str | None = None,
    component: str | None = None,
    name: str | None = None,
) -> Adapter:
    """Read a trained adapter of any known format.

    Args:
        path: A PEFT folder, or a ``.safetensors``, ``.bin``, ``.pt``, ``.pth``, ``.ckpt`` or
            ``.onnx_adapter`` file. The last imports onnxruntime, the four before it torch.
        alpha: Numerator of the scaling, if the file doesn't state it.
        rank: Rank, which is checked against the tensors.
        rslora: Divide alpha by √rank (True) or by rank (False); None to read it from the file.
        format: A key of `FORMATS`, if the tensor names alone are ambiguous.
        component: The part to read: ``unet``, ``text_encoder``, … of a file for several models; else the path
            of a submodel (``model.encoder``), see `Adapter.scope`; or both, with a colon in between.
        name: Name of the adapter; by default the folder's or the file's name.

    Raises:
        AdapterError: The file is missing, damaged, of an unknown format, or breaks rules; all are listed.
        BackendUnavailable: The file is a torch checkpoint or an ``.onnx_adapter``, but torch or onnxruntime
            is not installed.
        InputChangedError: A file of the adapter changed while it was read.
    """
    from lora_export.formats.reading.pairs import check_options
    from lora_export.formats.reading.patterns import within
    from lora_export.formats.reading.source import ReadOptions, open_source

    options = ReadOptions(alpha, rank, rslora, component)
    check_options(options)
    if format is not None and format not in FORMATS:
        raise AdapterError(f"the format '{format}' is unknown", f"give one of: {', '.join(FORMATS)}")
    source = open_source(Path(path), name)
    if not source.tensors:
        raise AdapterError(f"adapter '{source.name}' is empty: {source.file} has no tensors", "save it again")
    with within(f"adapter '{source.name}' ({source.file})"):
        adapter = _with_effect(_format(format or detect_format(source)).read(source, options))
    adapter = replace(adapter, states=source.states)
    if component is None:
        return adapter
    from lora_export.formats.reading.scope import part_of

    return part_of(adapter, component)


def _with_effect(adapter: Adapter) -> Adapter:
    """Add a note to an adapter that has no effect: training begins with B = 0."""
    import numpy as np

    modules = adapter.modules.values()
    others = adapter.extras or adapter.token_rows
    if others or not modules or any(m.magnitude is not None or m.lora_bias is not None for m in modules):
        return adapter
    if any(np.any(module.lora_b) for module in modules):
        return adapter
    note = "every lora_B is zero: it changes nothing (it was not trained, or its save failed)"
    return replace(adapter, notes=(*adapter.notes, note))


def as_adapter(given: str | os.PathLike[str] | Adapter, component: str | None = None) -> Adapter:
    """Return an adapter that was given as a path or as an `Adapter`.

    Args:
        given: A path for `load_adapter`, or an `Adapter`.
        component: The part to read, see `load_adapter`.

    Raises:
        AdapterError: As in `load_adapter`.
        InputChangedError: The files of an `Adapter` have changed since it was loaded.
    """
    from lora_export.adapter import Adapter
    from lora_export.formats.reading.scope import part_of
    from lora_export.storage.inputs import note_loaded

    if not isinstance(given, Adapter):
        return load_adapter(Path(given), component=component)
    note_loaded(given.states)
    return given if component is None else part_of(given, component)


def save_adapter(adapter: Adapter, folder: str | Path, force: bool = False) -> Path:
    """Write a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``, both or neither.

    Args:
        adapter: The adapter. Its dtypes are kept.
        folder: The folder, which is made if it doesn't exist.
        force: Replace existing files, but never those that the adapter was read from.

    Returns:
        The folder.

    Raises:
        AdapterError: The adapter has something that PEFT's format can't express; all of it is listed.
        OutputError: The files exist already, or can't be written.
    """
    from lora_export.formats.reading.peft_folder import write_folder

    return write_folder(adapter, Path(folder), force)


def detect_format(source: AdapterSource) -> str:
    """Return the one format that recognises the file; a format that is certain comes first.

    Raises:
        AdapterError: No format recognises it, or several do.
    """
    from lora_export.formats.reading.source import FORMAT_OPTION

    formats = {name: _format(name) for name in FORMATS}
    found = [name for name, one in formats.items() if one.certain and one.recognises(source)][:1]
    if not found:
        source.check_names()
        found = [name for name, one in formats.items() if one.recognises(source)]
    if len(found) == 1:
        return found[0]
    names = list(source.tensors)
    seen = ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
    listed = [f"seen: {seen}", *(f"{n} expects {f.expects}" for n, f in formats.items())]
    if found:
        raise AdapterError(
            f"{source.file} looks like several formats: {', '.join(found)}",
            f"save the tensors of each in a file of its own, or name the format with {FORMAT_OPTION}",
            listed,
        )
    raise AdapterError(
        f"{source.file} is not in a known adapter format",
        "rename the tensors to one of these forms, or save only the adapter's tensors",
        listed,
    )


def writer_of(name: str) -> Writer:
    """Return an entry of `WRITERS`."""
    module, _, attribute = WRITERS[name].partition(":")
    found: Writer = getattr(import_module(module), attribute)
    return found


def _format(name: str) -> Format:
    module, _, attribute = FORMATS[name].partition(":")
    found: Format = getattr(import_module(module), attribute)
    return found
