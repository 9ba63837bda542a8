"""Gates: conditions on a stage's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plumbline_api.evaluation import Gate
from plumbline_api.stagerun import METRICS_MAX
from plumbline_api.status import Metric


def gate_problem(gates: Sequence[Gate], metrics: Mapping[str, float]) -> str | None:
    """Why the first gate that does not hold fails, with value and bound; None where all hold."""
    for gate in gates:
        if gate.metric not in metrics:
            shown = ", ".join(sorted(metrics)) or "nothing"
            return f"gate on {gate.metric}: the stage did not measure it. It measured: {shown}"
        value = metrics[gate.metric]
        if not gate.holds(value):
            bounds = [
                f"{word} {bound:g}"
                for word, bound in (("at least", gate.at_least), ("at most", gate.at_most))
                if bound is not None
            ]
            return f"{gate.metric} is {value:g}; the gate asks for {' and '.join(bounds)}"
    return None


def written(metrics: Mapping[str, float]) -> list[Metric]:
    """Metrics as status holds them: decimal numbers that read back to the same value."""
    return [Metric(name=name[:128], value=repr(float(value))) for name, value in list(metrics.items())[:METRICS_MAX]]


def read(metrics: Sequence[Metric]) -> dict[str, float]:
    """Metrics from status; what is no number is left out."""
    found: dict[str, float] = {}
    for metric in metrics:
        try:
            found[metric.name] = float(metric.value)
        except ValueError:
            continue
    return found
