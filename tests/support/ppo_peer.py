"""trl's PPO as the oracle, in an environment of its own, because later versions dropped it. Missing, it fails."""

from __future__ import annotations

import json
import os
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import Style, make_model, make_tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-ppo" / "bin" / "python"
SIDE = Path(__file__).with_name("ppo_peer_side.py")


@dataclass(frozen=True)
class Rollout:
    """Prompts and their answers; an answer shorter than `longest` ends with the end token."""

    prompts: list[list[int]]
    answers: list[list[int]]
    longest: int

    @property
    def lengths(self) -> list[int]:
        return [len(answer) for answer in self.answers]


@dataclass(frozen=True)
class Models:
    """What PPO needs, tiny: reference and reward as they are, policy and critic to be trained."""

    policy: Any
    reference: Any
    critic: Any
    reward: Any


@dataclass(frozen=True)
class Step:
    """One optimizer step of trl: losses by token, and the gradients it was taken with."""

    rows: list[int]
    """Of the rollout, in its order: those of the last micro-batch before the step."""
    policy_loss: Tensor
    value_loss: Tensor
    """Squares: trl halves their mean."""
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Observed:
    """What trl had of a rollout, [n, T] each, in the order of ours; and its steps."""

    held: dict[str, Tensor]
    steps: list[Step]
    log: dict[str, float]

    def row(self, name: str, index: int, length: int) -> Tensor:
        """The first values of a row."""
        return self.held[name][index, :length]


@dataclass(frozen=True)
class Case:
    """One call of trl."""

    models: Models
    rollout: Rollout
    rate: float
    """Of plain gradient descent."""
    config: dict[str, Any]
    """Fields of its PPOConfig."""
    ranks: int = 1


def make_rollout(lengths: list[int], longest: int, *, seed: int = 1) -> Rollout:
    """Random prompts and answers of given lengths; those shorter than `longest` end with the end token."""
    rng, tokenizer = random.Random(seed), make_tokenizer()
    low = 2 + max(tokenizer.eos_token_id, tokenizer.pad_token_id)
    ids = range(low, len(tokenizer))
    prompts = [rng.choices(ids, k=rng.randint(3, 9)) for _ in lengths]
    answers = [
        rng.choices(ids, k=length) if length == longest else [*rng.choices(ids, k=length - 1), tokenizer.eos_token_id]
        for length in lengths
    ]
    return Rollout(prompts, answers, longest)


def make_models(style: Style) -> Models:
    """The policy has moved away from the reference, so that there is a divergence; the scalar models are others."""
    reference, policy = make_model(style, seed=5), make_model(style, seed=5)
    rng = torch.Generator().manual_seed(9)
    for parameter in policy.parameters():
        parameter.data += torch.randn(parameter.shape, generator=rng) * 0.03
    return Models(policy, reference, _scalar(style, seed=6), _scalar(style, seed=7))


def _scalar(style: Style, *, seed: int) -> Any:
    config = make_model(style, seed=seed).config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model.eval()


def observe(folder: Path, cases: dict[str, Case]) -> dict[str, Observed]:
    """Let trl update on rollouts, all in one process; with several ranks what is found is rank 0's, on its own rows."""
    assert PYTHON.exists(), f"{PYTHON} is missing: parity of PPO needs trl 1.12 there. Run: make .venv-ppo/.made"
    for name, case in cases.items():
        _write(folder / name, case)
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [str(PYTHON), "-W", "ignore", str(SIDE), *(str(folder / name) for name in cases)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"trl's side failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return {name: _read(folder / name, case.rollout) for name, case in cases.items()}


def _write(folder: Path, case: Case) -> None:
    tokenizer, rollout = make_tokenizer(), case.rollout
    pad, count = tokenizer.pad_token_id, len(rollout.prompts)
    for name in ("policy", "reference", "critic", "reward"):
        getattr(case.models, name).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "policy")
    responses = torch.tensor([answer + [pad] * (rollout.longest - len(answer)) for answer in rollout.answers])
    save_file({"queries": _queries(rollout), "responses": responses}, folder / "rollout.safetensors")
    config = {
        "per_device_train_batch_size": count // case.ranks,
        "total_episodes": count,
        "local_rollout_forward_batch_size": count,
        "response_length": rollout.longest,
        "stop_token": "eos",
        **case.config,
    }
    task = {"config": config, "pad": pad, "rate": case.rate, "ranks": case.ranks}
    (folder / "task.json").write_text(json.dumps(task))


def _queries(rollout: Rollout) -> Tensor:
    pad, width = make_tokenizer().pad_token_id, max(len(prompt) for prompt in rollout.prompts)
    return torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in rollout.prompts])


def _read(folder: Path, rollout: Rollout) -> Observed:
    found = load_file(folder / "found.safetensors")
    places = {tuple(ids): index for index, ids in enumerate(_queries(rollout).tolist())}
    rows = torch.tensor([places[tuple(ids)] for ids in found["rollout.queries"].tolist()])
    order = torch.argsort(rows)
    held = {name.removeprefix("rollout."): value[order] for name, value in found.items() if name.startswith("rollout.")}
    (log, *_) = json.loads((folder / "log.json").read_text())
    return Observed(held, _steps(found, rows), log)


def _steps(found: dict[str, Tensor], rows: Tensor) -> list[Step]:
    steps: list[Step] = []
    while f"step{len(steps)}.loss" in found:
        start = f"step{len(steps)}."
        of = {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}
        of_step = rows[of["micro_batch_inds"]]
        order = torch.argsort(of_step)
        steps.append(
            Step(
                of_step[order].tolist(),
                of["pg_loss_max"][order],
                of["vf_loss_max"][order],
                of["loss"].item(),
                {name.removeprefix("gradient."): value for name, value in of.items() if name.startswith("gradient.")},
            )
        )
    return steps


def token_logs(model: Any, prompt: list[int], answer: list[int], temperature: float) -> Tensor:
    """[T] log-probability of each token of an answer: one plain forward pass, without padding."""
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def token_values(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """[T + 1] value before each action of an answer, and after the last."""
    hidden = model.base_model(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state[0]
    values: Tensor = model.score(hidden[len(prompt) - 1 :]).squeeze(-1)
    return values
