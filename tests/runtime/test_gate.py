"""The rate limit by a clock of our own, and what it tells a client."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4_ascend.runtime.api.gate import RateLimit


def test_a_full_bucket_then_one_at_a_time():
    limit = RateLimit(60)
    assert [limit.take("a", 0.0) for _ in range(60)] == [0.0] * 60
    assert limit.take("a", 0.0) == pytest.approx(1.0)
    assert limit.take("a", 0.4) == pytest.approx(0.6)
    assert limit.take("b", 0.4) == 0.0
    assert limit.take("a", 1.0) == 0.0
    assert limit.take("a", 1.0) > 0


@given(
    per_minute=st.integers(1, 100),
    pauses=st.lists(st.floats(0, 90, allow_nan=False), min_size=1, max_size=150),
)
def test_no_minute_has_more_than_a_bucket_and_its_refill(per_minute, pauses):
    limit, now, served = RateLimit(per_minute), 0.0, []
    for pause in pauses:
        now += pause
        wait = limit.take("a", now)
        if not wait:
            served.append(now)
        else:
            # The wait that is told is enough.
            now += wait + 1e-6
            assert limit.take("a", now) == 0.0
            served.append(now)
    for start in served:
        assert sum(start <= t < start + 60 for t in served) <= 2 * per_minute
