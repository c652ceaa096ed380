"""Charts as SVG text: scores over trials, bars with intervals, a heat map. Numbers in, markup out.

Colours are CSS classes, so that one page serves light, dark and print. Every chart has a title, a
description and its numbers as text or tooltips. Knows nothing of studies. Built as an element tree:
whatever a label holds, the markup is well-formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from evomerge.sampling.base import Restart
from evomerge.service.coefficients import Grid
from evomerge.service.history import Dot
from evomerge.service.measurement import Interval

_LABEL_GAP = 16  # pixels between two labels' baselines, at least


@dataclass(frozen=True)
class Bar:
    """A model's value with its interval; `kind` is its CSS class."""

    label: str
    value: float
    interval: Interval | None
    kind: str


def history(
    dots: Sequence[Dot],
    references: Mapping[str, float],
    *,
    scored: int,
    winner: Dot | None = None,
    restarts: Sequence[Restart] = (),
) -> str:
    """Trials as dots, the best so far as a line, references as dashed lines with a label.

    `scored` is how many trials have a score, where there are more than dots. `winner` is marked,
    and each restart is a vertical line with its number, where there is room.
    """
    width, height, left, right, top, bottom = 760, 340, 52, 190, 12, 44
    shown = [(dot, dot.score) for dot in dots if dot.score is not None]
    y = _Scale([s for _, s in shown] + list(references.values()), height - bottom, top)
    x = _Scale([0, max([d.x for d in dots], default=1)], left, width - right, pad=0)
    words = _history_words(shown, scored)
    svg = _svg("history", width, height, "Scores on the search items", words)
    _y_axis(svg, y, left, width - right)
    _x_axis(svg, x, height - bottom)
    for value in references.values():
        _line(svg, left, y(value), width - right, y(value), "reference")
    _restarts(svg, restarts, x, top, height - bottom)
    radius = 3.5 if len(dots) < 120 else 2.0
    for dot, score in shown:
        circle = _add(svg, "circle", cx=x(dot.x), cy=y(score), r=radius, **{"class": "trial"})
        _add(circle, "title").text = _clean(f"{dot.label}: {score:.4f}")
    for dot in dots:
        if dot.score is None:
            _cross(svg, x(dot.x), height - bottom - 6, f"{dot.label}: failed")
    labels = [(f"{name} {value:.3f}", y(value), "label") for name, value in references.items()]
    if shown:
        best = _best_so_far(shown)
        _add(svg, "path", d=_steps(best, x, y, x(dots[-1].x)), **{"class": "best"})
        labels.append((f"best {best[-1][1]:.3f}", y(best[-1][1]), "label strong"))
    if winner is not None and winner.score is not None:
        _winner(svg, x(winner.x), y(winner.score), f"winner: {winner.label}: {winner.score:.4f}")
    _side_labels(svg, labels, width - right, top + 8, height - bottom)
    return _text(svg)


def bars(key: str, title: str, rows: Sequence[Bar]) -> str:
    """Horizontal bars from 0, one a row, with interval whiskers and the value in figures."""
    width, row_height, left, right = 410, 24, 196, 46
    height = row_height * len(rows) + 6
    ends = [end for row in rows for end in (row.value, *(row.interval or ()))]
    whole = [0.0, 1.0] if min(ends) >= 0 and max(ends) <= 1 else [0.0]
    x = _Scale([*whole, *ends], left, width - right, pad=0)
    words = "; ".join(f"{row.label} {row.value:.3f}{_interval_words(row.interval)}" for row in rows)
    svg = _svg(key, width, height, title, words)
    for place, row in enumerate(rows):
        middle = row_height * place + row_height / 2 + 3
        name = _label(svg, left - 8, middle, row.label, anchor="end", kind=f"label {row.kind}")
        name.text = _shorten(row.label, 26)
        _add(name, "title").text = _clean(row.label)
        start, end = sorted((x(0.0), x(row.value)))
        box = {"x": start, "y": middle - 8, "width": end - start, "height": 16}
        _add(svg, "rect", **box, **{"class": f"bar {row.kind}"})
        if row.interval is not None:
            _whisker(svg, x(row.interval[0]), x(row.interval[1]), middle)
        _label(svg, width - 2, middle, f"{row.value:.3f}", anchor="end", kind=f"label {row.kind}")
    _line(svg, x(0.0), 2, x(0.0), height - 2, "axis")
    return _text(svg)


