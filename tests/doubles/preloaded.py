"""`lora-export` in a fork of a process that has torch and its like loaded: the start takes no 5 s of imports.

For tests of what verbs read and write, each run with its own arguments, folder, environment and streams. The
exports that tests share are shared with these runs as well. What is tested of a process itself (its start,
its signals, what libraries read from the environment when they are imported) wants a new one. pytest's own
process has threads and is not to be forked: ``python preloaded.py SOCKET`` is the one that is.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_MOST_BYTES = 1 << 20


def run(
    arguments: Sequence[object],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
    timeout_s: int = 600,
    entry: str = "lora_export.cli:main",
) -> subprocess.CompletedProcess[str]:
    """Run the command line as `subprocess.run` would, stdout and stderr captured as text.

    Args:
        arguments: Of the command line.
        cwd: Folder to run in; None: the current one.
        env: Environment; None: this process's.
        input: Text on stdin.
        timeout_s: Seconds after which the run is ended by SIGALRM.
        entry: Function that takes the arguments, ``module:name``.
    """
    words = [str(word) for word in arguments]
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        streams[0].write(input.encode())
        streams[0].seek(0)
        where, settings = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        numbers = [stream.fileno() for stream in streams]
        code = asked(process(), words, where, settings, numbers, timeout_s, entry)
        for stream in streams[1:]:
            stream.seek(0)
        return subprocess.CompletedProcess(words, code, *(stream.read().decode() for stream in streams[1:]))


def asked(
    address: str,
    arguments: Sequence[str],
    cwd: str,
    env: Mapping[str, str],
    streams: Sequence[int] = (0, 1, 2),
    timeout_s: int = 600,
    entry: str = "lora_export.cli:main",
) -> int:
    """Ask the process at an address for a run; return its exit code, negative for a signal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        request = json.dumps([list(arguments), cwd, dict(env), timeout_s, entry]).encode()
        assert len(request) < _MOST_BYTES
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MOST_BYTES)
        rights = array.array("i", streams)
        connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        answer = connection.recv(64)
    assert answer, f"the process at {address} has ended"
    return int(answer)


@functools.cache
def process() -> str:
    """Start the process that is forked; return its address. It ends with this one."""
    # Not in the test's own folder: an address has to be short, and serves the tests after this one as well.
    address = str(Path(os.environ["LORA_EXPORT_TESTS_SHARED"]) / f"preloaded-{os.getpid()}")
    command = [sys.executable, __file__, address]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert started.stdin is not None
    assert started.stdout is not None

    @atexit.register
    def end() -> None:
        started.stdin.close()
        started.wait()

    assert started.stdout.readline() == b"ready\n"
    return address


def _serve(address: str) -> None:
    """Answer until stdin ends: as long as lives who started this."""
    _load()
    runs: dict[int, tuple[int, socket.socket]] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        os.write(1, b"ready\n")
        while 0 not in (ready := select.select([0, listener, *runs], [], [])[0]):
            for handle in [handle for handle in runs if handle in ready]:
                child, connection = runs.pop(handle)
                os.close(handle)
                with connection, contextlib.suppress(OSError):  # nobody waits for it any more
                    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            if listener in ready:
                connection, _ = listener.accept()
                child = _begun(connection, [listener, *(other for _, other in runs.values())])
                runs[os.pidfd_open(child)] = child, connection
    # The time that they took is told as that of this process's children.
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _load() -> None:
    """Import what verbs import when they need it; torch's exporter imports most when it is first used."""
    import onnxruntime  # noqa: F401
    import peft  # noqa: F401
    import torch
    from exports_once import share_exports
    from single_thread import single_thread
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    from unsynced import unsynced

    import lora_export.cli

    for module in pkgutil.walk_packages(lora_export.__path__, "lora_export."):
        importlib.import_module(module.name)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), dynamo=True, verbose=False)
    share_exports(Path(os.environ["LORA_EXPORT_TESTS_SHARED"]) / "exports")
    single_thread()
    unsynced()
    # A fork's garbage collector would go through all of it, and copy the memory that it lies in.
    gc.collect()
    gc.freeze()


def _begun(connection: socket.socket, others: Sequence[socket.socket]) -> int:
    """Begin the run that is asked for; return the number of its process."""
    request, streams, _, _ = socket.recv_fds(connection, _MOST_BYTES, 3)
    arguments, cwd, env, timeout_s, entry = json.loads(request)
    child = os.fork()
    if not child:
        for other in (connection, *others):
            other.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os._exit(_main(arguments, cwd, env, timeout_s, entry))
    for stream in streams:
        os.close(stream)
    return child


def _main(arguments: list[str], cwd: str, env: dict[str, str], timeout_s: int, entry: str) -> int:
    module, _, name = entry.partition(":")
    main = getattr(importlib.import_module(module), name)
    signal.alarm(timeout_s)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    sys.argv = ["lora-export", *arguments]
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
