"""Settings for every test: offline, one thread a process (small models run faster so; xdist runs several)."""

import atexit
import contextlib
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unsynced import unsynced

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# What torch keeps of the operators that it traces costs tiny models more than it saves.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
# Where pytest keeps what failed tests wrote is not in the folders that go at the end.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
unsynced()
# What Python 3.11 looks for anew whenever an object is asked for a protocol of onnx_ir, and later ones keep.
if sys.version_info < (3, 12):
    typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)
TEMPORARY = tempfile.mkdtemp(prefix="lora-export-tests-")
_OWNER = os.getpid()


@atexit.register
def _remove_temporary() -> None:
    if os.getpid() == _OWNER:  # not a fork
        shutil.rmtree(TEMPORARY, ignore_errors=True)
        if _IS_FIRST:
            shutil.rmtree(SHARED, ignore_errors=True)


# Engines are built anew by each run of the tests, and leave nothing in the user's cache.
os.environ["LORA_EXPORT_CACHE"] = tempfile.mkdtemp(dir=TEMPORARY)
# What workers share: the first process of a run makes it, and removes it in the end.
_IS_FIRST = "LORA_EXPORT_TESTS_SHARED" not in os.environ
if _IS_FIRST:
    os.environ["LORA_EXPORT_TESTS_SHARED"] = tempfile.mkdtemp(prefix="lora-export-shared-")
SHARED = os.environ["LORA_EXPORT_TESTS_SHARED"]


@pytest.fixture(autouse=True, scope="session")
def tiny_models_cost_less() -> Iterator[None]:
    """Let torch's exporter run once for the same module, and sessions have one thread.

    See `exports_once` and `single_thread`.
    """
    from exports_once import share_exports
    from single_thread import single_thread

    with pytest.MonkeyPatch.context() as patch:
        single_thread(patch.setattr)
        share_exports(Path(SHARED) / "exports", patch.setattr)
        yield


@pytest.fixture(autouse=True, scope="session")
def graphs_are_not_proven() -> Iterator[dict[str, Any]]:
    """Let captures be compared with PyTorch in tests marked ``proven`` alone: others do it themselves.

    Nor is a graph taken that another test's capture has left.
    """
    from lora_export.base.capture import capture
    from lora_export.graph.proof import Proof

    names = ("find", "not_proven")
    with pytest.MonkeyPatch.context() as patch:
        before = {name: getattr(capture, name) for name in names}
        patch.setattr(capture, "find", lambda key, tensors: None)
        patch.setattr(capture, "not_proven", lambda wanted: Proof(of="nothing", reason="a test"))
        yield before


@pytest.fixture(autouse=True)
def some_are_proven(
    request: pytest.FixtureRequest, graphs_are_not_proven: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let a test marked ``proven`` capture as users do."""
    if request.node.get_closest_marker("proven"):
        from lora_export.base.capture import capture

        for name, value in graphs_are_not_proven.items():
            monkeypatch.setattr(capture, name, value)


def pytest_configure() -> None:
    """Let signals do what they usually do: a job in the background is begun with some of them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker a group or a file at a time: its tests share what was made for the first of them.

    Two workers on one file would make it twice, or one would wait for the other. Many workers have to share
    files, or all wait for the longest.
    """
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return scope.partition("::")[0]

    if config.getoption("dist") != "loadgroup" or (config.getoption("numprocesses") or 0) > 4:
        return None
    config.option.loadscopereorder = False  # workers put them in order
    return ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let workers begin with groups and files that take long, so that none of them is alone in the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        sizes = Counter(map(_together, items))
        sizes.update({_together(item): len(items) for item in items if item.get_closest_marker("slow")})
        items.sort(key=lambda item: -sizes[_together(item)])


def _together(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    return mark.args[0] if mark else str(item.path)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what stays: libraries and tests, a million objects each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)  # what is traced makes many objects, and keeps them


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a temporary folder of its own: a verb tells of what a killed run has left there.

    It stays until the end: models that several tests share are made in the folder of the first.
    """
    monkeypatch.setenv("TMPDIR", tempfile.mkdtemp(dir=TEMPORARY))
    monkeypatch.setattr(tempfile, "tempdir", None)
