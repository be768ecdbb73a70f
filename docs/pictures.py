"""Draws boxes on a grid, and arrows between them, as SVG: the pictures of docs/, from tables of the code.

>>> draw([Box("a", "from", 0, 0), Box("b", "to", 1, 0)], [Arrow("a", "b", "why")]).count("<rect")
3
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

CHARACTER, HEIGHT, LINE = 7.3, 34, 17  # pixels
GAP_X, GAP_Y, MARGIN = 70, 34, 24
STYLE = (
    "text{font:13px 'DejaVu Sans',Verdana,sans-serif;fill:#1d2733}"
    ".label{font-size:11px;fill:#46525f;paint-order:stroke;stroke:#fff;stroke-width:4px}.page{fill:#fff}.group{fill:#f4f6f8;stroke:#c5ccd4}"
    ".box{fill:#e8f0fb;stroke:#3d6fb4}.store{fill:#fdf3dd;stroke:#b07d16}.end{fill:#e6f4e8;stroke:#3b8648}"
    ".other{fill:#f1ecf8;stroke:#7a58a8}path{fill:none;stroke:#5c6b7a;stroke-width:1.2}.back{stroke-dasharray:5 3}"
    ".tip{fill:#5c6b7a;stroke:none}"
)


class Box(NamedTuple):
    """A box in a column and a row, which may be fractions; ``kind``: box, store, end or other."""

    name: str
    text: str
    column: float
    row: float
    kind: str = "box"
    group: str = ""


class Arrow(NamedTuple):
    """From one box to another. ``label`` stands beside it, ``title`` is shown where a pointer rests on it."""

    start: str
    end: str
    label: str = ""
    title: str = ""


class _Place(NamedTuple):
    x: float
    y: float
    width: float
    height: float


def draw(
    boxes: list[Box], arrows: list[Arrow], *, gap_x: float = GAP_X, gap_y: float = GAP_Y, title: str = "",
    up: bool = False,
) -> str:  # fmt: skip
    """The picture as the text of an SVG file. Boxes of one ``group`` have a frame around them.

    ``up``: every arrow leaves a box at its top, and enters one above it at its bottom.
    """
    height = HEIGHT + LINE * (max(box.text.count("\n") for box in boxes))
    width = max(_width(box.text) for box in boxes)
    places = {
        box.name: _Place(
            MARGIN + box.column * (width + gap_x) + (width - _width(box.text)) / 2,
            MARGIN + 16 + box.row * (height + gap_y), _width(box.text), HEIGHT + LINE * box.text.count("\n"),
        )
        for box in boxes
    }  # fmt: skip
    ends = _ends(places, arrows, up)
    lines = [_arrow(arrow, *ends[number]) for number, arrow in enumerate(arrows)]
    drawn = [*_groups(boxes, places), *lines, *(_box(box, places[box.name]) for box in boxes)]
    right = max(place.x + place.width for place in places.values()) + MARGIN
    bottom = max(place.y + place.height for place in places.values()) + MARGIN
    labels = [
        ends[number] for number, arrow in enumerate(arrows) if arrow.start == arrow.end or _is_back(*ends[number])
    ]
    above = min([0.0, *(min(start[1], end[1]) - _rise(start, end) - 8 for start, end in labels)])
    size = f'viewBox="0 {above:.0f} {right:.0f} {bottom - above:.0f}" width="{right:.0f}" height="{bottom - above:.0f}"'
    page = f'<rect class="page" x="0" y="{above:.0f}" width="{right:.0f}" height="{bottom - above:.0f}" rx="6"/>\n'
    name = f"<title>{escape(title)}</title>\n" if title else ""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{name}<style>{STYLE}</style>\n'
    return "".join([head, page, *drawn, "</svg>\n"])


def layers(arrows: list[tuple[str, str]], names: list[str]) -> dict[str, int]:
    """The row of each name, where every arrow leads at least one row up; without circles."""
    rows = dict.fromkeys(names, 0)
    for _ in names:
        for start, end in arrows:
            rows[start] = max(rows[start], rows[end] + 1)
    return rows


def _width(text: str) -> float:
    return max(len(line) for line in text.split("\n")) * CHARACTER + 22


def _box(box: Box, place: _Place) -> str:
    rect = (
        f'<rect class="{box.kind}" x="{place.x:.1f}" y="{place.y:.1f}" width="{place.width:.1f}" '
        f'height="{place.height:.1f}" rx="5"/>\n'
    )
    middle = place.x + place.width / 2
    lines = [
        f'<text x="{middle:.1f}" y="{place.y + 22 + LINE * number:.1f}" text-anchor="middle">{escape(line)}</text>\n'
        for number, line in enumerate(box.text.split("\n"))
    ]
    return rect + "".join(lines)


def _groups(boxes: list[Box], places: dict[str, _Place]) -> list[str]:
    out = []
    for group in dict.fromkeys(box.group for box in boxes if box.group):
        mine = [places[box.name] for box in boxes if box.group == group]
        x, y = min(p.x for p in mine) - 12, min(p.y for p in mine) - 24
        right, bottom = max(p.x + p.width for p in mine) + 12, max(p.y + p.height for p in mine) + 12
        frame = f'x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"'
        out.append(f'<rect class="group" {frame} rx="8"/>\n')
        out.append(f'<text class="label" x="{x + 10:.1f}" y="{y + 15:.1f}">{escape(group)}</text>\n')
    return out


def _sides(a: _Place, b: _Place) -> tuple[str, str]:
    """The sides at which an arrow leaves one box and enters the other."""
    if a is b or a.x >= b.x + b.width:
        return "top", "top"
    if b.x >= a.x + a.width:
        return "right", "left"
    return ("bottom", "top") if b.y > a.y else ("top", "bottom")


End = tuple[float, float, str]  # x, y, side


def _ends(places: dict[str, _Place], arrows: list[Arrow], up: bool) -> list[tuple[End, End]]:
    """Where each arrow begins and ends: those of one side of a box are spread over it, in the order of their goals."""
    sides: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
    for number, arrow in enumerate(arrows):
        a, b = places[arrow.start], places[arrow.end]
        first, second = ("top", "bottom") if up else _sides(a, b)
        for mine, other, side, end in ((arrow.start, b, first, 0), (arrow.end, a, second, 1)):
            order = other.y if side in ("left", "right") else other.x
            sides.setdefault((mine, side), []).append((order, number, end))
    found: dict[tuple[int, int], End] = {}
    for (name, side), there in sides.items():
        place = places[name]
        for position, (_, number, end) in enumerate(sorted(there), start=1):
            share = position / (len(there) + 1)
            if side in ("left", "right"):
                found[number, end] = (
                    place.x + (place.width if side == "right" else 0),
                    place.y + place.height * share,
                    side,
                )
            else:
                found[number, end] = (
                    place.x + place.width * share,
                    place.y + (place.height if side == "bottom" else 0),
                    side,
                )
    return [(found[number, 0], found[number, 1]) for number in range(len(arrows))]


def _is_back(start: End, end: End) -> bool:
    return start[2] == end[2] == "top"


def _rise(start: End, end: End) -> float:
    return 22 + abs(start[0] - end[0]) / 9


def _arrow(arrow: Arrow, start: End, end: End) -> str:
    (x1, y1, _), (x2, y2, into) = start, end
    back = _is_back(start, end)
    if back:
        top = min(y1, y2) - _rise(start, end)
        bend = f"C {x1:.1f} {top:.1f} {x2:.1f} {top:.1f}"
        middle = ((x1 + x2) / 2, (y1 + y2 + 6 * top) / 8)
    elif into == "left":
        half = (x2 - x1) / 2
        bend = f"C {x1 + half:.1f} {y1:.1f} {x2 - half:.1f} {y2:.1f}"
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    else:
        half = (y2 - y1) / 2
        bend = f"C {x1:.1f} {y1 + half:.1f} {x2:.1f} {y2 - half:.1f}"
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    tip = {"left": (-8, -4, -8, 4), "top": (-4, -8, 4, -8), "bottom": (-4, 8, 4, 8)}[into]
    title = f"<title>{escape(arrow.title)}</title>" if arrow.title else ""
    anchor, aside, above = "middle", 0, 6
    if not back and into != "left":  # beside a line that leads up or down
        anchor, aside, above = ("end", -6, -4) if into == "bottom" else ("start", 6, -4)
    text = "".join(
        f'<text class="label" x="{middle[0] + aside:.1f}" y="{middle[1] - above + 13 * number:.1f}" '
        f'text-anchor="{anchor}">{escape(line)}</text>\n'
        for number, line in enumerate(arrow.label.split("\n") if arrow.label else ())
    )
    kind = ' class="back"' if back else ""
    return (
        f'<path{kind} d="M {x1:.1f} {y1:.1f} {bend} {x2:.1f} {y2:.1f}">{title}</path>\n'
        f'<path class="tip" d="M {x2:.1f} {y2:.1f} l {tip[0]} {tip[1]} L {x2 + tip[2]:.1f} {y2 + tip[3]:.1f} Z"/>\n'
        f"{text}"
    )
