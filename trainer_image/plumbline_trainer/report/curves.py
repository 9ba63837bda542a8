"""Curves of a training stage as inline SVG, in the page's own colours, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from plumbline_trainer.engine import range_test
from plumbline_trainer.report.facts import Point, series

# Matplotlib writes colours as numbers; these stand for the page's variables and are replaced in its output.
INK, _GRID, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206"
_VARIABLES = {INK: "var(--soft)", _GRID: "var(--line)", FIRST: "var(--blue)", SECOND: "var(--orange)"}
_COLOURS = {"var(--soft)": "#5b6470", "var(--line)": "#d9dde2", "var(--blue)": "#2f6fb7", "var(--orange)": "#d9730d"}
"""What they are in a file of its own."""
SMOOTH_FROM = 60
"""Steps from which a line is drawn smoothed above its points."""


@dataclass(frozen=True)
class Panel:
    """One plot: a training figure and what was held out beside it."""

    title: str
    training: str | None
    """Figure of every step; None where there is none."""
    held_out: str | None = None
    reference: float | None = None
    """A level to compare with, such as ½ for an accuracy."""
    unit: str = "optimizer step"
    """What is counted on the horizontal axis."""


_LIKELIHOOD = (Panel("Loss per token", "loss", "evalLoss"),)
_PREFERENCE = (
    Panel("Loss", "loss", "evalLoss"),
    Panel("Chosen preferred to rejected", "rewardAccuracy", "evalRewardAccuracy", 0.5),
    Panel("Margin of the implicit reward", "rewardMargin", "evalRewardMargin", 0.0),
)
PANELS: dict[str, tuple[Panel, ...]] = {
    **dict.fromkeys(("pretrain", "sft", "bestOfN"), _LIKELIHOOD),
    "rewardModel": (
        Panel("Loss", "loss", "evalLoss"),
        Panel("Better answer has the higher reward", "rewardAccuracy", "evalRewardAccuracy", 0.5),
        Panel("Margin of the reward", "rewardMargin", "evalRewardMargin", 0.0),
    ),
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo", "rrhf"), _PREFERENCE),
    "awr": (
        Panel("Weighted loss per token", "loss", "evalLoss"),
        Panel("Loss per token, all answers alike", "sftLoss", "evalSftLoss"),
    ),
    "kto": (
        Panel("Loss", "loss", "evalLoss"),
        Panel("Answers on their side of the reference point", "rewardAccuracy", "evalRewardAccuracy", 0.5),
        Panel("Distance of the implicit reward from the reference point", "rewardMargin", "evalRewardMargin", 0.0),
    ),
}


def panels_of(stage_type: str, parameters: Mapping[str, Any]) -> tuple[Panel, ...]:
    """The plots of a stage type. A sigmoid of the margin alone starts at ln 2."""
    panels = PANELS.get(stage_type, ())
    if parameters.get("rehearsal"):
        panels = (*panels, Panel("Loss per rehearsed token", "rehearsalLoss"))
    plain = parameters.get("loss", "sigmoid") in ("sigmoid", "robust") and not parameters.get("sftWeight")
    if stage_type == "dpo" and plain:
        return (replace(panels[0], reference=math.log(2)), *panels[1:])
    return panels


@dataclass(frozen=True)
class Figure:
    """A drawn plot."""

    title: str
    svg: str
    summary: str
    """In words, for people who do not see it."""


def draw_curves(
    stage: str, stage_type: str, points: Sequence[Point], parameters: Mapping[str, Any] | None = None
) -> list[Figure]:
    """Every plot that a stage's figures allow; none where it reported fewer than two steps."""
    return draw_panels(stage, panels_of(stage_type, parameters or {}), points)


def draw_panels(stage: str, panels: Sequence[Panel], points: Sequence[Point]) -> list[Figure]:
    """Those plots of which at least two steps were reported; what is measured at evaluations only, two evaluations."""
    figures = []
    for panel in panels:
        steps, values = series(points, panel.training) if panel.training is not None else ([], [])
        held_out = series(points, panel.held_out) if panel.held_out is not None else ([], [])
        if len(steps) >= 2 or (panel.training is None and len(held_out[0]) >= 2):
            svg = _draw(panel, steps, values, held_out, name=f"{stage}-{panel.training or panel.held_out}")
            figures.append(Figure(panel.title, svg, _summary(panel, steps, values, held_out)))
    return figures


