"""Steps that are packed ahead: the same steps, an exact position, and errors where the step would be."""

import threading

import pytest

from fastalign.engine.feed import Feed


class Counting:
    """A source of numbers, which notes the thread that reads it."""

    def __init__(self, reads_ahead=True, last=4):
        self.reads_ahead, self.last, self.drawn, self.threads = reads_ahead, last, 0, []

    def next(self):
        if self.drawn == self.last:
            raise ValueError("no more")
        self.drawn += 1
        self.threads.append(threading.current_thread())
        return [self.drawn]

    def state_dict(self):
        return {"drawn": self.drawn}


def feed(**options):
    source = Counting(**options)
    return source, Feed(source, lambda examples: [f"packed {i}" for i in examples])


@pytest.mark.parametrize("ahead", [True, False])
def test_steps_come_in_order_and_the_position_is_that_of_the_last_one_taken(ahead):
    source, steps = feed(reads_ahead=ahead)
    assert steps.position == {"drawn": 0}
    for number in (1, 2, 3):
        assert steps.peek() == steps.peek() == [f"packed {number}"], "a step that is not taken stays the next"
        assert steps.position == {"drawn": number - 1}
        steps.take()
        assert steps.position == {"drawn": number}
    assert steps.peek() == ["packed 4"] and steps.position == {"drawn": 3}
    steps.close()
    other = [thread for thread in source.threads if thread is not threading.current_thread()]
    assert len(other) == (3 if ahead else 0), "all but the first are packed meanwhile, or each when it is asked for"


def test_what_goes_wrong_in_the_thread_is_raised_at_its_step_and_no_sooner():
    _, steps = feed(last=2)
    for _ in range(2):
        steps.peek()
        steps.take()
    assert steps.position == {"drawn": 2}
    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            steps.peek()
    steps.close()


def test_an_error_behind_the_last_step_is_nobodys():
    _, steps = feed(last=1)
    steps.peek()
    steps.take()
    steps.close()
