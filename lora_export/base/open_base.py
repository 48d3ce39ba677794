"""Open the base graph of a mode: load or capture it, with weights to compare with and files to share.

Also name the files that are written for it: a graph, its data, a manifest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.adapter import Adapter
from lora_export.base.checkpoint.own_code import code_notes, refuse_own_code
from lora_export.base.checkpoint.sentence_modules import lost_modules
from lora_export.base.history.in_graph import merged_in, refuse_merged_into
from lora_export.base.history.merged import refuse_merged
from lora_export.base.own_base import compared_with_own, own_bases
from lora_export.base.pipeline import refuse_other_components
from lora_export.base.planning.plan_rows import (
    OtherValues,
    warned_of_computed,
    warned_of_training,
    with_unverified,
)
from lora_export.base.reads import CheckpointChoice, files_read
from lora_export.base.write_options import WriteOptions
from lora_export.errors import CheckpointError, GraphError, OutputError, SiteError
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.graph.ort_names import free_names
from lora_export.plan import Plan
from lora_export.sites.target import BaseWeights
from lora_export.storage.commit.leftovers import scratch_folder
from lora_export.storage.hashes import FileHash, hash_file, identity_of
from lora_export.storage.outputs import refuse_inputs, refuse_replacing
from lora_export.storage.sums.full import full_hash
from lora_export.untrusted.places import is_folder, listed
from lora_export.untrusted.texts import is_utf8

if TYPE_CHECKING:
    from lora_export.base.checkpoint.checkpoint import Checkpoint
    from lora_export.base.checkpoint.weights import CheckpointWeights


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """Base graph.

    Attributes:
        graph: The graph.
        weight_of: The checkpoint's weights, if there is one.
        shared_files: Data files in which unchanged weights may stay.
        files: Files that it was read from.
        checkpoint: The folder that an ONNX file's weights are compared with.
        notes: Notes on that folder: its origin, or the reason why there is none.
        compared: The folder that has the graph's values, for a comparison with the adapters' own bases.
        adapters: The adapters.
        plan_notes: Further notes for the plan on the adapters and this base.
        reads: All files that were read, with those of adapters and checkpoint; no output may be one of them.
    """

    graph: GraphFile
    weight_of: BaseWeights | None
    shared_files: set[Path]
    files: list[Path]
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    compared: Checkpoint | None = None
    adapters: tuple[Adapter, ...] = ()
    plan_notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()

    @cached_property
    def hashes(self) -> dict[Path, FileHash]:
        """Hash of each file; computed once, because a base is large."""
        return {path: hash_file(path) for path in self.files}

    @property
    def identity(self) -> str:
        """SHA-256 of the base as a whole."""
        return identity_of(self.hashes.values())

    def shared_places(self, out: Path) -> dict[str, FileHash]:
        """Return the hashes of the files in which weights may stay, by their path from the folder of ``out``.

        The hashes are full ones, for which the files are read whole; a graph that is only inspected never is.
        """
        folder = out.parent.resolve()
        return {
            os.path.relpath(path.resolve(), folder): replace(self.hashes[path], blake3=full_hash(path))
            for path in sorted(self.shared_files)
        }

    @property
    def merged(self) -> str:
        """Entries of the adapters that merges have put into it, see `history.in_graph`."""
        return merged_in(self.graph.model.metadata_props)

    def verified(self, plan: Plan) -> Plan:
        """Return the plan with notes on what was compared with the checkpoint, and what was not.

        Raises:
            SiteError: The folder that the user gave confirms no site at all.
        """
        notes, warnings = compared_with_own(self.compared, self.adapters) if self.compared else ([], [])
        plan = replace(
            plan, notes=(*self.plan_notes, *plan.notes, *notes), warnings=(*plan.warnings, *warnings)
        )
        plan = warned_of_training(plan)
        if self.checkpoint is None:
            return warned_of_computed(replace(plan, notes=(*plan.notes, *self.notes)))
        try:
            plan = with_unverified(plan, self.checkpoint)
        except SiteError as error:
            hints = list(dict.fromkeys(self.weight_of.hints)) if self.weight_of else []
            # Nobody typed the path of a folder that an adapter names.
            origin = ", which an adapter names as its base," if self.notes else ""
            if hints:
                raise SiteError(
                    f"the checkpoint {self.checkpoint}{origin} has the parameters that would change in "
                    "several parts of the model: names alone don't tell which is meant",
                    "; ".join(hints),
                    error.problems,
                ) from error
            if not self.notes:
                raise
            # Names led to every site.
            note = f"values were not compared: {error.message}; an adapter names this folder as its base"
            return replace(plan, notes=(*plan.notes, note))
        return replace(plan, notes=(*plan.notes, *self.notes))


@contextlib.contextmanager
def open_base(
    base: Path,
    out: Path,
    adapters: Collection[Adapter],
    options: WriteOptions,
    prepare: Callable[[Path], Path] | None = None,
) -> Iterator[tuple[Base, dict[str, Path]]]:
    """Load a graph, or capture a checkpoint folder, and yield it with the files to write.

    Args:
        base: An ONNX file or a Hugging Face folder.
        out: The graph to write.
        adapters: The adapters: no output may replace them, and a folder may lack parameters that they
            replace.
        options: Options of the mode.
        prepare: Function that makes the folder to capture instead of the base, in a temporary folder.

    Raises:
        GraphError: The graph can't be read, has an adapter merged into it already, or options for a capture
            are given.
        CheckpointError: The folder can't be read or captured.
        AdapterError: An adapter is not for the folder, by names before the capture; or it was merged into the
            folder or the checkpoint already.
        SiteError: Some targets of an adapter have no site in the folder.
        OutputError: An output exists or would replace a file that is read, or there is nothing to share.
    """
    paths = output_paths(out)
    if not is_utf8(base.absolute().name):
        # Outputs hold the base's name.
        raise GraphError(f"the name of the base {base} is not UTF-8", "rename it")
    reads = files_read(base, adapters, options.checkpoint)
    refuse_inputs(paths.values(), reads)
    if not options.dry_run:
        refuse_replacing(list(paths.values()), options.force)
    notes = _notes_on_parts(base, adapters, options.checkpoint)
    # A capture is as large as the base, so it goes beside the output, not to a small /tmp.
    place = out.parent if is_folder(base) and is_folder(out.parent) else None
    with scratch_folder(place) as scratch:
        if is_folder(base):
            notes += _refuse_folder(base, adapters, options)
            graph = _captured(base, adapters, options, prepare, scratch=scratch)
        else:
            graph = load_graph(base)
            free_names(graph)
            _refuse_capturing(base, options)
        refuse_merged_into(str(base), merged_in(graph.model.metadata_props), list(adapters))
        opened = _opened(base, graph, adapters, options.checkpoint, share=options.share_base)
        reads = [*reads, *opened.files]
        refuse_inputs(paths.values(), reads)
        opened = replace(opened, adapters=tuple(adapters), plan_notes=tuple(notes), reads=tuple(reads))
        if opened.checkpoint is not None:
            refuse_merged(opened.checkpoint, list(adapters))
        try:
            yield opened, paths
        except SiteError as error:
            raise _explained(error, opened) from error


def _notes_on_parts(base: Path, adapters: Collection[Adapter], checkpoint: CheckpointChoice) -> list[str]:
    """Return notes on adapters with parts for other models; refuse those for other models only."""
    given = [Path(checkpoint)] if checkpoint else []
    folders = [*given, base if is_folder(base) else base.parent]
    notes = refuse_other_components(adapters, folders)
    # A graph has none of these parts, which people who assemble the model need to know.
    return notes + lost_modules(list(adapters), folders[0], refuse=False)


def _refuse_folder(base: Path, adapters: Collection[Adapter], options: WriteOptions) -> tuple[str, ...]:
    """Refuse a folder that can't be captured, or that the adapters are not for; return notes on it."""
    from lora_export.base.checkpoint.checkpoint import read_config
    from lora_export.base.checkpoint.quantised import refuse_packed
    from lora_export.base.planning.refuse import refuse_absent

    config = read_config(base)
    refuse_own_code(base, config)
    refuse_absent(base, list(adapters), options.allow_unmatched)
    refuse_packed(base)
    return code_notes(config)


