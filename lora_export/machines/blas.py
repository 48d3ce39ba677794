"""Keep BLAS on one thread while any caller needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from lora_export.machines.held import Held


def _limit() -> Callable[[], object]:
    from threadpoolctl import threadpool_limits

    restore: Callable[[], object] = threadpool_limits(1, user_api="blas").restore_original_limits
    return restore


_ONE_THREAD = Held(_limit)


def one_blas_thread() -> contextlib.AbstractContextManager[None]:
    """Return a context in which BLAS computes on the calling thread alone."""
    return _ONE_THREAD.held()
