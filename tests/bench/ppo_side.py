"""One measured run of trl's PPO, in the environment of its own that has it.

    .venv-ppo/bin/python tests/bench/ppo_side.py '{…}' PROMPTS

PROMPTS is a JSON file with the ids of the prompts in the order in which they are answered. The policy and the value model
carry the same adapter, the reference is the policy without it; the reward costs nothing, and the end token ends no answer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from measured import PPO_EPOCHS, TEMPERATURE, Clock, Measured, Task
from parts import StepParts
from torch import nn
from torch.utils.data import DataLoader
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

RANK, ALPHA = 16, 32
assert trl.__version__ == "1.12.0", f"the peer is pinned to trl 1.12.0, this is {trl.__version__}"


class LastToken(nn.Module):
    """A reward model in trl's form that looks at the last token's id."""

    base_model_prefix = "backbone"

    def backbone(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=(input_ids[..., None] % 7 / 7.0,))

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def measure(task: Task, prompts: list[list[int]]) -> Measured:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[task.precision]
    policy = transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=1, dtype=dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model, padding_side="left")
    linear = {name.rpartition(".")[2] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
    adapter = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": sorted(linear - {"lm_head"})}
    clock = Clock([*policy.parameters(), *critic.parameters()], task, StepParts())
    critic = peft.inject_adapter_in_model(peft.LoraConfig(**adapter, task_type="SEQ_CLS"), critic)
    for name, parameter in critic.named_parameters():
        trained = "lora_" in name or name.startswith("score.")
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()

    class Ends(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    arguments: dict[str, Any] = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": task.precision == "bfloat16",
        "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.answers_per_step // task.batch,
        "total_episodes": len(prompts),
        "response_length": task.new_tokens,
        "temperature": TEMPERATURE,
        "num_ppo_epochs": PPO_EPOCHS,
        "num_sample_generations": 0,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    if task.side == "trl":
        arguments["gradient_checkpointing"] = False
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids in (r["input_ids"] for r in rows)])
        }

    real = ppo_trainer.batch_generation

    def whole_answers(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        both, logits = real(*arguments)
        assert logits.shape[1] == task.new_tokens, "an answer ended early; the sides would not do the same work"
        return both, logits

    ppo_trainer.batch_generation = whole_answers
    assert width + task.new_tokens <= policy.config.max_position_embeddings
    # A batch more than is answered: accelerate would not accumulate gradients on the last one of the loader.
    data = datasets.Dataset.from_dict({"input_ids": [*prompts, *prompts[: task.global_batch]]})
    with tempfile.TemporaryDirectory() as place:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=place, **arguments),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=LastToken(),
            value_model=critic,
            train_dataset=data,
            data_collator=padded,
            peft_config=peft.LoraConfig(**adapter, task_type="CAUSAL_LM"),
            callbacks=[Ends()],
        )
        loader = DataLoader(data, batch_size=task.global_batch, shuffle=False, collate_fn=padded, drop_last=True)
        trainer.dataloader = trainer.accelerator.prepare(loader)  # in the given order
        trainer.train()
    losses = [entry["loss/policy_avg"] for entry in trainer.state.log_history if "loss/policy_avg" in entry]
    tokens = sum(len(ids) + task.answers * task.new_tokens for ids in prompts)
    return clock.result(task, tokens, 0.0, losses)


if __name__ == "__main__":
    given = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(given.threads)
    found = measure(given, json.loads(Path(sys.argv[2]).read_text()))
    sys.stdout.write("\n" + json.dumps(asdict(found)) + "\n")