def _captured(
    base: Path,
    adapters: Collection[Adapter],
    options: WriteOptions,
    prepare: Callable[[Path], Path] | None,
    *,
    scratch: Path,
) -> GraphFile:
    """Capture a folder, or what ``prepare`` makes of it, into a temporary one."""
    from lora_export.base.capture.capture import capture_checkpoint

    captured = scratch / "base.onnx"
    capture_checkpoint(
        prepare(scratch) if prepare else base,
        captured,
        dtype=options.dtype or "float32",
        kv_cache=options.kv_cache,
        fused=options.fused,
        runtime=options.runtime,
        # A parameter that an adapter replaces whole is looked for under its own name.
        packed=options.packed and not any(adapter.extras for adapter in adapters),
        part=options.part,
        replaced=[] if prepare else [name for adapter in adapters for name in adapter.extras],
    )
    return load_graph(captured)


def _explained(error: SiteError, base: Base) -> SiteError:
    """Add to an error the origin of the folder that a graph's values differ from."""
    if not base.notes or not isinstance(error, OtherValues):
        return error
    return SiteError(
        f"{error.message} ({base.notes[0]})",
        "give --checkpoint with the folder that the graph was exported from; if the graph is right and the "
        "folder is another model by now, --no-checkpoint (checkpoint=False) goes by names alone",
        error.problems,
    )


