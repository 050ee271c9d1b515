"""Curves as inline SVG with HTML labels: no plotting library, so that a report opens anywhere and stays small.

A path holds the data's own numbers and a transform maps them to the frame: the picture stretches to any width while
lines and text keep their size, and the few lines of SCRIPT read the values for the tooltip back from the path.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.resources import files
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Scale = Literal["data", "zero", "log"]
COLORS = 8  # --c0 to --c7 of STYLE; further curves repeat them dashed


@dataclass(frozen=True)
class Series:
    """One curve of a figure over steps; an `area` reaches down to zero."""

    label: str
    x: Floats
    y: Floats
    color: int = 0
    kind: Literal["line", "faint", "dots", "area"] = "line"


def downsample(x: Floats, y: Floats, points: int = 1000) -> tuple[Floats, Floats]:
    """At most `points` of the points, in order: the lowest and the highest of each bucket, so that no spike is lost."""
    if len(x) <= points:
        return x, y
    keep: list[int] = []
    for start, stop in pairwise(np.linspace(0, len(x), points // 2 + 1).astype(int)):
        keep += sorted({start + int(y[start:stop].argmin()), start + int(y[start:stop].argmax())})
    return x[keep], y[keep]


def smooth(y: Floats, share: float = 0.02) -> Floats:
    """Centred moving mean over `share` of the curve. At the start the window shrinks from both sides: a steep fall stays where it is."""
    index, sums = np.arange(len(y)), np.concatenate([[0.0], np.cumsum(y)])
    half = np.minimum(index, int(len(y) * share / 2))
    low, high = index - half, np.minimum(index + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def short(value: float, digits: int = 4) -> str:
    """A number for people: 0, 3e-5, 0.125, 9,400, 12.6M."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:,.{digits}g}" if abs(value) < 1e3 else f"{value:,.0f}"
    if abs(value) < 1e-3 or abs(value) >= 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    power = min(4, int(math.log10(abs(value)) / 3))
    return f"{value / 1000**power:.{digits}g}{'kMBT'[power - 1]}"


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]; with `log` the limits and the ticks are powers of ten."""
    if log and high - low >= 1.5:
        every = math.ceil((high - low) / count)
        return [float(power) for power in range(math.ceil(low), math.floor(high) + 1) if power % every == 0]
    if log:
        return [math.log10(value) for value in ticks(10**low, 10**high, count=count) if value > 0]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * min((size for size in (1, 2, 5, 10) if size * unit >= raw * 0.999), default=10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def frame(series: Sequence[Series], from_zero: bool, log: bool) -> tuple[float, float, float | None]:
    """Lowest and highest value to show and, when a few spikes would flatten everything else, the peak that is left outside."""
    values = np.concatenate([one.y for one in series])
    low, high = (0.0 if from_zero else float(values.min())), float(values.max())
    most = float(np.quantile(values, 0.98))
    outside = None if log or high - low <= 4 * (most - low) or most <= low else high
    if outside is not None:
        high = most + (most - low) / 4
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - (0.0 if from_zero else margin), high + margin, outside


def figure(
    title: str,
    series: Sequence[Series],
    last_step: int,
    *,
    unit: str = "",
    scale: Scale = "data",
    skipped: Sequence[float] = (),
    events: Sequence[tuple[float, str]] = (),
) -> str:
    """One figure as HTML, empty when there is nothing to draw.

    `scale` says where the values' axis begins; `log` holds only for positive values that span two decades. `skipped` are steps
    marked on the lower edge, `events` are marked with a line that tells its text.
    """
    series = [one for one in series if len(one.x)]
    if not series:
        return ""
    ends = min(float(one.y.min()) for one in series), max(float(one.y.max()) for one in series)
    log = scale == "log" and ends[0] > 0 and ends[1] >= 100 * ends[0]
    series = [replace(one, y=np.log10(one.y)) for one in series] if log else series
    bottom, top, outside = frame(series, scale == "zero", log)
    series = [Series(one.label, *downsample(one.x, one.y), one.color, one.kind) for one in series]
    last_step = max(last_step, 1)
    sx, sy = 100 / last_step, 100 / (top - bottom)
    marks = sorted({round(step * sx, 1) for step in skipped})
    inner = f'<g transform="matrix({sx:.9g} 0 0 {-sy:.9g} 0 {top * sy:.9g})">{"".join(map(_paths, series))}</g>'
    inner += f'<path class="skip" d="{"".join(f"M{at:g} 100v-4" for at in marks)}"/>' if marks else ""
    labels = "".join(
        f'<span class="y" style="top:{(top - at) * sy:.2f}%">{short(10**at if log else at)}</span>' for at in ticks(bottom, top, log)
    )
    labels += "".join(f'<span class="x" style="left:{at * sx:.2f}%">{short(at)}</span>' for at in ticks(0, last_step) if at == int(at))
    lines = "".join(
        f'<i class="event" style="left:{step * sx:.2f}%" title="{escape(f"step {step:,.0f}: {text}")}"></i>' for step, text in events
    )
    named = [one for one in series if one.kind != "faint"]
    legend = [f'<span class="key {_dashed(one)}" style="--c:var(--c{one.color % COLORS})">{escape(one.label)}</span>' for one in named]
    legend += ['<span class="key skip">skipped step</span>'] if marks else []
    legend += ['<span class="key event">event</span>'] if lines else []
    note = f"log scale{f', {unit}' if unit else ''}" if log else unit
    note += f"{' · ' if note else ''}peak {short(outside)} outside the frame" if outside is not None else ""
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small></figcaption>"
        f'<div class="plot" data-last="{last_step}"{" data-log" if log else ""}>{labels}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">{inner}</svg>'
        f'{lines}<div class="cursor"></div><div class="tip"></div></div>'
        + (f'<div class="legend">{"".join(legend)}</div>' if len(legend) > 1 else "")
        + "</figure>"
    )


def _dashed(series: Series) -> str:
    return "dashed" if series.color >= COLORS else ""


def _paths(one: Series) -> str:
    """The series in its own numbers; a point is a line of no length, which round caps show as a dot."""
    points = [f"{x:.10g} {y:.6g}" for x, y in zip(one.x, one.y, strict=True)]
    color = f'style="--c:var(--c{one.color % COLORS})"'
    line = "M" + "L".join(points)
    if one.kind == "area":
        line = f"M{one.x[0]:.10g} 0L{line[1:]}L{one.x[-1]:.10g} 0Z"
    path = f'<path class="{one.kind} {_dashed(one)}" data-label="{escape(one.label)}" {color} d="{line}"/>'
    if one.kind == "dots" or len(points) == 1:
        path += f'<path class="dot" {color} d="{"".join(f"M{point}h0" for point in points)}"/>'
    return path


_FOLDER = files("maxtrain.training")
STYLE, SCRIPT = (_FOLDER.joinpath(name).read_text() for name in ("plot.css", "plot.js"))
