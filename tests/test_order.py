"""In which order tests run beside each other."""

from hypothesis import given
from hypothesis import strategies as st

from tests.order import spread

MODULES = st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=20)


def items_of(modules: list[tuple[bool, int]]) -> list[tuple[str, bool, int]]:
    return [(f"m{at:02}", slow, number) for at, (slow, count) in enumerate(modules) for number in range(count)]


def spread_out(items: list[tuple[str, bool, int]], parts: int) -> list[tuple[str, bool, int]]:
    return spread(items, parts, lambda item: item[0], lambda item: item[1])


@given(MODULES, st.integers(1, 6))
def test_no_test_is_lost_or_run_twice_and_those_of_a_module_keep_their_order(
    modules: list[tuple[bool, int]], parts: int
) -> None:
    items = items_of(modules)
    found = spread_out(items, parts)
    assert sorted(found) == sorted(items)
    for name, _, _ in items:
        assert [item for item in found if item[0] == name] == [item for item in items if item[0] == name]


def test_each_part_begins_with_its_slow_modules() -> None:
    found = spread_out(items_of([(True, 1), (True, 2), (True, 1), (False, 4), (False, 4)]), 2)
    assert [name for name, _, _ in found] == ["m00", "m02", *["m03"] * 4, "m01", "m01", *["m04"] * 4]


def test_one_process_runs_all_in_the_order_of_their_names_but_the_slow_ones_first() -> None:
    found = spread_out(items_of([(False, 1), (True, 1), (False, 1)]), 1)
    assert [name for name, _, _ in found] == ["m01", "m00", "m02"]
