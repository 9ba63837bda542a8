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
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.penalties import Displacement, Ewc, Moved, displacements
from plumbline_trainer.engine.references import row_keys
from plumbline_trainer.engine.schedule import epoch_order
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.trained import policy_identity
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.tensors import keep_tensors, kept_tensors

FOLDER = "fisher"


def hold_weights(run: TrainingRun, policy: Policy, parameters: PolicyStage, seed: int, *, method: Method) -> None:
    """Add the penalty that `ewc` asks for, if it does. Call it before the run takes up its checkpoint.

    The Fisher diagonal is taken from storage where a former attempt left it.

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
    fisher = kept_tensors(context.store, place)
    # Every rank reads for itself; if one finds none, all compute.
    if run.ranks.any(fisher is None or fisher.keys() != changes.keys()):
        context.log.info("Fisher diagonal from %d of %d rows", len(chosen), len(encoded))
        fisher = _computed(run, changes, chosen)
        if run.ranks.is_main:
            keep_tensors(context.store, place, fisher)
    assert fisher is not None
    on_device = {name: tensor.to(run.ranks.device) for name, tensor in fisher.items()}
    run.penalties.append(Ewc(ewc.coefficient, changes, on_device))


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
        changes: What the stage changes; F has the names, and the shapes of the changes, [out, in].
        rows: Rows of the dataset.
        ranks: They share the rows, and all get the result.
        at_row: Called on every rank alike before each round with rows done and rows in all; it may raise to stop.
    """
    weights = {name: _weight(scorer.model, name, change) for name, change in changes.items()}
    total = {name: torch.zeros(weight.shape, device=weight.device) for name, weight in weights.items()}
    with _asking_for_gradients(list(weights.values())):
        for start in range(0, len(rows), ranks.size):
            if at_row is not None:
                at_row(start, len(rows))
            if start + ranks.rank >= len(rows):
                continue
            scores = scorer(pack([rows[start + ranks.rank]], ranks.device))
            gradients = torch.autograd.grad(scores.sum(), list(weights.values()), allow_unused=True)
            for sums, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    sums += gradient.float().square()
    ranks.sum_tensors(list(total.values()))
    tokens = sum(scored_tokens(row) for row in rows)
    return {
        name: (sums.t() if _is_transposed(scorer.model, name, changes[name]) else sums).contiguous() / tokens
        for name, sums in total.items()
    }


def _computed(run: TrainingRun, changes: Mapping[str, Displacement], rows: Sequence[Encoded]) -> dict[str, Tensor]:
    def at_row(done: int, count: int) -> None:
        run.leave_if_stopped()
        if run.ranks.is_main:
            message = f"Fisher diagonal, row {done + 1} of {count}"
            run.context.progress.update(run.state.step, run.plan.steps, message)

    return fisher_diagonal(run.scorer, changes, rows, run.ranks, at_row)


def _key(run: TrainingRun, policy: Policy, rows: Sequence[Encoded]) -> str:
    lora = run.context.run.parameters.get("lora")
    known = [policy_identity(policy), run.state.path, run.scorer.precision, lora, run.ranks.size]
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


def _is_transposed(model: nn.Module, name: str, change: Displacement) -> bool:
    """Whether a weight lies as [in, out], as GPT-2's do."""
    if isinstance(change, Moved):
        return False
    return bool(getattr(model.get_submodule(name.removesuffix(".weight")), "fan_in_fan_out", False))


@contextmanager
def _asking_for_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Frozen weights take part in autograd for a while."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
