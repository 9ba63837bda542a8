"""What a reward model minimises: the better of two answers shall have the higher reward."""

from __future__ import annotations

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.losses.reward import bradley_terry, centring, plackett_luce


class RewardRanking:
    """Bradley-Terry on rows of two answers, Plackett-Luce on longer ones: mean over rows, by their weight.

    The heads of an ensemble each learn from every row; the loss is the mean over heads.
    """

    def __init__(self, *, centring: float | None = None) -> None:
        """Weight of the centring term; None leaves it out."""
        self.centring = centring

    def size(self, row: Encoded) -> float:
        """A row counts by its weight, however many answers it has."""
        return row.weight

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """The loss, the mean reward, and how often (ties half) and by how much better answers have higher rewards.

        The figures are over pairs of a better and a worse answer, and of the mean over heads.

        Args:
            batch: The batch whose heads were read, once per answer.
            scores: [answers, heads] rewards.
        """
        total = scores.new_zeros(())
        figures = {name: scores.new_zeros(()) for name in ("rewardAccuracy", "rewardMargin", "rewardMean")}
        for rows, places in rows_by_size(batch):
            weights = batch.weights[torch.tensor(rows, device=scores.device)]
            rewards = scores[torch.tensor(places, device=scores.device)].permute(2, 0, 1)  # [heads, B, k]
            ranks = torch.tensor([[batch.answers[i].response.rank for i in row] for row in places])
            ranks = ranks.to(scores.device)
            margins = torch.tensor([batch.rows[row].margin for row in rows]).to(scores)
            losses = torch.stack([self._losses(head, ranks, margins) for head in rewards]).mean(dim=0)
            total = total + (weights * losses).sum()
            with torch.no_grad():
                for name, values in _figures(rewards.mean(dim=0), ranks).items():
                    figures[name] = figures[name] + (weights * values).sum()
        return {"loss": total, **figures}

    def _losses(self, rewards: Tensor, ranks: Tensor, margins: Tensor) -> Tensor:
        """[B, k] rewards of one head → [B]."""
        if rewards.shape[1] == 2:
            better = ranks.argmin(dim=1, keepdim=True)
            chosen, rejected = rewards.gather(1, better).squeeze(1), rewards.gather(1, 1 - better).squeeze(1)
            losses = bradley_terry(chosen, rejected, margins)
        else:
            losses = plackett_luce(rewards, ranks)
        return losses if self.centring is None else losses + self.centring * centring(rewards)


def rows_by_size(batch: PackedBatch) -> list[tuple[list[int], list[list[int]]]]:
    """Rows with equally many answers together: their indices [B], and the indices of their answers [B, k]."""
    answers: list[list[int]] = [[] for _ in batch.rows]
    for index, answer in enumerate(batch.answers):
        assert len(answer.read) == 1, "a reward is read once per answer"
        answers[answer.row].append(index)
    found: dict[int, list[int]] = {}
    for row, members in enumerate(answers):
        found.setdefault(len(members), []).append(row)
    return [(rows, [answers[row] for row in rows]) for rows in found.values()]


def _figures(rewards: Tensor, ranks: Tensor) -> dict[str, Tensor]:
    """Means over the ordered pairs of each row, [B]."""
    ordered = ranks[:, :, None] < ranks[:, None, :]  # [B, better, worse]
    gaps = rewards[:, :, None] - rewards[:, None, :]
    right = (gaps > 0).float() + 0.5 * (gaps == 0).float()
    count = ordered.sum(dim=(1, 2)).clamp_min(1)
    return {
        "rewardAccuracy": (right * ordered).sum(dim=(1, 2)) / count,
        "rewardMargin": (gaps * ordered).sum(dim=(1, 2)) / count,
        "rewardMean": rewards.mean(dim=1),
    }
