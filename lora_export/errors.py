"""Every error that lora-export raises on purpose.

The tree::

    LoraExportError(message, hint, problems)      exit code 1
    ├── AdapterError         the adapter file, its tensors or its config
    ├── CheckpointError      the base model's folder or weights
    ├── SiteError            a module has no site in the graph, or more than one
    ├── GraphError           the ONNX file itself
    ├── OutputError          the file or folder to write
    ├── InputChangedError    a file changed while a result was made from it
    ├── RecipeError          a recipe file
    ├── BackendError         a compiler or runtime
    │   ├── BackendUnavailable   not installed; the hint is the pip line
    │   └── EngineBuildError     keeps the builder's own messages
    ├── ParityError          exit code 3
    └── PackageError         a folder for a server
    InternalError                                 exit code 4: a defect of ours
"""

from __future__ import annotations

from collections.abc import Sequence


class LoraExportError(Exception):
    """A problem that the user can fix; shown without a traceback.

    Attributes:
        message: The rule that failed, and where.
        problems: All problems found, one line each.
        hint: Text on how to fix it.
        exit_code: Exit code of the command line.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class AdapterError(LoraExportError):
    """The adapter file, its tensors or its config break a rule."""


class CheckpointError(LoraExportError):
    """The base model's folder, its index or one of its tensors breaks a rule."""


class SiteError(LoraExportError):
    """A module has no site in the graph, more than one, or one of another shape."""


class GraphError(LoraExportError):
    """The ONNX file is damaged, incomplete or uses something that we refuse."""


class OutputError(LoraExportError):
    """The output exists already, or can't be written."""


class InputChangedError(LoraExportError):
    """A file was changed or replaced while a result was made from it."""


class RecipeError(LoraExportError):
    """A recipe has an unknown key, a missing key or a bad value."""


class BackendError(LoraExportError):
    """A compiler or runtime failed."""


class BackendUnavailable(BackendError):
    """A compiler or runtime is not installed; the hint is the pip line."""


class EngineBuildError(BackendError):
    """The engine builder refused the graph."""


class ParityError(LoraExportError):
    """Two runtimes disagree by more than the stated tolerance."""

    exit_code = 3


class PackageError(LoraExportError):
    """A folder for a server can't be assembled."""


class InternalError(Exception):
    """A rule of our own code was broken: a defect to report."""

    exit_code = 4


def install_line(extra: str) -> str:
    """Return the command that installs what an extra needs.

    Where the package came from doesn't matter: pip takes the one that is installed and adds what it lacks.
    """
    return f"pip install 'lora-export[{extra}]'"
