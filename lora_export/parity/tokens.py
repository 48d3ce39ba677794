"""Generate greedy tokens step by step on both sides, until they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lora_export.adapter import Array
from lora_export.errors import BackendError
from lora_export.graph.captured import SEQUENCE, TOTAL_SEQUENCE, Captured
from lora_export.parity.feeds.made import Feed, InputPort
from lora_export.parity.result import Generated, State, Verdict, state_name

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
_PAST, _PRESENT = "past_key_values.", "present."
_KNOWN = ("input_ids", "attention_mask", "position_ids")
_PROMPT = 8


def check_decoder(
    ports: Sequence[InputPort],
    outputs: Sequence[str],
    where: str,
    count: int = 1,
    captured: Captured | None = None,
) -> None:
    """Refuse a candidate that can't generate ``count`` tokens.

    Raises:
        BackendError: The candidate is not a decoder, or takes fewer tokens.
    """
    if count < 0:
        raise BackendError(f"can't generate {count} tokens", "give at least 1, or omit it")
    largest = captured.largest if captured is not None else {}
    most = min((largest[role] for role in (SEQUENCE, TOTAL_SEQUENCE) if role in largest), default=None)
    if most is not None and _PROMPT + count > most:
        raise BackendError(
            f"{where} takes {most} tokens, but a prompt of {_PROMPT} and {count} new ones are more",
            f"give at most --generate {most - _PROMPT}" if most > _PROMPT else "omit --generate",
        )
    names = [port.name for port in ports]
    strange = [name for name in names if name not in _KNOWN and not name.startswith(_PAST)]
    unclear = [
        f"input {port.name}: {list(port.dims)}"
        for port in ports
        if port.name.startswith(_PAST)
        and not (len(port.dims) == 4 and isinstance(port.dims[1], int) and isinstance(port.dims[3], int))
    ]
    if unclear:
        raise BackendError(
            f"{where} does not state how many heads its cache has, or how large they are",
            "omit --generate, or export it with these sizes fixed",
            unclear,
        )
    if "input_ids" not in names or "logits" not in outputs or strange:
        raise BackendError(
            f"{where} is not a decoder that generates text: it has to read input_ids and to return logits",
            "omit --generate",
            [f"input {name}: not known to a decoder" for name in strange],
        )


def prompts_of(feeds: Sequence[Feed], count: int) -> list[tuple[int, ...]]:
    """Return up to ``count`` prompts: the beginnings of the feeds' first rows without padding, longest first.

    Raises:
        BackendError: No feed begins with a token.
    """
    found: list[tuple[int, ...]] = []
    for feed in feeds:
        ids = feed.values["input_ids"]
        row = ids[0] if feed.mask is None else ids[0][feed.mask[0].astype(bool)]
        prompt = tuple(int(token) for token in row[:_PROMPT])
        if prompt and prompt not in found:
            found.append(prompt)
    if not found:
        raise BackendError("no feed begins with a row of tokens to continue from", "omit --generate")
    return sorted(found, key=len, reverse=True)[:count]


class _Stream:
    """One side's context: tokens so far, and the cache if there is one."""

    def __init__(self, run: Run, ports: Sequence[InputPort], prompt: Sequence[int]) -> None:
        self._run = run
        self._ports = {port.name: port for port in ports}
        self._caches = [name for name in self._ports if name.startswith(_PAST)]
        self._tokens = list(prompt)
        self._new = list(prompt)
        self._past = {name: self._empty(self._ports[name]) for name in self._caches}

    @staticmethod
    def _empty(port: InputPort) -> Array:
        _, heads, _, size = port.dims
        return np.zeros((1, int(heads or 0), 0, int(size or 0)), port.numpy_dtype)

    def logits(self) -> Array:
        """Return the logits after the last token, of shape ``(vocab,)``."""
        length = len(self._tokens)
        ids = self._new if self._caches else self._tokens
        given = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, length)),
            "position_ids": np.arange(length - len(ids), length)[None],
        }
        values = {
            name: values.astype(self._ports[name].numpy_dtype)
            for name, values in given.items()
            if name in self._ports
        }
        outputs = self._run({**values, **self._past})
        for name in self._caches:
            self._past[name] = outputs[_PRESENT + name.removeprefix(_PAST)]
        last: Array = outputs["logits"][0, -1].astype(np.float64)
        return last

    def push(self, token: int) -> None:
        """Append a token to the context."""
        self._tokens.append(token)
        self._new = [token]


def generate(
    reference: Run,
    candidate: Run,
    ports: Sequence[InputPort],
    prompt: Sequence[int],
    count: int,
    state: State,
    tie: float,
) -> Generated:
    """Generate until ``count`` tokens are equal or one differs.

    Args:
        reference: Function that runs the reference in the state.
        candidate: Function that runs the candidate in the state.
        ports: Inputs of both.
        prompt: Token ids of the prompt.
        count: Number of tokens.
        state: Active adapters.
        tie: Difference below which two logits of the reference can't be told apart.
    """
    streams = _Stream(reference, ports, prompt), _Stream(candidate, ports, prompt)
    chosen: tuple[list[int], list[int]] = [], []
    for _ in range(count):
        expected, actual = (stream.logits() for stream in streams)
        tokens = int(expected.argmax()), int(actual.argmax())
        for tokens_of, token in zip(chosen, tokens, strict=True):
            tokens_of.append(token)
        finite = bool(np.isfinite(actual).all() and np.isfinite(expected).all())
        if tokens[0] != tokens[1] or not finite:
            gap = float(expected[tokens[0]] - expected[tokens[1]]) if finite else math.nan
            equal = len(chosen[0]) - 1
            near = finite and gap <= tie
            return Generated(
                state=state_name(state),
                prompt=tuple(prompt),
                reference=tuple(chosen[0]),
                candidate=tuple(chosen[1]),
                equal=equal,
                tie=near,
            )
        for stream in streams:
            stream.push(tokens[0])
    return Generated(
        state=state_name(state),
        prompt=tuple(prompt),
        reference=tuple(chosen[0]),
        candidate=tuple(chosen[1]),
        equal=count,
    )


def token_verdicts(found: Sequence[Generated], count: int, tie: Mapping[str, float]) -> list[Verdict]:
    """Return one verdict for each state: the number of prompts whose tokens differ, ties not counted.

    Args:
        found: The generated tokens.
        count: Number of requested tokens.
        tie: State → the gap below which a difference is a tie.
    """
    verdicts = []
    for state in dict.fromkeys(entry.state for entry in found):
        own = [entry for entry in found if entry.state == state]
        wrong = [entry for entry in own if entry.equal < count and not entry.tie]
        ties = sum(entry.tie for entry in own)
        why = f"{sum(entry.equal for entry in own)} greedy tokens of {len(own)} prompts are equal"
        if ties:
            why += f"; {ties} ended at a tie: the reference's own logits are nearer than {tie[state]:.1e}"
        if wrong:
            at = wrong[0]
            why = f"token {at.equal + 1} is {at.candidate[-1]}, the reference chose {at.reference[-1]}; {why}"
        # If every prompt ended at once with a tie, no token was compared.
        counted = bool(wrong) or any(entry.equal for entry in own)
        verdicts.append(
            Verdict(
                kind="tokens",
                name="greedy tokens",
                state=state,
                output="logits",
                value=float(len(wrong)),
                limit=0.0,
                passed=not wrong,
                why=why,
                counted=counted,
            )
        )
    return verdicts
