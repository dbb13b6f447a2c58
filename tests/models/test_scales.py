import pytest

from hmar_cli.models.scales import Scales, check_schedule, split_passes


def test_lengths_of_the_published_lists() -> None:
    assert Scales.of([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]).total == 680
    assert Scales.of([1, 2, 3, 4, 6, 9, 13, 18, 24, 32]).total == 2240
    assert Scales.of([1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]).total == 9451


def test_rectangles() -> None:
    scales = Scales.of([1, [1, 2], [2, 3]])
    assert scales.lengths == (1, 2, 6)
    assert scales.offsets == (0, 1, 3)
    assert scales.slice(2) == slice(3, 9)
    assert scales.grid == (2, 3)
    assert scales.sides() == [1, [1, 2], [2, 3]]


@pytest.mark.parametrize("sides", [[], [0, 1], [2, 1], [1, 1], [[2, 2], [1, 3]]])
def test_lists_that_do_not_grow(sides: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Scales.of(sides)


def test_schedules() -> None:
    scales = Scales.of([1, 2, 3])
    assert check_schedule([[1], [1, 3], [2, 3, 4]], scales) == ((1,), (1, 3), (2, 3, 4))
    for wrong in ([[1], [4]], [[1], [1, 2], [9]], [[1], [0, 4], [9]], [[1], [], [9]]):
        with pytest.raises(ValueError, match="expected"):
            check_schedule(wrong, scales)
    larger = Scales.of([2, 4])
    assert check_schedule([[4], [8, 8]], larger) == ((4,), (8, 8))
    with pytest.raises(ValueError, match="scale 1: expected one pass"):  # nothing comes before it
        check_schedule([[1, 3], [8, 8]], larger)


@pytest.mark.parametrize(("length", "passes"), [(1, 1), (4, 2), (9, 3), (16, 16), (256, 8), (5, 4)])
def test_split_passes(length: int, passes: int) -> None:
    shares = split_passes(length, passes)
    assert len(shares) == passes and sum(shares) == length and min(shares) >= 1


def test_split_passes_grows_and_refuses_too_many() -> None:
    assert split_passes(256, 4) == tuple(sorted(split_passes(256, 4)))
    with pytest.raises(ValueError, match="1 to 4"):
        split_passes(4, 5)


def test_another_grid_has_its_scales_in_proportion() -> None:
    scales = Scales.of([1, 2, 3, 4, 6])
    assert scales.for_grid((6, 6)) == scales
    assert scales.for_grid((12, 18)).sides() == [[2, 3], [4, 6], [6, 9], [8, 12], [12, 18]]
    assert scales.for_grid((9, 6)).sides() == [
        [2, 1],
        [3, 2],
        [5, 3],
        [6, 4],
        [9, 6],
    ]  # halves are rounded up
    assert Scales.of([[1, 2], [2, 4]]).for_grid((4, 4)).sides() == [2, 4]


@pytest.mark.parametrize("grid", [(0, 6), (6, 0), (3, 3), (2, 1)])
def test_a_grid_on_which_scales_would_be_alike(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Scales.of([1, 2, 3, 4, 6]).for_grid(grid)
