"""Draw the validation curves of a family of pretrained networks as one SVG file.

python scripts/plot_pretraining.py src/lamina/assets docs/pretraining.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 60, 50, 30, 110
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa7722", "#66ccee", "#aa3377")


def main() -> None:
    """Read every pretraining.json below a folder and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", type=Path, help="folder with one folder per network")
    parser.add_argument("svg", type=Path, help="file to write")
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.networks.glob("*/pretraining.json")]
    args.svg.write_text(draw(sorted(runs, key=lambda run: run["depth"])))


def draw(runs: list[dict]) -> str:
    """SVG text: validation loss over characters seen, the depths one after another as they grew."""
    lines, offset = [], 0.0
    for run in runs:
        per_step = run["recipe"]["batch_size"] * run["recipe"]["positions"] / 1e6
        points = [(offset + point["step"] * per_step, point["val_loss"]) for point in run["curve"]]
        lines.append((f"{run['depth']} blocks: {run['val_loss_nats']:.3f}", points))
        offset = points[-1][0] if run["recipe"]["grow"] else 0.0
    last = max(points[-1][0] for _, points in lines)
    low = min(loss for _, points in lines for _, loss in points) - 0.05
    high = min(1.7, max(loss for _, points in lines for _, loss in points))

    def place(x: float, loss: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">Validation loss on held-out novels, nats per character</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 10}">million characters seen, all depths together</text>',
    ]
    for tick in range(int(low * 10) + 1, int(high * 10) + 1):
        x, y = place(0, tick / 10)
        parts.append(f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>')
    for tick in range(0, int(last) + 1, 10):
        x, _ = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for colour, (label, points) in zip(COLOURS, lines, strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points if point[1] <= high))
        x, y = place(*points[-1])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{x - 4:.1f}" y="{y + 18:.1f}" fill="{colour}" text-anchor="middle">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
