"""Keep BLAS on one thread while any caller needs it."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

from lora_export.machines.held_setting import HeldSetting


def _limit() -> Callable[[], object]:
    # A BLAS comes with the module that needs it.
    limits = _libraries(len(sys.modules)).limit(limits=1, user_api="blas")
    restore: Callable[[], object] = limits.restore_original_limits
    return restore


@functools.lru_cache(maxsize=1)
def _libraries(_modules: int) -> Any:
    """Return the BLAS libraries of this process: the search looks at hundreds of files if torch is loaded."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


_ONE_THREAD = HeldSetting(_limit)


def one_blas_thread() -> contextlib.AbstractContextManager[None]:
    """Return a context in which BLAS computes on the calling thread alone."""
    return _ONE_THREAD.held()
