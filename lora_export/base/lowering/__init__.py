"""Lower a captured graph for a runtime: one meaning, in the operators that the runtime is fast with.

`lower.lower_graph` is run behind a fused capture, before the graph is proven: what is compared with PyTorch
is what is written.
"""

from typing import Literal

# ``portable``: operators of ONNX alone; ``ort-cuda``: with ONNX Runtime's own, for its CUDA provider.
Runtime = Literal["portable", "ort-cuda"]
RUNTIMES: tuple[Runtime, ...] = ("portable", "ort-cuda")
