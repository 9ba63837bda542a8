"""Generation: what is in the batch changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plumbline_trainer.evaluation.generation import generate
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout.drawing import uniform_draws
from plumbline_trainer.rollout.interface import Prompt
from support import tiny

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
    return [
        Prompt(
            f"row-{i}",
            list(
                tokenizer.hf.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
                    "input_ids"
                ]
            ),
        )
        for i, text in enumerate(QUESTIONS)
    ]


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_answers_as_each_prompt_alone(tmp_path, style, temperature):
    model, tokenizer = loaded(tmp_path, style)
    prompts = prompts_of(tokenizer)
    settings = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    together = generate(model, tokenizer, prompts, **settings)
    alone = [generate(model, tokenizer, [prompt], **settings)[0] for prompt in prompts]
    assert together == alone
    in_twos = generate(model, tokenizer, prompts, tokens_per_batch=200, **settings)
    assert in_twos == alone


@pytest.mark.parametrize("options", [{"pad_is_end": True}, {"bos": True}, {"pad_is_end": True, "bos": True}])
def test_greedy_answers_are_those_of_transformers(tmp_path, options):
    model, tokenizer = loaded(tmp_path, "qwen2", **options)
    for prompt, answer in zip(
        prompts_of(tokenizer),
        generate(model, tokenizer, prompts_of(tokenizer), max_new_tokens=16),
        strict=True,
    ):
        expected = model.generate(torch.tensor([prompt.ids]), max_new_tokens=16, do_sample=False)[0, len(prompt.ids) :]
        found = [*answer.ids, tokenizer.end_tokens[0]] if answer.finished else answer.ids
        assert expected.tolist() == found


def test_end_tokens_end_answers_and_are_left_out(tmp_path):
    model, tokenizer = loaded(tmp_path)
    prompts = prompts_of(tokenizer)
    free = generate(model, tokenizer, prompts, max_new_tokens=12)
    stop = free[0].ids[2]
    wanted = Tokenizer(tokenizer.hf, tokenizer.template, (*tokenizer.end_tokens, stop))
    answers = generate(model, wanted, prompts, max_new_tokens=12)
    assert answers[0].finished
    assert answers[0].ids == free[0].ids[: free[0].ids.index(stop)]
    for before, after in zip(free, answers, strict=True):
        cut = before.ids.index(stop) if stop in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.finished == (before.finished or cut is not None)


def test_sampling_follows_the_distribution(tmp_path):
    model, tokenizer = loaded(tmp_path)
    prompt = prompts_of(tokenizer)[0].ids
    many = [Prompt(str(i), prompt) for i in range(2000)]
    firsts = [
        a.ids[0] if a.ids else tokenizer.end_tokens[0]
        for a in generate(model, tokenizer, many, max_new_tokens=1, temperature=0.7)
    ]
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 0.7, -1).numpy()
    seen = np.bincount(firsts, minlength=len(expected)) / len(firsts)
    top = np.argsort(-expected)[:3]
    assert np.abs(seen[top] - expected[top]).max() < 0.04
    assert np.abs(np.cumsum(seen) - np.cumsum(expected)).max() < 0.05


def test_draws_depend_on_seed_and_row_only():
    assert uniform_draws(1, "a", 8).tolist() == uniform_draws(1, "a", 16)[:8].tolist()
    assert uniform_draws(1, "a", 8).tolist() != uniform_draws(1, "b", 8).tolist()
    assert uniform_draws(1, "a", 8).tolist() != uniform_draws(2, "a", 8).tolist()
    draws = uniform_draws(0, "a", 10000)
    assert 0 <= draws.min() < draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.01)


def test_progress_rises_and_may_stop(tmp_path):
    model, tokenizer = loaded(tmp_path)
    shares = []
    generate(model, tokenizer, prompts_of(tokenizer), max_new_tokens=6, tokens_per_batch=100, at_step=shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, prompts_of(tokenizer), max_new_tokens=6, at_step=stop)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ranks_share_the_prompts_and_know_all_answers(tmp_path, temperature):
    model, tokenizer = loaded(tmp_path)
    prompts = prompts_of(tokenizer)
    settings = {"max_new_tokens": 10, "temperature": temperature}
    left = {}
    generate(model, tokenizer, prompts, ranks=TwoRanks(0, left), **settings)
    assert generate(model, tokenizer, prompts, ranks=TwoRanks(1, left), **settings) == generate(
        model, tokenizer, prompts, **settings
    )
    busy = [int((table[:, 0] + table[:, 1] > 0).sum()) for table in left.values()]
    assert sorted(busy) == [2, 3]
