"""What the report draws, and how it writes numbers.

Charts are Altair's, rendered to SVG by vl_convert; their colours are the page's CSS variables, so that they follow it into the dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

INK, SOFT, LINE = "var(--ink)", "var(--soft)", "var(--line)"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
FONT = "system-ui, sans-serif"
WIDTH, HEIGHT, LETTER = 330, 250, 7.4
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def finite(value: Any) -> float | None:
    """A number, or None for what is none: null, NaN, infinity."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Scale:
    """How numbers that stand together are written: one prefix, one count of decimals."""

    factor: float = 1.0
    suffix: str = ""
    decimals: int = 0
    trim: bool = False

    @classmethod
    def of(cls, values: Sequence[float | None], unit: str = "", exact: bool = False, digits: int = 4) -> Scale:
        """The scale on which the largest of some values has so many digits."""
        known = [abs(value) for value in values if value is not None]
        largest = max(known, default=0.0)
        if unit != "bytes" and largest < 1e6 and all(value == int(value) for value in known):
            return cls()
        factor, suffix = next(((size, name) for size, name in PREFIXES if largest >= size and (unit == "bytes" or size >= 1e6)), (1.0, ""))
        if 0 < largest < 1e-3:
            power = 3 * math.floor(math.log10(largest) / 3)
            factor, suffix = 10.0**power, "×10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        whole = unit == "bytes" and factor == 1
        decimals = 0 if whole else max(0, digits - 1 - math.floor(math.log10(largest / factor)))
        return cls(factor, suffix + ("B" if unit == "bytes" else ""), decimals, exact)

    def bare(self, value: float | None, sign: bool = False) -> str:
        """The digits alone."""
        if value is None:
            return "–"
        text = f"{value / self.factor:{'+' if sign and value else ''},.{self.decimals}f}"
        if self.trim and "." in text:
            text = text.rstrip("0").rstrip(".")
        return text.replace("-", "−")

    def write(self, value: float | None, sign: bool = False) -> str:
        """The number with its prefix."""
        return self.bare(value, sign) + (f" {self.suffix}" if self.suffix and value is not None else "")

    def interval(self, low: float | None, high: float | None) -> str:
        """An interval; nothing if there is none."""
        return "" if low is None or high is None else f"[{self.bare(low)}, {self.bare(high)}]" + (f" {self.suffix}" if self.suffix else "")


def plain(value: Any, unit: str = "") -> str:
    """One number by itself, to four digits."""
    number = finite(value)
    return Scale.of([number], unit, exact=True).write(number)


def broken(name: str) -> Markup:
    """A name that may break across lines where its parts meet."""
    return Markup(str(escape(name)).replace("[", "<wbr>[").replace(",", ",<wbr>").replace("=", "=<wbr>"))


