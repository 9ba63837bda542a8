"""What a rollout left behind: answers, their scores and log-probabilities, in one order.

The answers of a rollout are numbered through, prompt by prompt; their tokens, end tokens included, lie end to end in
flat tensors of N entries. A is the number of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.losses.advantages import clip_rewards, penalise_unfinished
from plumbline_trainer.rollout.interface import Sampled
from plumbline_trainer.watch.figures import Rollout


@dataclass
class Experience:
    """One rollout."""

    prompts: list[Encoded]
    """Prompts of the iteration, without responses."""
    samples: list[list[Sampled]]
    """[prompt][answer], equally many for every prompt."""
    budget: int
    """Tokens of a micro-batch: a prompt with more answers than fit is laid out several times."""
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[A] reward of each answer: the weighted sum of its components."""
    shaped: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[A] what is learnt from: the reward within its bound, less the penalty of answers without an end."""
    components: dict[str, Tensor] = field(default_factory=dict)
    """[A] raw value of every component of the reward."""
    old: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[N] log-probabilities under the policy that sampled."""
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[N] entropies of that policy."""
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[N] log-probabilities under the reference."""
    values: Tensor | None = None
    """[N] the critic's values before each token."""

    @cached_property
    def answers(self) -> list[Sampled]:
        """All answers in order."""
        return [sampled for group in self.samples for sampled in group]

    @cached_property
    def lengths(self) -> list[int]:
        """[A] tokens of each answer."""
        return [len(sampled.ids) for sampled in self.answers]

    @cached_property
    def finished(self) -> Tensor:
        """[A] bool: the answer ended by itself."""
        return torch.tensor([sampled.finished for sampled in self.answers])

    def shape(self, *, clip: float | None, missing_end_penalty: float | None) -> None:
        """Make `shaped` of `scores`: within ±clip first, then less the penalty of answers without an end."""
        self.shaped = self.scores
        if clip is not None:
            self.shaped = clip_rewards(self.shaped, bound=clip)
        if missing_end_penalty is not None:
            self.shaped = penalise_unfinished(self.shaped, self.finished, penalty=missing_end_penalty)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, each prompt once per row."""
        return sum(len(row.prompt) + sum(len(item.ids) for item in row.responses) for row in self.all_rows)

    @property
    def watched(self) -> Rollout:
        """What its figures are made of."""
        return Rollout(
            ids=[sampled.ids for sampled in self.answers],
            finished=[sampled.finished for sampled in self.answers],
            policy=self.old,
            reference=self.reference,
            total=self.scores,
            components=self.components,
            scores=self.shaped,
            entropies=self.entropy,
        )

    @property
    def group_size(self) -> int:
        """Answers per prompt."""
        return len(self.samples[0])

    def by_answer(self, flat: Tensor) -> tuple[Tensor, ...]:
        """[N] → [T] for every answer."""
        return torch.split(flat, self.lengths)

    def sums(self, flat: Tensor) -> Tensor:
        """[N] → [A] sums over the tokens of each answer."""
        return torch.stack([part.sum() for part in self.by_answer(flat)])

    def spread(self, of_answers: Tensor) -> Tensor:
        """[A] → [N]: every token gets its answer's value."""
        return of_answers.repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    def rows(self) -> list[list[Encoded]]:
        """[prompt] → the rows that hold its answers: one, if they fit into a micro-batch together."""
        return [
            _laid_out(number, prompt, group, self.budget)
            for number, (prompt, group) in enumerate(zip(self.prompts, self.samples, strict=True))
        ]

    @property
    def all_rows(self) -> list[Encoded]:
        """Every row, in the order of the answers."""
        return [row for rows in self.rows for row in rows]

    @cached_property
    def starts(self) -> dict[str, int]:
        """Place of each row's first token among N."""
        found, total = {}, 0
        for row in self.all_rows:
            found[row.row_id] = total
            total += sum(len(response.ids) for response in row.responses)
        return found

    @cached_property
    def first_answers(self) -> dict[str, int]:
        """Number of each row's first answer."""
        found, total = {}, 0
        for row in self.all_rows:
            found[row.row_id] = total
            total += len(row.responses)
        return found

    def of_tokens(self, batch: PackedBatch, flat: Tensor) -> Tensor:
        """The entries of the batch's scored tokens, in its order: [N] → [n]. Of dummies, any."""
        counts = [0] * len(batch.rows)
        for answer in batch.answers:
            counts[answer.row] += len(answer.scored)
        places = [
            torch.arange(self.starts[row.row_id], self.starts[row.row_id] + count)
            for row, count in zip(batch.rows, counts, strict=True)
        ]
        return flat[torch.cat(places)].to(batch.weights.device)

    def of_answers(self, batch: PackedBatch, values: Tensor) -> Tensor:
        """The entries of the batch's answers, in its order: [A] → [a]."""
        places = [
            torch.arange(self.first_answers[row.row_id], self.first_answers[row.row_id] + len(row.responses))
            for row in batch.rows
        ]
        return values[torch.cat(places)].to(batch.weights.device)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: everything but the prompts, which the plan gives again."""
        ids = [token for sampled in self.answers for token in sampled.ids]
        found = {
            "ids": torch.tensor(ids, dtype=torch.long),
            "lengths": torch.tensor(self.lengths, dtype=torch.long),
            "finished": self.finished,
            "scores": self.scores,
            "shaped": self.shaped,
            "old": self.old,
            "entropy": self.entropy,
            "reference": self.reference,
            **{f"component/{name}": values for name, values in self.components.items()},
        }
        if self.values is not None:
            found["values"] = self.values
        # Copies: two of them may be one tensor, which safetensors refuses.
        return {name: tensor.clone().contiguous() for name, tensor in found.items()}

    @classmethod
    def restored(cls, prompts: list[Encoded], budget: int, tensors: dict[str, Tensor]) -> Experience:
        """From a checkpoint's tensors, exactly."""
        lengths = tensors["lengths"].tolist()
        answers = [
            Sampled(part.tolist(), bool(finished))
            for part, finished in zip(torch.split(tensors["ids"], lengths), tensors["finished"], strict=True)
        ]
        size = len(answers) // len(prompts)
        return cls(
            prompts=prompts,
            samples=[answers[start : start + size] for start in range(0, len(answers), size)],
            budget=budget,
            scores=tensors["scores"],
            shaped=tensors["shaped"],
            components={
                name.removeprefix("component/"): values
                for name, values in tensors.items()
                if name.startswith("component/")
            },
            old=tensors["old"],
            entropy=tensors["entropy"],
            reference=tensors["reference"],
            values=tensors.get("values"),
        )


def _laid_out(number: int, prompt: Encoded, group: Sequence[Sampled], budget: int) -> list[Encoded]:
    """Every token of an answer is scored, and a critic is read before each."""
    pieces: list[list[EncodedResponse]] = []
    room = 0
    for sampled in group:
        count = len(sampled.ids)
        response = EncodedResponse(sampled.ids, [True] * count, "completion", reads=tuple(range(-1, count - 1)))
        if not pieces or count > room:
            pieces.append([])
            room = budget - len(prompt.prompt)
        pieces[-1].append(response)
        room -= count
    return [
        Encoded(f"{number}/{piece}", prompt.group, prompt.prompt, responses, prompt.weight)
        for piece, responses in enumerate(pieces)
    ]
