"""A pool makes a slot only where all others are in use; the runner's tests see it with a GPU."""

import threading

import pytest

from msn_export.errors import DeviceError, RunnerError
from msn_export.runtime.context_pool import SlotPool


class Slot:
    """An execution slot that only knows whether it is closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def pool(limit: int) -> tuple[SlotPool, list[Slot]]:
    slots: list[Slot] = []

    def make() -> Slot:
        slots.append(Slot())
        return slots[-1]

    return SlotPool(make, limit, "TensorRT 11"), slots  # type: ignore[arg-type]


def test_one_caller_at_a_time_needs_one_slot() -> None:
    lent, slots = pool(2)
    for _ in range(3):
        with lent.slot() as slot:
            assert lent.free() == []
        assert lent.free() == [slot]
    assert len(slots) == 1


def test_two_callers_get_a_slot_each_and_the_third_waits() -> None:
    lent, slots = pool(2)
    waiting = threading.Thread(target=lambda: lent.slot().__enter__())
    with lent.slot() as first:
        with lent.slot() as second:
            assert first is not second
            waiting.start()
            waiting.join(0.05)
            assert waiting.is_alive()
        waiting.join(10)
        assert not waiting.is_alive()
        assert lent.free() == []  # the third has the second's
    assert len(slots) == 2


def test_a_slot_in_which_an_error_happened_is_closed_and_another_made() -> None:
    lent, slots = pool(1)
    with pytest.raises(DeviceError, match="broken"), lent.slot():
        raise DeviceError("broken")
    assert slots[0].is_closed
    assert lent.free() == []
    with lent.slot() as slot:
        assert slot is slots[1]


def test_a_slot_that_cannot_be_made_leaves_its_turn_to_others() -> None:
    lent, slots = pool(1)
    make, lent._make = lent._make, lambda: 1 / 0  # type: ignore[assignment,return-value]
    with pytest.raises(ZeroDivisionError), lent.slot():
        pass
    lent._make = make
    with lent.slot():
        assert len(slots) == 1


def test_a_closed_pool_closes_its_slots_and_lends_nothing() -> None:
    lent, slots = pool(2)
    with lent.slot():
        pass
    lent.close()
    assert slots[0].is_closed
    with pytest.raises(RunnerError, match=r"this runner \(TensorRT 11\) is closed; open another"):
        lent.slot().__enter__()
