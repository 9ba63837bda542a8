"""What a watched stage leaves behind: its monitors, and why it was aborted where it was."""

from __future__ import annotations

from dataclasses import replace

from plumbline_api.online import ABORTED

from plumbline_trainer.context import StageOutput
from plumbline_trainer.watch.course import Course
from plumbline_trainer.watch.verdict import write_monitors


def watched(output: StageOutput, course: Course, *, aborted: str | None, kept: str) -> StageOutput:
    """The output of a stage with `monitors.json` in its folder; of an aborted one also why, in message and meta.

    Args:
        output: That is about to be committed.
        course: Of the stage's figures.
        aborted: The reason that the abort rules gave; None where the stage ran to its end.
        kept: Which weights an aborted stage yields, such as `after iteration 12`.
    """
    verdict = write_monitors(output.folder, course, aborted=aborted)
    if aborted is None:
        return output if verdict.level == "clean" else replace(output, message=verdict.text)
    message = f"{aborted}; the output is the last good weights, those {kept}"
    return replace(output, message=message, meta={**output.meta, ABORTED: message})
