"""lora_export.machines.blas: one thread as long as anybody wants it, then the program's number again."""

from pathlib import Path

from threadpoolctl import threadpool_info, threadpool_limits

import lora_export
from lora_export.machines.blas import one_blas_thread


def threads():
    return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}


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


def test_nobody_limits_blas_besides():
    package = Path(lora_export.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "threadpool_limits" in path.read_text("utf-8")]
    assert users == ["blas.py"]
