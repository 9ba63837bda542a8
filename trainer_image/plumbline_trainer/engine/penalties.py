"""Penalties on how far weights have moved since the stage's start, against forgetting.

A penalty is a function of the weights alone. Its gradient is added once per optimizer step, after the gradients of the
rows are summed over ranks and before clipping, so that neither accumulation nor ranks change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.sharding import is_sharded, own_part, own_rows, total
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import ADAPTER_NAME


class Penalty(Protocol):
    """Something to add to the loss of every step."""

    name: str
    """Of the figure."""

    def add_gradients(self) -> float:
        """Add the gradient at the present weights to the parameters' gradients, which are there; the value."""
        ...


@dataclass(frozen=True)
class Moved:
    """All of a weight is trained: Δ = θ − θ₀."""

    weight: nn.Parameter
    start: Tensor
    """Of a sharded weight this rank's part."""

    @property
    def delta(self) -> Tensor:
        """Δ, of a sharded weight this rank's part."""
        return own_part(self.weight) - self.start


@dataclass(frozen=True)
class LowRank:
    """An adapter is trained beside a frozen weight: Δ = s·B·A, [out, in]. Every rank has all of A and B."""

    a: nn.Parameter
    """[r, in]"""
    b: nn.Parameter
    """[out, r]"""
    scale: float
    transposed: bool = False
    """Whether the weight lies as [in, out], as GPT-2's do."""

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """L and R with s·L·R = Δ as the weight lies: B and A, or Aᵀ and Bᵀ. L has the weight's rows."""
        return (self.a.t(), self.b.t()) if self.transposed else (self.b, self.a)


Displacement = Moved | LowRank
"""What a stage changes of one weight."""


def displacements(model: nn.Module, trainables: Mapping[str, nn.Parameter]) -> dict[str, Displacement]:
    """What the stage changes, by the name of the changed weight. Call it before the first step and before resuming.

    Raises:
        InputError: for an adapter whose change is not a product of two factors, such as DoRA.
    """
    from peft.tuners.lora import LoraLayer

    found: dict[str, Displacement] = {}
    factors: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        adapter: Any = layer
        if ADAPTER_NAME not in adapter.lora_A or ADAPTER_NAME in getattr(adapter, "lora_variant", {}):
            raise InputError(
                f"training: the adapter of {name} changes its weight by more than the product of two factors (DoRA, "
                "embeddings); l2sp and ewc have no meaning there. Use plain LoRA or leave them out"
            )
        pair = LowRank(
            adapter.lora_A[ADAPTER_NAME].weight,
            adapter.lora_B[ADAPTER_NAME].weight,
            adapter.scaling[ADAPTER_NAME],
            transposed=bool(getattr(adapter, "fan_in_fan_out", False)),
        )
        found[f"{name}.weight"] = pair
        factors |= {id(pair.a), id(pair.b)}
    for name, parameter in trainables.items():
        if id(parameter) not in factors:
            found[name] = Moved(parameter, own_part(parameter).detach().clone())
    return found


class L2Sp:
    """L2-SP (Li, Grandvalet, Davoine 2018, eq. 3): ½λ‖Δ‖², gradient λ·Δ.

    With LoRA, ‖s·B·A‖² = s²·tr(BᵀB·AAᵀ), so that Δ is never formed: ∂/∂B = λs²·B(AAᵀ), ∂/∂A = λs²·(BᵀB)A.
    """

    name = "l2sp"

    def __init__(self, strength: float, changes: Iterable[Displacement]) -> None:
        self.strength = strength
        self.changes = list(changes)

    @torch.no_grad()
    def add_gradients(self) -> float:
        """See `Penalty`."""
        squares: list[tuple[Tensor, Tensor]] = []
        for change in self.changes:
            if isinstance(change, Moved):
                _add(change.weight, change.delta, self.strength)
                squares.append((change.delta.double().square().sum(), change.weight))
                continue
            inner_a, inner_b = change.a @ change.a.t(), change.b.t() @ change.b
            squared = change.scale**2
            _add(change.b, change.b @ inner_a, self.strength * squared)
            _add(change.a, inner_b @ change.a, self.strength * squared)
            squares.append((squared * (inner_b.double() * inner_a.double()).sum(), change.b))
        return 0.5 * self.strength * total(squares)


class Ewc:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, eq. 3): ½λ·Σ F·Δ², gradient λ·F∘Δ.

    F is the diagonal of the Fisher information at the stage's start, of the weight that Δ changes. With LoRA,
    G = λ·F∘(s·B·A) is formed one weight at a time: ∂/∂B = s·G·Aᵀ, ∂/∂A = s·Bᵀ·G. Where F is sharded each rank forms
    its rows of G alone, and what they give for A and B is summed over ranks.
    """

    name = "ewc"

    def __init__(
        self,
        strength: float,
        changes: Mapping[str, Displacement],
        fisher: Mapping[str, Tensor],
        ranks: Ranks | None = None,
    ) -> None:
        """Prepare.

        Args:
            strength: λ.
            changes: What the stage changes, by name.
            fisher: F by the same names, each as its weight lies, and sharded as that is.
            ranks: Processes that share what is sharded.
        """
        self.strength, self.ranks = strength, ranks or Ranks()
        self.pairs = [(change, fisher[name]) for name, change in changes.items()]

    @torch.no_grad()
    def add_gradients(self) -> float:
        """See `Penalty`."""
        squares: list[tuple[Tensor, Tensor]] = []
        partial: list[Tensor] = []
        of_factors: list[tuple[LowRank, Tensor, Tensor]] = []
        for change, fisher in self.pairs:
            if isinstance(change, Moved):
                delta = change.delta
                slope = own_part(fisher) * delta
                _add(change.weight, slope, self.strength)
            else:
                rows, (left, right) = own_rows(fisher), change.factors
                delta = change.scale * (left[rows] @ right)
                slope = own_part(fisher) * delta
                to_left, to_right = torch.zeros_like(left), left[rows].t() @ slope
                to_left[rows] = slope @ right.t()
                of_factors.append((change, to_left, to_right))
                partial += [to_left, to_right] if is_sharded(fisher) else []
            squares.append(((slope.double() * delta.double()).sum(), fisher))
        self.ranks.sum_tensors(partial)
        for change, to_left, to_right in of_factors:
            to_b, to_a = (to_right.t(), to_left.t()) if change.transposed else (to_left, to_right)
            _add(change.b, to_b, self.strength * change.scale)
            _add(change.a, to_a, self.strength * change.scale)
        return 0.5 * self.strength * total(squares)


def _add(parameter: nn.Parameter, gradient: Tensor, factor: float) -> None:
    assert parameter.grad is not None
    own_part(parameter.grad).add_(gradient, alpha=factor)
