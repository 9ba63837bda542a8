"""Tokens per second of a rollout: our engine against transformers' `generate`, in alternating runs of one process.

    python -m tests.bench generation

Same model, adapter, prompts, answers per prompt, longest answer, temperature 1, precision and threads. `generate` runs
under `inference_mode` on prompts sorted by length, in device batches of the size that a trial of each finds fastest,
with the adapter as peft computes it and once more merged by peft, which a trainer that goes on training must undo. What
counts are tokens up to and including an answer's end; whatever a side computes after it is in vain.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plumbline_api.training import Lora
from plumbline_trainer.data.sources import bundled_model
from plumbline_trainer.models.adapters import attach_lora
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout.huggingface import TOKENS_PER_BATCH, HuggingFaceRollout
from plumbline_trainer.rollout.interface import Prompt

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ROOT / "examples" / "01-quickstart" / "data" / "questions.jsonl"
BATCHES = (2, 4, 8)
"""Prompts of a device batch of `generate`, each with all its answers."""


@dataclass(frozen=True)
class Size:
    """How much is generated."""

    prompts: int = 8
    answers: int = 8
    max_new_tokens: int = 32
    runs: int = 3


def measure(size: Size | None = None) -> list[dict[str, str]]:
    """One row per side."""
    size = size or Size()
    model, tokenizer = load_base(bundled_model("bundled://smollm2-135m-instruct"), "float32")
    attach_lora(model, Lora(rank=16, alpha=32), seed=1)
    _train_a_little(model)
    return compare(model, tokenizer, _prompts(tokenizer, size.prompts), size)


def compare(model: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], size: Size) -> list[dict[str, str]]:
    """Alternating runs of every side on a model with an adapter."""
    trials = {batch: _timed(_peer(model, tokenizer, prompts, size, batch), 0) for batch in BATCHES}
    batch = max(trials, key=lambda tried: trials[tried].per_cpu_second)
    sides: dict[str, Callable[[int], list[int]]] = {
        "ours": _ours(model, tokenizer, prompts, size),
        "generate": _peer(model, tokenizer, prompts, size, batch),
        "generate, adapter merged": _merged(model, _peer(model, tokenizer, prompts, size, batch)),
    }
    found: dict[str, list[Run]] = {name: [] for name in sides}
    for run in range(size.runs):
        for name, side in sides.items():
            found[name].append(_timed(side, run + 1))
    wall = {name: statistics.median(run.per_second for run in runs) for name, runs in found.items()}
    used = {name: statistics.median(run.per_cpu_second for run in runs) for name, runs in found.items()}
    return [
        {
            "rollout": name,
            "tokens/s": f"{wall[name]:.0f} ({min(r.per_second for r in runs):.0f}–{max(r.per_second for r in runs):.0f})",
            "ours against it": f"{wall['ours'] / wall[name]:.2f}×",
            "tokens per processor second": f"{used[name]:.1f}",
            "ours against it, by processor time": f"{used['ours'] / used[name]:.2f}×",
            "tokens per answer": f"{statistics.mean(run.per_answer for run in runs):.0f}",
            "device batch": f"{batch * size.answers} answers"
            if name != "ours"
            else f"{TOKENS_PER_BATCH:,} cached tokens",
        }
        for name, runs in found.items()
    ]


def notes() -> list[str]:
    """What was measured, and beside what."""
    size = Size()
    return [
        f"{size.prompts} prompts with {size.answers} answers of at most {size.max_new_tokens} tokens each, {size.runs} "
        f"alternating runs, {torch.get_num_threads()} threads; load of the machine {os.getloadavg()[1]:.1f}. Tokens count "
        "up to an answer's end. `generate` has the device batch that a trial of each found fastest."
    ]


def _prompts(tokenizer: Tokenizer, count: int) -> list[Prompt]:
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
    asked = [[{"role": "user", "content": json.loads(line)["instruction"]}] for line in lines]
    rendered = tokenizer.hf.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    return [Prompt(f"question-{index}", list(ids)) for index, ids in enumerate(rendered)]


@torch.no_grad()
def _train_a_little(model: Any) -> None:
    """Factors that are not zero, so that nothing can be left out."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.002)


@dataclass(frozen=True)
class Run:
    """One run of a side."""

    per_second: float
    per_cpu_second: float
    """Tokens over processor time of this process: what others do on the machine matters less."""
    per_answer: float


def _timed(side: Callable[[int], list[int]], seed: int) -> Run:
    start, used = time.perf_counter(), time.process_time()
    lengths = side(seed)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return Run(sum(lengths) / seconds, sum(lengths) / used, statistics.mean(lengths))


def _ours(model: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], size: Size) -> Callable[[int], list[int]]:
    engine = HuggingFaceRollout(model, tokenizer, max_new_tokens=size.max_new_tokens, temperature=1.0)

    def run(seed: int) -> list[int]:
        found = engine.sample(prompts, answers=size.answers, seed=seed)
        return [len(answer.ids) for answers in found for answer in answers]

    return run


def _peer(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[Prompt], size: Size, batch: int
) -> Callable[[int], list[int]]:
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids))
    ends = torch.tensor(tokenizer.end_tokens)

    @torch.inference_mode()
    def run(seed: int) -> list[int]:
        torch.manual_seed(seed)
        lengths: list[int] = []
        for first in range(0, len(ordered), batch):
            rows = [prompt.ids for prompt in ordered[first : first + batch]]
            width = max(map(len, rows))
            ids = torch.tensor([[tokenizer.pad_id] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            told = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=size.answers,
                max_new_tokens=size.max_new_tokens,
                eos_token_id=list(tokenizer.end_tokens),
                pad_token_id=tokenizer.pad_id,
            )[:, width:]
            ended = torch.isin(told, ends)
            cut = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, told.shape[1])
            lengths += cut.tolist()
        return lengths

    return run


def _merged(model: Any, run: Callable[[int], list[int]]) -> Callable[[int], list[int]]:
    """The same with the adapter in the weights, put in and taken out again."""
    from peft.tuners.lora import LoraLayer

    def merged(seed: int) -> list[int]:
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.merge()
        try:
            return run(seed)
        finally:
            for layer in layers:
                layer.unmerge()

    return merged
