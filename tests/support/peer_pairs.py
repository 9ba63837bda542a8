"""trl's preference trainers without a reference, which it keeps in `trl.experimental`, on ready ids."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import torch
from plumbline_trainer.data.encode import Encoded
from support.tiny import make_tokenizer
from torch.utils.data import SequentialSampler
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer


class _ReadyIds:
    """Replaces trl's tokenisation of a row by the row's own ids."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        prompt = feature["prompt_ids"]
        found = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side in ("chosen", "rejected"):
            answer = feature[f"{side}_ids"]
            found[f"{side}_input_ids"] = prompt + answer
            found[f"{side}_attention_mask"] = [1] * len(prompt + answer)
            found[f"{side}_labels"] = [-100] * len(prompt) + answer
        return found


class _Orpo(_ReadyIds, ORPOTrainer):  # type: ignore[misc]
    pass


class _Cpo(_ReadyIds, CPOTrainer):  # type: ignore[misc]
    pass


def orpo_trainer(model: Any, rows: Sequence[Encoded], arguments: dict[str, Any], *, beta: float) -> Any:
    """trl's ORPO, in the given order."""
    return _trainer(_Orpo, model, rows, ORPOConfig(**arguments, beta=beta))


def cpo_trainer(model: Any, rows: Sequence[Encoded], arguments: dict[str, Any], **config_fields: Any) -> Any:
    """trl's CPO, in the given order; with `loss_type="simpo"` its SimPO."""
    return _trainer(_Cpo, model, rows, CPOConfig(**arguments, **config_fields))


def _trainer(kind: Any, model: Any, rows: Sequence[Encoded], config: Any) -> Any:
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
    trainer = kind(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(data), processing_class=make_tokenizer()
    )
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(dataset or trainer.train_dataset)
    return trainer


def cpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, **fields: Any) -> torch.Tensor:
    """trl's CPO loss of given figures, one value per pair: the forms that its DPO does not have."""
    trainer = SimpleNamespace(
        **{"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu"), **fields}
    )
    losses, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    return losses
