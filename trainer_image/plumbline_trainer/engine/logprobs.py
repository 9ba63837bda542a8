"""Log-probabilities through the output head, chunk by chunk: no [T, V] tensor ever exists, forward or backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHUNK_BYTES = 30 * 2**20
"""Size of one chunk of float32 logits: large enough for full speed of the matrix products, small beside the model, and
below the 32 MiB from which glibc maps every allocation anew, with a page fault for every 4 KiB."""
CHUNK_BYTES_ON_DEVICE = 256 * 2**20
"""The same on a GPU, which a thousand tokens at a time keep busy."""


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale · (h·Wᵀ + b)) / temperature, cap(z) = softcap·tanh(z/softcap) if set."""

    weight: Tensor
    """[V, d]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        size = CHUNK_BYTES if self.weight.device.type == "cpu" else CHUNK_BYTES_ON_DEVICE
        return max(size // (4 * self.weight.shape[0]), 16)


def head_of(model: PreTrainedModel) -> Head | None:
    """The head of a causal language model; None where it is not a plain linear layer, such as one with an adapter.

    Scales and caps are read from the configuration under the names in use; what is not known here shows in the
    comparison with the plain path.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    config = model.config.get_text_config()
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale /= float(divisor)
    if (factor := getattr(config, "logit_scale", None)) is not None:
        scale *= float(factor)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight=layer.weight, bias=layer.bias, scale=scale, softcap=None if softcap is None else float(softcap))


def token_log_probabilities(hidden: Tensor, targets: Tensor, head: Head, smoothing: float = 0.0) -> Tensor:
    """log p(target) at each position; with smoothing ε the mean of log p under (1 − ε)·onehot + ε/V.

    Args:
        hidden: [N, d] outputs of the last layer that predict the targets.
        targets: [N] token ids.
        head: The output head; its weights get a gradient only if they ask for one.
        smoothing: ε (Szegedy et al. 2016, section 7).

    Returns:
        [N] float32.
    """
    needs_weights = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if torch.is_grad_enabled() and needs_weights:
        result = _TrainedHead.apply(hidden, head.weight, head.bias, targets, head, smoothing)
    else:
        result = _FrozenHead.apply(hidden, targets, head, smoothing)
    assert isinstance(result, Tensor)
    return result


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, [n, V] float32, by sums taken pairwise (see `_normalise`)."""
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def token_entropies(hidden: Tensor, head: Head) -> Tensor:
    """H(π) = −Σ_v p_v·log p_v over the whole vocabulary at each position; ∂H/∂z_v = −p_v·(log p_v + H).

    Args:
        hidden: [N, d] outputs of the last layer.
        head: The output head; its weights get a gradient only if they ask for one.

    Returns:
        [N] float32, nats.
    """
    if torch.is_grad_enabled() and head.weight.requires_grad:
        # Rare enough (an entropy bonus with all weights trained) to leave the formula to autograd, chunk by chunk.
        parts = [
            checkpoint(_plain_entropies, hidden[start : start + head.chunk], head, use_reentrant=False)
            for start in range(0, len(hidden), head.chunk)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
    result = _Entropy.apply(hidden, head)
    assert isinstance(result, Tensor)
    return result


def token_divergences(hidden: Tensor, reference: Tensor, head: Head, other: Head | None = None) -> Tensor:
    """KL(π_ref ‖ π) = Σ_v q_v·(log q_v − log p_v) over the whole vocabulary at each position; ∂/∂z = p − q.

    Args:
        hidden: [N, d] outputs of the last layer under the policy; they alone get a gradient.
        reference: [N, d] the same under the reference.
        head: The output head of the policy; its weights get a gradient only if they ask for one.
        other: That of the reference, which is frozen. Absent: the policy's.

    Returns:
        [N] float32.
    """
    other = head if other is None else other
    needs_weights = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    if torch.is_grad_enabled() and needs_weights:
        size = max(head.chunk // 2, 1)
        parts = [slice(start, start + size) for start in range(0, len(hidden), size)]
        found = [
            checkpoint(
                _divergence, hidden[part], reference[part], head, other, head.weight, head.bias, use_reentrant=False
            )
            for part in parts
        ]
        return torch.cat(found) if found else torch.zeros(0, device=hidden.device)
    result = _Divergence.apply(hidden, reference, head, other)
    assert isinstance(result, Tensor)
    return result


def _divergence(
    hidden: Tensor, reference: Tensor, head: Head, other: Head, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """One chunk of `token_divergences`, for autograd to go through: nothing is overwritten."""
    logits = (hidden.to(weight.dtype) @ weight.t()).float()
    logits = (logits if bias is None else logits + bias.float()) * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    logits = logits / head.temperature
    with torch.no_grad():
        wanted = torch.log_softmax(_logits(reference, other, other.weight, other.bias), dim=1)
    return (wanted.exp() * (wanted - torch.log_softmax(logits, dim=1))).sum(dim=1)


def _plain_entropies(hidden: Tensor, head: Head) -> Tensor:
    logits = head.scale * F.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    found = torch.log_softmax(logits / head.temperature, dim=1)
    return -(found.exp() * found).sum(dim=1)


def _logits(hidden: Tensor, head: Head, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[C, V] float32 logits of one chunk, in memory of their own."""
    logits = (hidden.to(weight.dtype) @ weight.t()).float()
    if bias is not None:
        logits += bias.float()
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        logits /= head.temperature
    return logits


