"""Scalar heads: where they are read, packed against plain, and what a step of a reward model adds up to."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plumbline_api.training import Lora
from plumbline_trainer.data.encode import Encoded, encode_rows
from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import dummy_of, pack, packed_length
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.ranking import RewardRanking
from plumbline_trainer.engine.values import ValueHeads, ValueScorer, fresh_heads, score_values
from plumbline_trainer.losses.reward import bradley_terry, centring, plackett_luce
from plumbline_trainer.models.adapters import attach_lora
from plumbline_trainer.models.loading import load_base
from support.encoded import make_pair, make_ranked
from support.tiny import STYLES, Style, make_model, save_model

GAP = 1e-5


@lru_cache(maxsize=16)
def model_of(style: Style, lora: bool) -> Any:
    model = make_model(style, seed=1)
    if not lora:
        return model
    model = attach_lora(model, Lora(rank=4), seed=1)
    rng = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return model


def scorer_of(
    style: Style = "llama", *, lora: bool = True, heads: int = 2, path: Any = "fast", precision: str = "float32"
) -> ValueScorer:
    model = model_of(style, lora)
    scorer = ValueScorer(model, fresh_heads(model, heads, seed=4), path=path, precision=precision)
    scorer.eval()
    return scorer


def measure(scorer: ValueScorer, rows: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    values = scorer(pack(rows))
    factors = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    trained = list(scorer.trainables().values())
    gradients = torch.autograd.grad((factors * values).sum(), trained, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
    return values.detach(), torch.cat([gradient.reshape(-1) for gradient in flat])


def any_rows() -> st.SearchStrategy[list[Encoded]]:
    """Rows of one to five answers of all lengths, with and without a prompt."""
    ranked = st.builds(
        lambda seed, prompt, lengths: make_ranked(random.Random(seed), prompt, [max(n, 2 - prompt) for n in lengths]),
        st.integers(0, 10**6),
        st.integers(0, 50),
        st.lists(st.integers(1, 30), min_size=1, max_size=5),
    )
    return st.lists(ranked, min_size=1, max_size=4)


class TestPaths:
    @pytest.mark.parametrize("lora", [True, False])
    @pytest.mark.parametrize("style", STYLES)
    @settings(max_examples=8, deadline=None)
    @given(rows=any_rows())
    def test_packed_equals_plain(self, style: Style, lora: bool, rows: list[Encoded]) -> None:
        fast, fast_gradient = measure(scorer_of(style, lora=lora), rows)
        plain, plain_gradient = measure(scorer_of(style, lora=lora, path="plain"), rows)
        assert fast.shape == (sum(len(row.responses) for row in rows), 2)
        assert (fast - plain).norm() <= GAP * plain.norm()
        assert plain_gradient.norm() > 0
        assert (fast_gradient - plain_gradient).norm() <= GAP * plain_gradient.norm()

    @pytest.mark.parametrize("style", STYLES)
    def test_the_comparison_before_training_passes(self, style: Style) -> None:
        scorer = scorer_of(style)
        rows = [make_ranked(random.Random(n), 12, [6, 9]) for n in range(4)]
        choice = choose_path(scorer, rows, scorer.trainables(), tokens=4096, ranks=Ranks())
        assert choice.path == "fast", choice.reason

    @pytest.mark.parametrize(("precision", "path"), [("bfloat16", "fast"), ("float32", "plain")])
    def test_a_few_values_may_all_be_rounded_to_one_side(
        self, monkeypatch: pytest.MonkeyPatch, precision: str, path: str
    ) -> None:
        """In bfloat16 a value of a deep model is off by some percent, and the mean of four values no less."""
        real = ValueScorer.forward

        def rounded(scorer: ValueScorer, batch: Any, *others: Any) -> Any:
            values = real(scorer, batch, *others)
            return values + 0.03 * values.detach().abs().mean() if scorer.path == "fast" else values

        monkeypatch.setattr(ValueScorer, "forward", rounded)
        scorer = scorer_of(precision=precision)
        rows = [make_ranked(random.Random(n), 12, [6, 9]) for n in range(2)]
        choice = choose_path(scorer, rows, scorer.trainables(), tokens=4096, ranks=Ranks())
        assert choice.path == path, choice.reason
        assert 0.01 < choice.gaps["values"] < 0.05

    def test_heads_that_start_at_zero_go_fast(self) -> None:
        scorer = scorer_of()
        torch.nn.init.zeros_(scorer.heads.weight)
        rows = [make_ranked(random.Random(n), 12, [6, 9]) for n in range(2)]
        assert choose_path(scorer, rows, scorer.trainables(), tokens=4096, ranks=Ranks()).path == "fast"

    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_the_comparison_finds_a_leak(self, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
        from plumbline_trainer.engine import attention

        def leaky(query: Any, key: Any, value: Any, block: Any, *_: Any, **__: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            ).transpose(1, 2)

        monkeypatch.setattr(attention, "can_join", lambda *_: False)
        monkeypatch.setattr(attention, "_attend", leaky)  # the second answer sees the first
        scorer = scorer_of(precision=precision)
        rows = [make_ranked(random.Random(n), 12, [6, 9]) for n in range(4)]
        choice = choose_path(scorer, rows, scorer.trainables(), tokens=4096, ranks=Ranks())
        assert choice.path == "plain"
        assert "differs" in choice.reason


class TestReading:
    def test_answers_go_whole_through_the_model(self) -> None:
        row = make_ranked(random.Random(0), 2, [3, 1])
        batch = pack([make_pair(random.Random(1), 2, 2, 2), row])
        assert packed_length(row) == 2 + 3 + 1
        start = batch.tokens - packed_length(row)
        assert batch.reads.tolist() == [start + 4, start + 5]
        assert [list(answer.read) for answer in batch.answers] == [[], [], [0], [1]]
        assert batch.input_ids[0, batch.reads].tolist() == [response.ids[-1] for response in row.responses]

    def test_values_are_those_of_the_last_hidden_state(self) -> None:
        scorer = scorer_of(lora=False, heads=3)
        row = make_ranked(random.Random(0), 7, [5, 9])
        values = scorer(pack([row]))
        for response, found in zip(row.responses, values, strict=True):
            ids = torch.tensor([[*row.prompt, *response.ids]])
            last = scorer.model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(found, last @ scorer.heads.weight.t(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("model", "style"),
        [({"pad_is_end": True}, "llama"), ({"bos": True}, "llama"), ({}, "qwen2"), ({"template": False}, "gpt2")],
        ids=["pad = end", "begins with BOS", "no BOS", "no template"],
    )
    def test_trap_1_and_21_the_end_token_itself_is_read(
        self, tmp_path: Path, model: dict[str, Any], style: Style
    ) -> None:
        """Not the token before it, whatever the padding token is, and whether or not texts begin with a token."""
        _, tokenizer = load_base(save_model(tmp_path / "model", style, **model), "float32")
        rows = [ranked("Why?", "Because.", "Because it is so, and was always so.", "No.")]
        (row,) = encode_rows(rows, tokenizer, method="score", max_length=256).rows
        batch = pack([row])
        ends = [batch.input_ids[0, place].item() for place in batch.reads]
        assert ends == [tokenizer.end_tokens[0]] * 3
        assert [sum(token in tokenizer.end_tokens for token in response.ids) for response in row.responses] == [1] * 3
        assert [response.rank for response in row.responses] == [0, 1, 2]
        begins = [*row.prompt, *row.responses[0].ids].count(tokenizer.bos_id)
        assert begins == (1 if model.get("bos") else 0)

    def test_a_truncated_answer_is_read_where_it_was_cut(self, tmp_path: Path) -> None:
        _, tokenizer = load_base(save_model(tmp_path / "model"), "float32")
        long = "It is so because " + "it is " * 40
        whole = encode_rows([ranked("Why?", "No.", long)], tokenizer, method="score", max_length=512).rows[0]
        limit = len(whole.prompt) + len(whole.responses[0].ids) + 3
        found = encode_rows([ranked("Why?", "No.", long)], tokenizer, method="score", max_length=limit)
        (row,) = found.rows
        assert found.truncated == 1
        assert [response.truncated for response in row.responses] == [False, True]
        assert [response.reads[0] for response in row.responses] == [len(r.ids) - 1 for r in row.responses]
        assert row.responses[1].ids == whole.responses[1].ids[: len(row.responses[1].ids)]
        assert row.responses[1].ids[-1] not in tokenizer.end_tokens

    def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(self, tmp_path: Path) -> None:
        _, tokenizer = load_base(save_model(tmp_path / "model"), "float32")
        rows = [ranked("Why? " * 60, "No.", "Yes."), ranked("Why?", "No.", "Yes.")]
        found = encode_rows(rows, tokenizer, method="score", max_length=64)
        assert (found.dropped, len(found.rows)) == (1, 1)


def ranked(prompt: str, *answers: str) -> Row:
    responses = tuple(
        Response(str(rank), (Message("assistant", answer),), rank=rank) for rank, answer in enumerate(answers)
    )
    return Row("row", "group", (Message("user", prompt),), responses, source="here")


class TestHeads:
    def test_heads_start_apart_and_are_functions_of_the_seed(self) -> None:
        model = model_of("llama", False)
        one, again, other = (fresh_heads(model, 3, seed=seed).weight for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert len({tuple(row.tolist()) for row in one}) == 3
        assert torch.equal(fresh_heads(model, 2, seed=1).weight, one[:2]), "more heads leave the first ones as they are"
        assert one.abs().max() <= 64**-0.5

    def test_heads_are_float32_under_autocast(self) -> None:
        heads = ValueHeads(torch.randn(2, 8))
        hidden = torch.randn(3, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = heads(hidden.bfloat16())
        assert found.dtype == torch.float32
        assert torch.equal(found, hidden.bfloat16().float() @ heads.weight.t())

    def test_the_heads_are_trained_and_the_vocabulary_is_not(self) -> None:
        model = make_model("llama", tie=False).requires_grad_(True)
        scorer = ValueScorer(model, fresh_heads(model, 2, seed=1))
        names = set(scorer.trainables())
        assert "heads.weight" in names
        assert "lm_head.weight" not in names
        tied = make_model("llama").requires_grad_(True)
        assert "model.embed_tokens.weight" in ValueScorer(tied, fresh_heads(tied, 1, seed=1)).trainables()


class TestObjective:
    rows = [
        make_ranked(random.Random(1), 5, [3, 4], margin=0.7),
        make_ranked(random.Random(2), 5, [3, 4, 2], ranks=[2, 0, 1], weight=2.0),
        make_ranked(random.Random(3), 0, [3, 4], ranks=[1, 0]),
        make_ranked(random.Random(4), 5, [3, 4, 6], weight=0.5),
    ]

    def test_sums_by_hand(self) -> None:
        scores = torch.randn(10, 1, generator=torch.Generator().manual_seed(1), requires_grad=True)
        objective = RewardRanking(centring=0.1)
        found = objective.sums(pack(self.rows), scores)
        r = scores[:, 0]
        rows = [r[None, :2], r[None, 2:5], r[None, 5:7], r[None, 7:]]
        losses = [
            bradley_terry(r[0:1], r[1:2], 0.7),
            plackett_luce(rows[1], torch.tensor([[2, 0, 1]])),
            bradley_terry(r[6:7], r[5:6]),
            plackett_luce(rows[3], torch.tensor([[0, 1, 2]])),
        ]
        weights = [1.0, 2.0, 1.0, 0.5]
        expected = sum(
            w * (loss + 0.1 * centring(row)).squeeze() for w, loss, row in zip(weights, losses, rows, strict=True)
        )
        assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(found["loss"], scores)[0], torch.autograd.grad(expected, scores)[0]
        )
        assert [objective.size(row) for row in self.rows] == weights
        assert found["rewardMean"].item() == pytest.approx(
            sum(w * row.mean().item() for w, row in zip(weights, rows, strict=True)), rel=1e-5
        )
        assert found["rewardMargin"].item() == pytest.approx(
            (r[0] - r[1]).item()
            + 2 * (2 * r[3] - 2 * r[2]).item() / 3
            + (r[6] - r[5]).item()
            + 0.5 * (2 * r[7] - 2 * r[9]).item() / 3,
            rel=1e-5,
        )

    def test_accuracy_takes_ties_by_half(self) -> None:
        rows = [make_ranked(random.Random(n), 3, [2, 2]) for n in range(3)]
        scores = torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.5], [0.5]])
        assert RewardRanking().sums(pack(rows), scores)["rewardAccuracy"].item() == 1.5

    def test_every_head_learns_from_every_row(self) -> None:
        scores = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
        together = RewardRanking().sums(pack(self.rows), scores)["loss"]
        apart = [RewardRanking().sums(pack(self.rows), scores[:, i : i + 1])["loss"] for i in range(3)]
        assert together.item() == pytest.approx(sum(apart).item() / 3, rel=1e-6)

    def test_dummies_add_nothing(self) -> None:
        dummies = [dummy_of(row) for row in self.rows]
        values = scorer_of()(pack(dummies))
        sums = RewardRanking(centring=0.1).sums(pack(dummies), values)
        assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(sums, 0.0)
        assert max(packed_length(row) for row in dummies) < 8


def test_scores_do_not_depend_on_company() -> None:
    rng = random.Random(4)
    rows = [make_ranked(rng, rng.randint(0, 30), [rng.randint(2, 9) for _ in range(n % 4 + 1)]) for n in range(9)]
    scorer = scorer_of()
    together = score_values(scorer, rows, tokens_per_batch=120)
    assert [tuple(values.shape) for values in together] == [(len(row.responses), 2) for row in rows]
    for row, values in zip(rows, together, strict=True):
        (alone,) = score_values(scorer, [row], tokens_per_batch=120)
        torch.testing.assert_close(values, alone, rtol=1e-4, atol=1e-5)
