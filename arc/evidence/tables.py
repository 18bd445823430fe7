"""The declared evidence tables: which features of an output cell make up its context, one table a line.

To add a table, add a line; to add a feature, add a plane (`planes.py`) or an anchor (`cells.py`) under a name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A map from a context, the hash of `features` (see `OutputCells.feature`), to a colour or a source."""

    name: str
    kind: str  # "colour" | "source" | "program"
    features: tuple[str, ...]
    meaning: str


def _tables(kind: str, declared: str) -> list[Table]:
    """One table a line: `feature feature ... : meaning`. The name is made of kind and features."""
    tables = []
    for line in declared.strip().splitlines():
        features, _, meaning = (part.strip() for part in line.partition(" : "))
        name = f"{kind}:{'+'.join(features.split())}"
        tables.append(Table(name, kind, tuple(features.split()), meaning))
    return tables


COLOUR_TABLES = """
colour : the cell's colour
colour n4 : colour and the four neighbours in order
n8 colour : the 3x3 window
colour sides : colour, left and right neighbour
colour ends : colour, upper and lower neighbour
colour x4 : colour and the four diagonal neighbours
colour cross : colour and the cells two steps away
colour edge_bag : colour and its four neighbours in any order
colour ring_bag : colour and its eight neighbours in any order
colour edge_bag corner_bag : the 3x3 window in any orientation, nearly
colour n8_any : the 3x3 window in any orientation
colour n24_any : the 5x5 window in any orientation
foreground fg8_any : which cells of the 3x3 window are foreground, in any orientation
colour fg8_any : colour and the foreground of the 3x3 window, in any orientation
colour same8_any : colour and which neighbours share it, in any orientation
colour rays8_any : colour and what is met in eight directions, in any orientation
colour rays4_any : colour and what is met in four directions, in any orientation
colour gaps_any : colour and the distances in four directions, in any orientation
colour gaps_rays_any : colour, distances and what is met in four directions, in any orientation
colour same8 : colour and which neighbours share it
colour fg8 : colour and which neighbours are foreground
fg24 foreground : which cells of the 5x5 window are foreground
colour fg8_count : colour and how many neighbours are foreground
colour fg4_count : colour and how many of the four neighbours are foreground
colour cluster_size : colour and size of the cluster
colour shape : colour and shape of the object
colour shape_any : colour and shape of the object in any orientation
colour cluster : colour and shape of the cluster
colour cluster_offset : colour and the place inside the cluster's box
colour shape_rank : colour and rank of the object by size
colour shape_twins : colour and the number of objects of that shape
colour cluster_rank : colour and rank of the cluster by size
colour region_open region_size : colour, size of the region, whether it touches the border
colour region_open region_box : colour, box of the region, whether it touches the border
colour rays4 : colour and what is met in four directions
colour rays8_bag : colour and what is met in eight directions, in any order
colour rays_x : colour and what is met along the diagonals
colour north : colour and what is met above
colour south : colour and what is met below
colour west : colour and what is met to the left
colour east : colour and what is met to the right
colour gap_ns : colour and distance to what is above and below
colour gap_we : colour and distance to what is left and right
colour .col : colour and column
.row .col : the place
colour .parity : colour and parity of row and column
colour .mod3 : colour, row and column modulo 3
colour .border : colour and distance to the border
colour colour@flip_cols colour@flip_rows colour@half_turn : colour here and in three mirror images
colour col_palette : colour and the foreground colours of the column
row_palette col_palette : the foreground colours of row and column
row_flat col_flat colour : colour, full row, full column
colour grid_top : colour and the commonest foreground colour
colour@scale : colour of the input stretched to the output's size
fg8@scale .within : stretched foreground window and the place inside the stretched cell
colour@tile colour@scale : colour of the repeated input and of the stretched input
colour@tile .tile : colour of the repeated input and which copy
colour@fold : colour of the mirror-tiled input
colour@end colour : colours of the input aligned at either end
colour shape_holes : colour and number of holes of the object
colour shape_left_rank : colour and rank of the object from left to right
colour shape_top_rank : colour and rank of the object from top to bottom
colour shape_height : colour and height of the object
colour shape_width : colour and width of the object
colour shape_colour_twins : colour and number of objects of that colour
colour grid_shapes : colour and number of objects in the grid
colour row_first col_first : colour, first cell of the row, first cell of the column
colour row_last col_last : colour, last cell of the row, last cell of the column
colour $colour_of_odd_one : colour and the colour of the object of a shape of its own
$cut_first_part $cut_second_part : colours of two parts of the input
$cut_first_part $cut_second_part $cut_third_part $cut_last_part : colours of up to four parts of the input
$cut_top_left $cut_top_right $cut_bottom_left $cut_bottom_right : colours of the four quarters of the input
colour $changed_filled : colour, and colour with enclosed background filled
colour $changed_extended_rows $changed_extended_cols : colour, and colour drawn on along rows and along columns
colour $changed_extended_diagonal : colour, and colour with every cell drawn on diagonally
colour $changed_mirrored_zero : colour, and colour with hidden cells mirrored
colour $changed_grown_diagonal : colour, and colour with objects grown by one cell in eight directions
colour $changed_box_mirrors_merged : colour, and colour with the foreground mirrored in its box
colour $changed_mirrors_merged : colour, and colour with the grid mirrored
"""

SOURCE_TABLES = """
.one : everywhere the same
foreground : foreground or not
role : rank of the cell's colour by number of cells
foreground same8_any : which neighbours have the cell's colour, in any orientation
foreground fg8_any : which cells of the 3x3 window are foreground, in any orientation
foreground fg24_any : which cells of the 5x5 window are foreground, in any orientation
foreground gaps_any : the distances in four directions, in any orientation
foreground rays4_any : what is met in four directions, in any orientation
same8 : which neighbours have the cell's colour
fg8 foreground : which cells of the 3x3 window are foreground
fg24 foreground : which cells of the 5x5 window are foreground
foreground fg4_count : foreground and number of foreground cells among four neighbours
foreground fg8_count : foreground and number of foreground cells among eight neighbours
foreground shape_size : size of the object
foreground region_size : size of the region
shape : shape of the object
shape_box shape_offset : the object's box and the place inside it
shape_offset : the place inside the object's box
shape_rank : rank of the object by size
shape_holes : number of holes of the object
shape_left_rank : rank of the object from left to right
shape_top_rank : rank of the object from top to bottom
shape_colour_twins : number of objects of that colour
shape_rank_up : rank of the object by size, from the smallest
cluster_twins : number of clusters of that shape
shape_full foreground : whether the object fills its box
foreground region_open : whether the region touches the border
foreground region_open region_full : whether the region is closed and fills its box
foreground region_open region_box : box of the region and whether it touches the border
region_open region_square region_full foreground : whether the region is a closed square
rays4_open foreground : in which of the four directions something is met
rays4_bag foreground : what is met in four directions, in any order
gap_ns foreground : distance to what is above and below
gap_we foreground : distance to what is left and right
.row : the row
.col : the column
.row .col : the place
.up : the row counted from the bottom
.left : the column counted from the right
.parity : parity of row and column
.mod3 : row and column modulo 3
.border : distance to the border
.diagonal : the diagonal
foreground@tile : foreground of the repeated input
foreground@tile foreground@scale : foreground of the repeated and of the stretched input
role@scale role@tile : colour ranks of the stretched and of the repeated input
foreground@flip_cols foreground@flip_rows foreground : foreground of mirror images
row_fg foreground : number of foreground cells in the row
col_fg foreground : number of foreground cells in the column
colour@scale : colour of the stretched input
"""

NUM_PROGRAM_TABLES = 3
_ORDINALS = ("first", "second", "third")
PROGRAM_TABLES = [
    Table(f"program:{k}", "program", (), f"the {k} of the different answers of programs that fit all demonstrations")
    for k in _ORDINALS[:NUM_PROGRAM_TABLES]
]

TABLES: tuple[Table, ...] = (
    *_tables("colour", COLOUR_TABLES),
    *_tables("source", SOURCE_TABLES),
    *PROGRAM_TABLES,
)
NUM_TABLES = len(TABLES)
NUM_SOURCE_TABLES = sum(table.kind == "source" for table in TABLES)
NUM_COLOUR_TABLES = sum(table.kind == "colour" for table in TABLES)
NUM_HASHED_TABLES = NUM_COLOUR_TABLES + NUM_SOURCE_TABLES  # the first of TABLES; program tables have no context
