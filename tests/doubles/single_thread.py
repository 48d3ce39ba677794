"""ONNX Runtime with one thread where a test asks for no number: tiny models cost less than a pool does.

Threads of a pool wait for the next run in a loop, for 40 ms of another worker's time after each run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def single_thread(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let sessions have one thread within an operator unless their options name a number.

    Args:
        put: Puts a value in the place of an attribute.
    """
    import onnxruntime

    init = onnxruntime.InferenceSession.__init__

    @functools.wraps(init)
    def opened(session: Any, model: Any, sess_options: Any = None, *more: Any, **named: Any) -> None:
        options = onnxruntime.SessionOptions() if sess_options is None else sess_options
        asked = options.intra_op_num_threads
        options.intra_op_num_threads = asked or 1
        try:
            init(session, model, options, *more, **named)
        finally:
            options.intra_op_num_threads = asked

    put(onnxruntime.InferenceSession, "__init__", opened)
