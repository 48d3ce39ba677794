"""List targets by module name, for graphs that are made before there is an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.errors import SiteError
from lora_export.graph.onnx_file import GraphFile, shape_of
from lora_export.sites import fit
from lora_export.sites.naming import names
from lora_export.sites.operand import Use
from lora_export.sites.resolve import Resolver
from lora_export.sites.target import Target, TargetKind

ALL_LINEAR = "all-linear"
_SHOWN = 12
_KINDS: dict[str, TargetKind] = {"linear": "linear", "conv": "conv", "embedding": "embedding"}


def targets_named(
    resolver: Resolver, graph: GraphFile, wanted: Sequence[str], allow_unmatched: bool = False
) -> list[Target]:
    """Return a target for each module whose path is, or ends in, one of the wanted names.

    This is PEFT's rule for ``target_modules``; ``all-linear`` means every linear module but ``lm_head``.
    ``q_proj`` also means the part of a ``qkv_proj`` that builders fuse.

    Args:
        resolver: The graph's weights.
        graph: The graph.
        wanted: Names of modules.
        allow_unmatched: Let ``all-linear`` leave out matrices that have no name.

    Raises:
        SiteError: No module of the graph has one of the names, or ``all-linear`` meets matrices without a
            name.
    """
    known = list(_modules(resolver))
    if ALL_LINEAR in wanted:
        _refuse_fused(graph, known)
        if not allow_unmatched:
            _refuse_nameless(resolver, graph)
    found: dict[str, Target] = {}
    missing = []
    for name in wanted:
        mine = [target for target in known if _means(name, target)]
        if not mine:
            missing.append(name)
        found.update((target.path, target) for target in mine)
    if missing:
        leaves = sorted({target.path.rpartition(".")[2] for target in known})
        more = ", …" if len(leaves) > _SHOWN else ""
        if missing == [ALL_LINEAR] and leaves:
            raise SiteError(
                f"{graph.path.name} has no Linear: its modules are convolutions or embeddings",
                f"name those that are meant, of {', '.join(leaves[:_SHOWN])}{more}",
                missing,
            )
        raise SiteError(
            f"{graph.path.name} has no modules of these names",
            f"it has: {', '.join(leaves[:_SHOWN])}{more}; names may be gone: give --adapter and --checkpoint"
            if leaves
            else "no module has its name any more: give --adapter and --checkpoint, or export with names",
            missing,
        )
    return [target for target in known if target.path in found]


def _refuse_nameless(resolver: Resolver, graph: GraphFile) -> None:
    """Refuse ``all-linear`` for a graph in which some matrices have lost their names."""
    named = {id(use.node) for use, key in resolver.named_uses() if key.endswith(".weight")}
    nameless = [
        f"{use.node.op_type} {use.node.name or ''} of {use.root.name}"
        for use in resolver.uses
        if use.operand.kind == "linear" and use.operand.index == 1 and id(use.node) not in named
    ]
    if nameless:
        raise SiteError(
            f"{graph.path.name} has {len(nameless)} matrices whose module has no name any more: "
            f"{ALL_LINEAR!r} would leave them out",
            "export with names (torch.onnx.export(..., optimize=False), and quantise after that), or give "
            "--adapter with --checkpoint; --allow-unmatched (allow_unmatched=True) goes on without them",
            nameless,
        )


def _refuse_fused(graph: GraphFile, known: Sequence[Target]) -> None:
    """Refuse fused weights: each may be one module (Phi-3) or fused by a builder, and adapters differ."""
    keys = {target.key for target in known}
    fused = [target.path for target in known if keys & set(names.parts_of(target.key))]
    if fused:
        raise SiteError(
            f"{graph.path.name} has fused weights: {ALL_LINEAR!r} doesn't say whether adapters change the "
            "whole or its parts",
            "name the modules as the adapters do: q_proj,k_proj,v_proj or qkv_proj, …; or give --adapter",
            fused,
        )


def _means(name: str, target: Target) -> bool:
    if name == ALL_LINEAR:
        return target.kind == "linear" and not target.path.endswith("lm_head")
    return target.path == name or target.path.endswith(f".{name}")


def _modules(resolver: Resolver) -> Iterator[Target]:
    """Yield every module that can get a branch, by the most trusted name of each of its uses."""
    seen: set[str] = set()
    for use, key in resolver.named_uses():
        kind = _KINDS.get(use.operand.kind)
        if key in seen or kind is None or not key.endswith(".weight"):
            continue
        seen.add(key)
        shape = _canonical_shape(use)
        yield Target(key=key, kind=kind, shape=shape, action="merge", tensor_names=())
        yield from _fused_parts(key, use, shape)


def _canonical_shape(use: Use) -> tuple[int, ...]:
    assert use.root.const_value is not None
    if use.operand.kind == "conv":
        return shape_of(use.root.const_value)
    rows, cols = fit.stored_shape(
        Target(key="", kind="linear", shape=(), action="merge", tensor_names=()), use
    )
    return (cols, rows) if use.transposed else (rows, cols)


def _fused_parts(key: str, use: Use, shape: tuple[int, ...]) -> Iterator[Target]:
    parts = names.parts_of(key)
    rows = fit.fused_rows(shape[0], len(parts), fit.heads_of(use.node)) if parts else None
    if rows:
        for part, count in zip(parts, rows, strict=True):
            yield Target(key=part, kind="linear", shape=(count, shape[1]), action="merge", tensor_names=())
