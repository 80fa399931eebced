"""A rate that is kept over every window, and used where there is something to send."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from swarmnode.p2p.token_bucket import TokenBucket

RATES = st.floats(10.0, 1e9)
PATIENCES = st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.0, 1.0)), min_size=1, max_size=40)


def released(rate: float, burst: int, asked: list[tuple[float, float]]) -> list[tuple[float, int]]:
    """When each went, and how many bytes it had; asked for after gaps, in shares of the burst."""
    bucket, now_s, gone = TokenBucket(rate, burst), 0.0, []
    for gap_s, share in asked:
        now_s += gap_s * burst / rate
        num_bytes = int(share * burst)
        gone.append((now_s + bucket.take(num_bytes, now_s), num_bytes))
    return gone


@given(RATES, st.integers(1, 1 << 20), PATIENCES)
def test_in_any_window_go_at_most_its_share_and_one_burst(
    rate: float, burst: int, asked: list[tuple[float, float]]
) -> None:
    gone = released(rate, burst, asked)
    for first, last in itertools.combinations_with_replacement(range(len(gone)), 2):
        window_s = gone[last][0] - gone[first][0]
        num_bytes = sum(count for _, count in gone[first : last + 1])
        assert num_bytes <= (rate * window_s + burst) * (1 + 1e-6) + 1e-3


@given(RATES, st.integers(1, 1 << 20), PATIENCES)
def test_nobody_waits_longer_than_what_was_taken_before_takes(
    rate: float, burst: int, asked: list[tuple[float, float]]
) -> None:
    gone = released(rate, burst, [(0.0, share) for _, share in asked])
    for last in range(len(gone)):
        before = sum(count for _, count in gone[: last + 1])
        assert gone[last][0] <= max(0.0, before - burst) / rate * (1 + 1e-6) + 1e-9
