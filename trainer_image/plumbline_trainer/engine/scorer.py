"""The one entry to a model in training: a packed batch in, token log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline_trainer.engine.attention import (
    SEGMENTS,
    FastPathError,
    attention_of,
    choose_attention,
    plain_implementation,
    register,
)
from plumbline_trainer.engine.logprobs import (
    Head,
    head_of,
    log_probabilities,
    token_divergences,
    token_entropies,
    token_log_probabilities,
)
from plumbline_trainer.engine.lowrank import in_one_piece, use_one_piece, use_separate_pieces
from plumbline_trainer.engine.optimizer import named_trainables
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import adapters_disabled

Path = Literal["fast", "plain"]
"""fast: packed, prompts shared, head in chunks. plain: one forward of the whole model per response."""

RECURRENT_LAYERS = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm", "rwkv"})


class Scorer(nn.Module):
    """Scores packed batches with a causal language model; nothing else touches the model's parts.

    The same batch gives the same numbers on either path, up to rounding.
    """

    entries: ClassVar[tuple[str, ...]] = ("distributions", "_with_divergence", "with_entropy")
    """Methods that run the model, beside `forward`: sharded weights are put together around them."""

    def __init__(self, model: PreTrainedModel, *, precision: str = "float32", path: Path = "fast") -> None:
        """Wrap a model.

        Args:
            model: A transformers causal language model; adapters live inside its layers.
            precision: `float32` or `bfloat16`, the type of activations.
            path: Which way to take.
        """
        super().__init__()
        self.model = model
        self.precision = precision
        self.path: Path = path
        self.temperature = 1.0
        """Divides the logits, on either path."""
        self.most: Callable[[int], int] | None = None
        """Where weights are sharded, the largest of a count over ranks: all must run the model equally often."""
        register()

    def trainables(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name.

        Raises:
            InputError: if nothing is trained.
        """
        return self.model_trainables()

    def model_trainables(self) -> dict[str, nn.Parameter]:
        """Those of them that the model brought along or that an adapter adds to it."""
        return named_trainables(self.model)

    def forward(self, batch: PackedBatch, smoothing: float = 0.0) -> Tensor:
        """Log-probability of every scored token, [N] float32; with smoothing ε that of the smoothed label.

        Raises:
            FastPathError: if the path is `fast` and the model cannot take it.
        """
        with self._autocast():
            if self.path == "fast":
                head = self._head()
                return token_log_probabilities(self._hidden(batch, batch.sources), batch.targets, head, smoothing)
            parts = [_smoothed(scores, ids, smoothing) for scores, ids in self._plain(batch)]
        return torch.cat(parts) if parts else torch.zeros(0, device=batch.input_ids.device)

    def with_divergence(
        self, batch: PackedBatch, smoothing: float = 0.0, reference: Scorer | None = None
    ) -> tuple[Tensor, Tensor]:
        """The scores, and KL(π_ref ‖ π) over the vocabulary at every scored token, [N] float32 each.

        It takes one more forward pass, of the reference: the same model with its adapter switched off where no other
        one is given. Another one takes the same path, and where it is sharded every rank keeps its head whole.
        """
        if reference is None:
            return self._with_divergence(batch, smoothing)
        # Before this model's own pass, so that the layers of one model alone are put together at a time.
        wanted = reference.distributions(batch)
        return self._with_divergence(batch, smoothing, wanted, reference._head() if self.path == "fast" else None)

    def distributions(self, batch: PackedBatch) -> list[Tensor]:
        """What divergences are taken from, without gradients.

        On the fast path the outputs of the last layer at the scored tokens, [N, d]; on the plain one log-probabilities
        [n, V] at the scored tokens of each answer that has some, then of contexts.
        """
        return self._distributions(batch)

    def _distributions(self, batch: PackedBatch) -> list[Tensor]:
        """`distributions`, within a call that has put sharded weights together."""
        with torch.no_grad(), self._autocast():
            if self.path == "fast":
                return [self._hidden(batch, batch.sources)]
            return [logs for logs, _ in self._plain(batch)]

    def _with_divergence(
        self, batch: PackedBatch, smoothing: float, wanted: list[Tensor] | None = None, other: Head | None = None
    ) -> tuple[Tensor, Tensor]:
        """`with_divergence`, given what the reference says, and on the fast path its head; else this model's start."""
        with self._autocast():
            if self.path == "fast":
                head = self._head()
                hidden = self._hidden(batch, batch.sources)
                (reference,) = self._at_start(batch) if wanted is None else wanted
                scores = token_log_probabilities(hidden, batch.targets, head, smoothing)
                return scores, token_divergences(hidden, reference, head, other)
            logs_of_reference = self._at_start(batch) if wanted is None else wanted
            pairs = list(zip(self._plain(batch), logs_of_reference, strict=True))
        if not pairs:
            return torch.zeros(0, device=batch.input_ids.device), torch.zeros(0, device=batch.input_ids.device)
        return (
            torch.cat([_smoothed(logs, ids, smoothing) for (logs, ids), _ in pairs]),
            torch.cat([(other.exp() * (other - logs)).sum(dim=1) for (logs, _), other in pairs]),
        )

    def _at_start(self, batch: PackedBatch) -> list[Tensor]:
        with adapters_disabled(self.model):
            return self._distributions(batch)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """While this is open, logits are divided by another temperature."""
        before, self.temperature = self.temperature, temperature
        try:
            yield
        finally:
            self.temperature = before

    def with_entropy(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The scores, and the entropy over the vocabulary at every scored token, [N] float32 each."""
        with self._autocast():
            if self.path == "fast":
                head = self._head()
                hidden = self._hidden(batch, batch.sources)
                return token_log_probabilities(hidden, batch.targets, head), token_entropies(hidden, head)
            pairs = list(self._plain(batch))
        if not pairs:
            return torch.zeros(0, device=batch.input_ids.device), torch.zeros(0, device=batch.input_ids.device)
        return (
            torch.cat([_smoothed(logs, ids, 0.0) for logs, ids in pairs]),
            torch.cat([-(logs.exp() * logs).sum(dim=1) for logs, _ in pairs]),
        )

    def _head(self) -> Head:
        head = head_of(self.model)
        if head is None:
            raise FastPathError("the output head is not a plain linear layer")
        return replace(head, temperature=self.temperature)

    def _hidden(self, batch: PackedBatch, places: Tensor) -> Tensor:
        """[n, d] outputs of the last layer at n places of the packed sequence, on the fast path."""
        with self._arranged(SEGMENTS, one_piece=True):
            outputs = self.model.get_decoder()(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                segment_plan=batch.plan,
            )
        hidden: Tensor = outputs.last_hidden_state[0].index_select(0, places)
        return hidden

    def _plain(self, batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """[n, V] log-probabilities and [n] ids of scored tokens: of each answer that has some, then of contexts."""
        model = self.model
        around: list[tuple[Tensor, Tensor]] = []
        contexts = {context.row: context.places for context in batch.contexts}
        # A row's context belongs to its first answer.
        runs = [(answer, contexts.pop(answer.row, ())) for answer in batch.answers]
        runs = [(answer, context) for answer, context in runs if answer.offsets or context]
        idle = self._idle_runs(batch, len(runs))
        for answer, context in runs:
            prompt = batch.rows[answer.row].prompt
            ids = torch.tensor([[*prompt, *answer.response.ids]], device=batch.input_ids.device)
            with self._arranged(plain_implementation(model), one_piece=False):
                logits = model(input_ids=ids, use_cache=False).logits[0]
            own = [offset + len(prompt) for offset in answer.offsets]
            places = torch.tensor([*own, *context], device=ids.device)
            logs, targets = log_probabilities(logits[places - 1].float() / self.temperature), ids[0, places]
            if own:
                yield logs[: len(own)], targets[: len(own)]
            if context:
                around.append((logs[len(own) :], targets[len(own) :]))
        yield from around
        for ids in idle:
            with self._arranged(plain_implementation(model), one_piece=False):
                logits = model(input_ids=ids, use_cache=False).logits[0]
            yield torch.log_softmax(logits[:0].float(), dim=-1), ids[0, :0]

    def _idle_runs(self, batch: PackedBatch, runs: int) -> list[Tensor]:
        """[1, 1] ids for each further run of the model that another rank needs. Ask before the first run.

        Nothing is taken from their outputs; an empty part of them brings the gradient 0.
        """
        missing = 0 if self.most is None else self.most(runs) - runs
        return [batch.input_ids.reshape(-1)[:1].reshape(1, 1)] * missing

    @contextmanager
    def _arranged(self, implementation: str, *, one_piece: bool) -> Iterator[None]:
        """Choose attention and adapter arithmetic for one forward pass."""
        model = self.model
        if model.is_activation_checkpointing:
            # Layers run again in the backward pass, after this context: the choice has to stay, also while something
            # is scored between the two.
            choose_attention(model, implementation)
            (use_one_piece if one_piece else use_separate_pieces)(model)
            yield
            return
        with attention_of(model, implementation), in_one_piece(model) if one_piece else nullcontext():
            yield

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision != "bfloat16":
            return nullcontext()
        # Casts that are kept for the length of a call would keep every layer's weights.
        kept = self.most is None
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, cache_enabled=kept)


def _smoothed(logs: Tensor, ids: Tensor, smoothing: float) -> Tensor:
    """Mean of log-probabilities [n, V] under (1 − ε)·onehot + ε/V, [n]."""
    chosen = logs.gather(1, ids[:, None]).squeeze(1)
    return (1.0 - smoothing) * chosen + smoothing * logs.mean(dim=1) if smoothing else chosen


def recurrent_layers(model: PreTrainedModel) -> str | None:
    """Why a model must go the plain way from the start: it carries a state from token to token; else None."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} carries a state from token to token"
    kinds = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    found = sorted(kinds & RECURRENT_LAYERS)
    return f"{type(model).__name__} has layers of type {', '.join(found)}" if found else None


def prepare_modes(scorer: Scorer, *, adapter_dropout: bool, gradient_checkpointing: bool) -> None:
    """Set what is random and what is recomputed.

    The base model's own dropout is always off, so that packing, prompt sharing and ranks do not change results;
    only the adapter's dropout can be on.
    """
    scorer.eval()
    model = scorer.model
    if adapter_dropout:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and ".lora_dropout." in f".{name}.":
                module.train()
                # The flag of the layer alone: DoRA looks at it, not at the dropout's.
                model.get_submodule(name.partition(".lora_dropout.")[0]).training = True
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise InputError(
                f"training.gradientCheckpointing: {type(model).__name__} cannot recompute activations; leave it out "
                "and lower training.tokensPerBatch instead"
            )
        model.activation_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # the flag of the layer alone: its dropout stays off
