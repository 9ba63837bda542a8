"""What the checker says about rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plumbline_api.artifacts import FORMAT_DESCRIPTIONS, REFERENCE_FORMATS
from plumbline_api.errors import Problem
from plumbline_api.online import Reward
from plumbline_api.pipeline import PipelineSpec
from plumbline_api.runtime import RewardEndpoint


def rewards_of(spec: PipelineSpec) -> Iterator[tuple[str, Reward]]:
    """Every reward with its field path."""
    for index, stage in enumerate(spec.stages):
        for number, reward in enumerate(getattr(stage.value, "rewards", None) or []):
            yield f"spec.stages[{index}].{stage.type}.rewards[{number}]", reward


def check_reward_references(spec: PipelineSpec) -> Iterator[Problem]:
    """Rewards that compare with the answer of a row, on rows without one."""
    formats = {dataset.name: dataset.format for dataset in spec.datasets}
    for index, stage in enumerate(spec.stages):
        prompts = getattr(stage.value, "prompts", None)
        form = formats.get(prompts) if prompts is not None else None
        if form is None or form == "auto":
            continue
        for number, reward in enumerate(getattr(stage.value, "rewards", None) or []):
            if (fault := reference_fault(reward, str(prompts), form)) is not None:
                yield Problem(f"spec.stages[{index}].{stage.type}.rewards[{number}].{reward.choice}", fault)


def reference_fault(reward: Reward, prompts: str, form: str) -> str | None:
    """Why a reward has nothing to compare with in rows of a format; None where it has, or needs nothing."""
    if not reward.needs_reference or form in REFERENCE_FORMATS:
        return None
    return (
        f'{reward.value} compares with the answer of the prompt\'s row, and "{prompts}" holds '
        f"{FORMAT_DESCRIPTIONS[form]}. Name prompts with answers (such as format promptCompletion), or another reward"
    )


def check_local_endpoints(spec: PipelineSpec, known: Sequence[RewardEndpoint]) -> Iterator[Problem]:
    """Endpoints that a local run does not know of."""
    names = [endpoint.name for endpoint in known]
    for path, reward in rewards_of(spec):
        if reward.endpoint is not None and reward.endpoint not in names:
            yield Problem(
                f"{path}.endpoint",
                f'nothing says where "{reward.endpoint}" is. For a local run put the AlignmentRuntime that offers it '
                f"(spec.rewardEndpoints) into the manifest file. Known: {', '.join(names) or 'none'}",
            )
