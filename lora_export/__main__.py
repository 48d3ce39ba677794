"""Run the command line: ``lora-export``, or ``python -m lora_export`` for the interpreter at hand.

A signal ends the process with the message and the exit code of `lora_export.cli`, also while that is
imported.
"""

from __future__ import annotations

import os
import sys

# `python -m` looks for modules in the current folder first, which may be a stranger's: a click.py there would
# run. Modules of lora_export are found in its own folder, wherever that lies.
if __name__ == "__main__" and not sys.flags.safe_path:
    try:
        if sys.path[0] == os.getcwd():  # noqa: PTH109
            del sys.path[0]
    except FileNotFoundError:  # the folder is gone, and Python has put none there
        pass

import contextlib
import signal


def main() -> None:
    """Import the command line, run it, and exit with its code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP and a shell's background SIGINT, and so it stays.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    from lora_export.cli import main as run

    run()


def _end(number: int, _frame: object) -> None:
    """End the process at once: nothing has begun, and what is raised within an import may be lost there."""
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, b"Aborted: nothing was replaced.\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
