import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanotrain.data.prefetch import PrefetchingLoader


class Steps:
    """Answers with the step; remembers who asked for what."""

    def __init__(self):
        self.asked, self.threads = [], set()

    def microbatches(self, step):
        self.asked.append(step)
        self.threads.add(threading.current_thread())
        if step == 13:
            raise IndexError("step 13")
        return [("batch", step)]


@settings(max_examples=30, deadline=None)
@given(order=st.lists(st.integers(0, 12), min_size=1, max_size=15), depth=st.integers(1, 4))
def test_any_order_gets_the_same_answers(order, depth):
    loader = PrefetchingLoader(Steps(), 13, depth)
    assert [loader.microbatches(step) for step in order] == [[("batch", step)] for step in order]
    loader.close()


def test_the_next_steps_are_made_ahead_once_and_none_after_the_last():
    steps = Steps()
    loader = PrefetchingLoader(steps, 5, depth=2)
    for step in range(5):
        loader.microbatches(step)
    loader.close()
    assert steps.asked == [0, 1, 2, 3, 4]
    assert threading.main_thread() not in steps.threads and len(steps.threads) == 1


def test_an_error_comes_at_its_own_step():
    loader = PrefetchingLoader(Steps(), 20)
    assert loader.microbatches(12) == [("batch", 12)]
    with pytest.raises(IndexError, match="step 13"):
        loader.microbatches(13)
    assert loader.microbatches(14) == [("batch", 14)]
    loader.close()
