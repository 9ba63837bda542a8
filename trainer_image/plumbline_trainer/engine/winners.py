"""Which of the sampled answers to a prompt are imitated, and what is said of all of them. Pure functions of rows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

from plumbline_trainer.data.formats import content_id, numbered
from plumbline_trainer.data.rows import Response, Row
from plumbline_trainer.errors import InputError
from plumbline_trainer.watch.figures import spearman

WINNER = "chosen"
"""Label of an answer that is imitated."""


def mark_winners(row: Row, *, keep: int, min_score: float | None) -> Row:
    """Rank a row's answers by score (0 is best, ties share a place) and label those that are imitated.

    These are the best `keep` ones that end by themselves, differ in their text and score at least `min_score`; of
    equal scores the one that was sampled first.

    Args:
        row: A prompt with scored answers.
        keep: How many at most.
        min_score: Least score; None for no bound.
    """
    places = {
        score: place for place, score in enumerate(sorted({_score(item) for item in row.responses}, reverse=True))
    }
    order = sorted(range(len(row.responses)), key=lambda index: (-_score(row.responses[index]), index))
    winners: dict[str, int] = {}
    for index in order:
        answer = row.responses[index]
        is_good = min_score is None or _score(answer) >= min_score
        if len(winners) < keep and is_good and _ends(answer) and answer.text not in winners:
            winners[answer.text] = index
    return dataclasses.replace(
        row,
        responses=tuple(
            dataclasses.replace(
                answer, rank=places[_score(answer)], label=WINNER if index in winners.values() else None
            )
            for index, answer in enumerate(row.responses)
        ),
    )


def winning_rows(rows: Iterable[Row]) -> list[Row]:
    """A row for each winner, with the ids that a dataset of just these prompts and answers would have."""
    alone = [
        dataclasses.replace(row, id=content_id(row.prompt, (answer,)), responses=(answer,))
        for row in rows
        for answer in sorted(row.responses, key=lambda answer: answer.rank or 0)
        if answer.label == WINNER
    ]
    return list(numbered(alone))


def refuse_no_winner(rows: Sequence[Row], min_score: float | None) -> None:
    """Say why nothing is left to imitate.

    Raises:
        InputError: if no answer is labelled as a winner.
    """
    answers = [answer for row in rows for answer in row.responses]
    if any(answer.label == WINNER for answer in answers):
        return
    ended = [answer for answer in answers if _ends(answer)]
    if not ended:
        raise InputError(
            f"none of {len(answers):,} sampled answers ends by itself, so that none can be imitated. Raise "
            "rollout.maxNewTokens, or start from a policy that was fine-tuned on answers with an end"
        )
    best = max(_score(answer) for answer in ended)
    raise InputError(
        f"none of {len(ended):,} sampled answers scores {min_score} or more; the best has {best:.6g}. Lower minScore, "
        "or raise answers"
    )


def answer_figures(rows: Sequence[Row]) -> dict[str, float]:
    """What is said of all answers, under the names of `plumbline_api.watched` where they mean the same.

    `rewardBest` is the mean over prompts of the best score of an answer that ends, `rewardGain` how far that is above
    the prompt's mean, `rewardSpread` the mean over prompts of the standard deviation of its scores.
    """
    answers = [answer for row in rows for answer in row.responses]
    scores, lengths = [_score(answer) for answer in answers], [_tokens(answer) for answer in answers]
    best = {
        row.id: max(ended, key=_score) for row in rows if (ended := [item for item in row.responses if _ends(item)])
    }
    gains = [_score(best[row.id]) - statistics.fmean(map(_score, row.responses)) for row in rows if row.id in best]
    figures = {
        "rewardGain": statistics.fmean(gains) if gains else None,
        "reward": statistics.fmean(scores),
        "rewardBest": statistics.fmean(map(_score, best.values())) if best else None,
        "rewardSpread": statistics.fmean(statistics.pstdev(map(_score, row.responses)) for row in rows),
        "winners": float(sum(answer.label == WINNER for answer in answers)),
        "promptsWithoutWinner": float(sum(all(item.label != WINNER for item in row.responses) for row in rows)),
        "answers": float(len(answers)),
        "length.mean": statistics.fmean(lengths),
        "length.best": statistics.fmean(map(_tokens, best.values())) if best else None,
        "missingEnd": statistics.fmean(float(not _ends(answer)) for answer in answers),
        "rewardLengthCorrelation": spearman(scores, lengths),
        **{
            f"reward.{name}": statistics.fmean(float(answer.annotations["rewards"][name]) for answer in answers)
            for name in answers[0].annotations["rewards"]
        },
    }
    return {name: value for name, value in figures.items() if value is not None}


def gold_figures(rows: Sequence[Row]) -> dict[str, float]:
    """What gold rewards say of the answers to held-out prompts and of their winners: is a higher reward better?

    Empty where there are no gold rewards.
    """
    answers = [answer for row in rows for answer in row.responses if "gold" in answer.annotations]
    winners = [answer for answer in answers if answer.label == WINNER]
    named = {"goldReward": answers, "goldRewardBest": winners}
    return {
        name: statistics.fmean(float(answer.annotations["gold"]) for answer in some)
        for name, some in named.items()
        if some
    }


def _score(answer: Response) -> float:
    assert answer.score is not None
    return answer.score


def _ends(answer: Response) -> bool:
    return bool(answer.sampling["finished"])


def _tokens(answer: Response) -> int:
    return int(answer.sampling["tokens"])
