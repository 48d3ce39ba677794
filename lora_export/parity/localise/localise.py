"""Find where a candidate's error begins: the first module whose output is further off than rounding explains.

Modules are run with their outputs exposed, in the graph and in PyTorch. In the order of computation,
everything before the mistake is off by rounding alone (`module_error`), so the first module that is off
further, though its input is right, contains the mistake. Of many modules only some are exposed at first, then
those between the last good and the first bad one; only if none is bad, all of them are exposed, in turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_export.adapter import Array
from lora_export.engines.record import is_engine
from lora_export.errors import LoraExportError
from lora_export.graph.onnx_file import GraphFile, load_graph
from lora_export.parity.localise.find_modules import NOT_FOUND, ModuleShape, Probe, find_probes
from lora_export.parity.localise.module_error import Measured, Runs, Taken
from lora_export.parity.localise.run_inside import run_with_outputs
from lora_export.parity.localise.torch_modules import bare_output, modules_of, weight_in
from lora_export.parity.localise.walk import tap_values
from lora_export.parity.result import BASE, Localisation, State, state_name
from lora_export.plan import Refusal
from lora_export.runtimes.ort.device import Provider
from lora_export.runtimes.torch.reference import TorchReference

if TYPE_CHECKING:
    import torch

# Largest number of modules that are exposed at once.
MOST = 64
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Both sides and one feed to compare them on.

    Attributes:
        reference: PyTorch in high precision.
        model: The reference's model.
        own: PyTorch in the candidate's dtype; None if it is not run.
        candidate: Path of the ``.onnx`` file.
        provider: Provider that it runs on.
        values: Values of the feed.
        tensors: Further inputs of the candidate that bring it into the state: LoRA tensors, a bank's weights.
        state: Active adapters.
        dtype: Type of the candidate.
        masks: Masks of the positions that are not padding, see `valid_positions`.
    """

    reference: TorchReference
    model: torch.nn.Module
    own: TorchReference | None
    candidate: Path
    provider: Provider
    values: Mapping[str, Array]
    tensors: Mapping[str, Array]
    state: State
    dtype: str = "float32"
    masks: Sequence[Array] = ()


def localise(sources: Sources, most: int = MOST) -> Localisation:
    """Find the module at which the error begins.

    Args:
        sources: Both sides and the feed.
        most: Largest number of modules that are exposed at once; at least 2.

    Returns:
        The localisation. No error is raised, so that a verdict never gets lost: the note gives the reason for
        a missing table.
    """
    name, file = state_name(sources.state), sources.candidate.name
    if is_engine(sources.candidate):
        return Localisation(state=name, module="", note=f"{file} is an engine: nothing inside it can be seen")
    try:
        graph, modules = load_graph(sources.candidate), modules_of(sources.model)
        found, missing = find_probes(graph, modules, lambda target: weight_in(sources.model, target))
        probes, lost = _once(found, missing, modules)
        if not probes:
            return Localisation(
                state=name, module="", note=f"no module of the model could be found in {file}"
            )
        return _Search(sources=sources, graph=graph, probes=probes, lost=lost, most=most).run()
    except LoraExportError as error:
        return Localisation(state=name, module="", note=f"could not look into {file}: {error.message}")
    except Exception as error:  # a defect of ours, or an unforeseen graph
        return Localisation(
            state=name, module="", note=f"could not look into {file}: {type(error).__name__}: {error}"
        )


def _once(
    probes: Sequence[Probe], missing: Mapping[str, Refusal], modules: Sequence[ModuleShape]
) -> tuple[list[Probe], dict[str, Refusal]]:
    """Return one probe for each module, of its first name, and the modules missing under all their names."""
    identity = {module.path: module.identity for module in modules}
    kept: dict[int, Probe] = {}
    for probe in probes:
        kept.setdefault(identity[probe.module], probe)
    lost: dict[int, str] = {}
    for path in missing:
        if identity[path] not in kept:
            lost.setdefault(identity[path], path)
    return list(kept.values()), {path: missing[path] for path in lost.values()}


