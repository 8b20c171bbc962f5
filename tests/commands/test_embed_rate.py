"""Rate and time left are those of the last minute."""

from msn_export.commands.embed import Rate


def test_time_left_follows_the_rate_of_the_last_minute() -> None:
    now = [0.0]
    rate = Rate(10_000, 1_000, clock=lambda: now[0])
    now[0] = 10.0
    assert rate.at(1_200) == "1200 of 10000, 20.0/s, 0:07:20 left"
    for second in range(20, 200, 10):
        now[0] = float(second)
        told = rate.at(1_200 + (second - 10) * 20)
    assert told == "4800 of 10000, 20.0/s, 0:04:20 left"


def test_a_run_that_stands_still_promises_nothing() -> None:
    now = [0.0]
    rate = Rate(100, 0, clock=lambda: now[0])
    now[0] = 5.0
    assert rate.at(0) == "0 of 100, 0.0/s, time left unknown"
