"""Compute everything in float64, also norms, softmax and rotations, which models compute in float32.

transformers casts there by name (``x.to(torch.float32)``, ``softmax(…, dtype=torch.float32)``,
``x.float()``), which helps a float16 model, but costs a float64 model nine digits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Use float64 wherever a call of PyTorch inside names float32."""
    import torch
    from torch.overrides import TorchFunctionMode

    def widened(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Wide(TorchFunctionMode):  # type: ignore[misc]  # torch has no types for it
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            named = {name: widened(value) for name, value in (kwargs or {}).items()}
            return func(*map(widened, args), **named)

    with Wide():
        yield