def _normalise(
    logits: Tensor, targets: Tensor, smoothing: float, *, keep_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the (smoothed) targets [C], exp(z − max z) [C, V] and its row sums [C, 1].

    The sums are taken by `sum`, which adds pairwise: the running sum inside a fused softmax drifts by several 1e-6 over
    a large vocabulary, the same way for every token, and preference losses add that up. The logits are
    overwritten unless they are to be kept.
    """
    chosen = logits.gather(1, targets[:, None])
    if smoothing:
        chosen = (1.0 - smoothing) * chosen + smoothing * logits.mean(dim=1, keepdim=True)
    highest = logits.amax(dim=1, keepdim=True)
    powers = (logits - highest if keep_logits else logits.sub_(highest)).exp_()
    sums = powers.sum(dim=1, keepdim=True)
    return (chosen - highest - sums.log()).squeeze(1), powers, sums


def _logit_gradient(powers: Tensor, sums: Tensor, targets: Tensor, smoothing: float, factor: Tensor | None) -> Tensor:
    """∂ log p(target) / ∂ logits = (1 − ε)·onehot + ε/V − p, times a factor per token; overwrites the powers."""
    gradient = powers.div_(-sums)
    if smoothing:
        gradient += smoothing / gradient.shape[1]
    gradient.scatter_add_(1, targets[:, None], torch.full_like(sums, 1.0 - smoothing))
    if factor is not None:
        gradient *= factor[:, None]
    return gradient


def _through_cap(gradient: Tensor, logits: Tensor, head: Head) -> Tensor:
    """Take a gradient at the logits back to h·Wᵀ + b; overwrites both."""
    if head.temperature != 1.0:
        gradient /= head.temperature
    if head.softcap is not None:
        gradient *= logits.mul_(head.temperature / head.softcap).square_().neg_().add_(1.0)
    if head.scale != 1.0:
        gradient *= head.scale
    return gradient


class _FrozenHead(torch.autograd.Function):
    """The head takes no gradient: ∂ log p / ∂ h does not depend on what comes after, so the forward pass keeps it.

    The backward pass is then one product per element; nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, smoothing: float) -> Tensor:
        keep = ctx.needs_input_grad[0]
        average = head.weight.float().mean(dim=0) if keep and smoothing else None
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if keep else None
        for start in range(0, len(targets), head.chunk):
            part = slice(start, start + head.chunk)
            chosen = targets[part]
            logits = _logits(hidden[part], head, head.weight, head.bias)
            capped = head.softcap is not None and slopes is not None
            result[part], powers, sums = _normalise(logits, chosen, smoothing, keep_logits=capped)
            if slopes is None:
                continue
            if capped:
                gradient = _through_cap(_logit_gradient(powers, sums, chosen, smoothing, None), logits, head)
                slopes[part] = (gradient.to(head.weight.dtype) @ head.weight).to(slopes.dtype)
            else:
                # (target − powers/sums)·W without a further pass over [C, V]
                expected = (powers.to(head.weight.dtype) @ head.weight).float() / sums
                wanted = head.weight[chosen].float()
                if average is not None:
                    wanted = (1.0 - smoothing) * wanted + smoothing * average
                slopes[part] = ((wanted - expected) * (head.scale / head.temperature)).to(slopes.dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * upstream[0][:, None]).to(slopes.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    """The head is trained: its gradient needs the factor of each token, so the backward pass computes chunks again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        smoothing: float,
    ) -> Tensor:
        ctx.head, ctx.smoothing = head, smoothing
        ctx.save_for_backward(hidden, weight, bias, targets)
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), head.chunk):
            part = slice(start, start + head.chunk)
            logits = _logits(hidden[part], head, weight, bias)
            result[part] = _normalise(logits, targets[part], smoothing, keep_logits=False)[0]
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, bias, targets = ctx.saved_tensors
        head: Head = ctx.head
        smoothing: float = ctx.smoothing
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(targets), head.chunk):
            part = slice(start, start + head.chunk)
            logits = _logits(hidden[part], head, weight, bias)
            _, powers, sums = _normalise(logits, targets[part], smoothing, keep_logits=head.softcap is not None)
            gradient = _logit_gradient(powers, sums, targets[part], smoothing, upstream[0][part])
            gradient = _through_cap(gradient, logits, head)
            gradient = gradient.to(weight.dtype)
            to_hidden[part] = (gradient @ weight).to(hidden.dtype)
            if to_weight is not None:
                to_weight.addmm_(gradient.t(), hidden[part].to(weight.dtype))
            if to_bias is not None:
                to_bias += gradient.sum(dim=0)
        return to_hidden, to_weight, to_bias, None, None, None


class _Divergence(torch.autograd.Function):
    """As with `_FrozenHead`, the forward pass keeps the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, reference: Tensor, head: Head, other: Head) -> Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(head.chunk // 2, 1)  # two sets of logits at a time
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = _logits(hidden[part], head, head.weight, head.bias)
            wanted = torch.log_softmax(_logits(reference[part], other, other.weight, other.bias), dim=1)
            found = torch.log_softmax(logits, dim=1)
            shares = wanted.exp()
            result[part] = (shares * (wanted - found)).sum(dim=1)
            if slopes is not None:
                gradient = _through_cap(found.exp_().sub_(shares), logits, head)
                slopes[part] = (gradient.to(head.weight.dtype) @ head.weight).to(slopes.dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * upstream[0][:, None]).to(slopes.dtype), None, None, None


class _Entropy(torch.autograd.Function):
    """As with `_FrozenHead`, the forward pass keeps the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head) -> Tensor:
        result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), head.chunk):
            part = slice(start, start + head.chunk)
            logits = _logits(hidden[part], head, head.weight, head.bias)
            found = torch.log_softmax(logits, dim=1)
            entropy = torch.special.entr(found.exp()).sum(dim=1)
            result[part] = entropy
            if slopes is not None:
                gradient = _through_cap(-found.exp() * (found + entropy[:, None]), logits, head)
                slopes[part] = (gradient.to(head.weight.dtype) @ head.weight).to(slopes.dtype)
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * upstream[0][:, None]).to(slopes.dtype), None
