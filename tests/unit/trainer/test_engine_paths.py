"""Packed, prompt-shared and chunked against plain: the same loss and the same gradient, for every kind of model."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plumbline_api.training import Lora
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine import logprobs
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.models.adapters import attach_lora
from support.encoded import make_completion, make_pair
from support.tiny import STYLES, Style, make_model

GAP = 1e-5


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 384 * 16)


@lru_cache(maxsize=16)
def full_model(style: Style) -> Any:
    return make_model(style)


@lru_cache(maxsize=16)
def adapted_model(style: Style) -> Any:
    """With an adapter whose B is not zero, so that both factors have gradients."""
    model = attach_lora(make_model(style, seed=1), Lora(rank=4), seed=1)
    rng = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return model


def measure(model: Any, rows: list[Encoded], path: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    scorer = Scorer(model, path=path)
    scorer.eval()
    scores = scorer(pack(rows))
    factors = torch.randn(len(scores), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((factors * scores).sum(), trained, allow_unused=True)
    return scores.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]


def assert_same(model: Any, rows: list[Encoded]) -> None:
    fast, fast_gradient = measure(model, rows, "fast")
    plain, plain_gradient = measure(model, rows, "plain")
    assert (fast - plain).norm() <= GAP * plain.norm()
    one = torch.cat([gradient.reshape(-1) for gradient in fast_gradient])
    other = torch.cat([gradient.reshape(-1) for gradient in plain_gradient])
    assert other.norm() > 0
    assert (one - other).norm() <= GAP * other.norm()


def any_rows() -> st.SearchStrategy[list[Encoded]]:
    """Pairs, completions and texts of all lengths; prompts may be empty, masks have holes, the last tokens may not count."""
    length = st.integers(1, 40)
    pairs = st.builds(
        lambda seed, p, c, r: make_pair(random.Random(seed), p, max(c, 2 - min(p, 1)), max(r, 2 - min(p, 1))),
        st.integers(0, 10**6),
        st.integers(0, 50),
        length,
        length,
    )
    completions = st.builds(
        lambda seed, p, n, share: make_completion(random.Random(seed), p, n if p else n + 1, share=share),
        st.integers(0, 10**6),
        st.integers(0, 50),
        length,
        st.sampled_from([1.0, 0.5, 0.1]),
    )
    return st.lists(pairs | completions, min_size=1, max_size=5)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=any_rows())
def test_fast_equals_plain_with_an_adapter(style: Style, rows: list[Encoded]) -> None:
    assert_same(adapted_model(style), rows)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=any_rows())
def test_fast_equals_plain_with_all_weights(style: Style, rows: list[Encoded]) -> None:
    assert_same(full_model(style), rows)


@pytest.mark.parametrize("style", STYLES)
def test_rows_do_not_see_each_other(style: Style) -> None:
    rng = random.Random(1)
    rows = [make_pair(rng, 20, 9, 5), make_completion(rng, 0, 30), make_completion(rng, 8, 12)]
    others = [make_pair(rng, 33, 4, 4), rows[1], make_completion(rng, 40, 2)]
    scorer = Scorer(adapted_model(style))
    with torch.no_grad():
        first, second = scorer(pack(rows)), scorer(pack(others))
    of_row = [pack(batch).answers for batch in (rows, others)]
    one = first[of_row[0][2].scored.start : of_row[0][2].scored.stop]
    two = second[of_row[1][2].scored.start : of_row[1][2].scored.stop]
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", [0, 25])
def test_long_responses_segment_by_segment(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from plumbline_trainer.engine import attention

    pieces: list[int] = []
    real = attention.joined_attention

    def counted(query: Any, key: Any, value: Any, given: Any, scaling: Any) -> Any:
        pieces.append(len(given))
        return real(query, key, value, given, scaling)

    monkeypatch.setattr(attention, "joined_attention", counted)
    rng = random.Random(1)
    rows = [make_pair(rng, prompt, 190, 210), make_pair(rng, prompt, 3, 2)]
    assert_same(adapted_model("llama"), rows)
    assert pieces == [4 if prompt else 3] * 2, "in each layer the long row's segments, and the short row whole"


def test_long_responses_segment_by_segment_where_nothing_is_trained() -> None:
    rng = random.Random(1)
    batch = pack([make_pair(rng, 25, 190, 210), make_pair(rng, 25, 3, 2)])
    model = adapted_model("llama")
    with torch.no_grad():
        found = Scorer(model)(batch)
    torch.testing.assert_close(found, Scorer(model, path="plain")(batch).detach(), rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    from plumbline_trainer.engine.scorer import prepare_modes

    rows = [make_pair(random.Random(1), 20, 9, 5), make_completion(random.Random(2), 7, 12)]
    model = attach_lora(make_model("llama", seed=1), Lora(rank=4), seed=1)
    _, without = measure(model, rows, "fast")
    scorer = Scorer(model)
    calls: list[int] = []
    prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=True)
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    scores = scorer(pack(rows))
    factors = torch.randn(len(scores), generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((factors * scores).sum(), trained)
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    for one, other in zip(found, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


class TestChoosingThePath:
    rows = [make_pair(random.Random(number), 12, 6, 9) for number in range(4)]

    def choose(self, model: Any) -> Any:
        scorer = Scorer(model)
        scorer.eval()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return choose_path(scorer, self.rows, trained, tokens=4096, ranks=Ranks())

    @pytest.mark.parametrize("style", STYLES)
    def test_ordinary_models_go_fast(self, style: Style) -> None:
        assert self.choose(adapted_model(style)).path == "fast"

    def test_the_plain_path_takes_answers_one_by_one_and_no_more_than_two_of_a_row(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Their graphs at once were the peak of whole stages."""
        rows = [replace(row, responses=[*row.responses] * 3) for row in self.rows]
        seen: list[tuple[str, int]] = []
        real = Scorer.forward

        def counted(scorer: Scorer, batch: Any, *others: Any) -> Any:
            seen.append((scorer.path, len(batch.answers)))
            return real(scorer, batch, *others)

        monkeypatch.setattr(Scorer, "forward", counted)
        monkeypatch.setattr(self, "rows", rows, raising=False)
        assert self.choose(adapted_model("llama")).path == "fast"
        compared = sum(path == "plain" for path, _ in seen)
        assert seen == [("plain", 1)] * compared + [("fast", compared)]
        assert compared == 2 * len(rows)

    def test_what_is_scored_around_an_answer_is_compared_with_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [replace(row, score_context=True) for row in self.rows]
        monkeypatch.setattr(self, "rows", rows, raising=False)
        assert self.choose(adapted_model("llama")).path == "fast"

    def test_a_leak_between_rows_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from plumbline_trainer.engine import attention

        def leaky(query: Any, key: Any, value: Any, block: Any, *_: Any, **__: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            ).transpose(1, 2)

        monkeypatch.setattr(attention, "can_join", lambda *_: False)
        monkeypatch.setattr(attention, "_attend", leaky)  # the second response sees the first
        choice = self.choose(adapted_model("llama"))
        assert choice.path == "plain"
        assert "differs" in choice.reason

    def test_answers_that_are_known_by_heart_go_fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beside log-probabilities near zero the rounding of the logits is not small."""
        real = Scorer.forward

        def known(scorer: Scorer, batch: Any, *others: Any) -> Any:
            return real(scorer, batch, *others) * 1e-4 - (2e-7 if scorer.path == "fast" else 0.0)

        monkeypatch.setattr(Scorer, "forward", known)
        choice = self.choose(adapted_model("llama"))
        assert choice.path == "fast", choice.reason

    def test_an_unknown_scale_on_the_logits_is_found(self) -> None:
        model = attach_lora(make_model("llama", seed=1), Lora(rank=4), seed=1)
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 0.5)
        assert self.choose(model).path == "plain"

    def test_a_wrong_gradient_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from plumbline_trainer.engine.logprobs import _FrozenHead

        right = _FrozenHead.backward

        def wrong(ctx: Any, *upstream: Any) -> Any:
            slopes, *rest = right(ctx, *upstream)
            return (slopes * 1.05, *rest)

        monkeypatch.setattr(_FrozenHead, "backward", staticmethod(wrong))
        choice = self.choose(adapted_model("llama"))
        assert choice.path == "plain"
        assert choice.gaps["loss"] < 1e-5 < choice.gaps["gradient"]

    def test_an_adapter_on_the_head_goes_plain(self) -> None:
        import peft

        model = make_model("llama", tie=False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), model)
        choice = self.choose(model)
        assert choice.path == "plain"
        assert "output head" in choice.reason

    def test_recurrent_models_go_plain(self) -> None:
        from transformers import MambaConfig, MambaForCausalLM

        model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4))
        choice = self.choose(model)
        assert choice.path == "plain"
        assert "state" in choice.reason
        scorer = Scorer(model, path="plain")
        assert scorer(pack(self.rows)).requires_grad

    def test_sliding_windows_are_seen_although_rows_are_short(self) -> None:
        """The compared rows must include one that is longer than the window."""
        from plumbline_trainer.engine.pathcheck import _sample

        long = make_completion(random.Random(1), 30, 50)
        assert long in _sample([*self.rows, long], 64, window=32)
        assert long not in _sample([*self.rows, long], 64, window=None)

    def test_the_shortest_scored_rows_are_compared(self) -> None:
        from plumbline_trainer.engine.pathcheck import _sample

        rng = random.Random(2)
        long, short, shorter, silent = (make_completion(rng, *sizes) for sizes in ((30, 50), (5, 8), (4, 6), (1, 2)))
        silent.responses[0].mask[:] = [False] * len(silent.responses[0].mask)
        assert _sample([long, silent, short, shorter], 40, window=None) == [shorter, short]
        assert _sample([long, short], 1, window=None) == [short, long]


def test_scored_rows_are_aligned_with_their_ids() -> None:
    rng = random.Random(4)
    rows = [make_completion(rng, 5, 8, share=0.5), make_pair(rng, 9, 4, 6), make_completion(rng, 0, 7)]
    model = full_model("llama")
    scores = score_rows(model, rows, tokens_per_batch=64, device=torch.device("cpu"))
    for row, found in zip(rows, scores, strict=True):
        for response, tokens in zip(row.responses, found, strict=True):
            ids = torch.tensor([[*row.prompt, *response.ids]])
            with torch.no_grad():
                expected = torch.log_softmax(model(ids).logits[0].float(), -1)
            for index, scored in enumerate(response.mask):
                place = len(row.prompt) + index
                want = expected[place - 1, response.ids[index]].item() if scored else 0.0
                assert tokens[index].item() == pytest.approx(want, abs=1e-4)


def test_scoring_again_gives_the_same_bits_in_any_company_of_ranks() -> None:
    rng = random.Random(4)
    rows = [make_pair(rng, rng.randint(1, 30), rng.randint(1, 9), rng.randint(1, 9)) for _ in range(12)]
    scorer = Scorer(full_model("llama"))
    one, two = (score_rows(scorer, rows, tokens_per_batch=80, device=torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
