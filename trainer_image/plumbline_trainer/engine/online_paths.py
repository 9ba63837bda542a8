"""Which way each model of a stage that samples is evaluated: found once, kept by the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.online_state import OnlineState, Trained
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.scorer import Scorer

POLICY, CRITIC = "policy", "critic"


def choose_paths(
    context: StageContext,
    ranks: Ranks,
    models: Mapping[str, Trained],
    state: OnlineState,
    rows: Sequence[Encoded],
    *,
    tokens: int,
) -> None:
    """Compare both ways on answers of the first rollout and note the choice, which the log tells."""
    for name, trained in models.items():
        choice = choose_path(trained.scorer, rows, trained.trainables, tokens=tokens, ranks=ranks)
        level = context.log.info if choice.path == "fast" else context.log.warning
        level("%s path: %s", choice.path, choice.reason)
        if name == POLICY:
            state.path = choice.path
        else:
            state.critic_path = choice.path


def take_paths(models: Mapping[str, Trained], reference: Scorer | None, state: OnlineState) -> None:
    """Go the ways that were chosen; the reference goes the policy's."""
    if state.path is not None:
        models[POLICY].scorer.path = state.path
        if reference is not None:
            reference.path = state.path
    if state.critic_path is not None:
        models[CRITIC].scorer.path = state.critic_path
