"""``python -m lora_export``: the command line of the interpreter at hand."""

from lora_export.cli import main

if __name__ == "__main__":
    main()
