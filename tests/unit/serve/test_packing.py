"""Packing rules and the service estimate: limits, holding, padding, and what least squares can know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corun.errors import InputError
from corun.serve.estimate import KnownCost, LearnedCost
from corun.serve.packing import RULES, Builder, Item, Limits, make_rule, rest_cost, waste

LENGTHS = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=20), min_size=1, max_size=8)


def items_of(lengths: list[list[int]]) -> list[list[Item]]:
    """Requests with items of these lengths."""
    return [[Item(request, index, length) for index, length in enumerate(own)] for request, own in enumerate(lengths)]


def packed(name: str, order: list[list[Item]], limits: Limits, now_ns: int = 0, room: int | None = None) -> Builder:
    """What a rule puts into one package."""
    package = Builder(limits, room)
    make_rule(name)(order, package, now_ns)
    return package


@given(
    lengths=LENGTHS,
    rule=st.sampled_from(sorted(RULES)),
    max_items=st.integers(1, 16),
    tokens=st.integers(60, 600),
    room=st.none() | st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_a_package_never_exceeds_its_limits(
    lengths: list[list[int]], rule: str, max_items: int, tokens: int, room: int | None
) -> None:
    """Any rule: at most max_items (or the room there is) and max_padded_tokens, no item twice, never empty."""
    package = packed(rule, items_of(lengths), Limits(max_items, tokens), room=room)
    assert 1 <= len(package.items) <= min(max_items, room or max_items)
    assert len(package.items) * package.longest <= tokens
    assert package.longest == max(item.length for item in package.items)
    assert len({id(item) for item in package.items}) == len(package.items)


def test_off_takes_one_request_and_count_fills_in_service_order() -> None:
    """off stays within the first request; count goes on with the next until the package is full."""
    order = items_of([[5, 9], [40], [3, 3]])
    assert [(item.owner, item.index) for item in packed("off", order, Limits(4)).items] == [(0, 0), (0, 1)]
    assert [item.owner for item in packed("count", order, Limits(4)).items] == [0, 0, 1, 2]


def test_cost_adds_only_what_adds_little_padding() -> None:
    """Beside the anchor an item is taken exactly when the padding it adds is at most theta of its own length."""
    order = items_of([[20, 18], [20, 16, 15], [21, 30]])
    package = packed("cost", order, Limits(64, 4096, theta=0.25))
    assert [item.length for item in package.items] == [20, 18, 20, 16, 21]
    assert {item.length: item.held_ns for item in order[1] + order[2]} == {20: None, 16: None, 15: 0, 30: 0, 21: None}


def test_an_overdue_item_leads_whatever_the_service_order_says() -> None:
    """Held for hold_ns and passed over often enough, the longest held item leads, with those that resemble it."""
    order = items_of([[50], [5, 6, 30]])
    limits = Limits(2, 4096, hold_ns=100, passes=2)

    def lengths(now_ns: int) -> list[int]:
        return [item.length for item in packed("cost", order, limits, now_ns).items]

    assert lengths(10) == [50]
    assert lengths(50) == [50]
    assert lengths(60) == [50]
    order[1][1].held_ns = 5
    assert lengths(111) == [6, 5]
    assert order[0][0].passed == 1
    order[1][0].passed = order[1][1].passed = order[1][2].passed = 1
    assert lengths(1000) == [50]


def test_cost_wastes_less_than_count_on_mixed_lengths() -> None:
    """On requests of mixed length, cost-packing pads less than a third as much as count-packing, however long packages take."""
    random = np.random.default_rng(3)
    lengths = [[int(n) for n in random.integers(3, 56, 8)] for _ in range(64)]

    def total_waste(name: str, package_ns: int = 10_000_000) -> float:
        order = items_of(lengths)
        padded = real = now = 0
        while order:
            package = packed(name, order, Limits(64, 4096), now)
            now += package_ns
            padded += len(package.items) * package.longest
            real += sum(item.length for item in package.items)
            taken = {id(item) for item in package.items}
            order = [left for items in order if (left := [item for item in items if id(item) not in taken])]
        assert real == sum(map(sum, lengths))
        return 1 - real / padded

    for package_ns in (1_000_000, 4_000_000_000):
        assert total_waste("cost", package_ns) < total_waste("count") / 3


def test_bad_limits_and_names_are_explained() -> None:
    """Impossible limits are listed together; an unknown rule gets a suggestion."""
    with pytest.raises(InputError) as error:
        Limits(0, 0, -1, -1)
    assert len(error.value.problems) == 4
    with pytest.raises(InputError, match='did you mean "count"'):
        make_rule("counts")


def test_waste_and_the_cost_of_the_rest() -> None:
    """Waste is padding over all tokens; the rest of a request is cut into packages, each padded to its longest."""
    assert waste([10, 5]) == pytest.approx(0.25)
    assert waste([]) == 0
    assert rest_cost([4, 2, 9], 2) == (2, 8 + 9)
    assert rest_cost([], 2) == (0, 0)


@given(start=st.floats(0.001, 0.5), token=st.floats(1e-5, 1e-2), sizes=st.lists(st.integers(1, 4096), min_size=3))
@settings(max_examples=60, deadline=None)
def test_the_estimate_learns_a_line(start: float, token: float, sizes: list[int]) -> None:
    """On exact times of two sizes or more the estimate predicts any package; always a positive time."""
    estimate = LearnedCost(forget=1.0)
    for size in [64, 4096, *sizes]:
        estimate.observe(size, start + token * size)
    assert estimate.seconds(1, 1000) == pytest.approx(start + 1000 * token, rel=1e-3)
    assert estimate.seconds(0, 0) > 0


def test_the_estimate_forgets_and_keeps_its_floor() -> None:
    """A change of speed is learned; a falling line or times of zero still give a positive, growing estimate."""
    estimate = LearnedCost(forget=0.5)
    for _ in range(30):
        estimate.observe(100, 1.0)
    for size in [100, 200] * 20:
        estimate.observe(size, size * 0.001)
    assert estimate.seconds(1, 100) == pytest.approx(0.1, rel=0.01)
    falling = LearnedCost()
    for size, seconds in [(100, 2.0), (200, 1.0), (300, 0.0), (0, 5.0)]:
        falling.observe(size, seconds)
    assert 0 < falling.seconds(1, 100) < falling.seconds(1, 200)
    with pytest.raises(ValueError, match="forget"):
        LearnedCost(forget=0)


def test_a_known_cost_does_not_learn() -> None:
    """a per package and b per token, whatever is observed."""
    cost = KnownCost(0.2, 0.01)
    cost.observe(1, 99.0)
    assert cost.seconds(2, 10) == pytest.approx(0.5)
