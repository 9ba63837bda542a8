"""trl as the oracle: its own trainers on the same tiny model, rows and adapter. A missing or other trl fails, it never skips."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import trl
from plumbline_api.training import Lora, Schedule, Training
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.objective import Objective
from plumbline_trainer.engine.schedule import StepPlan, plan_steps
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.models.adapters import adapter_state, attach_lora
from support.encoded import make_completion, make_pair, make_thumb
from support.tiny import Style, make_model, make_tokenizer
from support.trainer import stage_context, stage_run
from torch.utils.data import SequentialSampler

PINNED = "1.16.0"
assert trl.__version__ == PINNED, f"parity is stated against trl {PINNED}, this is {trl.__version__}"

LORA = Lora(rank=4, alpha=8)
TRAINING: dict[str, Any] = {
    "learning_rate": 3e-3,
    "global_batch": 4,
    "tokens_per_batch": 256,
    "schedule": Schedule(type="cosine", warmup_ratio=0.1),
    "weight_decay": 0.0,
    "gradient_clip": 1.0,
}
"""Optimisation of both sides, unless a test changes it."""
CURVE_TOLERANCE = 1e-4
"""Relative, at every one of thirty steps in float32. The padded and the packed forward round differently."""

__all__ = ["LORA", "make_completion", "make_pair", "make_thumb"]


def training(**changes: Any) -> Training:
    """`TRAINING` with changes."""
    return Training(**{**TRAINING, **changes})


def our_model(style: Style, *, lora: bool, touched: bool = False) -> Any:
    """A tiny model to train; `touched`: the adapter is no longer at its start, so that both factors have gradients."""
    model = make_model(style, seed=5)
    if not lora:
        return model.requires_grad_(True)
    model = attach_lora(model, LORA, seed=5)
    if touched:
        rng = torch.Generator().manual_seed(9)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=rng) * 0.05
    return model.eval()


def their_model(ours: Any, style: Style, *, lora: bool) -> Any:
    """The same weights as trl takes them: a PEFT model with the same factors, or the bare model."""
    model = make_model(style, seed=5)
    if not lora:
        model.load_state_dict(ours.state_dict())
        return model
    targets = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter_state(ours)})
    config = peft.LoraConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    move_adapter(model, ours)
    return model


def move_adapter(theirs: Any, ours: Any) -> None:
    """Give trl's policy the factors of our model."""
    result = peft.set_peft_model_state_dict(theirs, adapter_state(ours))
    assert not result.unexpected_keys


def gradients_by_name(model: Any) -> dict[str, torch.Tensor]:
    """Gradients under names that both sides share."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def gradient_gap(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the wanted gradient, over all of it."""
    assert found.keys() == wanted.keys()
    gap = sum(float((found[name] - wanted[name]).double().square().sum()) for name in found) ** 0.5
    norm = sum(float(wanted[name].double().square().sum()) for name in found) ** 0.5
    assert norm > 0
    return float(gap / norm)


def shared_arguments(folder: Path, training: Training) -> dict[str, Any]:
    """trl's names for our optimisation parameters."""
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": training.global_batch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule.type,
        "warmup_steps": training.schedule.warmup_ratio,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.gradient_clip,
        "num_train_epochs": 1,
        "max_length": 512,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def sft_trainer(model: Any, rows: Sequence[Encoded], arguments: dict[str, Any]) -> Any:
    """trl's SFT on ready ids and labels, in the given order."""
    data = []
    for row in rows:
        (response,) = row.responses
        labels = [token if scored else -100 for token, scored in zip(response.ids, response.mask, strict=True)]
        data.append({"input_ids": [*row.prompt, *response.ids], "labels": [-100] * len(row.prompt) + labels})
    config = trl.SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}, packing=False)
    trainer = trl.SFTTrainer(
        model, args=config, train_dataset=datasets.Dataset.from_list(data), processing_class=make_tokenizer()
    )
    return in_order(trainer)


def dpo_trainer(
    model: Any, rows: Sequence[Encoded], arguments: dict[str, Any], *, beta: float, **config_fields: Any
) -> Any:
    """trl's DPO on ready ids, in the given order; only its tokenisation is left out.

    The reference is the model as given; the loss is trl's default (sigmoid) unless `config_fields` say otherwise.
    """

    class Ready(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    data = [
        {
            "prompt_ids": row.prompt,
            "chosen_ids": row.responses[0].ids,
            "rejected_ids": row.responses[1].ids,
            "prompt": "",
            "chosen": "",
            "rejected": "",
        }
        for row in rows
    ]
    config = trl.DPOConfig(**arguments, beta=beta, **{"loss_type": ["sigmoid"], **config_fields})
    trainer = Ready(
        model,
        ref_model=None if isinstance(model, peft.PeftModel) else copy.deepcopy(model),
        args=config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=make_tokenizer(),
    )
    return in_order(trainer)


def kto_trainer(model: Any, rows: Sequence[Encoded], arguments: dict[str, Any], **fields: Any) -> Any:
    """trl's KTO on ready ids, in the given order; its own rotation of completions within each device batch stays.

    The reference is the model as given.
    """
    data = [
        {"prompt_ids": row.prompt, "completion_ids": response.ids, "label": response.role == "desirable"}
        for row in rows
        for response in row.responses
    ]
    size = arguments["per_device_train_batch_size"]
    for start in range(0, len(data), size):
        ids = [row["completion_ids"] for row in data[start : start + size]]
        for row, other in zip(data[start : start + size], [ids[-1], *ids[:-1]], strict=True):
            row["KL_completion_ids"] = other

    class Ready(trl.KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    config = trl.KTOConfig(**arguments, **fields)
    trainer = Ready(
        model,
        ref_model=None if isinstance(model, peft.PeftModel) else copy.deepcopy(model),
        args=config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=make_tokenizer(),
    )
    return in_order(trainer)


def in_order(trainer: Any) -> Any:
    """Let a trainer of trl take the rows as they are given."""
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(dataset or trainer.train_dataset)
    return trainer


def first_batch(trainer: Any) -> Any:
    """The batch of trl's own loader."""
    return next(iter(trainer.get_train_dataloader()))


def losses_of(trainer: Any) -> list[float]:
    """Train; the loss of every step."""
    found: list[float] = []
    real = trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        found.append(float(loss.detach()))
        return result

    trainer.compute_loss = recorded
    trainer.train()
    return found


def plan_of(rows: Sequence[Encoded], training: Training) -> StepPlan:
    return plan_steps(
        [row.row_id for row in rows],
        seed=1,
        global_batch=training.global_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )


def in_plan_order(rows: Sequence[Encoded], training: Training, steps: int = 30) -> list[Encoded]:
    """The rows as our steps take them."""
    plan = plan_of(rows, training)
    assert plan.steps == steps
    return [rows[index] for step in range(steps) for index in plan.rows(step)]


class LossCurve:
    """Our training loop on ready rows; remembers the loss of every step."""

    def __init__(
        self, folder: Path, model: Any, rows: Sequence[Encoded], training: Training, scorer: Scorer | None = None
    ) -> None:
        context = stage_context(folder, stage_run(folder))
        self.losses: list[float] = []
        context.progress.update = lambda step, steps, message="", metrics=None: (  # type: ignore[method-assign]
            self.losses.append(metrics["loss"]) if metrics else None
        )
        scorer = Scorer(model) if scorer is None else scorer
        scorer.eval()
        self.run = TrainingRun(context, Ranks(), scorer, plan_of(rows, training), list(rows), training)

    def train(self, objective: Objective) -> list[float]:
        self.run.train(objective, [])
        return copy.copy(self.losses)
