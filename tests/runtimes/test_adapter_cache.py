"""The bookkeeping of `AdapterCache`, with texts in place of tensors."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_export.errors import AdapterError
from lora_export.runtimes.adapter_cache import AdapterCache, Prepared


def of(value, nbytes=10):
    return Prepared(nbytes, lambda: value)


def filled(*names, max_items=16, max_bytes=None):
    cache = AdapterCache(max_items, max_bytes)
    for name in names:
        cache.add(name, of(name), lambda name=name: of(name))
    return cache


def use(cache, name):
    with cache.use(name) as value:
        return value


def test_the_least_recently_used_leaves_first():
    cache = filled("a", "b", "c", max_items=3)
    use(cache, "a")
    cache.add("d", of("d"), lambda: of("d"))
    assert cache.on_device() == ["c", "a", "d"]
    assert cache.names() == ["a", "b", "c", "d"]
    assert use(cache, "b") == "b"
    assert cache.on_device() == ["a", "d", "b"]


def test_bytes_make_as_much_room_as_is_needed():
    cache = filled("a", "b", "c", max_bytes=30)
    assert cache.bytes_on_device() == 30
    cache.add("big", of("big", 25), lambda: of("big", 25))
    assert cache.on_device() == ["big"]
    assert cache.bytes_on_device() == 25
    cache.remove("big")
    assert cache.bytes_on_device() == 0


def test_what_is_in_use_stays_and_goes_when_it_is_free():
    cache = filled("a", "b", max_items=2)
    with cache.use("a"), cache.use("b"):
        cache.add("c", of("c"), lambda: of("c"))
        assert cache.on_device() == ["a", "b", "c"]
    assert cache.on_device() == ["a", "c"]  # b's use ended first
    assert cache.bytes_on_device() == 20


def test_a_failed_placement_is_not_counted():
    cache = filled("a", max_items=1)

    def fail():
        raise MemoryError("full")

    with pytest.raises(MemoryError):
        cache.add("b", Prepared(10, fail), lambda: of("b"))
    assert cache.names() == ["a"]
    assert cache.bytes_on_device() == 0
    assert use(cache, "a") == "a"  # it had made room, and comes back
    assert cache.on_device() == ["a"]
    assert cache.bytes_on_device() == 10


def test_a_failed_return_can_be_tried_again():
    cache = AdapterCache(1)
    answers = [AdapterError("gone"), of("a")]

    def load():
        answer = answers.pop(0)
        if isinstance(answer, AdapterError):
            raise answer
        return answer

    cache.add("a", of("a"), load)
    cache.add("b", of("b"), lambda: of("b"))
    with pytest.raises(AdapterError, match="gone"):
        use(cache, "a")
    assert cache.on_device() == ["b"]
    assert use(cache, "a") == "a"
    assert cache.bytes_on_device() == 10


def test_several_that_want_an_evicted_one_load_it_once():
    cache = AdapterCache(1)
    loads, inside, go_on = [], threading.Event(), threading.Event()

    def load():
        loads.append(1)
        inside.set()
        assert go_on.wait(10)
        return of("a")

    cache.add("a", of("a"), load)
    cache.add("b", of("b"), lambda: of("b"))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(use, cache, "a") for _ in range(4)]
        assert inside.wait(10)
        go_on.set()
        assert [future.result(10) for future in waiting] == ["a"] * 4
    assert len(loads) == 1
    assert cache.on_device() == ["a"]


def test_removed_while_it_is_loaded_again():
    cache = AdapterCache(1)

    def load():
        cache.remove("a")
        return of("a")

    cache.add("a", of("a"), load)
    cache.add("b", of("b"), lambda: of("b"))
    assert use(cache, "a") == "a"  # the run that asked for it gets it
    assert cache.names() == ["b"]
    assert cache.on_device() == []
    assert cache.bytes_on_device() == 0


def test_replaced_while_in_use():
    cache = filled("a", "b")
    with cache.use("a") as old:
        cache.add("a", of("new"), lambda: of("new"), replace=True)
        assert old == "a"
        assert use(cache, "a") == "new"
    assert cache.names() == ["a", "b"]
    assert cache.bytes_on_device() == 20
    assert use(cache, "a") == "new"


def test_a_name_that_is_taken_leaves_no_trace():
    cache = filled("a")
    with pytest.raises(AdapterError, match="already"):
        cache.add("a", of("new"), lambda: of("new"))
    assert use(cache, "a") == "a"
    assert cache.bytes_on_device() == 10
    with pytest.raises(AdapterError, match="already"):
        cache.check_free("a")
    cache.check_free("b")
