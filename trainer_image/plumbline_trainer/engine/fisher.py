"""The Fisher diagonal of a dataset at a stage's start, and the penalty that holds the weights that matter to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from plumbline_api.methods import PolicyStage
from torch import Tensor, nn

from plumbline_trainer.data.encode import Encoded, Method, encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.objective import scored_tokens
from plumbline_trainer.engine.packing import dummy_of, pack
from plumbline_trainer.engine.penalties import Displacement, Ewc, Moved, displacements
from plumbline_trainer.engine.references import row_keys
from plumbline_trainer.engine.schedule import epoch_order
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.sharding import (
    gathered,
    is_sharded,
    own_part,
    own_rows,
    sharded_like,
    squared_before_summing,
)
from plumbline_trainer.engine.trained import policy_identity
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.tensors import keep_tensors, kept_tensors

FOLDER = "fisher"


def hold_weights(run: TrainingRun, policy: Policy, parameters: PolicyStage, seed: int, *, method: Method) -> None:
    """Add the penalty that `ewc` asks for, if it does. Call it before the run takes up its checkpoint.

    The Fisher diagonal is taken from storage where a former attempt left it; there it is whole, and of a sharded weight
    every rank keeps its rows.

    Raises:
        InputError: if the dataset cannot be read, or for adapters that are no product of two factors.
        Interrupted: on SIGTERM.
    """
    ewc = parameters.ewc
    if ewc is None:
        return
    context = run.context
    rows = load_rows(context, context.input("ewc.dataset"), "train")
    encoded = encode_rows(rows, policy.tokenizer, method=method, max_length=parameters.training.max_length).rows
    order = epoch_order(tuple(row.row_id for row in encoded), seed, 0)
    chosen = [encoded[index] for index in order[: ewc.rows]]
    changes = displacements(run.scorer.model, run.trainables)
    place = uris.join(context.run_root, f"{FOLDER}/{_key(run, policy, chosen)}")
    kept = kept_tensors(context.store, place)
    # Every rank reads for itself; if one finds none, all compute.
    if run.ranks.any(kept is None or kept.keys() != changes.keys()):
        context.log.info("Fisher diagonal from %d of %d rows", len(chosen), len(encoded))
        fisher = _computed(run, changes, chosen)
        whole = gathered(fisher, keeps=run.ranks.is_main)
        if run.ranks.is_main:
            keep_tensors(context.store, place, whole)
    else:
        assert kept is not None
        fisher = {
            name: _cut(kept[name], _weight(run.scorer.model, name, change)).to(run.ranks.device)
            for name, change in changes.items()
        }
    run.penalties.append(Ewc(ewc.coefficient, changes, fisher, run.ranks))


def fisher_diagonal(
    scorer: Scorer,
    changes: Mapping[str, Displacement],
    rows: Sequence[Encoded],
    ranks: Ranks,
    at_row: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """F = Σ_rows (∂/∂θ Σ_t log π(y_t | x, y_<t))² ÷ tokens, with the dataset's own tokens for y (the empirical Fisher).

    It is the curvature of the mean loss per token on these rows, as far as the model has learned them.

    Args:
        scorer: Around the model with the weights of the stage's start, nothing dropped.
        changes: What the stage changes.
        rows: Rows of the dataset, each with one response.
        ranks: They share the rows, and all get the result.
        at_row: Called on every rank alike before each round with rows done and rows in all; it may raise to stop.

    Returns:
        F in float32 by the names of the changes, each as its weight lies, and sharded as that is.
    """
    assert all(len(row.responses) == 1 for row in rows), "the model must run once for each gradient"
    weights = {name: _weight(scorer.model, name, change) for name, change in changes.items()}
    sums = {name: torch.zeros_like(own_part(weight), dtype=torch.float32) for name, weight in weights.items()}
    shares = any(is_sharded(weight) for weight in weights.values())
    with _gradients_of(list(weights.values()), scorer), squared_before_summing(scorer):
        for start in range(0, len(rows), ranks.size):
            if at_row is not None:
                at_row(start, len(rows))
            idle = start + ranks.rank >= len(rows)
            if idle and not shares:
                continue
            row = dummy_of(rows[0]) if idle else rows[start + ranks.rank]
            scores = scorer(pack([row], ranks.device))
            torch.autograd.backward(scores.sum() * float(not idle))
            for name, weight in weights.items():
                if weight.grad is not None:
                    gradient = own_part(weight.grad).float()
                    sums[name] += gradient if is_sharded(weight) else gradient.square()
                weight.grad = None
    # Of sharded weights the backward passes have summed the ranks' squares.
    ranks.sum_tensors([total for name, total in sums.items() if not is_sharded(weights[name])])
    tokens = sum(scored_tokens(row) for row in rows)
    return {name: sharded_like(total / tokens, weights[name]) for name, total in sums.items()}


def _computed(run: TrainingRun, changes: Mapping[str, Displacement], rows: Sequence[Encoded]) -> dict[str, Tensor]:
    def at_row(done: int, count: int) -> None:
        run.leave_if_stopped()
        if run.ranks.is_main:
            message = f"Fisher diagonal, row {done + 1} of {count}"
            run.context.progress.update(run.state.step, run.plan.steps, message)

    return fisher_diagonal(run.scorer, changes, rows, run.ranks, at_row)


def _key(run: TrainingRun, policy: Policy, rows: Sequence[Encoded]) -> str:
    lora = run.context.run.parameters.get("lora")
    # Ranks and sharding change the order of sums, and with it bits.
    shared = [run.ranks.size, run.training.sharding]
    known = [policy_identity(policy), run.state.path, run.scorer.precision, lora, shared]
    state = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for key in (key for row in rows for key in row_keys(row)):
        state.update(key)
    return state.hexdigest()


def _weight(model: nn.Module, name: str, change: Displacement) -> nn.Parameter:
    if isinstance(change, Moved):
        return change.weight
    layer = model.get_submodule(name.removesuffix(".weight"))
    weight = layer.get_base_layer().weight  # type: ignore[operator]
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise InputError(
            f"ewc: the weights of {name} are quantised and have no gradient; use lora without quantisation"
        )
    return weight


def _cut(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as another one is sharded; a rank's part is a copy, so that the whole can go."""
    return sharded_like(value[own_rows(like)].clone(), like) if is_sharded(like) else value


@contextmanager
def _gradients_of(weights: Sequence[nn.Parameter], scorer: Scorer) -> Iterator[None]:
    """For a while these weights alone take part in autograd, frozen or not: an adapter beside them does not."""
    # FSDP2 gives a weight that it puts together what its part says at that time.
    before = {parameter: parameter.requires_grad for parameter in scorer.parameters()}
    chosen = {id(weight) for weight in weights}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
