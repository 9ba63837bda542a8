"""The prompts of a stage that samples: to answer, to score, and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from plumbline_api.online import AbortRule, SampledStage

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.encode import Encoded, EncodedRows, encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.rows import Row
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rollout.interface import Prompt, Sampled


@dataclass
class Prompts:
    """Prompts as token ids, with the rows that they come from."""

    encoded: EncodedRows
    """To train on, and what became of the others."""
    held_out: list[Encoded]
    """To evaluate on; may be empty."""
    rows: dict[str, Row]
    """By row id."""
    tokenizer: Tokenizer
    abort_rules: list[AbortRule] = field(default_factory=list)

    @property
    def train(self) -> list[Encoded]:
        """Prompts to train on."""
        return self.encoded.rows

    def to_answer(self, row: Encoded) -> Prompt:
        """For a rollout engine."""
        return Prompt(row.row_id, row.prompt)

    def candidates(self, rows: Sequence[Encoded], samples: Sequence[Sequence[Sampled]]) -> list[Candidate]:
        """The answers in order, with what rewards look at."""
        found = []
        for encoded, group in zip(rows, samples, strict=True):
            row = self.rows[encoded.row_id]
            reference = row.chosen.text if row.responses else None
            found += [
                Candidate(row.prompt, self.tokenizer.decode(item.ids), len(item.ids), reference, row.id)
                for item in group
            ]
        return found


def load_prompts(context: StageContext, policy: Policy, parameters: SampledStage) -> Prompts:
    """Read and encode the stage's prompts; those that leave no room for an answer are dropped, counted and named.

    Raises:
        InputError: if none is left; if rewards compare with answers that rows do not have; if gold rewards have
            nothing to be measured on.
    """
    dataset = context.input("prompts")
    longest = parameters.training.max_length - parameters.rollout.max_new_tokens
    train, held_out = (load_rows(context, dataset, split) for split in ("train", "evaluation"))
    for row in (*train, *held_out):
        if not row.responses and (needy := [reward for reward in parameters.rewards if reward.needs_reference]):
            raise InputError(
                f'{row.source}: the reward "{needy[0].figure}" compares with the answer of the prompt\'s row, and this '
                f'row of "{dataset.name}" has none. Add answers (format promptCompletion), or leave the reward out'
            )
    if not held_out and any(reward.gold for reward in parameters.rewards):
        raise InputError(
            f'rewards: gold ones are measured on held-out prompts, and "{dataset.name}" has no evaluation split. Set '
            "its split.evaluation (such as 0.1)"
        )
    encoded = encode_rows(train, policy.tokenizer, method="prompt", max_length=longest)
    held = encode_rows(held_out, policy.tokenizer, method="prompt", max_length=longest).rows if held_out else []
    return Prompts(
        encoded,
        held,
        {row.id: row for row in (*train, *held_out)},
        policy.tokenizer,
        [AbortRule.model_validate(rule) for rule in context.run.parameters.get("abortWhen", [])],
    )
