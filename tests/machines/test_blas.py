"""lora_export.machines.blas: one thread as long as anybody wants it, then the program's number again."""

import sys
import types
from pathlib import Path

import threadpoolctl
from threadpoolctl import threadpool_info, threadpool_limits

import lora_export
from lora_export.machines import blas
from lora_export.machines.blas import one_blas_thread


def threads(infos=threadpool_info):
    return {info["num_threads"] for info in infos() if info["user_api"] == "blas"}


def test_holders_that_overlap_give_back_what_the_program_had():
    first, second = one_blas_thread(), one_blas_thread()
    with threadpool_limits(2, user_api="blas"):
        assert threads() == {2}
        first.__enter__()
        second.__enter__()
        assert threads() == {1}
        first.__exit__(None, None, None)
        assert threads() == {1}
        second.__exit__(None, None, None)
        assert threads() == {2}
        with one_blas_thread():
            assert threads() == {1}
        assert threads() == {2}


def test_libraries_are_searched_for_again_when_a_module_has_come(monkeypatch):
    search, searches = threadpoolctl.ThreadpoolController, []

    def counted():
        searches.append(len(sys.modules))
        return search()

    monkeypatch.setattr(threadpoolctl, "ThreadpoolController", counted)
    blas._libraries.cache_clear()
    for number, name in enumerate(("first", "second"), 1):
        monkeypatch.setitem(sys.modules, f"the {name} module of this test", types.ModuleType(name))
        for _ in range(2):
            with one_blas_thread():
                assert threads(search().info) == {1}
        assert len(searches) == number


def test_nobody_limits_blas_besides():
    package = Path(lora_export.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "threadpoolctl" in path.read_text("utf-8")]
    assert users == ["blas.py"]
