import gc
import weakref

import pytest

from penstock_wire.garbage import keep_what_is_there


class Thing:
    """Something that the collector finds."""

    itself: "Thing"


@pytest.fixture(autouse=True)
def thaw():
    yield
    gc.unfreeze()


def cycle() -> "tuple[Thing, weakref.ref[Thing]]":
    thing = Thing()
    thing.itself = thing
    return thing, weakref.ref(thing)


def test_what_was_there_is_passed_over_and_what_comes_is_collected():
    before, before_alive = cycle()
    keep_what_is_there()
    assert before not in gc.get_objects()  # the collector's own list
    after, after_alive = cycle()
    assert after in gc.get_objects()
    del before, after
    gc.collect()
    assert before_alive() is not None
    assert after_alive() is None


def test_garbage_of_the_start_is_not_kept():
    thing, alive = cycle()
    del thing
    keep_what_is_there()
    assert alive() is None
