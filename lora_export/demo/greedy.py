"""Compare greedy generation: PyTorch's answers, saved beside a base, with onnxruntime-genai's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import BackendUnavailable, PackageError, ParityError, install_line
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import FieldError, from_plain
from lora_export.untrusted.places import is_file
from lora_export.untrusted.shown import command

# Lies beside the base's model.onnx; swap-onnx copies it with the tokenizer's files.
EXPECTED = "greedy.json"
ADAPTER_SUFFIX = ".onnx_adapter"
MAX_NEW_TOKENS = 24
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Greedy:
    """Tokens generated for each prompt, without the prompt and without the end-of-sequence token.

    Attributes:
        adapter: The adapter's name, or None for the base alone.
        answers: One answer for each prompt.
    """

    adapter: str | None
    answers: tuple[Tokens, ...]

    @classmethod
    def by_pytorch(cls, model: Any, adapter: str | None, prompts: Sequence[Sequence[int]]) -> Greedy:
        """Generate with transformers, one prompt at a time: padding would change the last bits."""
        import torch

        answers = []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)])
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                )
            answer = output[0].tolist()[len(prompt) :]
            # onnxruntime-genai leaves out the end token.
            ended = answer[-1] == model.generation_config.eos_token_id
            answers.append(tuple(answer[:-1] if ended else answer))
        return cls(adapter, tuple(answers))


@dataclass(frozen=True)
class Expected:
    """Content of ``greedy.json``.

    Attributes:
        prompts: Token ids of each prompt.
        generated: Answers without an adapter, then with each adapter.
        max_new_tokens: Number of tokens at which an unfinished answer was cut.
    """

    prompts: tuple[Tokens, ...]
    generated: tuple[Greedy, ...]
    max_new_tokens: int = MAX_NEW_TOKENS

    def save(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        (folder / EXPECTED).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Expected:
        """Read the file that `save` wrote.

        Raises:
            PackageError: The file is missing or damaged.
        """
        path = folder / EXPECTED
        if not is_file(path):
            raise PackageError(
                f"{folder} has no {EXPECTED} to compare with",
                "give a folder that swap-onnx wrote from a base of 'lora-export demo --model smollm2'",
            )
        again = "run the demo and swap-onnx again"
        try:
            return from_plain(cls, read_json(path, PackageError, again, given=folder))
        except FieldError as error:
            raise PackageError(f"{path} is damaged", again, error.problems) from error


@dataclass(frozen=True)
class Served:
    """Answers of onnxruntime-genai from a folder, and PyTorch's answers to the same prompts.

    Attributes:
        candidate: Answers of onnxruntime-genai, in the order of ``reference``.
        reference: Answers of PyTorch.
        texts: The answers of ``candidate`` as text.
    """

    candidate: tuple[Greedy, ...]
    reference: tuple[Greedy, ...]
    texts: tuple[tuple[str, ...], ...]

    def rows(self) -> list[tuple[str, int, int, tuple[str, ...]]]:
        """Return (adapter or "(none)", equal answers, all answers, texts) for each adapter."""
        return [
            (
                candidate.adapter or "(none)",
                sum(
                    mine == theirs for mine, theirs in zip(candidate.answers, reference.answers, strict=True)
                ),
                len(reference.answers),
                texts,
            )
            for candidate, reference, texts in zip(self.candidate, self.reference, self.texts, strict=True)
        ]

    def require_equal(self, folder: Path) -> None:
        """Raise `ParityError` that lists every adapter whose tokens differ from PyTorch's."""
        rows = [(name, equal, count) for name, equal, count, _ in self.rows() if equal < count]
        if rows:
            raise ParityError(
                f"{folder} in onnxruntime-genai generates other tokens than PyTorch with PEFT",
                "check that each .onnx_adapter there was converted from the demo's adapter of the same name",
                [f"{name}: {equal} of {count} answers are equal" for name, equal, count in rows],
            )


def serve(folder: Path) -> Served:
    """Generate with onnxruntime-genai from ``folder``: without an adapter, then with each adapter in it.

    Args:
        folder: Folder with graph, config, tokenizer, ``greedy.json`` and a ``NAME.onnx_adapter`` for each
            adapter that ``greedy.json`` names.

    Raises:
        BackendUnavailable: onnxruntime-genai is not installed.
        PackageError: Something is missing in the folder, or onnxruntime-genai refuses it.
    """
    expected = Expected.load(folder)
    names = [row.adapter for row in expected.generated if row.adapter is not None]
    missing = [name for name in names if not is_file(folder / f"{name}{ADAPTER_SUFFIX}")]
    if missing:
        raise PackageError(
            f"{folder} lacks adapters that {EXPECTED} names",
            command(
                [
                    *("lora-export", "convert-adapter", "ADAPTER", "--for", folder / "model.onnx"),
                    *("-o", folder / f"NAME{ADAPTER_SUFFIX}"),
                ]
            ),
            [f"{name}{ADAPTER_SUFFIX}" for name in missing],
        )
    og = _genai()
    try:
        model = og.Model(str(folder))
        tokenizer, adapters = og.Tokenizer(model), og.Adapters(model)
        for name in names:
            adapters.load(str(folder / f"{name}{ADAPTER_SUFFIX}"), name)
        answers = tuple(
            Greedy(
                row.adapter,
                tuple(_generate(og, model, adapters=adapters, adapter=row.adapter, expected=expected)),
            )
            for row in expected.generated
        )
        texts = tuple(
            tuple(str(tokenizer.decode(np.array(answer, np.int32))) for answer in row.answers)
            for row in answers
        )
    except RuntimeError as error:
        raise PackageError(
            f"onnxruntime-genai refuses {folder}: {error}", "make the folder again with swap-onnx"
        ) from error
    return Served(answers, expected.generated, texts)


def _genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise BackendUnavailable("onnxruntime-genai is not installed", install_line("genai")) from error
    return onnxruntime_genai


def _generate(
    og: Any, model: Any, adapters: Any, adapter: str | None, expected: Expected
) -> Iterator[Tokens]:
    """Yield the answer to each prompt."""
    for prompt in expected.prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + expected.max_new_tokens, do_sample=False)
        generator = og.Generator(model, params)
        if adapter is not None:
            # Set before the prompt: set later, the prompt's keys and values would silently be the base's.
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        yield tuple(int(token) for token in generator.get_sequence(0)[len(prompt) :])