def duration(seconds: float) -> str:
    """Seconds as one would say them: 0.42 s, 12.3 s, 2 min 5 s, 1 h 3 min."""
    if seconds < 59.95:
        return f"{seconds:.3g} s" if seconds >= 0.001 or not seconds else "< 1 ms"
    for size, large, small_size, small in ((60, "min", 1, "s"), (3600, "h", 60, "min"), (86400, "d", 3600, "h")):
        whole, rest = divmod(round(seconds / small_size), size // small_size)
        if large == "d" or whole < {"min": 60, "h": 24}[large]:
            return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
    raise AssertionError


@dataclass(frozen=True)
class Point:
    """A value of the study in a chart."""

    name: str
    label: str
    step: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()

    @property
    def row(self) -> dict[str, Any]:
        return {"name": self.name, "step": self.step, "x": self.x, "y": self.y, "low": self.bottom, "high": self.top}

    @property
    def bottom(self) -> float:
        return self.y if self.low is None else self.low

    @property
    def top(self) -> float:
        return self.y if self.high is None else self.high


@dataclass(frozen=True)
class Span:
    """The range of an axis, and where on it a value stands."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float], pad: float = 0.08) -> Span:
        """A range around some values; logarithmic where they lie more than a factor of 20 apart."""
        low, high = min(values), max(values)
        if low > 0 and high / low > 20:
            ratio = (high / low) ** pad
            return cls(low / ratio, high * ratio, True)
        room = (high - low) * pad or abs(high) * pad or 1.0
        return cls(low - room, high + room, False)

    def share(self, value: float) -> float:
        """Where a value stands, 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def encoded(self) -> Any:
        """The same as a scale of Altair's."""
        import altair

        return altair.Scale(domain=[self.low, self.high], type="log" if self.logarithmic else "linear", nice=False, zero=False)

    def axis(self, title: str, **more: Any) -> Any:
        """An axis with few ticks and short numbers."""
        import altair

        return altair.Axis(title=title, tickCount=5, format="~s" if self.high >= 1e4 else "~r", labelOverlap=True, labelFlush=False, **more)


def scatter(points: Sequence[Point], x_title: str, y_title: str, steps: Sequence[str], best: Sequence[Point] = ()) -> str:
    """The first measure against a cost, with intervals; every point labelled, and a line through the `best` ones, from left to right."""
    import altair

    across, up = Span.over([point.x for point in points], 0.12), Span.over([edge for point in points for edge in (point.bottom, point.top)])
    heights = [((1 - up.share(point.y)) * HEIGHT, (1 - up.share(point.top)) * HEIGHT, (1 - up.share(point.bottom)) * HEIGHT) for point in points]
    lefts = _dodged([(across.share(point.x) * WIDTH, top, bottom) for point, (_, top, bottom) in zip(points, heights, strict=True)])
    places = list(_labels([(left, *three, point.label) for point, left, three in zip(points, lefts, heights, strict=True)]))
    x = altair.X("x:Q", scale=across.encoded(), axis=across.axis(x_title, grid=False))
    y = altair.Y("y:Q", scale=up.encoded(), axis=up.axis(y_title, titleAngle=0, titleAlign="left", titleAnchor="end", titleX=-44, titleY=-12, minExtent=44))
    frame = altair.Chart(altair.Data(values=[point.row for point in points])).mark_point(opacity=0).encode(x=x, y=y)
    pixel_x, pixel_y = altair.X("px:Q", scale=None), altair.Y("py:Q", scale=None)
    drawn = altair.Chart(
        altair.Data(values=[{"px": left, "py": middle, "py2": bottom, "top": top, "step": point.step} for point, left, (middle, top, bottom) in zip(points, lefts, heights, strict=True)])
    )
    bars = drawn.mark_rule(strokeWidth=1.5, opacity=0.6).encode(x=pixel_x, y=altair.Y("top:Q", scale=None), y2="py2:Q", color=_colours(points, steps))
    marks = drawn.mark_point(filled=True, size=70, opacity=1).encode(x=pixel_x, y=pixel_y, color=_colours(points, steps), shape=_shapes(points, steps))
    texts = [{"px": place[0], "py": place[1], "side": place[2], "text": point.label} for point, place in zip(points, places, strict=True)]
    names = [
        altair.Chart(altair.Data(values=there)).mark_text(align=side, baseline="middle", fontSize=13, color=INK).encode(x=pixel_x, y=pixel_y, text="text:N")
        for side in ("left", "right", "center")
        if (there := [text for text in texts if text["side"] == side])
    ]
    far = [{"px": a, "py": b, "px2": c, "py2": d} for _, _, _, *leader in places for a, b, c, d in leader]
    leaders = altair.Chart(altair.Data(values=far)).mark_rule(strokeWidth=0.8, color=SOFT).encode(x=pixel_x, y=pixel_y, x2="px2:Q", y2="py2:Q")
    edge = [{"px": lefts[place], "py": heights[place][0], "turn": turn} for turn, one in enumerate(best) for place in [points.index(one)]]  # in their order: points that stand aside may change theirs
    line = altair.Chart(altair.Data(values=edge)).mark_line(strokeWidth=1, strokeDash=[3, 3], color=SOFT).encode(x=pixel_x, y=pixel_y, order="turn:Q")
    return _svg(
        altair.layer(frame, *([line] if len(edge) > 1 else []), bars, *([leaders] if far else []), marks, *names)
        .resolve_scale(x="independent", y="independent")
        .properties(width=WIDTH, height=HEIGHT),
        legend_offset=34,
    )


def _dodged(bars: Sequence[tuple[float, float, float]]) -> list[float]:
    """Where across (pixels) bars (x, top, bottom) stand, moved a little aside where one would cover another."""
    placed: list[tuple[float, float, float]] = []
    for x, top, bottom in bars:
        tries = (x + side * 9 * step for step in range(5) for side in ((1, -1) if step else (1,)))
        place = next((at for at in tries if 5 < at < WIDTH - 5 and not any(abs(at - other) < 8 and top - 6 < low and high < bottom + 6 for other, high, low in placed)), x)
        placed.append((place, top, bottom))
    return [place for place, *_ in placed]


def dots(points: Sequence[Point], title: str, steps: Sequence[str], reference: str) -> str:
    """A dot and an interval for every value, the seeds as faint dots, the reference as a dashed line."""
    import altair

    span = Span.over([edge for point in points for edge in (point.bottom, point.top, *point.seeds)], 0.05)
    x = altair.X("y:Q", scale=span.encoded(), axis=span.axis(title))
    y = altair.Y("name:N", sort=[point.name for point in points], axis=None, scale=altair.Scale(paddingOuter=0.1))
    base = altair.Chart(altair.Data(values=[point.row for point in points]))
    seeds = altair.Chart(altair.Data(values=[{"name": point.name, "y": value, "step": point.step} for point in points for value in point.seeds]))
    at = [{"y": point.y} for point in points if point.name == reference]
    offset = 7  # the name stands above its line, not beside it, so that long names fit a phone
    layers = [
        altair.Chart(altair.Data(values=at)).mark_rule(strokeDash=[3, 3], color=SOFT).encode(x=x) if at else None,
        base.mark_rule(strokeWidth=2, yOffset=offset).encode(x=altair.X("low:Q", scale=span.encoded()), x2="high:Q", y=y, color=_colours(points, steps)),
        seeds.mark_point(filled=True, size=55, opacity=0.35, yOffset=offset).encode(x=x, y=y, color=_colours(points, steps)) if any(point.seeds for point in points) else None,
        base.mark_point(filled=True, size=70, opacity=1, yOffset=offset).encode(x=x, y=y, color=_colours(points, steps), shape=_shapes(points, steps)),
        base.mark_text(align="left", baseline="middle", fontSize=13, color=INK, dy=-8).encode(x=altair.value(2), y=y, text="name:N"),
    ]
    return _svg(altair.layer(*[layer for layer in layers if layer is not None]).properties(width=400, height=altair.Step(38)))


def _range(points: Sequence[Point], steps: Sequence[str]) -> tuple[list[str], list[int]]:
    """Steps in the chart, and their places among all that are measured, which give each its colour and shape in every chart; 0 is what was given."""
    shown = list(dict.fromkeys(point.step for point in points))
    return shown, [1 + list(steps).index(step) if step in steps else 0 for step in shown]


def _legend() -> Any:
    import altair

    return altair.Legend(orient="top", title=None, symbolSize=70, symbolOpacity=1, columns=3, labelLimit=150, columnPadding=24)


def _colours(points: Sequence[Point], steps: Sequence[str]) -> Any:
    import altair

    shown, places = _range(points, steps)
    return altair.Color("step:N", sort=shown, scale=altair.Scale(domain=shown, range=[f"var(--s{1 + (place - 1) % 5 if place else 0})" for place in places]), legend=_legend())


def _shapes(points: Sequence[Point], steps: Sequence[str]) -> Any:
    import altair

    shown, places = _range(points, steps)
    return altair.Shape("step:N", sort=shown, scale=altair.Scale(domain=shown, range=[SHAPES[place % len(SHAPES)] for place in places]), legend=_legend())


def _svg(chart: Any, legend_offset: int = 12) -> str:
    """A chart as SVG that scales with the page and takes its colours."""
    import vl_convert

    axis = {"labelColor": INK, "titleColor": INK, "labelFontSize": 13, "titleFontSize": 13, "titleFontWeight": "normal", "gridColor": LINE, "domainColor": SOFT, "tickColor": SOFT}
    chart = chart.configure(background="transparent", font=FONT, padding=4).configure_view(stroke=None).configure_axis(**axis).configure_legend(labelColor=INK, labelFontSize=13, offset=legend_offset)
    svg = str(vl_convert.vegalite_to_svg(chart.to_dict(validate=False)))
    head, body = svg.split(">", 1)
    view = re.search(r'viewBox="([^"]+)"', head)
    return f'<svg class="plot" role="img" viewBox="{view[1] if view else "0 0 400 300"}">{body}'


def _labels(places: Sequence[tuple[float, float, float, float, str]]) -> Iterator[tuple[Any, ...]]:
    """For every point (x, y, interval from, to, text; pixels) where its label stands, on which side it begins, and a leader if that is far.

    Greedy: each label takes the candidate place that overlaps least with points, intervals and labels before it.
    """
    blocked = [(x - 6, y - 6, x + 6, y + 6, 8.0) for x, y, *_ in places] + [(x - 1, min(a, b), x + 1, max(a, b), 2.0) for x, _, a, b, _ in places]
    for x, y, _, _, text in places:
        width, best, chosen = LETTER * len(text), math.inf, (x, y, "left", 0, (0.0, 0.0, 0.0, 0.0))
        for distance in range(0, 120, 8):
            for rise in (-distance, distance) if distance else (0,):
                for side, at, left in (("left", x + 9 + distance * 0.3, 0.0), ("right", x - 9 - distance * 0.3, -width), ("center", x, -width / 2))[: 3 if distance else 2]:
                    box = (at + left - 1, y + rise - 7, at + left + width + 1, y + rise + 7)
                    outside = max(0, -box[0]) + max(0, box[2] - WIDTH - 4) + max(0, -box[1]) + max(0, box[3] - HEIGHT)
                    cost = distance * 2 + 50 * outside + sum(weight * _overlap(box, other) for *other, weight in blocked)
                    if cost < best:
                        best, chosen = cost, (at, y + rise, side, distance, box)
        at, middle, side, distance, box = chosen
        blocked.append((*box, 8.0))
        yield (at, middle, side, (x, y, min(max(x, box[0]), box[2]), middle + (7 if middle < y else -7))) if distance > 16 else (at, middle, side)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))


