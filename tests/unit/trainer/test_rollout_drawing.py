"""Drawing tokens: the distribution is right, and every number in [0, 1) takes a token that can be taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plumbline_trainer.rollout.drawing import draw, uniform_draws

CRITICAL = {4: 23.5, 299: 414.0}
"""Chi-square at one in ten thousand, by degrees of freedom."""


@pytest.mark.parametrize("vocabulary", [5, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(vocabulary, temperature):
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    count = 200 * vocabulary
    numbers = np.concatenate([uniform_draws(9, f"row-{row}", 100, row % 3) for row in range(count // 100)])
    ids = draw(logits.expand(count, -1), temperature, torch.from_numpy(numbers))
    seen = np.bincount(ids.numpy(), minlength=vocabulary)
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * count
    assert float(((seen - expected) ** 2 / expected).sum()) < CRITICAL[vocabulary - 1]


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000])
def test_draws_are_those_of_the_cumulated_probabilities(vocabulary):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, vocabulary, generator=generator) * 3
    numbers = torch.rand(500, generator=generator, dtype=torch.float64)
    sums = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
    pairs = zip(sums.numpy(), numbers.numpy(), strict=True)
    expected = [int(np.searchsorted(row, number * row[-1], side="right")) for row, number in pairs]
    assert draw(logits, 0.8, numbers).tolist() == expected
    assert [int(draw(logits[i : i + 1], 0.8, numbers[i : i + 1])) for i in range(500)] == expected


@pytest.mark.parametrize("vocabulary", [2, 300, 513])
def test_what_cannot_be_is_never_drawn(vocabulary):
    """Not the padding behind the vocabulary, not a token of no probability, whatever the number."""
    logits = torch.full((3, vocabulary), -torch.inf)
    logits[:, 1] = 0.0
    edges = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, 1.0, edges).tolist() == [1, 1, 1]
    even = torch.zeros(3, vocabulary)
    assert draw(even, 1.0, edges).tolist() == [0, vocabulary // 2, vocabulary - 1]


def test_numbers_depend_on_seed_row_and_answer_only():
    first = uniform_draws(1, "a", 8, 2).tolist()
    assert first == uniform_draws(1, "a", 16, 2)[:8].tolist()
    for other in (uniform_draws(1, "a", 8), uniform_draws(1, "b", 8, 2), uniform_draws(2, "a", 8, 2)):
        assert first != other.tolist()


def test_evaluation_keeps_its_numbers():
    """The first answer has the numbers that evaluation had before there were others."""
    expected = [0.8494592251030432, 0.7057467286883305, 0.2721267357840741]
    assert uniform_draws(3, "row-1", 3).tolist() == expected
