"""A picture of `bench context`: an SVG that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from v4_ascend.runtime.bench_context import Point

HUES = ("#b3202c", "#1f5fa8", "#2b8a3e", "#8a5a00", "#6b3fa0")
LEFT, TOP, WIDTH, HEIGHT = 70, 40, 560, 320
TEXT = 'font-family="system-ui, sans-serif" font-size="12"'


@dataclass(frozen=True, slots=True)
class Axes:
    """Powers of two of the context across, powers of ten of the seconds up."""

    x: tuple[float, float]
    y: tuple[int, int]

    @classmethod
    def around(cls, points: Sequence[Point]) -> Axes:
        """Return axes that show every point and its floor."""
        contexts = [math.log2(p.context) for p in points]
        seconds = [math.log10(y) for p in points for y in (p.seconds, p.floor)]
        low, high = math.floor(min(seconds)), math.ceil(max(seconds))
        return cls((min(contexts), max(*contexts, min(contexts) + 1)), (low, max(high, low + 1)))

    def place(self, context: float, seconds: float) -> tuple[float, float]:
        """Return where a point is drawn, from the upper left corner."""
        across = (math.log2(context) - self.x[0]) / (self.x[1] - self.x[0])
        down = (self.y[1] - math.log10(seconds)) / (self.y[1] - self.y[0])
        return round(LEFT + across * WIDTH, 1), round(TOP + down * HEIGHT, 1)


def plot(points: Sequence[Point], title: str) -> str:
    """Return a drawing of seconds against context, a line for each batch, its floor dashed."""
    run = [p for p in points if not p.why]
    axes = Axes.around(run)
    batches = sorted({p.batch for p in run})
    lines = [
        f'<text x="{LEFT}" y="20" font-weight="bold">{escape(title)}</text>',
        *_grid(axes, sorted({p.context for p in run})),
        *(
            line
            for number, batch in enumerate(batches)
            for line in _batch(axes, [p for p in run if p.batch == batch], HUES[number % len(HUES)])
        ),
    ]
    size = f'width="{LEFT + WIDTH + 90}" height="{TOP + HEIGHT + 50}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {TEXT}>'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join((start, ground, *lines, "</svg>", ""))


def _grid(axes: Axes, contexts: list[int]) -> Iterator[str]:
    bottom = TOP + HEIGHT
    for power in range(axes.y[0], axes.y[1] + 1):
        y = axes.place(contexts[0], 10.0**power)[1]
        yield f'<path d="M{LEFT} {y}h{WIDTH}" stroke="#ddd"/>'
        label = f"{10.0 ** (power + 3):g} ms"
        yield f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{label}</text>'
    for context in contexts:
        x = axes.place(context, 1.0)[0]
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{context:,}</text>'
    caption = "tokens of context; dashed: the floor"
    yield f'<text x="{LEFT + WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">{caption}</text>'


def _batch(axes: Axes, points: list[Point], hue: str) -> Iterator[str]:
    measured = [axes.place(p.context, p.seconds) for p in points]
    floors = [axes.place(p.context, p.floor) for p in points]
    for places, dashes in ((measured, "none"), (floors, "4 4")):
        path = " ".join(f"{x},{y}" for x, y in places)
        style = f'fill="none" stroke="{hue}" stroke-width="2" stroke-dasharray="{dashes}"'
        yield f'<polyline points="{path}" {style}/>'
    x, y = measured[-1]
    yield f'<text x="{x}" y="{y}" dx="6" dy="4" fill="{hue}">batch {points[0].batch}</text>'