@dataclass(kw_only=True)
class _Search:
    """The search so far.

    Attributes:
        sources: Both sides and the feed.
        graph: The candidate's graph.
        probes: Modules that can be examined, in the order of computation.
        lost: Path of each module that can't → the reason.
        most: Largest number of modules that are exposed at once.
        seen: Number of a probe → its error.
        unlike: Numbers of probes whose value has another size than PyTorch's.
    """

    sources: Sources
    graph: GraphFile
    probes: Sequence[Probe]
    lost: dict[str, Refusal]
    most: int
    seen: dict[int, Measured] = field(default_factory=dict)
    unlike: list[int] = field(default_factory=list)

    def run(self) -> Localisation:
        """Examine all modules, or some and then those between the last good and the first bad one."""
        numbers = range(len(self.probes))
        while unseen := [n for n in numbers if n not in self.seen and n not in self.unlike]:
            self._look(self._spread(unseen))
            first = self._first_off()
            # A small error may vanish in the noise of later modules: then all are examined, in turns.
            numbers = numbers if first is None else self._before(first)
        return self._result(self._first_off())

    def _spread(self, numbers: Sequence[int]) -> list[int]:
        """Return these numbers, or if there are many some that are evenly spaced, including the last."""
        if len(numbers) <= self.most:
            return list(numbers)
        picks = np.linspace(0, len(numbers) - 1, self.most).round().astype(int)
        return [numbers[n] for n in picks.tolist()]

    def _first_off(self) -> int | None:
        return min((n for n, measured in self.seen.items() if measured.off), default=None)

    def _before(self, first: int) -> range:
        """Return the modules that the first bad module may have its error from."""
        good = max((n for n in self.seen if n < first), default=-1)
        between = range(good + 1, first)
        done = all(n in self.unlike for n in between)
        if done and self.seen[first].off_in:
            # The good module may be in another branch than the mistake, not after it.
            return range(max(0, first - self.most), first)
        return between

    def _look(self, numbers: Sequence[int]) -> None:
        """Run both sides with these modules exposed, and record their errors."""
        sources, chosen = self.sources, [self.probes[n] for n in numbers]
        taps = [tap for probe in chosen for tap in (*probe.y, *((probe.x,) if probe.x else ()))]
        feeds = {**sources.values, **sources.tensors}
        values = run_with_outputs(self.graph, [tap.value for tap in taps], feeds, sources.provider)
        runs = self._runs([probe.module for probe in chosen])
        for number, probe in zip(numbers, chosen, strict=True):
            parts = [tap_values(tap, values, probe.axis) for tap in probe.y]
            y = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=probe.axis)
            x = tap_values(probe.x, values, probe.axis) if probe.x else None
            if probe.axis != probe.module_axis:
                y = np.moveaxis(y, probe.axis, probe.module_axis)
                x = None if x is None else np.moveaxis(x, probe.axis, probe.module_axis)
            measured = runs.measure(probe.module, x, y, probe.module_axis)
            if measured is None:
                self.unlike.append(number)
            else:
                self.seen[number] = measured

    def _runs(self, paths: list[str]) -> Runs:
        """Run PyTorch; the first time also with the lost modules, to learn whether they run at all."""
        sources = self.sources
        more = [] if self.seen or self.unlike else list(self.lost)[: self.most]
        _, high = sources.reference.run_with_modules(sources.values, sources.state, [*paths, *more])
        self.lost = {path: why for path, why in self.lost.items() if path not in more or path in high}
        without: Taken = high
        if sources.state != BASE:
            _, without = sources.reference.run_with_modules(sources.values, BASE, paths)
        own: Taken = {}
        if sources.own is not None:
            _, own = sources.own.run_with_modules(sources.values, sources.state, paths)
        bare = {path: bare_output(sources.model, path, x) for path, (x, _) in high.items()}
        added = {path: values for path, values in bare.items() if values is not None}
        return Runs(
            right=high, without=without, own=own, bare=added, dtype=sources.dtype, masks=sources.masks
        )

    def _result(self, first: int | None) -> Localisation:
        module, notes = "", []
        if first is None:
            notes.append("no module's error jumps: it begins after the last one, or other feeds show it")
        elif self.seen[first].off_in:
            reader, before = self.probes[first].module, [n for n in self.seen if n < first]
            where = (
                f"after {self.probes[max(before)].module}"
                if before
                else "before all modules that can be seen"
            )
            notes.append(f"the input of {reader} already has the error: it begins {where}")
        else:
            module = self.probes[first].module
            if math.isnan(self.seen[first].row.error_in):
                notes.append(f"the input of {module} can't be seen: the error may begin shortly before it")
        rows = tuple(replace(self.seen[n].row, jumped=n == first and bool(module)) for n in sorted(self.seen))
        unlike = [self.probes[n].module for n in self.unlike]
        notes += [
            *_listed("not found in the graph", [path for path, why in self.lost.items() if why == NOT_FOUND]),
            *_listed("of another size in the graph", unlike),
            *(f"{path}: {why.detail}" for path, why in self.lost.items() if why != NOT_FOUND),
        ]
        looked = len(self.seen) + len(self.unlike)
        return Localisation(
            state=state_name(self.sources.state),
            module=module,
            rows=rows,
            looked_at=looked,
            of=len(self.probes),
            note="; ".join(notes),
        )


def _listed(what: str, names: Sequence[str]) -> list[str]:
    more = f", … ({len(names)})" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"] if names else []
