"""trl's RewardTrainer as the oracle: the same backbone, adapter, head and rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.values import ValueScorer
from plumbline_trainer.models.adapters import adapter_state
from support import peer
from support.tiny import Style, make_model, make_tokenizer

HEAD = "base_model.model.score.weight"


def their_reward_model(style: Style, *, lora: bool) -> Any:
    """A sequence classifier as trl trains it, on the backbone of `peer.our_model`; its head and adapter come later."""
    ours = make_model(style, seed=5)
    config = ours.config
    config.num_labels, config.pad_token_id = 1, make_tokenizer().pad_token_id
    model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(ours.base_model.state_dict())
    if not lora:
        return model
    fresh = peer.our_model(style, lora=True)
    targets = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter_state(fresh)})
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=peer.LORA.rank,
            lora_alpha=peer.LORA.alpha,
            lora_dropout=0.0,
            target_modules=targets,
            modules_to_save=["score"],
            task_type="SEQ_CLS",
        ),
    )


def take_weights(theirs: Any, ours: ValueScorer, *, lora: bool) -> None:
    """Give trl's model the head, and the factors where there are any, of ours."""
    head = ours.heads.weight.detach().clone()
    if not lora:
        theirs.score.weight.data = head
        return
    result = peft.set_peft_model_state_dict(theirs, {**adapter_state(ours.model), HEAD: head})
    assert not result.unexpected_keys
    assert torch.equal(theirs.get_submodule("base_model.model.score.modules_to_save.default").weight, head)


def reward_trainer(model: Any, rows: Sequence[Encoded], arguments: dict[str, Any], *, centring: float | None) -> Any:
    """trl's trainer on ready ids, in the given order."""
    data = []
    for row in rows:
        better, worse = sorted(row.responses, key=lambda response: response.rank)
        record = {"chosen_ids": [*row.prompt, *better.ids], "rejected_ids": [*row.prompt, *worse.ids]}
        data.append(record | {"margin": row.margin})
    config = trl.RewardConfig(**arguments, center_rewards_coefficient=centring)
    trainer = trl.RewardTrainer(
        model, args=config, train_dataset=datasets.Dataset.from_list(data), processing_class=make_tokenizer()
    )
    return peer.in_order(trainer)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of trl's model under our names; its head is `score.weight`."""
    return {name.replace("modules_to_save.", ""): value for name, value in peer.gradients_by_name(model).items()}
