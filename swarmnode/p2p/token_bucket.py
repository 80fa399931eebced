"""A rate that may be used a little ahead of time, and never for long: a pure token bucket."""

import math


class TokenBucket:
    """Lets bytes go at a rate; who takes more than there is waits, in the order of taking.

    Bound: in any w seconds at most bytes_per_s * w + burst_bytes go.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._full_s = -math.inf
        """When it is full again, if nobody takes more."""

    def take(self, num_bytes: int, now_s: float) -> float:
        """Take at most `burst_bytes`; the seconds to wait before they may go."""
        assert 0 <= num_bytes <= self._burst_bytes
        self._full_s = max(self._full_s, now_s) + num_bytes / self._bytes_per_s
        return max(0.0, self._full_s - self._burst_bytes / self._bytes_per_s - now_s)
