"""Network coordinates: a round trip predicted for two nodes that never measured each other.

Source: Vivaldi with height vectors (Dabek, Cox, Kaashoek and Morris, SIGCOMM 2004): nodes are
springs in space, and the height is what a node's own line adds to every path. Pure.
"""

import hashlib
import math

from swarmnode.domain import Coordinate, PeerId

ERROR_GAIN = 0.25
MOVE_GAIN = 0.35
"""The paper takes 0.25 for both; a node with few probes settles sooner with a longer stride."""
MAX_S = 10.0
"""No coordinate is further out, and no round trip is longer, than this."""
MIN_HEIGHT_S = 1e-5
MIN_ERROR = 0.01
"""Who claims to be surer than this is believed no more."""
_START_S = 1e-3
_NOISE_S = 2e-3
"""A coordinate that has moved less than this, or than a twentieth, has not moved."""


def start(peer: PeerId) -> Coordinate:
    """Where a node is before it has measured anybody: near the origin, no two at one spot."""
    digest = hashlib.sha256(peer.encode()).digest()
    x_s, y_s, z_s = (_START_S * (byte - 127.5) / 127.5 for byte in digest[:3])
    return Coordinate(x_s, y_s, z_s, _START_S, 1.0)


def is_sound(coordinate: Coordinate) -> bool:
    """Whether an honest node can have this coordinate."""
    space = coordinate[:3]
    return (
        all(math.isfinite(value) for value in coordinate)
        and all(abs(value) <= MAX_S for value in space)
        and 0.0 <= coordinate.height_s <= MAX_S
        and 0.0 <= coordinate.error <= 1.0
    )


def update(mine: Coordinate, theirs: Coordinate, rtt_s: float) -> Coordinate:
    """Where we are, after a round trip of `rtt_s` to a node that says it is at `theirs`.

    Bound:  one call moves us by at most MOVE_GAIN of the difference between `rtt_s` and the
            distance. What no honest node can say changes nothing.
    """
    if not (is_sound(theirs) and 0.0 < rtt_s <= MAX_S):
        return mine
    distance_s = max(_distance_s(mine, theirs), 1e-9)
    my_error, their_error = max(mine.error, MIN_ERROR), max(theirs.error, MIN_ERROR)
    share = my_error / (my_error + their_error)
    miss = min(1.0, abs(distance_s - rtt_s) / rtt_s)
    gain = ERROR_GAIN * share
    push = MOVE_GAIN * share * (rtt_s - distance_s) / distance_s
    space = (a + push * (a - b) for a, b in zip(mine[:3], theirs[:3], strict=True))
    x_s, y_s, z_s = (min(MAX_S, max(-MAX_S, value)) for value in space)
    height_s = mine.height_s + push * (mine.height_s + theirs.height_s)
    return Coordinate(
        x_s,
        y_s,
        z_s,
        min(MAX_S, max(MIN_HEIGHT_S, height_s)),
        min(1.0, miss * gain + my_error * (1.0 - gain)),
    )


def round_trip_s(here: Coordinate, there: Coordinate) -> float | None:
    """The predicted round trip; None if one of the two knows nothing of where it is."""
    if here.error >= 1.0 or there.error >= 1.0:
        return None
    return _distance_s(here, there)


def has_moved(before: Coordinate, now: Coordinate) -> bool:
    """Whether the swarm should be told: by less than the noise of a measurement, it need not."""
    moved_s = math.dist(before[:3], now[:3]) + abs(before.height_s - now.height_s)
    size_s = math.hypot(*before[:3]) + before.height_s
    return moved_s > max(_NOISE_S, 0.05 * size_s) or abs(before.error - now.error) > 0.1


def _distance_s(here: Coordinate, there: Coordinate) -> float:
    return math.dist(here[:3], there[:3]) + here.height_s + there.height_s