def heat_map(key: str, grid: Grid, largest: float) -> str:
    """Cells of tensor type by column; the deeper the colour the larger, another hue below 0."""
    cell = max(20, min(40, 640 // max(1, len(grid.columns))))
    left, top, row_height = 84, 20, 24
    width = left + cell * len(grid.columns) + 2
    height = top + row_height * len(grid.types) + 2
    svg = _svg(key, width, height, f"Coefficients of {grid.title}", _grid_words(grid))
    every = 1 if cell >= 26 else 4
    for place, column in enumerate(grid.columns):
        if not column.isdigit() or int(column) % every == 0:
            _label(svg, left + cell * (place + 0.5), top / 2, column, anchor="middle", kind="tick")
    for row, kind in enumerate(grid.types):
        y = top + row_height * row
        _label(svg, left - 8, y + row_height / 2, kind, anchor="end", kind="label")
        for place, column in enumerate(grid.columns):
            value = grid.cells.get((kind, column))
            if value is not None:
                where = f"{kind}, {column if not column.isdigit() else f'layer {column}'}"
                _cell(svg, left + cell * place, y, cell, row_height, value, largest, where)
    return _text(svg)


# -- scales and ticks ----------------------------------------------------------------------------


class _Scale:
    """Values to pixels, linearly; the range covers all values, a little wider by `pad`."""

    def __init__(self, values: Sequence[float], start: float, end: float, pad: float = 0.05):
        low, high = min(values, default=0.0), max(values, default=1.0)
        margin = (high - low) * pad or (0.0 if pad == 0 and high > low else 0.5)
        self.low, self.high = low - margin, high + margin
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to at least `gap`, keeping their order and, if they fit, the limits."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = list(positions)
    floor, ceiling = low, high
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


# -- pieces --------------------------------------------------------------------------------------


def _y_axis(svg: ET.Element, y: _Scale, left: float, right: float) -> None:
    for tick in ticks(y.low, y.high):
        _line(svg, left, y(tick), right, y(tick), "grid")
        _label(svg, left - 8, y(tick), f"{tick:g}", anchor="end", kind="tick")


def _x_axis(svg: ET.Element, x: _Scale, y: float) -> None:
    _line(svg, x(x.low), y, x(x.high), y, "axis")
    for tick in ticks(x.low, x.high):
        if tick == int(tick):
            _label(svg, x(tick), y + 14, f"{tick:g}", anchor="middle", kind="tick")
    _label(svg, x((x.low + x.high) / 2), y + 34, "search trial", anchor="middle", kind="tick")


def _side_labels(
    svg: ET.Element, labels: Sequence[tuple[str, float, str]], x: float, low: float, high: float
) -> None:
    placed = spread([y for _, y, _ in labels], _LABEL_GAP, low, high)
    for (text, y, kind), target in zip(labels, placed, strict=True):
        _line(svg, x, y, x + 10, target, "leader")
        element = _label(svg, x + 14, target, text, kind=kind)
        element.text = _shorten(text, 26)
        _add(element, "title").text = _clean(text)


def _restarts(
    svg: ET.Element, restarts: Sequence[Restart], x: _Scale, top: float, bottom: float
) -> None:
    labelled = -math.inf
    for restart in restarts:
        at = x(restart.trials + 0.5)
        line = _add(svg, "line", x1=at, y1=top, x2=at, y2=bottom, **{"class": "restart"})
        _add(line, "title").text = f"restart {restart.number} after {restart.trials} trials"
        if at - labelled >= _LABEL_GAP:
            _label(svg, at + 3, top + 2, f"{restart.number}", kind="tick")
            labelled = at


def _winner(svg: ET.Element, x: float, y: float, title: str) -> None:
    circle = _add(svg, "circle", cx=x, cy=y, r=6, **{"class": "winner"})
    _add(circle, "title").text = _clean(title)
    _label(svg, x, y + 18, "winner", anchor="middle", kind="label winner")


def _best_so_far(scored: Sequence[tuple[Dot, float]]) -> list[tuple[int, float]]:
    best: list[tuple[int, float]] = []
    for dot, score in scored:
        if not best or score > best[-1][1]:
            best.append((dot.x, score))
    return best


def _steps(best: Sequence[tuple[int, float]], x: _Scale, y: _Scale, end: float) -> str:
    path = [f"M{x(best[0][0]):.1f} {y(best[0][1]):.1f}"]
    path += [f"H{x(at):.1f}V{y(score):.1f}" for at, score in best[1:]]
    return "".join([*path, f"H{end:.1f}"])


def _whisker(svg: ET.Element, start: float, end: float, y: float) -> None:
    path = f"M{start:.1f} {y - 4:.1f}v8M{start:.1f} {y:.1f}H{end:.1f}M{end:.1f} {y - 4:.1f}v8"
    _add(svg, "path", d=path, **{"class": "whisker"})


def _cross(svg: ET.Element, x: float, y: float, title: str) -> None:
    path = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
    _add(_add(svg, "path", d=path, **{"class": "failed"}), "title").text = _clean(title)


def _cell(
    svg: ET.Element,
    x: float,
    y: float,
    width: float,
    height: float,
    value: float,
    largest: float,
    where: str,
) -> None:
    share = abs(value) / largest if largest else 0.0
    hue = "negative" if value < 0 else "positive"
    box = {"x": x, "y": y, "width": width - 1, "height": height - 1}
    rect = _add(svg, "rect", **box, **{"class": f"cell {hue}", "fill-opacity": f"{share:.3f}"})
    _add(rect, "title").text = _clean(f"{where}: {value:.4f}")
    if width >= 34:
        kind = "figure deep" if share > 0.8 else "figure"
        _label(svg, x + width / 2, y + height / 2, f"{value:.2f}", anchor="middle", kind=kind)


def _svg(key: str, width: float, height: float, title: str, words: str) -> ET.Element:
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width:g}",
            "height": f"{height:g}",
            "role": "img",
            "aria-labelledby": f"{key}-title {key}-words",
        },
    )
    _add(svg, "title", id=f"{key}-title").text = _clean(title)
    _add(svg, "desc", id=f"{key}-words").text = _clean(words)
    return svg


