"""trl's GRPO and RLOO as the oracle: given answers and scores, two updates on them, observed."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
import trl
from support import peer
from support.frames import variables_of
from support.tiny import make_tokenizer
from torch import Tensor

Kind = Literal["grpo", "rloo"]
_TRAINERS: dict[Kind, tuple[Any, Any]] = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
}
assert trl.__version__ == peer.PINNED


@dataclass(frozen=True)
class Step:
    """One optimizer step of trl: what it held, by name, and its gradients. Rows are in trl's order."""

    held: dict[str, Any]
    answers: list[list[int]]
    """Tokens of each row, without padding."""
    gradients: dict[str, Tensor]

    def by_answer(self, name: str, answers: list[list[int]]) -> list[Tensor]:
        """A tensor of trl's in the order of our answers, each without padding; answers must be distinct."""
        rows = [self.answers.index(answer) for answer in answers]
        value = self.held[name]
        return [value[row][: len(self.answers[row])] if value.dim() > 1 else value[row] for row in rows]


class Observed(torch.optim.SGD):
    """Plain gradient descent that keeps the gradients of every step."""

    def __init__(self, model: Any, rate: float) -> None:
        super().__init__(model.parameters(), lr=rate)
        self.model, self.gradients = model, list[dict[str, Tensor]]()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients.append(peer.gradients_by_name(self.model))
        super().step(closure)


def two_updates(
    kind: Kind,
    folder: Path,
    policy: Any,
    reference: Any,
    prompts: list[list[int]],
    groups: list[list[list[int]]],
    scores: list[list[float]],
    *,
    rate: float,
    **config: Any,
) -> list[Step]:
    """Two updates of trl on one rollout: `groups` are the answers to each prompt, `scores` theirs.

    trl's model is a copy of `policy`, its reference one of `reference`; its sampler and its tokenisation are replaced
    by what is given, and nothing else.
    """
    parent, fields = _TRAINERS[kind]
    reference.save_pretrained(folder / "reference")  # where trl loads it again
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "reference")
    size = len(groups[0])
    by_answer = {
        (prompt, tuple(ids)): score
        for prompt, (group, values) in enumerate(zip(groups, scores, strict=True))
        for ids, score in zip(group, values, strict=True)
    }

    class Ready(parent):  # type: ignore[misc, valid-type]
        def _tokenize_prompts(self, names: list[str]) -> Any:
            self.asked = [int(name) for name in names]
            return [prompts[number] for number in self.asked], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            seen: Counter[int] = Counter()
            found = []
            for number in self.asked:
                found.append(groups[number][seen[number]])
                seen[number] += 1
            return (found, None) if kind == "grpo" else found

    def given(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [by_answer[int(prompt), tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)]

    optimizer = Observed(model, rate)
    trainer = Ready(
        model=model,
        reward_funcs=given,
        args=fields(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=size * len(prompts),
            num_generations=size,
            num_iterations=2,
            steps_per_generation=1,
            max_completion_length=max(len(ids) for group in groups for ids in group),
            max_grad_norm=0.0,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **config,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(number) for number in range(len(prompts))]}),
        processing_class=make_tokenizer(),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    trainer.model.load_state_dict(policy.state_dict())
    held: list[dict[str, Any]] = []
    real = trainer.accelerator.reduce

    def reduce(*arguments: Any, **named: Any) -> Any:
        # It is called for metrics: of the rollout, and at the end of the loss, there more than once.
        if len(held) == len(optimizer.gradients):
            with suppress(LookupError):
                held.append(variables_of("_compute_loss", f"{kind}_trainer.py"))
        return real(*arguments, **named)

    trainer.accelerator.reduce = reduce
    trainer.train()
    assert len(held) == len(optimizer.gradients) == 2
    return [_step(*pair) for pair in zip(held, optimizer.gradients, strict=True)]


def _step(held: dict[str, Any], gradients: dict[str, Tensor]) -> Step:
    flat = {name: value.detach().clone() for name, value in held.items() if isinstance(value, Tensor)}
    flat |= {f"inputs.{name}": value for name, value in held["inputs"].items() if isinstance(value, Tensor)}
    answers = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(flat["inputs.completion_ids"], flat["inputs.completion_mask"], strict=True)
    ]
    return Step(flat, answers, gradients)
