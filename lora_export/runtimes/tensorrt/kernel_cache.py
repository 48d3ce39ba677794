"""Keep TensorRT-RTX's runtime cache in a file: the kernels that it compiled for this GPU.

https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_export.errors import BackendError
from lora_export.runtimes.session_options import PathLike
from lora_export.runtimes.tensorrt.engine import LoadedEngine
from lora_export.storage.outputs import OutputSet, output_errors
from lora_export.untrusted.places import is_file


class RuntimeCache:
    """The runtime cache of one engine's context."""

    def __init__(self, loaded: LoadedEngine, file: PathLike | None) -> None:
        """Remember the file.

        Raises:
            BackendError: A file is given for classic TensorRT, which compiles nothing while it runs.
        """
        if file is not None and not loaded.compiles_at_run:
            raise BackendError(
                f"{loaded.path.name} is an engine of classic TensorRT, which has no runtime cache",
                "omit runtime_cache=",
            )
        self._loaded: LoadedEngine | None = loaded
        self._file = None if file is None else Path(file)
        self._cache: Any = None

    @property
    def wanted(self) -> bool:
        """True if there is a file for the cache."""
        return self._file is not None

    def attach(self, config: Any) -> None:
        """Attach the cache to the ``config`` of a context, with the kernels compiled before."""
        if self._file is None:
            return
        self._cache = config.create_runtime_cache()
        if is_file(self._file):
            # It returns False for another GPU, driver or version; then all is compiled again and the file
            # replaced.
            self._cache.deserialize(self._file.read_bytes())
        assert self._loaded is not None
        if not config.set_runtime_cache(self._cache):
            raise self._loaded.log.refused(self._loaded.path, "use a runtime cache")

    def save(self) -> None:
        """Write the kernels compiled so far; a reader sees the old file or the new one.

        Raises:
            BackendError: The session has no cache, or TensorRT-RTX doesn't return it.
            OutputError: The file can't be written.
        """
        if self._file is None:
            raise BackendError("the session has no runtime cache", "open it with runtime_cache=FILE")
        assert self._loaded is not None
        blob = self._cache.serialize()
        if blob is None:
            raise self._loaded.log.refused(self._loaded.path, "return its runtime cache")
        with output_errors(self._file), OutputSet(force=True, listed=False) as outputs:
            outputs.stage(self._file).write_bytes(bytes(blob))
            outputs.commit()

    def release(self) -> None:
        """Release TensorRT's objects."""
        self._cache = self._loaded = None
