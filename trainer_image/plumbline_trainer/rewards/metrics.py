"""Likeness to a reference by the field's metrics, as their libraries compute them, between 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from plumbline_api.online import Reward

from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.rules import reference_of, words

if TYPE_CHECKING:
    from torch import Tensor

    from plumbline_trainer.engine.distributed import Ranks

Metric = Callable[[str, str], float]
"""Answer and reference → likeness."""


class MetricReward:
    """BLEU of a sentence, or the F-measure of a ROUGE."""

    def __init__(self, reward: Reward, place: str) -> None:
        assert reward.metric is not None
        self._metric, self._place = make_metric(reward.metric), place

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32; each rank does its share."""
        import torch

        found = torch.zeros(len(candidates), device=ranks.device)
        for index in range(ranks.rank, len(candidates), ranks.size):
            candidate = candidates[index]
            found[index] = self._metric(candidate.answer, reference_of(candidate, self._place))
        # Every place is written by one rank and zero on the others, so the sum is exact.
        ranks.sum_tensors([found])
        return found.cpu()


def make_metric(name: str) -> Metric:
    """A metric by its name: `bleu` (sacrebleu, with effective order, because answers are short) or a ROUGE."""
    if name == "bleu":
        from sacrebleu.metrics import BLEU

        bleu = BLEU(effective_order=True)
        return lambda answer, reference: float(bleu.sentence_score(answer, [reference]).score) / 100.0
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], tokenizer=_Words())
    return lambda answer, reference: float(scorer.score(reference, answer)[name].fmeasure)


class _Words:
    """Words in any script: the library's own tokenizer knows a to z only, and would find nothing alike in others."""

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case, without signs."""
        return [word for word in words(text) if word.isalnum() or "_" in word]
