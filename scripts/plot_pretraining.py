"""Draw the validation curves of a family of pretrained networks as one SVG file.

python scripts/plot_pretraining.py src/lamina/assets novels docs/pretraining.svg
python scripts/plot_pretraining.py src/lamina/assets tinyvit docs/pretraining-images.svg
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 60, 50, 30, 110
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa7722", "#66ccee", "#aa3377")


@dataclass(frozen=True)
class Axes:
    """What is drawn over what.

    Attributes:
        title: Of the picture.
        across: What is seen, and in which unit.
        per_unit: Characters or images in that unit.
        key: Of the score in a point of the curve.
        scale: What the score is multiplied by.
        digits: After the point, in labels.
        most: Scores above it are left out.
        beside: Pixels from the end of a line down to its label: below where lines fall, above where they rise.
    """

    title: str
    across: str
    per_unit: float
    key: str
    scale: float
    digits: int
    most: float
    beside: int


TEXT = Axes(
    title="Validation loss on held-out novels, nats per character",
    across="million characters seen, all depths together",
    per_unit=1e6,
    key="val_loss",
    scale=1,
    digits=3,
    most=1.7,
    beside=18,
)
IMAGES = Axes(
    title="Top-1 on validation images, %",
    across="thousand images seen, all depths together",
    per_unit=1e3,
    key="val_top1",
    scale=100,
    digits=1,
    most=100,
    beside=-8,
)


def main() -> None:
    """Read the pretraining.json of every member of a family below a folder and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", type=Path, help="folder with one folder per network")
    parser.add_argument("family", help="name of the family, as in its recipe")
    parser.add_argument("svg", type=Path, help="file to write")
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.networks.glob("*/pretraining.json")]
    family = [run for run in runs if run["recipe"]["name"] == args.family]
    if not family:
        parser.error(f"no network of {args.family} below {args.networks}")
    args.svg.write_text(draw(sorted(family, key=lambda run: run["depth"])))


def draw(runs: list[dict]) -> str:
    """SVG text: a score over what was seen, the depths one after another as they grew."""
    axes = TEXT if "text" in runs[0]["recipe"] else IMAGES
    lines, offset = [], 0.0
    for run in runs:
        per_step = run["recipe"]["batch_size"] * run["recipe"].get("positions", 1) / axes.per_unit
        points = [(offset + point["step"] * per_step, point[axes.key] * axes.scale) for point in run["curve"]]
        lines.append((f"{run['depth']} blocks: {points[-1][1]:.{axes.digits}f}", points))
        offset = points[-1][0] if run["recipe"]["grow"] else 0.0
    last = max(points[-1][0] for _, points in lines)
    scores = [score for _, points in lines for _, score in points]
    low, high = min(scores) - 0.05 * axes.scale**0.5, min(axes.most, max(scores))

    def place(x: float, score: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - score) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">{axes.title}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 10}">{axes.across}</text>',
    ]
    for label, tick in ticks(low, high):
        x, y = place(0, tick)
        parts.append(f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for label, tick in ticks(0, last):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>')
    for colour, (label, points) in zip(COLOURS, lines, strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points if point[1] <= high))
        x, y = place(*points[-1])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{x - 4:.1f}" y="{y + axes.beside:.1f}" fill="{colour}" text-anchor="middle">{label}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def ticks(low: float, high: float) -> list[tuple[str, float]]:
    """At most eight round numbers from low to high, and how they are written."""
    power = 10.0 ** math.floor(math.log10((high - low) / 8))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) <= 8)
    digits = max(0, -math.floor(math.log10(step)))
    return [(f"{i * step:.{digits}f}", i * step) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


if __name__ == "__main__":
    main()
