"""The rule of every family of generated tasks once more, from its sentence alone and by other means.

Grids are lists of rows here and nothing comes from arc/generate: what both say alike is not one mistake made twice.
Each rule: (rows, colours, palette, variant) -> rows, the last three as arc.generate.family.Fixed has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Rows = list[list[int]]
Cell = tuple[int, int]
Colours = Sequence[int]
Check = Callable[[Rows, Colours, Colours, Any], Rows]

RULES: dict[str, Check] = {}
STEP = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
EIGHT = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


def rule(function: Check) -> Check:
    RULES[function.__name__.rstrip("_")] = function
    return function


def build(height: int, width: int, colour: Callable[[int, int], int]) -> Rows:
    return [[colour(r, c) for c in range(width)] for r in range(height)]


def cells(g: Rows) -> list[Cell]:
    return [(r, c) for r in range(len(g)) for c in range(len(g[0]))]


def at(g: Rows, r: int, c: int) -> int:
    """The colour of a cell, -1 beyond the border."""
    return g[r][c] if 0 <= r < len(g) and 0 <= c < len(g[0]) else -1


def like(g: Rows, colour: Callable[[int, int], int]) -> Rows:
    return build(len(g), len(g[0]), colour)


def cut(g: Rows, wanted: Callable[[int], bool]) -> Rows:
    """The smallest box with all wanted colours, by taking away border lines that have none."""
    while not any(map(wanted, g[0])):
        g = g[1:]
    while not any(map(wanted, g[-1])):
        g = g[:-1]
    while not any(wanted(row[0]) for row in g):
        g = [row[1:] for row in g]
    while not any(wanted(row[-1]) for row in g):
        g = [row[:-1] for row in g]
    return g


def parts(g: Rows) -> list[set[Cell]]:
    """Objects, by merging the sets of neighbouring cells of one colour."""
    label = {cell: number for number, cell in enumerate(cells(g)) if g[cell[0]][cell[1]]}
    changed = True
    while changed:
        changed = False
        for r, c in list(label):
            for other in ((r + 1, c), (r, c + 1), (r - 1, c), (r, c - 1)):
                if at(g, *other) == g[r][c] and label[other] < label[r, c]:
                    label[r, c] = label[other]
                    changed = True
    return [{cell for cell, number in label.items() if number == name} for name in sorted(set(label.values()))]


def columns_of(g: Rows) -> Rows:
    return [list(column) for column in zip(*g, strict=True)]


# --------------------------------------------------------------------------------------------------------------------
# the whole grid


@rule
def recolour(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    new = dict(zip(palette, colours, strict=True))
    return [[new.get(colour, colour) for colour in row] for row in g]


@rule
def swap(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    a, b = palette
    return [[b if colour == a else a if colour == b else colour for colour in row] for row in g]


@rule
def flip(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    h, w = len(g), len(g[0])
    return {
        "left-right": lambda: build(h, w, lambda r, c: g[r][w - 1 - c]),
        "up-down": lambda: build(h, w, lambda r, c: g[h - 1 - r][c]),
        "diagonal": lambda: build(w, h, lambda r, c: g[c][r]),
        "other diagonal": lambda: build(w, h, lambda r, c: g[h - 1 - c][w - 1 - r]),
    }[variant]()


@rule
def rotate(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    for _ in range(variant):  # a quarter turn counter-clockwise: the last column becomes the first row
        g = columns_of(g)[::-1]
    return g


@rule
def shift(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    (down, right), distance = STEP[variant[0]], variant[1]
    return like(g, lambda r, c: max(0, at(g, r - down * distance, c - right * distance)))


@rule
def roll(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    down, right = STEP[variant]
    return like(g, lambda r, c: g[(r - down) % len(g)][(c - right) % len(g[0])])


@rule
def gravity(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    g = [row[:] for row in g]
    down, right = STEP[variant]
    moved = True
    while moved:  # one step at a time, until nothing can fall any further
        moved = False
        for r, c in cells(g):
            if g[r][c] and at(g, r + down, c + right) == 0:
                g[r + down][c + right], g[r][c] = g[r][c], 0
                moved = True
    return g


@rule
def crop(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    return cut(g, lambda colour: colour > 0)


@rule
def crop_colour(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    return cut(g, lambda colour: colour == colours[0])


@rule
def inside(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    return [row[1:-1] for row in cut(g, lambda colour: colour == colours[0])[1:-1]]


@rule
def enlarge(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    return build(2 * len(g), 2 * len(g[0]), lambda r, c: g[r // 2][c // 2])


@rule
def stretch(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    if variant == "across":
        return [[colour for colour in row for _ in "ab"] for row in g]
    return [row for row in g for _ in "ab"]


@rule
def shrink(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    for r, c in cells(g):
        assert g[r][c] == g[r - r % 2][c - c % 2]
    return build(len(g) // 2, len(g[0]) // 2, lambda r, c: g[2 * r + 1][2 * c + 1])


@rule
def tile(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    down, across = variant
    return [row * across for row in g] * down


@rule
def mirror_tile(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    across = [row[::-1] for row in g]
    return {
        "right": lambda: [a + b for a, b in zip(g, across, strict=True)],
        "left": lambda: [b + a for a, b in zip(g, across, strict=True)],
        "down": lambda: g + g[::-1],
        "up": lambda: g[::-1] + g,
    }[variant]()


@rule
def fractal(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    h, w = len(g), len(g[0])
    return build(h * h, w * w, lambda r, c: g[r % h][c % w] if g[r // h][c // w] else 0)


@rule
def half(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    h, w = len(g) // 2, len(g[0]) // 2
    return {
        "right": lambda: [row[w:] for row in g],
        "left": lambda: [row[:w] for row in g],
        "down": lambda: g[h:],
        "up": lambda: g[:h],
    }[variant]()


@rule
def pad(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    line = [colours[0]] * (len(g[0]) + 2)
    return [line, *([colours[0], *row, colours[0]] for row in g), line]


@rule
def commonest(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    (first, n), (_, m) = Counter(colour for row in g for colour in row).most_common(2)
    assert n > m
    return like(g, lambda r, c: first)


@rule
def rarest(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    counts = sorted((sum(row.count(colour) for row in g), colour) for colour in palette)
    assert 0 < counts[0][0] < counts[1][0]
    return [[counts[0][1]]]


@rule
def row_majority(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    if variant == "down":
        return columns_of(row_majority(columns_of(g), colours, palette, "across"))
    # What more than half of a sorted row has is in its middle.
    for row in g:
        assert 2 * row.count(sorted(row)[len(row) // 2]) > len(row)
    return [[sorted(row)[len(row) // 2]] * len(row) for row in g]


@rule
def stripes(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    axis, first = variant
    hit = (lambda r, c: c % 2 == first) if axis == "across" else (lambda r, c: r % 2 == first)
    return like(g, lambda r, c: colours[1] if g[r][c] and hit(r, c) else g[r][c])


@rule
def mirror(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    if variant == "down":
        return columns_of(mirror(columns_of(g), colours, palette, "across"))
    w = len(g[0]) // 2
    if any(colour for row in g for colour in row[:w]):
        return [row[:w] + row[:w][::-1] for row in g]
    return [row[w:][::-1] + row[w:] for row in g]


@rule
def repair(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    h, w = len(g), len(g[0])

    def mended(r: int, c: int) -> int:
        seen = {g[y][x] for y in (r, h - 1 - r) for x in (c, w - 1 - c)} - {colours[0]}
        assert len(seen) == 1  # neither covered four times nor contradictory
        return seen.pop()

    return like(g, mended)


@rule
def continue_(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    if variant == "down":
        return columns_of(continue_(columns_of(g), colours, palette, "across"))
    lines = columns_of(g)
    shown = [line for line in lines if any(line)]
    for period in (1, 2, 3):
        motif = shown[:period]
        if (motif * len(shown))[: len(shown)] == shown:
            assert 2 * period <= len(shown)
            return columns_of((motif * len(lines))[: len(lines)])
    raise AssertionError("no period")


# --------------------------------------------------------------------------------------------------------------------
# cells and lines


@rule
def fill(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    wall, colour = colours
    free = {(r, c) for r, c in cells(g) if g[r][c] == 0}
    waiting = [(r, c) for r, c in free if r in (0, len(g) - 1) or c in (0, len(g[0]) - 1)]
    while waiting:  # passing diagonally too: closed is closed for everyone
        cell = waiting.pop()
        if cell in free:
            free.remove(cell)
            waiting += [(cell[0] + r, cell[1] + c) for r, c in EIGHT]
    return like(g, lambda r, c: colour if (r, c) in free else g[r][c])


@rule
def outline(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    dot, colour = colours
    allowed = {"around": (1, 2), "beside": (1,), "diagonally": (2,)}[variant]
    near = [step for step in EIGHT if abs(step[0]) + abs(step[1]) in allowed]
    return like(g, lambda r, c: g[r][c] or (colour if any(at(g, r + y, c + x) == dot for y, x in near) else 0))


def walk(g: Rows, start: Cell, step: Cell, stop: Callable[[int], bool]) -> list[Cell]:
    """The cells from `start` (left out) in one direction, to the border or before a colour that stops."""
    found = []
    r, c = start[0] + step[0], start[1] + step[1]
    while at(g, r, c) >= 0 and not stop(at(g, r, c)):
        found.append((r, c))
        r, c = r + step[0], c + step[1]
    return found


@rule
def line(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    out = [row[:] for row in g]
    for r, c in cells(g):
        for y, x in walk(g, (r, c), STEP[variant], bool) if g[r][c] else ():
            out[y][x] = g[r][c]
    return out


@rule
def ray(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    dot, obstacle = colours
    out = [row[:] for row in g]
    for r, c in cells(g):
        for y, x in walk(g, (r, c), STEP[variant], lambda seen: seen == obstacle) if g[r][c] == dot else ():
            out[y][x] = dot
    return out


@rule
def connect(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    dot, colour = colours

    def sees(r: int, c: int, step: Cell) -> bool:
        return any(g[y][x] == dot for y, x in walk(g, (r, c), step, lambda seen: False))

    def between(r: int, c: int) -> bool:
        return any(sees(r, c, (y, x)) and sees(r, c, (-y, -x)) for y, x in ((0, 1), (1, 0)))

    return like(g, lambda r, c: g[r][c] or (colour if between(r, c) else 0))


@rule
def cross(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    out = [row[:] for row in g]
    for r, c in cells(g):
        for step in EIGHT if g[r][c] else ():
            if abs(step[0]) + abs(step[1]) == 1 and variant in ("row" if step[0] == 0 else "column", "both"):
                for y, x in walk(g, (r, c), step, lambda seen: False):
                    out[y][x] = g[y][x] or colours[1]
    return out


@rule
def diagonal(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    out = [row[:] for row in g]
    for r, c in cells(g):
        for step in EIGHT if g[r][c] else ():
            if step[0] * step[1] and variant in ("falling" if step[0] == step[1] else "rising", "both"):
                for y, x in walk(g, (r, c), step, lambda seen: False):
                    out[y][x] = g[y][x] or colours[1]
    return out


@rule
def hollow(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    out = [row[:] for row in g]
    for part in parts(g):
        rows, columns = {r for r, _ in part}, {c for _, c in part}
        assert len(part) == len(rows) * len(columns) and min(len(rows), len(columns)) >= 3
        for r in range(min(rows) + 1, max(rows)):
            for c in range(min(columns) + 1, max(columns)):
                out[r][c] = colours[1]
    return out


@rule
def corners(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    out = [row[:] for row in g]
    for part in parts(g):
        for r in (min(part)[0], max(part)[0]):
            for c in (min(part)[1], max(part)[1]):
                out[r][c] = colours[1]
    return out


@rule
def crossing(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    assert g[0][0] == 0
    return like(g, lambda r, c: colours[2] if r and c and g[0][c] == colours[0] and g[r][0] == colours[1] else g[r][c])


# --------------------------------------------------------------------------------------------------------------------
# objects, numbers, panels


def painted(g: Rows, chosen: Sequence[set[Cell]], colour: int) -> Rows:
    return like(g, lambda r, c: colour if any((r, c) in part for part in chosen) else g[r][c])


@rule
def extreme_size(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    ordered = sorted(parts(g), key=len, reverse=variant == "largest")
    assert len(ordered[0]) != len(ordered[1])
    return painted(g, ordered[:1], colours[1])


@rule
def denoise(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    lone = [(r, c) for r, c in cells(g) if g[r][c] and not any(at(g, r + y, c + x) > 0 for y, x in EIGHT)]
    return painted(g, [set(lone)], 0)


@rule
def by_size(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    found = parts(g)
    assert {len(part) for part in found} == {1, 2, 3}
    for size in (1, 2, 3):
        g = painted(g, [part for part in found if len(part) == size], colours[size])
    return g


@rule
def touching(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    def at_border(part: set[Cell]) -> bool:
        return any(at(g, r + y, c + x) == -1 for r, c in part for y, x in EIGHT)

    return painted(g, [part for part in parts(g) if at_border(part) == (variant == "touching")], colours[1])


@rule
def count(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    row = [colour for line in g for colour in line if colour == colours[0]]
    return [row] if variant == "row" else [[colour] for colour in row]


@rule
def sort_bars(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    return columns_of(sorted(columns_of(g), key=sum, reverse=variant == "falling"))


@rule
def extreme_bar(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    bars = columns_of(g)
    wanted = (max if variant == "tallest" else min)(sum(bar) for bar in bars)
    assert sum(sum(bar) == wanted for bar in bars) == 1
    return columns_of([[colours[1] * (colour > 0) if sum(bar) == wanted else colour for colour in bar] for bar in bars])


@rule
def key(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    vertical, horizontal = variant.split()
    corner = g[0 if vertical == "top" else len(g) - 1][0 if horizontal == "left" else len(g[0]) - 1]
    assert corner not in (0, colours[0])
    return [[corner if colour == colours[0] else colour for colour in row] for row in g]


@rule
def logic(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    operation, axis = variant
    if axis == "down":
        return columns_of(logic(columns_of(g), colours, palette, (operation, "across")))
    a, b, bar, result = colours
    (middle,) = {row.index(bar) for row in g}
    drawn = {
        "and": {(a, b)},
        "or": {(a, b), (a, 0), (0, b)},
        "xor": {(a, 0), (0, b)},
        "neither": {(0, 0)},
        "only the first": {(a, 0)},
    }[operation]
    return build(len(g), middle, lambda r, c: result if (g[r][c], g[r][middle + 1 + c]) in drawn else 0)


@rule
def overlay(g: Rows, colours: Colours, palette: Colours, variant: Any) -> Rows:
    (middle,) = {row.index(colours[2]) for row in g}
    lower, upper = [row[:middle] for row in g], [row[middle + 1 :] for row in g]
    if variant == "first above":
        lower, upper = upper, lower
    return like(lower, lambda r, c: upper[r][c] or lower[r][c])
