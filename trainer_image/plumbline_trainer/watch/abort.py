"""Rules that stop a stage whose figures go astray. Pure; no I/O, no clock.

A rule makes an observation whenever its figure is measured: at every step, or at evaluations for figures such as
goldReward. It holds once it has held at as many observations in a row as its window (`for`) is long.

- `above`, `below`: an observation holds where the figure lies beyond the bound.
- `fallsWhile`: the window holds where at each of its observations the figure is lower, and the other figure higher,
  than both were just before the window. Its start is one fixed point, so that noise within the window does not matter
  as long as everything stays on the wrong side of that point. The other figure may be measured more often (a reward at
  every step, a gold reward at evaluations): what counts is its mean since the observation before. Where it was not
  measured since, there is no observation.

What is not a number is no observation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from plumbline_api.online import AbortRule
from plumbline_api.watched import RARE_FIGURES


@dataclass
class _Seen:
    """What one rule has seen."""

    held: int = 0
    """Observations in a row at which it held; how much of its window has passed."""
    last: float = 0.0
    """Value at the last observation."""
    fresh: bool = False
    """Whether the last call made an observation."""
    pairs: list[list[float]] = field(default_factory=list)
    """fallsWhile: the figure and the other one at the last observations, as many as the window and one."""
    others: list[float] = field(default_factory=list)
    """fallsWhile: the other figure's values since the last observation."""


class AbortWatch:
    """Watches figures by rules. Its state is JSON and is restored exactly."""

    def __init__(self, rules: Sequence[AbortRule]) -> None:
        """Begin.

        Args:
            rules: Of the stage; the first whose window is full gives the reason.
        """
        self.rules = list(rules)
        self._seen = [_Seen() for _ in self.rules]

    def observe(self, figures: Mapping[str, float]) -> None:
        """Take what was just measured into account.

        Figures of a rollout speak of the weights that sampled it, so observe them before those weights change.

        Args:
            figures: Of a rollout, of the updates of a step, or of an evaluation; in one call or in several.
        """
        for rule, seen in zip(self.rules, self._seen, strict=True):
            seen.fresh = False
            if rule.falls_while is None:
                _observe_bound(rule, seen, figures)
            else:
                _observe_fall(rule, seen, figures)

    @property
    def violated(self) -> bool:
        """Whether the window of a rule has begun."""
        return any(seen.held > 0 for seen in self._seen)

    @property
    def good(self) -> bool:
        """Whether the weights that were observed last are known to be good.

        No window has begun, and no rule waits for an evaluation to look at them: between evaluations nobody knows what
        goldReward is.
        """
        looked = (
            seen.fresh or rule.metric not in RARE_FIGURES for rule, seen in zip(self.rules, self._seen, strict=True)
        )
        return not self.violated and all(looked)

    @property
    def reason(self) -> str | None:
        """Why the stage stops, in words, such as `kl above 15 for 5 steps (now 17.2)`; None while it goes on."""
        for rule, seen in zip(self.rules, self._seen, strict=True):
            if seen.held >= rule.for_:
                return _words(rule, seen)
        return None

    def state(self) -> dict[str, Any]:
        """Everything it knows, as JSON."""
        return {"rules": [asdict(seen) for seen in self._seen]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state, exactly.

        Raises:
            ValueError: if it is of other rules.
        """
        if len(state["rules"]) != len(self.rules):
            raise ValueError(f"the state is of {len(state['rules'])} abort rules; there are {len(self.rules)}")
        self._seen = [_Seen(**seen) for seen in state["rules"]]


def _observe_bound(rule: AbortRule, seen: _Seen, figures: Mapping[str, float]) -> None:
    value = _measured(figures, rule.metric)
    if value is None:
        return
    beyond = (rule.above is not None and value > rule.above) or (rule.below is not None and value < rule.below)
    seen.held, seen.last, seen.fresh = seen.held + 1 if beyond else 0, value, True


def _observe_fall(rule: AbortRule, seen: _Seen, figures: Mapping[str, float]) -> None:
    assert rule.falls_while is not None
    other, value = _measured(figures, rule.falls_while), _measured(figures, rule.metric)
    if other is not None:
        seen.others.append(other)
    if value is None or not seen.others:
        return
    pair = [value, math.fsum(seen.others) / len(seen.others)]
    seen.pairs = [*seen.pairs, pair][-(rule.for_ + 1) :]
    seen.others, seen.last, seen.fresh = [], value, True
    seen.held = _longest_window(seen.pairs)


def _longest_window(pairs: Sequence[Sequence[float]]) -> int:
    """At how many last observations in a row the figure is lower, and the other one higher, than just before them."""
    longest, highest, lowest = 0, -math.inf, math.inf
    for back, (figure, other) in enumerate(reversed(pairs)):
        if back and figure > highest and other < lowest:
            longest = back
        highest, lowest = max(highest, figure), min(lowest, other)
    return longest


def _measured(figures: Mapping[str, float], name: str) -> float | None:
    value = figures.get(name)
    if value is None or math.isnan(value):
        return None
    # JSON has no infinity, and the state must read back as it was.
    return min(max(value, -sys.float_info.max), sys.float_info.max)


def _words(rule: AbortRule, seen: _Seen) -> str:
    unit = "evaluation" if rule.metric in RARE_FIGURES else "step"
    window = f" for {rule.for_} {unit}s" if rule.for_ > 1 else ""
    if rule.falls_while is not None:
        (first, before), (last, now) = seen.pairs[0], seen.pairs[-1]
        moved = f"{_short(first)} → {_short(last)}, {rule.falls_while} {_short(before)} → {_short(now)}"
        return f"{rule.metric} falls while {rule.falls_while} rises{window} ({moved})"
    over = rule.above is not None and seen.last > rule.above
    bound = f"above {rule.above:g}" if over else f"below {rule.below:g}"
    return f"{rule.metric} {bound}{window} (now {_short(seen.last)})"


def _short(value: float) -> str:
    return f"{value:.3g}"
