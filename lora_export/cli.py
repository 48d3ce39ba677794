"""The `lora-export` command: a group that loads a verb only when it is called."""

from __future__ import annotations

import atexit
import contextlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import click

from lora_export import __version__
from lora_export.commands import COMMANDS
from lora_export.commands.printing import (
    JsonAnswer,
    guard_libraries,
    print_error,
    print_json_error,
    print_lines,
)
from lora_export.commands.verb import write_verbs
from lora_export.errors import InternalError, LoraExportError
from lora_export.progress import spoken
from lora_export.storage.commit.told import Run, listening
from lora_export.untrusted.shown import shown

_NOTHING = "Aborted: nothing was replaced."
# For so long after a signal a further one does not break into what the first one began: its end.
_ENDING_S = 5.0
# A signal waits for the end of an import, at most so long, and looks so often.
_IMPORT_S, _WAIT_S = 20.0, 0.01
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ISSUES = "https://github.com/lora-export/lora-export/issues"


class VerbGroup(click.Group):
    """A click group whose verbs are looked up in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the registry: the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its click command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs in the order of the data."""
        write_verbs(self, ctx, formatter)


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-export")
@click.option("--debug", is_flag=True, help="Show Python tracebacks.")
def root(debug: bool) -> None:
    """Take a trained LoRA adapter to the runtime that serves it.

    Results go to stdout, messages to stderr.
    Exit codes: 0 good, 1 a problem with the input, 2 usage, 3 parity failed, 4 a defect of ours.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    code = 130
    try:
        code = _guarded(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before the run listens to it, or after its end
        print_lines(["Aborted."], err=True)
    # Python gives signals their own effect back before it has ended, which takes a second with PyTorch: one
    # would change the exit code of what is done, and said.
    atexit.register(_ignore_signals)
    sys.exit(code)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A Ctrl-C that came within `exec` of a text (as dataclasses do) Python sends itself again in the end,
    # though it was dealt with (``pythonrun.c``, unhandled_keyboard_interrupt).
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _guarded(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    # Accept --debug behind the verb as well: that is where people add it after a failure.
    arguments = ["--debug", *(a for a in arguments if a != "--debug")] if debug else arguments
    guard_libraries()
    ending = _Ending()
    # Do what Ctrl-C does: unfinished output is removed, and running builders are ended.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, ending)
        # nohup ignores SIGHUP and a shell's background SIGINT, and so it stays.
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, ending)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, ending)
    return _run(arguments, debug, ending)


class _Ending:
    """A handler of signals: the first one ends the run, and those that follow let it end.

    On the way out files are removed and names are given back. A second Ctrl-C that breaks into the first
    lines of that would leave them. Where the way out is a long one, it can be tried again.

    What a package's own code makes of an interrupt while it is imported is its matter: an ImportError, as if
    it were not installed. So a signal waits for the end of an import, but not for ever.
    """

    def __init__(self) -> None:
        self._began_s: float | None = None
        self._waits_left = int(_IMPORT_S / _WAIT_S)
        self._waiting: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._waits_left and _is_importing(frame):
            self._waits_left -= 1
            self._waiting = number
            again = threading.Timer(_WAIT_S, _send_again, [number])
            again.daemon = True
            again.start()
            return
        self._waiting = None
        self._end(number, frame)

    def settle(self) -> None:
        """End the run if a signal still waits at its end."""
        if self._waiting is not None:
            self._end(self._waiting, None)

    def _end(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._began_s is not None and now - self._began_s < _ENDING_S:
            return
        self._began_s = now
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        _terminate(number, frame)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _send_again(number: int) -> None:
    main_thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main_thread is not None:
        signal.pthread_kill(main_thread, number)  # it ends what the thread waits for, too
    else:
        signal.raise_signal(number)


def _terminate(number: int, _frame: object) -> None:
    raise _Terminated(128 + number)


class _Terminated(SystemExit):
    """Raised when the system asks the process to end."""


def _run(arguments: list[str], debug: bool, ending: _Ending | None = None) -> int:
    with listening(_note) as run:
        try:
            try:
                code = _outcome(arguments, debug, run)
                if ending:
                    ending.settle()
                return code
            finally:
                run.put_away()
        except (click.exceptions.Abort, KeyboardInterrupt) as error:
            _interrupted(error, run)
            return 130
        except _Terminated as error:
            _interrupted(error, run)
            return int(str(error.code))


def _note(text: str) -> None:
    print_lines([f"note: {text}"], err=True)


def _interrupted(error: BaseException, run: Run) -> None:
    """Print which outputs were complete on the disk when the run was interrupted."""
    run.put_away()  # the interrupt may have come just before the same call
    before: BaseException | None = error
    while before is not None:
        if isinstance(before, LoraExportError):  # the interrupt came while this error was handled
            print_error(before)
            print_lines([f"Aborted.{_written(run)}"], err=True)
            return
        before = before.__cause__ or before.__context__
    written = _written(run)
    text = f"Aborted:{written} nothing else was replaced." if written else _NOTHING
    print_lines([text], err=True)


def _written(run: Run) -> str:
    """Return a text that names the outputs in place already, or "" if there are none."""
    paths = run.written()
    return f" complete and in place: {', '.join(map(str, paths))};" if paths else ""


def _tidy(arguments: Sequence[str]) -> None:
    """Remove what runs that ended early left among the temporary files; `Verb` does it where outputs go."""
    from lora_export.storage.commit.leftovers import tidy

    # The doctor tidies on its own, and reports it.
    if arguments and not {"--help", "-h", "--version", "--dry-run", "doctor"} & set(arguments):
        with contextlib.suppress(OSError):  # the folder is missing or full
            tidy(Path(tempfile.gettempdir()))


def _outcome(arguments: list[str], debug: bool, run: Run) -> int:
    answer = JsonAnswer(is_given="--json" not in arguments)
    try:
        _tidy([argument for argument in arguments if argument != "--debug"])
        code: Any = root.main(args=arguments, prog_name="lora-export", standalone_mode=False, obj=answer)
        return code if isinstance(code, int) else 0
    except click.exceptions.Abort:
        raise
    except click.exceptions.NoArgsIsHelpError as error:
        print_lines(error.message.split("\n"), err=True)
        return error.exit_code
    except click.ClickException as error:
        # What was typed may contain the name of a file that a stranger chose.
        if error.message != (text := shown(error.message)):
            print_lines([f"Error: {text}"], err=True)
        else:
            spoken(error.show, err=True)
        _say_written(run)
        _answer(answer, error, error.exit_code, error.format_message())
        return error.exit_code
    except LoraExportError as error:
        if debug:
            raise
        print_error(error)
        _say_written(run)
        _answer(
            answer,
            error,
            code=error.exit_code,
            message=error.message,
            problems=error.problems,
            hint=error.hint,
        )
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        where = f" {error.filename}" if error.filename else ""
        message = f"the system refused to read or write{where}: {error.strerror or error}"
        return _refused_by_system(run, answer, error, message)
    except MemoryError as error:
        if debug:
            raise
        message = f"there is not enough memory{f': {error}' if str(error) else ''}"
        hint = "end other programs, or give smaller sizes; a small file that asks for so much is damaged"
        return _refused_by_system(run, answer, error, message, hint=hint)
    except Exception as error:
        if debug:
            raise
        message = f"{type(error).__name__}: {error}"
        hint = f"this is a defect of lora-export; run again with --debug and report it at {ISSUES}"
        print_lines([f"Internal error: {message}", f"hint: {hint}"], err=True)
        _say_written(run)
        _answer(answer, error, InternalError.exit_code, message, hint=hint)
        return InternalError.exit_code


def _refused_by_system(
    run: Run, answer: JsonAnswer, error: Exception, message: str, *, hint: str = ""
) -> int:
    print_lines([f"Error: {message}", *([f"hint: {hint}"] if hint else [])], err=True)
    _say_written(run)
    _answer(answer, error, LoraExportError.exit_code, message, hint=hint)
    return LoraExportError.exit_code


def _say_written(run: Run) -> None:
    """Say which outputs an error came after, whatever error it is: they are there, and complete."""
    if written := _written(run):
        print_lines([f"before that:{written[:-1]}"], err=True)


def _answer(
    answer: JsonAnswer,
    error: Exception,
    code: int,
    message: str,
    problems: Sequence[str] = (),
    hint: str = "",
) -> None:
    """Print the error as JSON for a program that asked for JSON; if stdout fails, it has the exit code."""
    if not answer.is_given:
        with contextlib.suppress(OSError):
            print_json_error(type(error).__name__, code, message=message, problems=problems, hint=hint)
