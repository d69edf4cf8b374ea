"""How long to wait before another attempt, and when to give up."""

import pytest

from trident_client import BadRequest, Overloaded, RetryPolicy


def test_waits_double_with_half_of_them_random_up_to_the_largest():
    policy = RetryPolicy(retries=10, first_delay=1.0, max_delay=4.0)
    error = Overloaded("full")
    for attempt, longest in enumerate([1.0, 2.0, 4.0, 4.0]):
        waits = {policy.delay(attempt, error) for _ in range(50)}
        assert len(waits) > 1
        assert all(longest / 2 <= wait <= longest for wait in waits)


def test_the_servers_wish_counts_when_it_is_longer():
    policy = RetryPolicy(first_delay=0.5, max_delay=10.0)
    assert policy.delay(0, Overloaded("the queue is full; retry after 2.5 s")) == 2.5
    assert policy.delay(0, Overloaded("retry after 0 s")) >= 0.25


def test_a_wish_beyond_the_longest_wait_ends_it():
    error = Overloaded("retry after 60 s")
    with pytest.raises(Overloaded) as caught:
        RetryPolicy(max_delay=30.0).delay(0, error)
    assert caught.value is error


def test_attempts_are_bounded():
    policy = RetryPolicy(retries=2)
    policy.delay(1, Overloaded("full"))
    with pytest.raises(Overloaded):
        policy.delay(2, Overloaded("full"))


@pytest.mark.parametrize("settings", [{"retries": -1}, {"first_delay": -1.0}, {"first_delay": 5.0, "max_delay": 1.0}])
def test_settings_are_checked(settings):
    with pytest.raises(BadRequest, match=next(iter(settings))):
        RetryPolicy(**settings)
