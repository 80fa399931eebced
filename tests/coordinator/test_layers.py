"""Layer splits: the least maximum under caps, against every split there is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmnode.coordinator.solver.training.layers import min_max_split


@given(
    st.integers(2, 9),
    st.lists(
        st.tuples(st.floats(0.1, 5), st.floats(0, 5), st.integers(0, 5)), min_size=1, max_size=4
    ),
)
def test_a_layer_split_is_the_least_maximum_there_is(
    num_layers: int, rows: list[tuple[float, float, int]]
) -> None:
    layer_s, fixed_s, caps = zip(*rows, strict=True)

    def slowest(split: tuple[int, ...]) -> float:
        return max(f + n * t for n, t, f in zip(split, layer_s, fixed_s, strict=True))

    every = [
        split
        for split in itertools.product(*(range(1, cap + 1) for cap in caps))
        if sum(split) == num_layers
    ]
    found = min_max_split(num_layers, layer_s, fixed_s, caps)
    if not every:
        assert found is None
    else:
        assert found in every
        assert slowest(found) == pytest.approx(min(map(slowest, every)))


def test_a_fast_stage_takes_more_layers_up_to_its_cap() -> None:
    assert min_max_split(12, [1.0, 1.0, 2.0], [0.0, 0.0, 0.0], [12, 12, 12]) == (5, 5, 2)
    assert min_max_split(12, [1.0, 1.0, 2.0], [0.0, 0.0, 0.0], [12, 3, 12]) == (6, 3, 3)
    assert min_max_split(12, [1.0, 1.0, 2.0], [0.0, 4.0, 0.0], [12, 12, 12]) == (7, 3, 2)


def test_too_little_room_or_too_few_layers_have_no_split() -> None:
    assert min_max_split(7, [1.0, 1.0], [0.0, 0.0], [3, 3]) is None
    assert min_max_split(6, [1.0, 1.0], [0.0, 0.0], [6, 0]) is None
    assert min_max_split(1, [1.0, 1.0], [0.0, 0.0], [3, 3]) is None
