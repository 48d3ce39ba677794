"""Check how a user wants a graph to be quantised, before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lora_export.errors import GraphError
from lora_export.modes.quantising import METHODS
from lora_export.modes.quantising.codes import Method
from lora_export.modes.quantising.quantisers import method_named

# Type that a user types → bits of a code.
TYPES = {"int4": 4, "int8": 8}
BLOCK_SIZES = (16, 32, 64, 128)
# ONNX Runtime's levels: 0 leaves the choice to it, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations.
ACCURACY_LEVELS = range(5)


@dataclass(frozen=True, kw_only=True)
class QuantiseChoice:
    """The user's choice.

    Attributes:
        to: One of `TYPES`.
        method: One of `METHODS`.
        block_size: Number of values along K that share a scale.
        symmetric: Quantise without zero points; None: as the method does by default.
        accuracy_level: How ONNX Runtime may round activations in MatMulNBits.
        keep: Modules that stay in float: their path, or what it ends in.
        head: Quantise the head too, the product that makes the logits.
        embeddings: Quantise embeddings too.
    """

    to: str
    method: str = "rtn"
    block_size: int = 32
    symmetric: bool | None = None
    accuracy_level: int = 0
    keep: tuple[str, ...] = field(default=())
    head: bool = False
    embeddings: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return TYPES[self.to]

    @property
    def is_symmetric(self) -> bool:
        """True if there are no zero points."""
        assert self.symmetric is not None
        return self.symmetric


def choice_of(to: str | None) -> QuantiseChoice | None:
    """Return the choice of a mode's ``quantize``, with the defaults of `quantize_onnx`; None for none.

    Raises:
        GraphError: The type is unknown.
        BackendUnavailable: ONNX Runtime is not installed.
    """
    return None if to is None else checked(QuantiseChoice(to=to))[0]


def checked(choice: QuantiseChoice) -> tuple[QuantiseChoice, Method]:
    """Return a choice with its defaults filled in, and its method.

    Raises:
        GraphError: A value is unknown, or the method can't do it; all problems are listed.
        BackendUnavailable: The method needs a package that is not installed.
    """
    problems = []
    if choice.to not in TYPES:
        problems.append(f"to: {choice.to!r}, wanted {' or '.join(TYPES)}")
    if choice.method not in METHODS:
        problems.append(f"method: {choice.method!r}, wanted one of {', '.join(METHODS)}")
    if choice.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        problems.append(f"block size: {choice.block_size}, wanted one of {sizes}")
    if choice.accuracy_level not in ACCURACY_LEVELS:
        problems.append(f"accuracy level: {choice.accuracy_level}, wanted 0 to {ACCURACY_LEVELS[-1]}")
    method = method_named(choice.method) if choice.method in METHODS else None
    if method is not None and choice.symmetric not in (None, *method.symmetric):
        form = "symmetrically" if choice.symmetric else "asymmetrically"
        problems.append(f"method: {choice.method} can't quantise {form}")
    if method is not None and method.float_zeros and choice.to == "int8":
        problems.append(
            f"to: {choice.method} makes zero points in float, which ONNX Runtime takes for int4 only"
        )
    if method is not None and method.float_zeros and choice.embeddings:
        problems.append(
            f"embeddings: GatherBlockQuantized has no zero points in float, as {choice.method} makes"
        )
    if problems:
        raise GraphError(
            "a graph can't be quantised like this",
            "give values that ONNX Runtime's quantisers have",
            problems,
        )
    assert method is not None
    symmetric = method.symmetric[0] if choice.symmetric is None else choice.symmetric
    return replace(choice, symmetric=symmetric), method
