"""Whole-grid changes: each on a grid small enough to be checked by eye, and all of them on any grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc.evidence.changes import CHANGES, SAME_SHAPE
from arc.evidence.drawing import DRAWINGS
from arc.evidence.programs import colour_map
from arc.evidence.scene import Scene
from arc.tasks import Grid


def grid(text: str) -> Grid:
    """Rows separated by blanks; a dot is colour 0."""
    return np.array([[int(cell) for cell in row.replace(".", "0")] for row in text.split()], np.uint8)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(2, 10),
    st.sampled_from([0, 0.6, 0.9]),
)
def test_a_change_gives_a_grid_or_nothing_and_leaves_its_input(
    seed: int, height: int, width: int, colours: int, empty: float
) -> None:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, colours, (height, width)).astype(np.uint8)
    start[rng.random(start.shape) < empty] = 0
    scene = Scene(start.copy())
    for name, change in CHANGES.items():
        result = change.apply(scene)
        assert np.array_equal(scene.grid, start), name
        if result is None:
            continue
        assert result.dtype == np.uint8 and result.ndim == 2 and result.max(initial=0) <= 9, name
        assert name not in SAME_SHAPE or result.shape == start.shape, name
        assert change.may(start.shape, result.shape), name
        assert change.adds_colours or np.isin(result, start).all(), name
        if change.keeps is not None:  # what the search for programs judges it by, before it is run
            kept = change.keeps(scene)
            assert result.shape == start.shape and colour_map(start[kept], result[kept]) is not None, name


EXAMPLES = [
    ("rays_rare_cross", "..... ..2.. ..... 1.1.. .....", "..2.. 22222 ..2.. 1.1.. ....."),
    ("rays_dots_diagonals", "1.... ..... ...3. .333. .....", "1.... .1... ..13. .333. ....."),
    ("lines_rare", "1.2 ... 1..", "122 ..2 1.2"),
    ("grown_rare", "1.... ...2. 1....", "1.222 ..222 1.222"),
    ("linked_to_top", "1..2 1... 1...", "1222 1... 1..."),
    ("symmetric_lines", "1.5.. ..5.. 55555 ..5.. ..5..", "1.5.1 ..5.. 55555 ..5.. 1.5.1"),
    ("symmetric_rare", "1.... ..2.. 1....", "1...1 ..2.. 1...1"),
    ("moved_to_top", "111.. ..... ..... ..2..", "111.. ..2.. ..... ....."),
    ("rare_falls_down", ".2... ..... 111.. .....", "..... .2... 111.. ....."),
    ("rare_falls_right", ".2... 11... .....", "....2 11... ....."),
    ("dots_to_own_colour", "1...1 1.... 1....", "11... 1.... 1...."),
    ("colour_boxes", "1..1 .... 1...", "1111 1111 1111"),
    ("hollowed", "..... .111. .111. .111. .....", "..... .111. .1.1. .111. ....."),
    ("absorbed_1", "1111 1211 1111 ....", "1111 1111 1111 ...."),
    ("ringed", "..... ..... ..3.. ..... .....", "..... .333. .333. .333. ....."),
    ("continued", "12.12.... ......... .........", "12.12.12. ......... ........."),
    ("panel_fullest_filled", "1.5.. ..511 55555 ..5.. ..5..", "..511 ..511 55555 ..5.. ..5.."),
    ("rolled_right", "12. ...", ".12 ..."),
    ("erased_-1", "..... .111. .121. .111.", "..... .111. .111. .111."),
    ("flooded_0", "11111 1.2.1 11111 .....", "11111 12221 11111 ....."),
    ("elbow_rows_first", "1... .... ...2", "1999 ...9 ...2"),
    ("stamped_on_twins", ".12.. .12.. ..... .33.. .33..", ".12.. .12.. ..... .12.. .12.."),
    ("stamped_at_markers", "12..... 13..... ....... ....2..", "12..... 13..... ....... ...12.. "),
]


@pytest.mark.parametrize(("name", "before", "after"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_what_a_drawing_does(name: str, before: str, after: str) -> None:
    result = DRAWINGS[name](Scene(grid(before)))
    assert result is not None
    np.testing.assert_array_equal(result, grid(after))