COLUMN, GAP, BOX_LINE, LANE = 204, 60, 18, 8


def graph(resolved: dict[str, Any], variants: dict[str, int]) -> dict[str, Any] | None:
    """Boxes and arrows of a study, laid out in columns: what is given, the steps, the measures.

    An arrow that passes a column gets a lane of its own there, shared by all that leave the same box.
    """
    boxes, edges = _boxes(resolved, variants)
    if not boxes:
        return None
    depth = max(box["layer"] for box in boxes.values())
    lanes = {(source, layer) for source, target in edges for layer in range(boxes[source]["layer"] + 1, boxes[target]["layer"])}
    heights: dict[Any, float] = dict.fromkeys(lanes, LANE)
    heights |= {key: BOX_LINE * (1 + len(box["lines"])) + 16 for key, box in boxes.items()}
    middle: dict[Any, float] = {}

    def before(key: Any) -> list[Any]:
        """What an arrow into a box, or a lane, comes from in the column before."""
        layer = key[1] if key in lanes else boxes[key]["layer"]
        sources = [key[0]] if key in lanes else [source for source, target in edges if target == key]
        return [source if boxes[source]["layer"] == layer - 1 else (source, layer - 1) for source in sources]

    for layer in range(depth + 1):
        members = [key for key, box in boxes.items() if box["layer"] == layer] + sorted(lane for lane in lanes if lane[1] == layer)
        if layer:
            members.sort(key=lambda key: sum(middle[one] for one in before(key)) / max(1, len(before(key))))
        total = sum(heights[key] + 18 for key in members) - 18
        top = -total / 2
        for key in members:
            middle[key] = top + heights[key] / 2
            top += heights[key] + 18
    least = min(middle[key] - heights[key] / 2 for key in middle)
    middle = {key: value - least + 2 for key, value in middle.items()}
    left = {key: 2 + (COLUMN + GAP) * (key[1] if key in lanes else boxes[key]["layer"]) for key in middle}
    paths = []
    for key in middle:
        sources = sorted(before(key), key=lambda one: middle[one])
        for place, source in enumerate(sources):
            y = middle[key] + (place - (len(sources) - 1) / 2) * min(14, heights[key] / max(1, len(sources)))
            bend, start, end = GAP / 2, left[source] + COLUMN, left[key] - (0 if key in lanes else 3)
            paths.append(
                {"d": f"M{start} {middle[source]:.1f}C{start + bend} {middle[source]:.1f} {end - bend} {y:.1f} {end} {y:.1f}" + (f"h{COLUMN}" if key in lanes else ""), "head": key not in lanes}
            )
    drawn = [{**box, "x": left[key], "y": round(middle[key] - heights[key] / 2, 1), "height": heights[key]} for key, box in boxes.items()]
    return {"boxes": drawn, "paths": paths, "width": 4 + depth * (COLUMN + GAP) + COLUMN, "height": round(max(middle[key] + heights[key] / 2 for key in middle) + 2, 1), "box": COLUMN}


