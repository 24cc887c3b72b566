"""Items one ahead: in order, no more than two, errors where the item would have been."""

import threading

import pytest
import torch

from sarm.training.prefetch import prefetch


def test_items_come_in_order_from_another_thread():
    threads = set()

    def make(check):
        for i in range(5):
            threads.add(threading.get_ident())
            yield i

    assert list(prefetch(make)) == [0, 1, 2, 3, 4]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert list(prefetch(lambda check: iter(()))) == []


def test_the_next_item_is_computed_meanwhile_and_none_beyond():
    made = [threading.Event() for _ in range(4)]

    def make(check):
        for i, event in enumerate(made):
            event.set()
            yield i

    items = prefetch(make)
    assert next(items) == 0
    assert made[1].wait(30)  # without the caller asking for it
    assert next(items) == 1
    assert made[2].wait(30)
    assert not made[3].is_set()  # item 2 has not been taken
    assert list(items) == [2, 3]


def test_an_error_comes_where_its_item_would_have():
    def make(check):
        yield 1
        raise ValueError("broken")

    items = prefetch(make)
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_closing_stops_the_item_in_progress():
    begun, ended = threading.Event(), []

    def make(check):
        yield 1
        begun.set()
        try:
            while True:
                check()
        finally:
            ended.append(True)

    items = prefetch(make)
    next(items)
    assert begun.wait(30)
    items.close()
    assert ended == [True]


def test_the_thread_computes_with_as_many_threads_as_the_caller():
    """How a sum is split among threads decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = list(prefetch(lambda check: iter([None] * 2)))
        assert len(found) == 2
        assert [*prefetch(counts)] == [before + 1] * 2
    finally:
        torch.set_num_threads(before)


def counts(check):
    for _ in range(2):
        yield torch.get_num_threads()
