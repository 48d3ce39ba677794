"""Checkpoints with Python code of their own that leaves a mark where it is executed."""

import json
import shutil
from pathlib import Path

import tiny

# Every class that somebody could ask for is in every file.
CODE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class XConfig(LlamaConfig):
    model_type = "x"
class XModel(LlamaForCausalLM):
    config_class = XConfig
class XTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **options):
    return model
"""
AUTO_MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModel": "modeling_x.XModel",
    "AutoModelForCausalLM": "modeling_x.XModel",
    "AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizer"],
    "AutoProcessor": "tokenization_x.XTokenizer",
}


def plant(folder: Path, mark: Path, **changes) -> Path:
    """Write tiny Llama's checkpoint with code of its own.

    Args:
        folder: Where to.
        mark: The file that the code makes.
        changes: Of config.json; None leaves a key out.
    """
    shutil.copytree(tiny.checkpoint("llama"), folder)
    code = CODE.format(mark=str(mark))
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        file = folder / name
        found = json.loads(file.read_text()) if file.exists() else {}
        found |= {"auto_map": AUTO_MAP}
        if name == "config.json":
            found = {key: value for key, value in (found | changes).items() if value is not None}
        file.write_text(json.dumps(found))
    return folder
