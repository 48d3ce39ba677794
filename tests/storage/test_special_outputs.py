"""No output replaces a device, a pipe or a socket, or a link to one: other programs would meet a file there.

Only what is made in a test's own folder is ever named here: a mistake would change the machine.
"""

import os
import socket
import stat

import pytest
import tiny

from lora_export import cli
from lora_export.errors import OutputError
from lora_export.storage.outputs import OutputSet, refuse_existing, refuse_replacing


def pipe(path):
    os.mkfifo(path)


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # a whole path may be too long for one


def link_to_pipe(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_open_file(path):
    """As /dev/stdout is: what it leads to is a file, while stdout goes into one."""
    path.symlink_to(f"/proc/self/fd/{HELD}")


HELD = 999
KINDS = {
    pipe: "a pipe",
    bound_socket: "a socket",
    link_to_pipe: "a link to a pipe",
    link_to_open_file: "a link to an open file",
}


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def special(request, tmp_path, monkeypatch):
    """A place that is special, and what it is called."""
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "held").open("w") as held:
        os.dup2(held.fileno(), HELD)
    request.param(tmp_path / "out")
    yield tmp_path / "out", KINDS[request.param]
    os.close(HELD)


def kind_of(path):
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode), status.st_ino


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_set_refuses_it(force, folder, special):
    path, what = special
    before = kind_of(path)
    with (
        OutputSet(force) as outputs,
        pytest.raises(OutputError, match="neither a file nor a folder") as caught,
    ):
        outputs.stage(path, folder=folder)
    assert caught.value.problems[0].startswith(f"{path}: is not a regular file but {what}")
    assert "--json" in caught.value.hint
    assert kind_of(path) == before


@pytest.mark.parametrize("check", [refuse_existing, refuse_replacing])
def test_the_first_checks_refuse_it(check, special):
    with pytest.raises(OutputError, match="neither a file nor a folder"):
        check([special[0]], True)


def test_a_set_looks_again_when_it_is_complete(tmp_path):
    with OutputSet(force=True) as outputs:
        outputs.stage(tmp_path / "out").write_text("new")
        os.mkfifo(tmp_path / "out")
        with pytest.raises(OutputError, match="neither a file nor a folder"):
            outputs.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stat.S_ISFIFO(os.lstat(tmp_path / "out").st_mode)


def test_a_folder_that_holds_one_is_not_replaced(tmp_path):
    (tmp_path / "out" / "in").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / "in" / "pipe")
    with OutputSet(force=True) as outputs, pytest.raises(OutputError, match="neither a file") as caught:
        outputs.stage(tmp_path / "out", folder=True)
    assert str(tmp_path / "out" / "in" / "pipe") in caught.value.problems[0]


def test_files_and_links_to_them_are_replaced_as_before(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("file", "link", "nowhere"):
        with OutputSet(force=True) as outputs:
            outputs.stage(tmp_path / name).write_text("new")
            outputs.commit()
        assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_a_report_does_not_replace_it(option, tmp_path, capsys):
    path = tmp_path / ("r.json" if option == "--report" else "r.svg")
    os.mkfifo(path)
    command = ["inspect", str(tiny.adapter("llama")), option, str(path), "--force"]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 1
    assert "is not a regular file but a pipe" in capsys.readouterr().err
    assert stat.S_ISFIFO(os.lstat(path).st_mode)
