"""Sessions of ONNX Runtime that are opened once for a graph that is run several times.

A test runs a graph with one adapter after another, and its base beside it. To open a tiny graph takes longer
than to run it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

# A graph and its base, and those of a test inside a test.
_KEPT = 4


def session_of(path: Path, unoptimised: bool = False) -> Any:
    """Return a session of a graph as it is now, with one thread.

    Args:
        path: The graph.
        unoptimised: Run node by node what the graph says.
    """
    return _opened(str(path), _content(path), unoptimised)


def _content(path: Path) -> tuple[object, ...]:
    """Return what tells that a graph or data of it was written anew, even at once and as long as before."""
    digest, others = hashlib.sha256(), []
    for entry in sorted(os.scandir(path.parent), key=lambda entry: entry.name):
        if entry.name.startswith(path.name) and entry.is_file():
            digest.update(f"{entry.name}\0".encode() + Path(entry.path).read_bytes())
        else:
            known = entry.stat(follow_symlinks=False)
            others.append((entry.name, known.st_ino, known.st_mtime_ns, known.st_size))
    return digest.digest(), *others


@functools.lru_cache(maxsize=_KEPT)
def _opened(path: str, content: object, unoptimised: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if unoptimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
