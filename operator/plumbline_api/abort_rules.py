"""Checks of abort rules: a rule on a figure that nobody measures would never stop anything."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from plumbline_api.errors import Problem
from plumbline_api.online import ONLINE_STAGES, AbortRule, OnlineStage
from plumbline_api.pipeline import PipelineSpec
from plumbline_api.watched import RARE_FIGURES, figures_of, needs_held_out


def check_abort_rules(spec: PipelineSpec) -> Iterator[Problem]:
    """Rules on figures that their stage does not measure, or measures only when it is over."""
    for index, stage in enumerate(spec.stages):
        here = f"spec.stages[{index}]"
        if not isinstance(stage.value, OnlineStage):
            if stage.abort_when:
                watched = ", ".join(ONLINE_STAGES)
                yield Problem(f"{here}.abortWhen", f"{stage.type} is not watched; leave it out. Watched are {watched}")
            elif stage.on_abort is not None:
                yield Problem(f"{here}.onAbort", f"{stage.type} is not watched; leave it out")
            continue
        if stage.on_abort is not None and not stage.abort_when:
            yield Problem(f"{here}.onAbort", "without abortWhen nothing aborts the stage; leave it out, or add rules")
        for number, rule in enumerate(stage.abort_when):
            yield from _check_rule(spec, stage.type, stage.value, rule, here, f"{here}.abortWhen[{number}]")


def _check_rule(
    spec: PipelineSpec, stage_type: str, stage: OnlineStage, rule: AbortRule, stage_path: str, path: str
) -> Iterator[Problem]:
    known = figures_of(stage)
    for field, figure in (("metric", rule.metric), ("fallsWhile", rule.falls_while)):
        if figure is None:
            continue
        if figure not in known:
            yield Problem(f"{path}.{field}", _unknown(figure, known, stage))
        elif needs_held_out(figure):
            position = next((i for i, d in enumerate(spec.datasets) if d.name == stage.prompts), None)
            if position is not None and spec.datasets[position].split.evaluation == 0:
                yield Problem(
                    f"{path}.{field}",
                    f'{figure} is measured on held-out prompts, and "{stage.prompts}" has no evaluation split. '
                    f"Set spec.datasets[{position}].split.evaluation (such as 0.1)",
                )
    if rule.metric in RARE_FIGURES and rule.metric in known and stage.training.evaluate_every_steps is None:
        yield Problem(
            f"{path}.metric",
            f"{rule.metric} is measured at evaluations, which take place at the start and the end only. "
            f"Set {stage_path}.{stage_type}.training.evaluateEverySteps (such as 10)",
        )


def _unknown(figure: str, known: dict[str, str], stage: OnlineStage) -> str:
    gold = {reward.figure for reward in stage.rewards if reward.gold}
    if figure.startswith("goldReward"):
        return f"{figure} is not measured, because no reward of this stage has gold: true"
    if figure.startswith("sycophancy"):
        return f"{figure} is not measured; set sycophancy: {{}} for the probe"
    if figure.partition(".")[2] in gold:
        return f'"{figure}" is a gold reward, which is not scored in training. Did you mean goldReward?'
    longer = [name for name in known if name.startswith(f"{figure}.")]
    close = longer or difflib.get_close_matches(figure, known, n=1)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(known)}"
    return f'this stage has no figure "{figure}". {hint}'
