"""Lines over the rounds as SVG. Drawn anew after every round, so by hand: matplotlib would take the run's own time."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 460, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 96, 28, 40
_MOST_POINTS = 400  # a line has no more corners than that


@dataclass(frozen=True)
class Line:
    """One figure over the rounds.

    Attributes:
        colour: a class of the style sheet.
        label: stands at its right end.
        points: (round from 1, figure, half the length of its bar), by round.
    """

    colour: str
    label: str
    points: tuple[tuple[int, float, float], ...]


def chart(
    name: str, title: str, lines: Sequence[Line], *, y: str, limits: tuple[float, float], budget: float | None = None
) -> str:
    """The element, escaped.

    Args:
        name: of the drawing, unique on its page.
        y: what its height means.
        limits: lowest and highest figure that is drawn.
        budget: a horizontal mark, in words "budget".
    """
    first = min(line.points[0][0] for line in lines)
    last = max(line.points[-1][0] for line in lines)
    low, high = limits

    def across(number: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((number - first) / (last - first) if last > first else 0.5)

    def up(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = []
    for value in ticks(low, high, 5):
        parts.append(f'<path class="rule" d="M{_LEFT} {up(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 7}" y="{up(value) + 4:.1f}">{value:g}</text>')
    marks = [tick for tick in ticks(first, last, 6) if tick == int(tick)]
    apart = 0.6 * (marks[1] - marks[0]) if len(marks) > 1 else 0.0
    for value in (first, *(tick for tick in marks if tick > first + apart)):
        parts.append(f'<text class="middle" x="{across(value):.1f}" y="{_HEIGHT - _BOTTOM + 18}">{value:.0f}</text>')
    parts.append(f'<text class="middle" x="{across((first + last) / 2):.1f}" y="{_HEIGHT - 5}">round</text>')
    if budget is not None:
        parts.append(f'<path class="hurt mark" d="M{_LEFT} {up(budget):.1f}H{_WIDTH - _RIGHT}"/>')
    labels = [(up(line.points[-1][1]), line.colour, line.label) for line in lines]
    labels += [(up(budget), "hurt", f"budget {budget:g}")] if budget is not None else []
    for height, (_, colour, label) in zip(
        _apart([height for height, *_ in sorted(labels)]), sorted(labels), strict=True
    ):
        text = html.escape(label)
        parts.append(f'<text class="{colour}" x="{_WIDTH - _RIGHT + 8}" y="{height + 4:.1f}">{text}</text>')
    for line in lines:
        shown = line.points[:: math.ceil(len(line.points) / _MOST_POINTS)]
        shown = shown if shown[-1] == line.points[-1] else (*shown, line.points[-1])
        corners = "L".join(f"{across(number):.1f} {up(value):.1f}" for number, value, _ in shown)
        parts.append(f'<path class="{line.colour} line" d="M{corners}"/>')
        bars = [(number, value, bar) for number, value, bar in shown if bar]
        if bars:
            drawn = "".join(f"M{across(n):.1f} {up(value - bar):.1f}V{up(value + bar):.1f}" for n, value, bar in bars)
            parts.append(f'<path class="{line.colour} bar" d="{drawn}"/>')
        number, value, _ = line.points[-1]
        parts.append(f'<circle class="{line.colour} dot" cx="{across(number):.1f}" cy="{up(value):.1f}" r="3.5"/>')
    told = "; ".join(f"{line.label} {line.points[-1][1]:.3f} after round {line.points[-1][0]}" for line in lines)
    named = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    return (
        f'<svg class="plot live" viewBox="0 0 {_WIDTH} {_HEIGHT}" {named}>'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(told)}.</desc>'
        f'<text class="over" x="0" y="12">{html.escape(y)}</text>{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most so many."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if (high - low) / (factor * power) < most)
    return [
        round(number * step, 12) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _apart(heights: Sequence[float], least: float = 15.0) -> list[float]:
    """Heights from the top down, pushed apart so that labels can be read, and kept inside."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    below = max(0.0, placed[-1] - (_HEIGHT - _BOTTOM)) if placed else 0.0
    return [height - below for height in placed]
