"""A frontier as a file: PNG through matplotlib, or one HTML page that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt_cli.errors import LlmoptError, UsageError
from llmopt_cli.estimate.figures import plain
from llmopt_cli.views.pareto import PER_USER, VALUE, legend, legend_rows, scales

if TYPE_CHECKING:
    from llmopt_cli.estimate.pareto import Picture, Point

WIDTH, HEIGHT = 860, 520  # pixels of the plot
LEFT, BOTTOM, TOP = 80, 60, 20  # pixels around it
STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin-top: 1em } th, td { padding: .25em .8em; text-align: right }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
text { font: 12px system-ui, sans-serif; fill: #222 } .beaten { fill: #b5b5b5 } .grid { stroke: #e5e5e5 }
.front { fill: #1463c4 } .line { fill: none; stroke: #1463c4; stroke-width: 1.5 }
"""


def save(picture: Picture, path: Path, title: str) -> None:
    """Write the picture as the file's suffix says, .png or .html; replaces a file of that name.

    Raises UsageError for another suffix or a place that can't be written, LlmoptError where matplotlib is missing.
    """
    write = WRITERS.get(path.suffix.lower())
    if write is None:
        raise UsageError(
            f"cannot draw `{path}`", "name a file that ends in .png or .html, such as `--plot frontier.html`"
        )
    part = path.with_name(f".{path.name}.part")
    try:
        write(picture, part, title)
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}", "name another file with --plot") from None
    finally:
        part.unlink(missing_ok=True)


def _png(picture: Picture, path: Path, title: str) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        hint = "`pip install llmopt[plot]`, or name an .html file: that needs nothing"
        raise LlmoptError("drawing a PNG needs matplotlib, which is not installed", hint) from None
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*_columns(picture.points), s=8, color="#b5b5b5")
    axes.plot(*_columns(picture.frontier), color="#1463c4", marker="o", markersize=4)
    for letter, points in legend(picture):
        axes.annotate(
            letter, (points[0].per_user, points[0].value), textcoords="offset points", xytext=(4, 5), fontsize=8
        )
    axes.set(xscale="log", yscale="log", xlabel=PER_USER, ylabel=VALUE[picture.axis], title=title)
    names = "\n".join(f"{letter}  {points[0].name}" for letter, points in legend(picture))
    axes.text(1.01, 1, names, transform=axes.transAxes, va="top", fontsize=7)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")


def _columns(points: tuple[Point, ...]) -> tuple[list[float], list[float]]:
    return [point.per_user for point in points], [point.value for point in points]


def _html(picture: Picture, path: Path, title: str) -> None:
    heads = ("", "deployment", "batch", PER_USER, VALUE[picture.axis])
    rows = [heads, *legend_rows(picture)]
    cells = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * len(rows)], rows, strict=False)
    ]
    table = "".join(f"<tr>{row}</tr>\n" for row in cells)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>\n{svg(picture)}\n<table>\n{table}</table>"
    path.write_text(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n', "utf-8")


def svg(picture: Picture) -> str:
    """The scatter as an SVG element: a title on every point, letters on the frontier."""
    place = _place(picture)
    dots = [_dot(place, point, "beaten", 2) for point in picture.points]
    line = " ".join("{:.1f},{:.1f}".format(*place(point.per_user, point.value)) for point in picture.frontier)
    front = [_dot(place, point, "front", 4) for point in picture.frontier]
    letters = [_letter(place, letter, points[0]) for letter, points in legend(picture)]
    box = f'viewBox="0 0 {LEFT + WIDTH} {TOP + HEIGHT + BOTTOM}" width="100%" style="max-width: {LEFT + WIDTH}px"'
    parts = [*_axes(picture), *dots, f'<polyline class="line" points="{line}"/>', *front, *letters]
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n' + "\n".join(parts) + "\n</svg>"


Place = Callable[[float, float], tuple[float, float]]


def _place(picture: Picture) -> Place:
    users, values = scales(picture)
    return lambda per_user, value: (LEFT + users.at(per_user) * WIDTH, TOP + (1 - values.at(value)) * HEIGHT)


def _dot(place: Place, point: Point, kind: str, radius: int) -> str:
    x, y = place(point.per_user, point.value)
    said = escape(f"{point.name}, batch {point.batch}: {plain(point.per_user, 3)}, {plain(point.value, 3)}")
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{said}</title></circle>'


def _letter(place: Place, letter: str, point: Point) -> str:
    x, y = place(point.per_user, point.value)
    return f'<text x="{x + 5:.1f}" y="{y - 5:.1f}">{letter}</text>'


def _axes(picture: Picture) -> list[str]:
    users, values = scales(picture)
    parts, floor = [], TOP + HEIGHT
    for tick in users.ticks:
        x = LEFT + users.at(tick) * WIDTH
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{plain(tick, 3)}</text>')
    for tick in values.ticks:
        y = TOP + (1 - values.at(tick)) * HEIGHT
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{plain(tick, 3)}</text>')
    middle = TOP + HEIGHT / 2
    parts.append(f'<text x="{LEFT + WIDTH / 2}" y="{floor + 44}" text-anchor="middle">{PER_USER}</text>')
    turned = f'transform="rotate(-90 16 {middle})" text-anchor="middle"'
    return [*parts, f'<text x="16" y="{middle}" {turned}>{VALUE[picture.axis]}</text>']


WRITERS: dict[str, Callable[[Picture, Path, str], None]] = {".png": _png, ".html": _html}
