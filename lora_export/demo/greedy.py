"""Greedy generation: PyTorch's answers written beside a base, and onnxruntime-genai's compared with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import BackendUnavailable, PackageError, ParityError
from lora_export.untrusted.documents import read_json
from lora_export.untrusted.fields import FieldError, from_plain

# Beside the base's model.onnx, from where swap-onnx takes it along with the tokenizer's files.
EXPECTED = "greedy.json"
ADAPTER_SUFFIX = ".onnx_adapter"
MAX_NEW_TOKENS = 24
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Greedy:
    """What was generated for each prompt, without the prompt and without the end-of-sequence token.

    Attributes:
        adapter: Its name, or None for the base alone.
        answers: One for each prompt.
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
            # onnxruntime-genai stops before it.
            ended = answer[-1] == model.generation_config.eos_token_id
            answers.append(tuple(answer[:-1] if ended else answer))
        return cls(adapter, tuple(answers))


@dataclass(frozen=True)
class Expected:
    """The content of ``greedy.json``.

    Attributes:
        prompts: Token ids.
        generated: Without an adapter, then with each.
        max_new_tokens: Where an answer without an end was cut.
    """

    prompts: tuple[Tokens, ...]
    generated: tuple[Greedy, ...]
    max_new_tokens: int = MAX_NEW_TOKENS

    def save(self, folder: Path) -> None:
        """Write it into ``folder``."""
        (folder / EXPECTED).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Expected:
        """Read what `save` wrote.

        Raises:
            PackageError: The folder has none, or it is damaged.
        """
        path = folder / EXPECTED
        if not path.is_file():
            raise PackageError(
                f"{folder} has no {EXPECTED} to compare with",
                "give a folder that swap-onnx wrote from a base of 'lora-export demo --model smollm2'",
            )
        again = "run the demo and swap-onnx again"
        try:
            return from_plain(cls, read_json(path, PackageError, again))
        except FieldError as error:
            raise PackageError(f"{path} is damaged", again, error.problems) from error


@dataclass(frozen=True)
class Served:
    """What onnxruntime-genai generated from a folder, and PyTorch before it.

    Attributes:
        got: By onnxruntime-genai, in the order of ``wanted``.
        wanted: By PyTorch.
        texts: What ``got`` says.
    """

    got: tuple[Greedy, ...]
    wanted: tuple[Greedy, ...]
    texts: tuple[tuple[str, ...], ...]

    def rows(self) -> list[tuple[str, int, int, tuple[str, ...]]]:
        """Return (adapter or "(none)", equal answers, answers, texts) for each."""
        return [
            (
                got.adapter or "(none)",
                sum(mine == theirs for mine, theirs in zip(got.answers, wanted.answers, strict=True)),
                len(wanted.answers),
                texts,
            )
            for got, wanted, texts in zip(self.got, self.wanted, self.texts, strict=True)
        ]

    def require_equal(self, folder: Path) -> None:
        """Raise `ParityError` listing every adapter with other tokens than PyTorch's."""
        rows = [(name, equal, count) for name, equal, count, _ in self.rows() if equal < count]
        if rows:
            raise ParityError(
                f"{folder} in onnxruntime-genai generates other tokens than PyTorch with PEFT",
                "is each .onnx_adapter there converted from the demo's adapter of that name?",
                [f"{name}: {equal} of {count} answers are equal" for name, equal, count in rows],
            )


def serve(folder: Path) -> Served:
    """Generate from ``folder`` with onnxruntime-genai alone: without an adapter, and with each of its own.

    Args:
        folder: Graph, config, tokenizer, ``greedy.json`` and a ``NAME.onnx_adapter`` for each adapter in it.

    Raises:
        BackendUnavailable: onnxruntime-genai is not installed.
        PackageError: Something is missing in the folder, or onnxruntime-genai refuses it.
    """
    expected = Expected.load(folder)
    names = [row.adapter for row in expected.generated if row.adapter is not None]
    missing = [name for name in names if not (folder / f"{name}{ADAPTER_SUFFIX}").is_file()]
    if missing:
        raise PackageError(
            f"{folder} lacks adapters that {EXPECTED} knows",
            f"lora-export convert-adapter ADAPTER --for {folder}/model.onnx -o {folder}/NAME{ADAPTER_SUFFIX}",
            [f"{name}{ADAPTER_SUFFIX}" for name in missing],
        )
    og = _genai()
    try:
        model = og.Model(str(folder))
        tokenizer, adapters = og.Tokenizer(model), og.Adapters(model)
        for name in names:
            adapters.load(str(folder / f"{name}{ADAPTER_SUFFIX}"), name)
        got = tuple(
            Greedy(row.adapter, tuple(_generate(og, model, adapters, row.adapter, expected)))
            for row in expected.generated
        )
        texts = tuple(
            tuple(str(tokenizer.decode(np.array(answer, np.int32))) for answer in row.answers) for row in got
        )
    except RuntimeError as error:
        raise PackageError(
            f"onnxruntime-genai refuses {folder}: {error}", "make the folder again with swap-onnx"
        ) from error
    return Served(got, expected.generated, texts)


def _genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise BackendUnavailable(
            "onnxruntime-genai is not installed", "pip install 'lora-export[genai]'"
        ) from error
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
            # Before the prompt: set later, the prompt's keys and values would be the base's, without a word.
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        yield tuple(int(token) for token in generator.get_sequence(0)[len(prompt) :])
