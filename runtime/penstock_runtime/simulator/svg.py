"""The timeline as a picture: stages down, time across, one bar a chunk, bubbles hatched. SVG."""

from __future__ import annotations

import html
import math
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from penstock_runtime.engine.timeline import SpanChunk, StepSpan

WIDTH = 1200
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 64, 40
ROW, GAP = 30, 6
TOOLTIPS = 20_000
"""Bars up to which each tells what it is when pointed at; more would make the file unwieldy."""


def timeline_svg(spans: Sequence[StepSpan], title: str) -> str:
    """Return the picture of these steps. Raises ValueError if there are none.

    title: of the picture; say whether it was simulated or measured.
    """
    if not spans:
        raise ValueError("no step, no picture")
    begin, end = min(s.begin for s in spans), max(s.end for s in spans)
    stages = sorted({span.stage for span in spans})
    height = TOP + len(stages) * (ROW + GAP) + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / max(end - begin, 1e-9)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">'
        ),
        (
            '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f3f3f3"/>'
            '<line x1="0" y1="0" x2="0" y2="6" stroke="#d0d0d0" stroke-width="2"/></pattern></defs>'
        ),
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16">{html.escape(title)}</text>',
        (
            f'<text x="{LEFT}" y="44" fill="#666">one bar a chunk, one colour a request; '
            "hatched: the stage idles</text>"
        ),
    ]
    tooltips = len(spans) <= TOOLTIPS
    ordered = sorted(spans, key=lambda span: span.stage)
    for row, (stage, bars) in enumerate(groupby(ordered, key=lambda span: span.stage)):
        y = TOP + row * (ROW + GAP)
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + ROW * 0.65:.0f}" text-anchor="end">stage {stage}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{ROW}" '
            'fill="url(#idle)"/>'
        )
        for span in bars:
            x = LEFT + (span.begin - begin) * scale
            parts += _bars(span, x, y, (span.end - span.begin) * scale, tooltips=tooltips)
    parts += _axis(end - begin, scale, height)
    parts.append("</svg>\n")
    return "\n".join(parts)


def _bars(span: StepSpan, x: float, y: float, width: float, *, tooltips: bool) -> Iterator[str]:
    """Yield one bar for each chunk; those of one step share its time, and its height by tokens."""
    tokens = sum(chunk.length for chunk in span.chunks)
    top = float(y)
    for chunk in span.chunks:
        height = ROW * chunk.length / tokens
        title = f"<title>{_describe(span, chunk)}</title>" if tooltips else ""
        yield (
            f'<rect x="{x:.2f}" y="{top:.2f}" width="{max(width, 0.2):.2f}" height="{height:.2f}" '
            f'fill="{_colour(chunk.key, span.step)}" stroke="white" '
            f'stroke-width="{min(0.6, width / 8):.2f}">{title}</rect>'
        )
        top += height


def _describe(span: StepSpan, chunk: SpanChunk) -> str:
    request = html.escape(chunk.request or str(chunk.key))
    return (
        f"request {request}, tokens [{chunk.start}, {chunk.start + chunk.length}), "
        f"{(span.end - span.begin) * 1e3:.2f} ms after {span.wait * 1e3:.2f} ms of waiting"
    )


def _colour(key: int, step: int) -> str:
    """Return a colour for a request; neighbouring steps differ in lightness.

    Hues go round by the golden angle, so that requests which follow each other look unlike.
    """
    return f"hsl({(210 + key * 137.5) % 360:.0f} 55% {48 + 12 * (step % 2)}%)"


def _axis(seconds: float, scale: float, height: int) -> Iterator[str]:
    step = _tick(seconds / 8)
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3)
    base = height - BOTTOM
    for i in range(math.floor(seconds / step + 1e-9) + 1):
        x = LEFT + i * step * scale
        yield (
            f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{base + 4}" stroke="#00000022"/>'
            f'<text x="{x:.1f}" y="{base + 20}" text-anchor="middle">'
            f"{i * step * factor:.6g} {unit}</text>"
        )


def _tick(about: float) -> float:
    """Return the 1, 2 or 5 times a power of ten next above `about`."""
    if about <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(about))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= about * (1 - 1e-9))