def draw_range_test(stage: str, rates: Sequence[float], losses: Sequence[float], suggested: float | None) -> Figure:
    """Loss over learning rate of a range test, with the suggestion."""
    name = f"{stage}-range"
    with canvas_of(name) as (canvas, axes):
        axes.set_xscale("log")
        axes.plot(rates, losses, color=FIRST, linewidth=1.2, alpha=0.3)
        axes.plot(rates, range_test.smoothed(losses), color=FIRST, linewidth=2.0)
        if suggested is not None:
            axes.axvline(suggested, color=SECOND, linewidth=1.6)
        axes.set_xlabel("learning rate")
        svg = rendered(canvas, name)
    found = "no rate is suggested" if suggested is None else f"the suggested rate is {suggested:.2g}"
    title = "Loss over learning rate"
    return Figure(title, svg, f"{title}, from {rates[0]:.2g} to {rates[-1]:.2g}: {found}")


def standalone(svg: str) -> str:
    """A figure as a file of its own, with colours instead of the page's variables."""
    for variable, colour in _COLOURS.items():
        svg = svg.replace(variable, colour)
    return svg.replace("<svg ", '<svg width="644" height="350" style="background:#ffffff" ', 1)


def _draw(
    panel: Panel, steps: Sequence[int], values: Sequence[float], held_out: tuple[list[int], list[float]], *, name: str
) -> str:
    from matplotlib.ticker import MaxNLocator

    with canvas_of(name) as (canvas, axes):
        if panel.reference is not None:
            axes.axhline(panel.reference, color=INK, linewidth=0.9, dashes=(3, 3))
        smooth = len(values) >= SMOOTH_FROM
        if values:
            axes.plot(steps, values, color=FIRST, linewidth=1.6, alpha=0.3 if smooth else 1.0)
        if smooth:
            axes.plot(steps, smoothed(values), color=FIRST, linewidth=2.0)
        if len(held_out[0]) > 0:
            axes.plot(*held_out, color=SECOND, linewidth=1.6, marker="o", markersize=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel(panel.unit)
        return rendered(canvas, name)


def draw_reliability(stage: str, calibration: dict[str, Any]) -> Figure | None:
    """How often the answer with the higher reward is the better one, by how sure it is of that; None without rows.

    Args:
        stage: name of the stage.
        calibration: `error` and `bins` of its evaluation.json.
    """
    bins = [(float(item["confidence"]), float(item["accuracy"])) for item in calibration.get("bins", [])]
    if not bins:
        return None
    name = f"{stage}-calibration"
    with canvas_of(name) as (canvas, axes):
        axes.plot([0.5, 1.0], [0.5, 1.0], color=INK, linewidth=0.9, dashes=(3, 3))
        axes.plot(*zip(*bins, strict=True), color=SECOND, linewidth=1.6, marker="o", markersize=5)
        axes.set_xlabel("probability that the reward model gives its favourite")
        svg = rendered(canvas, name)
    said = ", ".join(f"{accuracy:.0%} right where it is {confidence:.0%} sure" for confidence, accuracy in bins)
    title = f"Calibration, expected error {float(calibration['error']):.2f}"
    return Figure(title, svg, f"{title}: {said}")


@contextmanager
def canvas_of(name: str) -> Iterator[tuple[Any, Any]]:
    """An empty plot in the page's style."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib.figure import Figure as Canvas

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(4.6, 2.5), layout="constrained")
        axes = canvas.subplots()
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        yield canvas, axes


def rendered(canvas: Any, name: str) -> str:
    """A plot as an element of the page."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Type": None})
    return _inline(buffer.getvalue(), name)


def smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over a tenth of the steps."""
    half = max(1, len(values) // 20)
    return [
        sum(window) / len(window)
        for index in range(len(values))
        if (window := values[max(0, index - half) : index + half + 1])
    ]


def _inline(svg: str, name: str) -> str:
    """Only the element, with the page's colours and identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    prefix = re.sub(r"[^a-zA-Z0-9]", "-", name)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _summary(
    panel: Panel, steps: Sequence[int], values: Sequence[float], held_out: tuple[list[int], list[float]]
) -> str:
    if not values:
        return f"{panel.title}: {held_out[1][0]:.3g} at step {held_out[0][0]}, then {held_out[1][-1]:.3g}"
    text = f"{panel.title}: {values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}"
    if len(held_out[0]) > 1:
        return f"{text}; on held-out rows {held_out[1][0]:.3g}, then {held_out[1][-1]:.3g}"
    return f"{text}; on held-out rows {held_out[1][0]:.3g}" if held_out[0] else text