def _add(parent: ET.Element, tag: str, **attributes: float | str) -> ET.Element:
    plain = {k: v if isinstance(v, str) else f"{v:.1f}" for k, v in attributes.items()}
    return ET.SubElement(parent, tag, plain)


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    _add(svg, "line", x1=x1, y1=y1, x2=x2, y2=y2, **{"class": kind})


def _label(
    svg: ET.Element, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "label"
) -> ET.Element:
    # a third of the font size below the middle: dominant-baseline is not honoured everywhere
    element = _add(svg, "text", x=x, y=y + 4, **{"class": kind, "text-anchor": anchor})
    element.text = _clean(text)
    return element


def _history_words(shown: Sequence[tuple[Dot, float]], scored: int) -> str:
    if not shown:
        return "No trial has a score."
    dot, score = max(shown, key=lambda entry: entry[1])
    return f"{scored} scored trials; the best is {dot.label} with {score:.4f}."


def _interval_words(interval: Interval | None) -> str:
    return "" if interval is None else f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})"


def _grid_words(grid: Grid) -> str:
    return "; ".join(
        f"{kind}: {', '.join(f'{c} {grid.cells[kind, c]:.2f}' for c in columns)}"
        for kind in grid.types
        if (columns := [c for c in grid.columns if (kind, c) in grid.cells])
    )


def _shorten(text: str, most: int) -> str:
    text = _clean(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _clean(text: str) -> str:
    """Without the control characters that XML has no way to write."""
    return "".join(c if c.isprintable() else " " for c in text)


def _text(svg: ET.Element) -> str:
    return ET.tostring(svg, encoding="unicode")
