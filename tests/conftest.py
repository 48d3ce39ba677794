"""Settings for every test: offline, one thread a process (small models run faster so; xdist runs several)."""

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# Engines are built anew by each run of the tests, and leave nothing in the user's cache.
os.environ["LORA_EXPORT_CACHE"] = tempfile.mkdtemp(prefix="lora-export-cache-")
atexit.register(shutil.rmtree, os.environ["LORA_EXPORT_CACHE"], ignore_errors=True)


def pytest_configure() -> None:
    """Let signals do what they usually do: a job in the background is begun with some of them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, handler)


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test a temporary folder of its own: a verb tells of what other tests' killed runs have left there."""
    with tempfile.TemporaryDirectory(prefix="lora-export-test-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield
