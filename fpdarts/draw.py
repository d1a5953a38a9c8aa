"""Draw a genotype's two cells, left to right, with nothing but matplotlib.

The layout is the classic layered one. States stand in columns by their depth; between two columns lies one for labels.
An edge takes a place of its own in each column that it crosses, so neither edges nor labels can lie on each other.
Then places are ordered to cross little, and shifted to make edges straight.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from fpdarts.genotype import Genotype
from fpdarts.kernels.spec import OPERATIONS

SUFFIXES = (".svg", ".png")

COLUMN_WIDTH = 1.08  # inches, from a column of states to one of labels
LABEL_WIDTH = 0.86  # inches, of the longest operation's name
LABEL_HEIGHT, STATE_HEIGHT, EDGE_HEIGHT = 0.30, 0.56, 0.20  # inches that a place takes in its column
STATE_WIDTH = 0.56
INK, MUTED = "#24292f", "#8c959f"
STATE_COLOURS = {"input": "#dbeafe", "node": "#f3f4f6", "output": "#fde8c8"}


@dataclass(eq=False)
class _Place:
    """A state, a label, or the passage of an edge through a column; y is what the layout looks for."""

    column: int
    height: float
    text: str = ""
    kind: str = "passage"  # "input", "node", "output", "label" or "passage"
    y: float = 0.0
    left: list["_Place"] = field(default_factory=list)
    right: list["_Place"] = field(default_factory=list)


def draw(genotype: Genotype, path: str | os.PathLike) -> None:
    """Write a picture of both cells, as SVG or PNG by the path's suffix. The same genotype gives the same bytes.

    Raises ValueError for another suffix, OSError if the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {suffix!r} for a drawing; the suffixes are: {', '.join(SUFFIXES)}")

    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no window, no global state, whatever back end is set

    style = {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "mathtext.fontset": "dejavusans",
        "svg.fonttype": "path",
        "svg.hashsalt": "fpdarts",  # else identifiers are random
    }
    with matplotlib.rc_context(style):
        cells = [
            ("normal cell", *_layout(genotype.normal, genotype.normal_concat)),
            ("reduction cell", *_layout(genotype.reduce, genotype.reduce_concat)),
        ]
        heights = [_extent(places) for _, places, _ in cells]
        width = max(place.column for _, places, _ in cells for place in places) * COLUMN_WIDTH + STATE_WIDTH + 0.3
        title, margin = 0.42, 0.12
        total = sum(heights) + 2 * (title + margin)
        figure = Figure(figsize=(width, total), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-(STATE_WIDTH + 0.3) / 2, width - (STATE_WIDTH + 0.3) / 2)
        axes.set_ylim(-total, 0)  # data units are inches
        axes.axis("off")
        top = 0.0
        for (name, places, chains), height in zip(cells, heights):
            left, middle = -STATE_WIDTH / 2, top - title / 2 - 0.03
            axes.text(left, middle, name, fontsize=12, fontweight="bold", color=INK, va="center")
            shift = top - title - max(place.y + place.height / 2 for place in places)
            _paint(axes, places, chains, shift)
            top -= title + height + margin
        # Date and version would make the bytes differ from run to run and machine to machine.
        metadata = {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}
        figure.savefig(path, format=suffix[1:], dpi=160, metadata=metadata)


# Layout


def _layout(edges: tuple, concat: tuple[int, ...]) -> tuple[list[_Place], list[list[_Place]]]:
    """All places of a cell with their y, and each edge as the chain of places that it runs through."""
    nodes = len(edges) // 2
    depth = [0, 0]
    for node in range(nodes):
        depth.append(1 + max(depth[source] for _, source in edges[2 * node : 2 * node + 2]))
    last = 2 * (1 + max(depth))

    names = ["$c_{k-2}$", "$c_{k-1}$", *map(str, range(nodes))]
    states = [_Place(2 * depth[i], STATE_HEIGHT, name, "input" if i < 2 else "node") for i, name in enumerate(names)]
    output = _Place(last, STATE_HEIGHT, "$c_k$", "output")
    places = [*states, output]
    chains = []

    def connect(source: _Place, target: _Place, operation: str | None):
        chain = [source]
        for column in range(source.column + 1, target.column):
            if operation and column == target.column - 1:  # next to the node whose input it is
                chain.append(_Place(column, LABEL_HEIGHT, operation, "label"))
            else:
                chain.append(_Place(column, EDGE_HEIGHT))
        chain.append(target)
        places.extend(chain[1:-1])
        for a, b in zip(chain, chain[1:]):
            a.right.append(b)
            b.left.append(a)
        chains.append(chain)

    for index, (operation, source) in enumerate(edges):
        connect(states[source], states[2 + index // 2], operation)
    for state in concat:
        connect(states[state], output, None)

    columns = [[place for place in places if place.column == column] for column in range(last + 1)]
    columns = _ordered(columns)
    _align(columns)
    return places, chains


def _crossings(columns: list[list[_Place]]) -> int:
    total = 0
    for column, following in zip(columns, columns[1:]):
        rank = {place: i for i, place in enumerate(following)}
        ends = [sorted(rank[b] for b in place.right) for place in column]
        for i, upper in enumerate(ends):
            total += sum(a > b for lower in ends[i + 1 :] for a in upper for b in lower)
    return total


def _ordered(columns: list[list[_Place]]) -> list[list[_Place]]:
    """Reorder each column to cross few edges: sort by the neighbours' mean, then swap places while it helps."""
    best, fewest = columns, _crossings(columns)
    for start in (columns, [column[::-1] for column in columns]):
        current = [list(column) for column in start]
        for sweep in range(12):
            forward = sweep % 2 == 0
            for i in range(1, len(current)) if forward else range(len(current) - 2, -1, -1):
                rank = {place: r for r, place in enumerate(current[i - 1 if forward else i + 1])}
                own = {place: r for r, place in enumerate(current[i])}

                def mean(place):
                    near = place.left if forward else place.right
                    return sum(rank[n] for n in near) / len(near) if near else own[place]

                current[i].sort(key=mean)
            _swap(current)
            if _crossings(current) < fewest:
                best, fewest = [list(column) for column in current], _crossings(current)
    # The picture may stand on its head; the first input goes on top.
    if [place.text for place in best[0]] == ["$c_{k-1}$", "$c_{k-2}$"]:
        best = [column[::-1] for column in best]
    return best


def _swap(columns: list[list[_Place]]) -> None:
    improved = True
    while improved:
        improved = False
        for i, column in enumerate(columns):
            nearby = columns[max(0, i - 1) : i + 2]  # the same list objects: a swap shows at once
            for r in range(len(column) - 1):
                before = _crossings(nearby)
                column[r], column[r + 1] = column[r + 1], column[r]
                if _crossings(nearby) < before:
                    improved = True
                else:
                    column[r], column[r + 1] = column[r + 1], column[r]


def _align(columns: list[list[_Place]]) -> None:
    """Give every place its y, downwards negative: near the mean of its neighbours, but not on top of another."""
    for column in columns:
        y = 0.0
        for place in column:
            place.y = y - place.height / 2
            y -= place.height
    for sweep in range(60):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            wanted = []
            for place in column:
                near = place.left + place.right
                wanted.append(sum(n.y for n in near) / len(near) if near else place.y)
            for place, y in zip(column, _spread(wanted, [place.height for place in column])):
                place.y = y


def _spread(wanted: list[float], heights: list[float]) -> list[float]:
    """The least-squares positions nearest to the wanted ones, in their order and apart by half of both heights each.

    Without the offsets that the heights make at least, that is an isotonic regression: merge neighbours that would
    pass one another, and give a merged block the mean.
    """
    offsets = [0.0]
    for above, below in zip(heights, heights[1:]):
        offsets.append(offsets[-1] - (above + below) / 2)
    blocks = []  # [sum, size], with falling means
    for y, offset in zip(wanted, offsets):
        blocks.append([y - offset, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] < blocks[-1][0] * blocks[-2][1]:
            value, size = blocks.pop()
            blocks[-1][0] += value
            blocks[-1][1] += size
    means = [value / size for value, size in blocks for _ in range(size)]
    return [mean + offset for mean, offset in zip(means, offsets)]


def _extent(places: list[_Place]) -> float:
    return max(p.y + p.height / 2 for p in places) - min(p.y - p.height / 2 for p in places)


# Painting


def _colour(operation: str) -> str:
    """By kind: pooling, skip, separable (two stages) or dilated convolution."""
    what = OPERATIONS[operation]
    if what.kind == "pooling":
        return "#b45309"
    if what.kind == "skip":
        return "#57606a"
    return "#1d4ed8" if what.dilation == 1 else "#0f766e"


def _paint(axes, places: list[_Place], chains: list[list[_Place]], shift: float) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    level = {place.column for place in places if place.kind == "label"}
    for chain in chains:
        label = next((place for place in chain if place.kind == "label"), None)
        colour = _colour(label.text) if label else MUTED
        axes.add_patch(
            FancyArrowPatch(
                path=_curve(chain, shift, level),
                arrowstyle="-|>,head_length=5,head_width=2.6",
                color=colour,
                linewidth=1.3,
                shrinkA=0,
                shrinkB=0,
                joinstyle="miter",
                capstyle="butt",
                zorder=1,
            )
        )
        if label:
            axes.text(
                label.column * COLUMN_WIDTH,
                label.y + shift,
                label.text,
                fontsize=8.5,
                color=colour,
                ha="center",
                va="center",
                zorder=2,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
            )
    for place in places:
        if place.kind not in STATE_COLOURS:
            continue
        x, y, half = place.column * COLUMN_WIDTH, place.y + shift, STATE_WIDTH / 2
        axes.add_patch(
            FancyBboxPatch(
                (x - half, y - 0.19),
                2 * half,
                0.38,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=STATE_COLOURS[place.kind],
                edgecolor=INK,
                linewidth=1.0,
                zorder=3,
            )
        )
        axes.text(x, y, place.text, fontsize=11, color=INK, ha="center", va="center", zorder=4)


def _port(place: _Place, neighbour: _Place, side: str) -> float:
    """How far from a state's middle an edge meets it: edges share its side in the order of where they come from."""
    around = sorted(place.left if side == "left" else place.right, key=lambda p: -p.y)
    gap = min(0.11, 0.26 / max(1, len(around) - 1))
    return ((len(around) - 1) / 2 - around.index(neighbour)) * gap


def _curve(chain: list[_Place], shift: float, level: set[int]):
    """A smooth path through a chain of places, level at both ends and across the columns that hold labels."""
    from matplotlib.path import Path as Curve

    xs, ys = [], []
    for place in chain:
        around = (-LABEL_WIDTH / 2, LABEL_WIDTH / 2) if place.column in level else (0,)
        xs += [place.column * COLUMN_WIDTH + dx for dx in around]
        ys += [place.y + shift for _ in around]
    xs[0] += STATE_WIDTH / 2
    ys[0] += _port(chain[0], chain[1], "right")
    xs[-1] -= STATE_WIDTH / 2
    ys[-1] += _port(chain[-1], chain[-2], "left")

    slopes = [0.0]
    for i in range(1, len(xs) - 1):
        before, after = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1]), (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
        # Level at a turning point, so that the curve never overshoots the places it runs through; elsewhere half of the
        # harmonic mean, flat enough to clear the corners of the states above and below.
        slopes.append(before * after / (before + after) if before * after > 0 else 0.0)
    slopes.append(0.0)

    points, codes = [(xs[0], ys[0])], [Curve.MOVETO]
    for i in range(len(xs) - 1):
        reach = (xs[i + 1] - xs[i]) * 0.4
        points += [(xs[i] + reach, ys[i] + reach * slopes[i]), (xs[i + 1] - reach, ys[i + 1] - reach * slopes[i + 1])]
        points += [(xs[i + 1], ys[i + 1])]
        codes += [Curve.CURVE4] * 3
    return Curve(points, codes)
