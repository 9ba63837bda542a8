"""trl's PPO in the environment of its own: one rollout and the updates on it, observed.

    .venv-ppo/bin/python tests/support/ppo_peer_side.py FOLDER…

A FOLDER is one case; they share a process because the imports take longer than the work. It holds `task.json` (fields of PPOConfig, pad and end token), the models `policy`, `reference`, `critic` and `reward`
as Hugging Face folders, and `rollout.safetensors` with the prompts [n, P] (padded left) and their answers [n, T] (padded
right). It writes `found.safetensors`: what trl had of the rollout, and of each optimizer step its losses by token and its
gradients; and `log.json`, what it logged. The one thing replaced is the sampler: it gives the answers of `rollout`, with
the logits of trl's own forward pass. With several ranks, the files are those of rank 0.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from accelerate.state import AcceleratorState, GradientState
from frames import variables_of
from safetensors.torch import load_file, save_file
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

PINNED = "1.12.0"
assert trl.__version__ == PINNED, f"parity of PPO is stated against trl {PINNED}, this is {trl.__version__}"

ROLLOUT = (
    "queries",
    "responses",
    "logprobs",
    "ref_logprobs",
    "scores",
    "values",
    "rewards",
    "advantages",
    "returns",
    "padding_mask",
    "padding_mask_p1",
    "kl",
)
STEP = ("micro_batch_inds", "pg_loss_max", "vf_loss_max", "ratio", "pg_loss", "vf_loss", "loss")


class Observed(torch.optim.SGD):
    """SGD that keeps what trl holds, and its gradients, before every step."""

    def __init__(self, model: Any, rate: float, found: dict[str, torch.Tensor]) -> None:
        super().__init__(model.parameters(), lr=rate)
        self.model, self.found, self.steps = model, found, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        held = variables_of("train", "ppo_trainer.py")
        if not self.steps:
            self.found.update({f"rollout.{name}": kept(held[name]) for name in ROLLOUT})
        self.found.update({f"step{self.steps}.{name}": kept(held[name]) for name in STEP})
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.found[f"step{self.steps}.gradient.{name}"] = kept(parameter.grad)
        self.steps += 1
        super().step(closure)


def kept(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().clone().contiguous()


class Parts(torch.nn.Module):
    """What is trained, under the names of both models."""

    def __init__(self, policy: Any, critic: Any) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic


def measure(folder: Path) -> None:
    """One case, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    task = json.loads((folder / "task.json").read_text())
    rollout = load_file(folder / "rollout.safetensors")
    pad = task["pad"]
    answers = {
        tuple(ids.tolist()): answer for ids, answer in zip(rollout["queries"], rollout["responses"], strict=True)
    }
    # trl shuffles prompts with its loader; the answers are found by the prompt, wherever it lands.
    prompts = [[token for token in ids if token != pad] for ids in rollout["queries"].tolist()]
    assert len(answers) == len(prompts), "every prompt must be another one"
    width = rollout["queries"].shape[1]

    def given(model: Any, queries: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([queries, torch.stack([answers[tuple(ids)] for ids in queries.tolist()])], dim=1)
        logits = ppo_trainer.forward(model, both, pad).logits[:, width - 1 : -1]
        return both, logits / (task["config"]["temperature"] + 1e-7)

    ppo_trainer.batch_generation = given

    causal, scalar = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
    policy, reference = (causal.from_pretrained(folder / name) for name in ("policy", "reference"))
    critic, reward = (scalar.from_pretrained(folder / name, num_labels=1) for name in ("critic", "reward"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [[pad] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows]
        return {"input_ids": torch.tensor(ids)}

    found: dict[str, torch.Tensor] = {}
    optimizer = Observed(Parts(policy, critic), task["rate"], found)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            num_sample_generations=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **task["config"],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        data_collator=padded,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    trainer.train()
    assert optimizer.steps, "trl took no step"
    if trainer.accelerator.is_main_process:
        save_file(found, folder / "found.safetensors")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def measure_on_ranks(folder: Path, ranks: int) -> None:
    """One case in as many processes, forked after the imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        measure(folder)
        sys.stdout.flush()
        os._exit(0)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"a rank of {folder.name} failed")


def main(folders: list[Path]) -> None:
    """All cases; those on several ranks first, while this process has no threads yet."""
    tasks = [(json.loads((folder / "task.json").read_text())["ranks"], folder) for folder in folders]
    for ranks, folder in sorted(tasks, key=lambda task: -task[0]):
        if ranks > 1:
            measure_on_ranks(folder, ranks)
        else:
            measure(folder)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
