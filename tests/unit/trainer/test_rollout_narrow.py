"""Products over few tokens are turned where that is faster, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plumbline_trainer.rollout import narrow
from plumbline_trainer.rollout.narrow import (
    HEAD_ROWS_MIN,
    HEAD_TOKENS_MAX,
    ROWS_MIN,
    TOKENS_MAX,
    narrow_linear,
    narrow_linears,
)
from torch import Tensor, nn


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 1), (3, 4), (TOKENS_MAX, 1), (TOKENS_MAX + 1, 1)])
@pytest.mark.parametrize("rows", [7, ROWS_MIN, ROWS_MIN + 3, HEAD_ROWS_MIN])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_that_of_a_linear_layer(shape: tuple[int, int], rows: int, biased: bool) -> None:
    x, weight, bias = drawn(*shape, 24), drawn(rows, 24), drawn(rows) if biased else None
    found = narrow_linear(x, weight, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(), "a model may view it in any way"


@pytest.mark.parametrize(
    ("tokens", "rows", "turned"),
    [
        (1, HEAD_ROWS_MIN, False),
        (2, ROWS_MIN - 1, False),
        (2, ROWS_MIN, True),
        (TOKENS_MAX, ROWS_MIN, True),
        (TOKENS_MAX + 1, HEAD_ROWS_MIN - 1, False),
        (TOKENS_MAX + 1, HEAD_ROWS_MIN, True),
        (HEAD_TOKENS_MAX, HEAD_ROWS_MIN, True),
        (HEAD_TOKENS_MAX + 1, HEAD_ROWS_MIN, False),
    ],
)
def test_products_are_turned_where_it_pays(
    tokens: int, rows: int, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(narrow.F, "linear", lambda x, *_: asked.append(len(x)) or x)
    narrow_linear(drawn(tokens, 8), drawn(rows, 8), None)
    assert bool(asked) is not turned


def test_only_float32_is_turned() -> None:
    x, weight = drawn(4, 24).bfloat16(), drawn(ROWS_MIN, 24).bfloat16()
    assert torch.equal(narrow_linear(x, weight, None), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert narrow_linear(x.float(), weight.float(), None).dtype == torch.bfloat16


def test_layers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(narrow, "narrow_linear", lambda x, *_: seen.append(len(x)) or x)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].forward = kept = lambda x: x  # type: ignore[assignment]  # such as an adapter's

    def fails_within() -> None:
        with narrow_linears(model):
            model(drawn(3, 4))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails_within()
    assert seen == [3]
    assert "forward" not in model[0].__dict__
    assert model[1].forward is kept
