"""Gates: conditions on a stage's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plumbline_api.evaluation import Gate
from plumbline_api.online import ABORTED, ABORTED_REASON
from plumbline_api.stagerun import METRICS_MAX
from plumbline_api.status import Metric

GATE_FAILED = "GateFailed"


def is_aborted(metrics: Mapping[str, float]) -> bool:
    """Whether the stage stopped by its own abort rules."""
    return metrics.get(ABORTED, 0.0) > 0


def verdict(gates: Sequence[Gate], metrics: Mapping[str, float], said: str) -> tuple[str, str] | None:
    """Reason and message of a stage whose gates do not hold; None where all hold.

    A stage that was aborted tells why in its own words (`said`), whatever other gates have to say about its output.
    """
    if is_aborted(metrics) and any(gate.metric == ABORTED and not gate.holds(metrics[ABORTED]) for gate in gates):
        return ABORTED_REASON, said
    problem = gate_problem(gates, metrics)
    return None if problem is None else (GATE_FAILED, problem)


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