def _refuse_capturing(base: Path, options: WriteOptions) -> None:
    """Refuse options of a capture for a graph."""
    flags = {
        "--dtype": options.dtype is not None,
        "--kv-cache": options.kv_cache,
        "--fused": options.fused,
        "--runtime": options.runtime != "portable",
    }
    given = " and ".join(flag for flag, is_given in flags.items() if is_given)
    if given:
        raise GraphError(
            f"{base} is a graph already: {given} can't change how it was captured",
            f"give the checkpoint folder that it comes from as --base, or omit {given}",
        )


def _opened(
    base: Path,
    graph: GraphFile,
    adapters: Collection[Adapter],
    checkpoint: CheckpointChoice,
    *,
    share: bool,
) -> Base:
    data_files = graph.data_files()
    if share and not data_files:
        raise OutputError(
            f"{base} has no weights in files of their own: nothing can be shared",
            "omit --share-base, or save the base with external data first",
        )
    from lora_export.base.checkpoint.checkpoint import Checkpoint
    from lora_export.base.checkpoint.weights import CheckpointWeights, link_weights

    files, shared = _base_files(base, graph), data_files if share else set()
    if is_folder(base) and not checkpoint:
        opened = Checkpoint.open(base)
        shared = link_weights(graph, opened) if share else set()
        return Base(
            graph=graph,
            weight_of=CheckpointWeights(opened),
            shared_files=shared,
            files=files,
            compared=None if checkpoint is False else opened,
        )
    if checkpoint:
        opened = Checkpoint.open(Path(checkpoint))
        if share and is_folder(base):
            shared = link_weights(graph, opened)
        return Base(
            graph=graph,
            weight_of=_given_weights(opened),
            shared_files=shared,
            files=files,
            checkpoint=Path(checkpoint),
            compared=opened,
        )
    if checkpoint is False:
        return Base(graph=graph, weight_of=None, shared_files=shared, files=files)
    named = own_bases(adapters, merged_in(graph.model.metadata_props))
    own = next((own for own in named if own.weights is not None), None)
    if own is None:
        why = tuple(own.note for own in named)
        return Base(graph=graph, weight_of=None, shared_files=shared, files=files, notes=why)
    return Base(
        graph=graph,
        weight_of=own.weights,
        shared_files=shared,
        files=files,
        checkpoint=own.folder,
        notes=(own.note,),
        compared=Checkpoint.open(own.folder) if len(named) > 1 else None,
    )


def _given_weights(checkpoint: Checkpoint) -> CheckpointWeights:
    """Return the weights of the folder that the user gave.

    Raises:
        CheckpointError: The folder is quantised in a way that is not understood, or stores parameters twice.
    """
    from lora_export.base.checkpoint.doubles import StoredTwiceError
    from lora_export.base.checkpoint.weights import CheckpointWeights

    try:
        return CheckpointWeights(checkpoint)
    except StoredTwiceError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f"{error.message}: the graph's values can't be compared with it",
            "give the unquantised folder with --checkpoint, or go by names: --no-checkpoint "
            "(checkpoint=False)",
            error.problems,
        ) from error


def output_paths(out: Path) -> dict[str, Path]:
    """Return the files of an output graph, the graph last, so that it appears when the others are there.

    Raises:
        OutputError: The output's name does not end in ``.onnx``, or can't be written into a graph.
    """
    if not is_utf8(out.name):
        # onnx.proto: strings are UTF-8, and the graph names its data file.
        raise OutputError(f"the name of the output {out} is not UTF-8", "choose another name")
    if out.suffix != ".onnx":
        raise OutputError(f"the output {out} does not end in .onnx", f"-o {out / 'model.onnx'}")
    return {
        "data": out.with_name(out.name + ".data"),
        "manifest": out.with_suffix(".lora.json"),
        "graph": out,
    }


def _base_files(base: Path, graph: GraphFile) -> list[Path]:
    if is_folder(base):
        return sorted([*listed(base, "*.safetensors"), *listed(base, "config.json")])
    return [base, *sorted(graph.data_files())]
