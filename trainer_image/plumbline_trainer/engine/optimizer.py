"""AdamW with decoupled weight decay, a schedule and clipping, over float32 trainables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from plumbline_api.training import Training
from torch import Tensor, nn

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.learning_rate import make_schedule, make_sweep
from plumbline_trainer.engine.penalties import Penalty
from plumbline_trainer.engine.sharding import is_sharded, own_part, put, sharded_like, total
from plumbline_trainer.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


def named_trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the model's order.

    Raises:
        InputError: if nothing is trained.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise InputError("nothing would be trained: the stage has neither trainable weights nor an adapter")
    wrong = [name for name, parameter in found.items() if parameter.dtype != torch.float32]
    if wrong:
        raise ValueError(f"trainable weights must be float32, {wrong[0]} is {found[wrong[0]].dtype}")
    return found


class Optimizer:
    """One optimizer step: exchange gradients, clip, AdamW, schedule."""

    def __init__(
        self,
        trainables: Mapping[str, nn.Parameter],
        training: Training,
        steps: int,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        """Prepare.

        Args:
            trainables: Parameters by name.
            training: The stage's optimisation parameters, learning rate resolved.
            steps: Optimizer steps of the whole stage.
            depths: Layers between a parameter and the top one, by its name; each takes `layerDecay` off its rate. What
                is not named, such as a new head, counts as the top.
        """
        assert training.learning_rate is not None
        self.trainables = dict(trainables)
        self.own = {name: _own(parameter) for name, parameter in self.trainables.items()}
        """What this rank changes: the parameters themselves, or its parts of sharded ones."""
        self.clip = training.gradient_clip
        sweep = training.range_test
        self.peak = training.learning_rate if sweep is None else sweep.lowest
        self.penalties: dict[str, float] = {}
        """Values of the penalties at the last step."""
        if depths is not None and not depths.keys() & self.trainables.keys():
            raise ValueError("the depths are those of another model")
        groups: dict[tuple[int, float], dict[str, Any]] = {}
        for name, parameter in self.trainables.items():
            depth = 0 if depths is None or training.layer_decay is None else depths.get(name, 0)
            decay = training.weight_decay if parameter.ndim >= 2 else 0.0
            rate = self.peak * (training.layer_decay or 1.0) ** depth
            group = groups.setdefault((depth, decay), {"params": [], "weight_decay": decay, "lr": rate})
            group["params"].append(self.own[name])
        self.adamw = torch.optim.AdamW(
            [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1]))],
            lr=self.peak,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            fused=True,
        )
        if sweep is None:
            self.schedule = make_schedule(training.schedule, self.adamw, steps)
        else:
            self.schedule = make_sweep(self.adamw, sweep.highest / sweep.lowest, sweep.steps)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step, in the top layer."""
        return self.peak * self.schedule.lr_lambdas[0](self.schedule.last_epoch)

    def step(self, ranks: Ranks, penalties: Sequence[Penalty] = ()) -> float:
        """Take the step with the gradients summed over ranks; afterwards they are cleared.

        Args:
            ranks: Processes that share the work.
            penalties: Their gradients are added once, on every rank alike.

        Returns:
            Global gradient norm before clipping; not finite if the gradients are not, and then nothing was changed.
        """
        alike = []
        for name, parameter in self.trainables.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.own[name].grad = own_part(parameter.grad)
            if not is_sharded(parameter):  # The backward pass has summed those of sharded ones.
                alike.append(parameter.grad)
        ranks.sum_tensors(alike)
        self.penalties = {penalty.name: penalty.add_gradients() for penalty in penalties}
        norm = self._clip()
        if math.isfinite(norm):
            self.adamw.step()
            self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        for parameter in self.trainables.values():
            parameter.grad = None
        return norm

    def _clip(self) -> float:
        """Scale the gradients down to the largest norm; their norm before."""
        parameters = list(self.own.values())
        if not any(is_sharded(parameter) for parameter in self.trainables.values()):
            return float(nn.utils.clip_grad_norm_(parameters, self.clip))
        squares = [
            (self.own[name].grad.double().square().sum(), parameter)  # type: ignore[union-attr]
            for name, parameter in self.trainables.items()
        ]
        norm = math.sqrt(total(squares))
        nn.utils.clip_grads_with_norm_(parameters, self.clip, torch.tensor(norm, device=parameters[0].device))
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Moments by parameter name, for a checkpoint: `<name>/exp_avg`, `<name>/exp_avg_sq`; sharded as they are."""
        return {
            f"{name}/{moment}": sharded_like(self.adamw.state[self.own[name]][moment], parameter)
            for name, parameter in self.trainables.items()
            if self.own[name] in self.adamw.state
            for moment in MOMENTS
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        steps = {float(state["step"]) for state in self.adamw.state.values()}
        assert len(steps) <= 1, "every parameter takes every step"
        return {"adamSteps": steps.pop() if steps else 0.0, "schedule": self.schedule.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Take up a checkpoint, exactly."""
        self.schedule.load_state_dict(dict(state["schedule"]))
        for group, rate in zip(self.adamw.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        for name, parameter in self.trainables.items():
            own = self.own[name]
            moments = {moment: torch.empty_like(own, requires_grad=False) for moment in MOMENTS}
            for moment, part in moments.items():
                put(sharded_like(part, parameter), tensors[f"{name}/{moment}"])
            # A fused step counts on the parameter's device.
            step = torch.tensor(float(state["adamSteps"]), dtype=torch.float32, device=own.device)
            self.adamw.state[own] = {"step": step, **moments}


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the rows that this rank keeps, in the same memory."""
    return nn.Parameter(own_part(parameter)) if is_sharded(parameter) else parameter