def _boxes(resolved: dict[str, Any], variants: dict[str, int]) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Every box with its lines and its column, by a key, and who feeds whom."""
    boxes: dict[str, dict[str, Any]] = {}
    edges: list[tuple[str, str]] = []
    for name, source in (resolved.get("given") or {}).items():
        kind = next((kind for kind in ("model", "corpus", "generator") if kind in source), "")
        boxes[name] = {"kind": "given", "title": name, "lines": [str(source.get(kind, "")), " ".join(str(value) for key, value in source.items() if key != kind)], "layer": 0}
    steps = dict(resolved.get("steps") or {})
    while steps:
        ready = [name for name, step in steps.items() if not _sources(step.get("inputs")) & (set(steps) - {name})] or list(steps)
        for name in ready:
            step = steps.pop(name)
            tried = [f"{label} · {next(iter(use), '')}" for label, use in (step.get("try") or {}).items()] or [next(iter(step.get("use") or {}), "")]
            more = [f"budget {step['budget']}"] if step.get("budget") else []
            fan = [f"{variants[name]} variants"] if not step.get("try") and variants.get(name, 1) > 1 else []
            sources = [source for source in boxes if source in _sources(step.get("inputs"))]
            shown = tried if len(tried) <= 9 else [*tried[:8], f"and {len(tried) - 8} more"]
            boxes[name] = {"kind": "step", "title": name, "lines": [*shown, *more, *fan], "layer": 1 + max((boxes[source]["layer"] for source in sources), default=0)}
            edges += [(source, name) for source in sources]
    last = 1 + max((box["layer"] for box in boxes.values()), default=0)
    for name, measure in (resolved.get("measure") or {}).items():
        key, used = f"measure {name}", next(iter(measure.get("use") or {}), "")
        edges += [(source, key) for source in boxes if source in _sources({"of": measure.get("of") or [], "on": measure.get("on") or [], **(measure.get("inputs") or {})})]
        boxes[key] = {"kind": "measure", "title": name, "lines": [used.split(".")[-1]] if used.split(".")[-1] != name else [], "layer": last}
    for box in boxes.values():
        box["lines"] = [{"full": line, "short": line if len(line) <= 26 else line[:25] + "…"} for line in box["lines"] if line]
        box["short"] = box["title"] if len(box["title"]) <= 22 else box["title"][:21] + "…"
    return boxes, edges


def _sources(inputs: dict[str, list[str]] | None) -> set[str]:
    return {reference.partition("[")[0] for references in (inputs or {}).values() for reference in references}
