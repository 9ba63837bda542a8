"""Rollouts: what is drawn is a function of seed, row, number of the answer and place, however answers are batched."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
import transformers
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout import decoding
from plumbline_trainer.rollout.cache import RowCache
from plumbline_trainer.rollout.drawing import uniform_draws
from plumbline_trainer.rollout.huggingface import HuggingFaceRollout
from plumbline_trainer.rollout.interface import Prompt, Sampled
from support import adapted, tiny

QUESTIONS = (
    "Name three fruits.",
    "Why?",
    "How do I check that a shelf is level, and what do I need for it?",
    "A plumb line is",
    "Who asks a question wants an answer that is short, correct and kind. What is water?",
)


def loaded(tmp_path, style="llama", **options):
    return load_base(tiny.save_model(tmp_path / style, style, seed=4, **options), "float32")


def prompts_of(tokenizer: Tokenizer) -> list[Prompt]:
    rendered = [
        tokenizer.hf.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in QUESTIONS
    ]
    return [Prompt(f"row-{i}", list(ids)) for i, ids in enumerate(rendered)]


def with_ends(tokenizer: Tokenizer, *more: int) -> Tokenizer:
    """Further end tokens, so that answers of a random model finish at different places."""
    return Tokenizer(tokenizer.hf, tokenizer.template, (*tokenizer.end_tokens, *more))


def engine(model, tokenizer, **settings) -> HuggingFaceRollout:
    return HuggingFaceRollout(model, tokenizer, **({"max_new_tokens": 20} | settings))


@torch.no_grad()
def slowly(model, tokenizer, prompt: Prompt, number: int, *, seed: int, steps: int, temperature: float) -> Sampled:
    """One answer without cache, batch or cleverness."""
    ids: list[int] = []
    uniforms = uniform_draws(seed, prompt.row_id, steps, number)
    for step in range(steps):
        logits = model(torch.tensor([[*prompt.ids, *ids]]), use_cache=False).logits[0, -1].double().numpy()
        weights = np.exp((logits - logits.max()) / temperature)
        sums = np.cumsum(weights)
        ids.append(int(np.searchsorted(sums, uniforms[step] * sums[-1], side="right")))
        if ids[-1] in tokenizer.end_tokens:
            return Sampled(ids, True)
    return Sampled(ids, False)


@pytest.mark.parametrize("style", tiny.STYLES)
def test_answers_are_those_of_the_plain_loop(tmp_path, style):
    model, tokenizer = loaded(tmp_path, style)
    tokenizer = with_ends(tokenizer, *range(40, 60))
    prompts = prompts_of(tokenizer)
    found = engine(model, tokenizer, temperature=0.9, tokens_per_batch=450).sample(prompts, answers=4, seed=7)
    for prompt, answers in zip(prompts, found, strict=True):
        expected = [slowly(model, tokenizer, prompt, number, seed=7, steps=20, temperature=0.9) for number in range(4)]
        assert answers == expected
    lengths = {len(answer.ids) for answers in found for answer in answers}
    assert len(lengths) > 3  # answers left the batch at different steps
    assert {answer.finished for answers in found for answer in answers} == {True, False}


@pytest.mark.parametrize("trial", range(6))
def test_no_batching_changes_an_answer(tmp_path, trial, monkeypatch):
    """Any budget, any order, any part of the prompts, any number of answers."""
    model, tokenizer = loaded(tmp_path, tiny.STYLES[trial % len(tiny.STYLES)])
    tokenizer = with_ends(tokenizer, *range(50, 70))
    prompts = prompts_of(tokenizer)
    whole = dict(
        zip(
            [prompt.row_id for prompt in prompts],
            engine(model, tokenizer).sample(prompts, answers=5, seed=trial),
            strict=True,
        )
    )
    chance = random.Random(trial)
    for _ in range(4):
        part = chance.sample(prompts, chance.randint(1, len(prompts)))
        count = chance.randint(1, 5)
        monkeypatch.setattr(decoding, "REFILL_SHARE", chance.choice([1, 2, 8]))
        found = engine(model, tokenizer, tokens_per_batch=chance.choice([1, 90, 200, 300, 700, 2000])).sample(
            part, answers=count, seed=trial
        )
        assert found == [whole[prompt.row_id][:count] for prompt in part]


def test_a_prompt_is_computed_once_for_all_its_answers(tmp_path):
    model, tokenizer = loaded(tmp_path)
    prompts = prompts_of(tokenizer)
    widths: list[tuple[int, ...]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, given, out: widths.append(out.shape[:2]))
    engine(model, tokenizer, max_new_tokens=6, tokens_per_batch=150).sample(prompts, answers=7, seed=0)
    handle.remove()
    prefills = [rows for rows, width in widths if width > 1]
    assert sum(prefills) == len(prompts)
    assert max(rows for rows, _ in widths) <= 150 // 6


def test_memory_of_a_rollout_is_free_before_the_garbage_collector_comes(tmp_path, monkeypatch):
    model, tokenizer = loaded(tmp_path)
    made: list[weakref.ref] = []

    class Noted(RowCache):
        def __init__(self, layers: int) -> None:
            super().__init__(layers)
            made.append(weakref.ref(self))

    monkeypatch.setattr(decoding, "RowCache", Noted)
    gc.disable()
    try:
        engine(model, tokenizer, max_new_tokens=4).sample(prompts_of(tokenizer), answers=2, seed=1)
        assert [cache() for cache in made] == [None]
    finally:
        gc.enable()


def test_answers_that_are_finished_cost_nothing_more(tmp_path):
    model, tokenizer = loaded(tmp_path)
    tokenizer = with_ends(tokenizer, *range(0, 200, 3))
    rows: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: rows.append(out.shape[0]) if out.shape[1] == 1 else None
    )
    found = engine(model, tokenizer, max_new_tokens=30).sample(prompts_of(tokenizer), answers=8, seed=1)
    handle.remove()
    # Every token but an answer's first one takes one row of one step.
    assert sum(rows) == sum(len(answer.ids) - 1 for answers in found for answer in answers)
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 4


def test_free_places_are_taken_by_those_that_wait(tmp_path):
    model, tokenizer = loaded(tmp_path)
    tokenizer = with_ends(tokenizer, *range(0, 200, 3))
    prompts = [Prompt(str(number), [5, 6, 7, 8]) for number in range(60)]
    passes: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, given, out: passes.append(tuple(out.shape[:2]))
    )
    engine(model, tokenizer, max_new_tokens=28, tokens_per_batch=20 * 32).sample(prompts, answers=2, seed=1)
    handle.remove()
    last = max(place for place, (_, width) in enumerate(passes) if width > 1)
    busy = [rows for rows, width in passes[:last] if width == 1]
    assert len(busy) > 20
    assert max(busy) <= 20
    assert min(busy) >= 14


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("options", [{}, {"pad_is_end": True}])
def test_greedy_answers_are_those_of_transformers(tmp_path, style, options):
    model, tokenizer = loaded(tmp_path, style, **options)
    stops = [tokenizer.end_tokens[0], *range(60, 75)]
    tokenizer = with_ends(tokenizer, *stops[1:])
    prompts = prompts_of(tokenizer)
    found = engine(model, tokenizer, temperature=0.0, max_new_tokens=24).sample(prompts, answers=2, seed=0)
    for prompt, answers in zip(prompts, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt.ids]),
            attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_id,
        )[0, len(prompt.ids) :].tolist()
        assert [answer.ids for answer in answers] == [expected, expected]
        assert answers[0].finished == (expected[-1] in stops)


def recurrent_model(tokenizer):
    """Convolutions between attention layers: its cache holds states, not tokens."""
    config = transformers.Lfm2Config(
        vocab_size=len(tokenizer.hf),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def stateful_model(tokenizer):
    """A state-space model, which hands out no cache of tokens at all."""
    config = transformers.MambaConfig(
        vocab_size=len(tokenizer.hf), hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.3
    )
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("make", [recurrent_model, stateful_model])
def test_models_with_another_cache_answer_one_at_a_time_and_say_so(tmp_path, make):
    _, tokenizer = loaded(tmp_path)
    tokenizer = with_ends(tokenizer, *range(50, 70))
    model, prompts = make(tokenizer), prompts_of(tokenizer)[:3]
    rollout = engine(model, tokenizer, max_new_tokens=10)
    assert rollout.plain_reason is not None
    assert "one answer at a time" in rollout.describe()
    shares: list[float] = []
    found = rollout.sample(prompts, answers=2, seed=5, at_step=shares.append)
    assert found == [
        [slowly(model, tokenizer, prompt, number, seed=5, steps=10, temperature=1.0) for number in range(2)]
        for prompt in prompts
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_progress_rises_and_may_stop(tmp_path):
    model, tokenizer = loaded(tmp_path)
    shares: list[float] = []
    rollout = engine(model, tokenizer, max_new_tokens=6, tokens_per_batch=100)
    rollout.sample(prompts_of(tokenizer), answers=3, seed=0, at_step=shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1

    def stop(share):
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        rollout.sample(prompts_of(tokenizer), answers=3, seed=0, at_step=stop)
    assert model.training


class TwoRanks:
    """One of two ranks in one process: exchanges add what the other one left."""

    size = 2
    device = torch.device("cpu")

    def __init__(self, rank, left):
        self.rank, self.left = rank, left

    def sum_tensors(self, tensors):
        (table,) = tensors
        self.left[self.rank] = table.clone()
        if len(self.left) == self.size:
            table.copy_(sum(self.left.values()))


@pytest.mark.parametrize("count", [1, 3])
def test_ranks_share_the_prompts_and_know_all_answers(tmp_path, count):
    model, tokenizer = loaded(tmp_path)
    tokenizer, prompts = with_ends(tokenizer, *range(50, 70)), prompts_of(tokenizer)
    left: dict[int, torch.Tensor] = {}
    engine(model, tokenizer, ranks=TwoRanks(0, left)).sample(prompts, answers=count, seed=2)
    both = engine(model, tokenizer, ranks=TwoRanks(1, left)).sample(prompts, answers=count, seed=2)
    assert both == engine(model, tokenizer).sample(prompts, answers=count, seed=2)
    busy = sorted(int((table[:, 0] > 0).sum()) for table in left.values())
    assert busy == [2 * count, 3 * count]


def test_seed_row_and_number_tell_answers_apart(tmp_path):
    model, tokenizer = loaded(tmp_path)
    one, other = prompts_of(tokenizer)[0], Prompt("another", prompts_of(tokenizer)[0].ids)
    rollout = engine(model, tokenizer)
    first = rollout.sample([one, other], answers=2, seed=1)
    assert rollout.sample([one, other], answers=2, seed=1) == first
    drawn = [tuple(answer.ids) for answers in first for answer in answers]
    drawn += [tuple(answer.ids) for answer in rollout.sample([one], answers=2, seed=2)[0]]
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("kind", adapted.KINDS)
def test_the_policy_in_training_answers_with_its_adapter(tmp_path, kind):
    """In training mode, with the model's own attention switched over, as the engine leaves it between steps."""
    from plumbline_trainer.engine.attention import SEGMENTS, choose_attention
    from plumbline_trainer.engine.lowrank import use_one_piece

    model, tokenizer = loaded(tmp_path)
    adapted.attach_and_move(model, adapted.lora_of(kind), seed=3, size=0.2)
    prompts = prompts_of(tokenizer)[:3]
    expected = [
        [slowly(model, tokenizer, prompt, number, seed=5, steps=12, temperature=1.0) for number in range(2)]
        for prompt in prompts
    ]
    choose_attention(model, SEGMENTS)
    use_one_piece(model)
    modes = {name: module.training for name, module in model.train().named_modules()}
    rollout = engine(model, tokenizer, max_new_tokens=12)
    assert rollout.sample(prompts, answers=2, seed=5) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == SEGMENTS
    assert "merged" in rollout.describe()


@pytest.mark.parametrize("kind", ["plain", "dora", "saved"])
def test_a_policy_in_bfloat16_answers_as_it_is_trained(tmp_path, kind):
    """Under the same automatic casts, so that keys, values and factors may have different types."""
    model, tokenizer = load_base(tiny.save_model(tmp_path / "tiny", "llama", seed=4, dtype="bfloat16"), "bfloat16")
    adapted.attach_and_move(model, adapted.lora_of(kind), seed=3, size=0.2)
    rollout = engine(model, tokenizer, max_new_tokens=12, precision="bfloat16", tokens_per_batch=300)
    prompts = prompts_of(tokenizer)
    found = rollout.sample(prompts, answers=3, seed=5)
    assert "their weights are bfloat16" in rollout.describe()
    # Rounding may turn a token, after which an answer goes its own way; first tokens have the same rounding.
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = [slowly(model, tokenizer, p, n, seed=5, steps=1, temperature=1.0) for p in prompts for n in range(3)]
    drawn = [answer for answers in found for answer in answers]
    same = [answer.ids[0] == one.ids[0] for answer, one in zip(drawn, expected, strict=True)]
    assert sum(same) >= len(same) - 1
