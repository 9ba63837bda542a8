"""Scalar heads on a language model: what a reward model reads at the end of a response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.attention import plain_implementation
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.engine.schedule import random_key
from plumbline_trainer.engine.scorer import Path, Scorer
from plumbline_trainer.engine.scoring import shared_batches
from plumbline_trainer.models.adapters import initial_factor

Values = list[Tensor]
"""[row] → [reads of the row, heads] float32 CPU tensor; of a reward model, one read per response."""


class ValueHeads(nn.Module):
    """Linear heads without a bias, in float32 whatever the model computes in: v = h·wᵀ.

    A bias would change no comparison and so would never be learnt.
    """

    def __init__(self, weight: Tensor) -> None:
        """Take weights of [heads, d]."""
        super().__init__()
        self.weight = nn.Parameter(weight.float())

    @property
    def count(self) -> int:
        """Number of heads."""
        return int(self.weight.shape[0])

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, d] → [R, heads] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight.t()


def fresh_heads(model: PreTrainedModel, count: int, seed: int) -> ValueHeads:
    """Heads with a start of their own each: uniform in ±1/√d, drawn from seed and number."""
    width = int(model.config.get_text_config().hidden_size)
    rows = [initial_factor(random_key(seed, "head", number), "value", 1, width) for number in range(count)]
    return ValueHeads(torch.cat(rows)).to(model.device)


class ValueScorer(Scorer):
    """A scorer that reads scalar heads instead of the vocabulary's: a packed batch in, [R, heads] float32 out."""

    def __init__(
        self, model: PreTrainedModel, heads: ValueHeads, *, precision: str = "float32", path: Path = "fast"
    ) -> None:
        """Wrap a model and its heads; the other arguments as for `Scorer`."""
        super().__init__(model, precision=precision, path=path)
        self.heads = heads
        vocabulary = model.get_output_embeddings()
        if vocabulary is not None and vocabulary.weight is not model.get_input_embeddings().weight:
            vocabulary.requires_grad_(False)  # Nothing reads it, so weight decay must not wear it down.

    def trainables(self) -> dict[str, nn.Parameter]:
        """The model's, and the heads'."""
        heads = {f"heads.{name}": parameter for name, parameter in self.heads.named_parameters()}
        return {**super().trainables(), **heads}

    def forward(self, batch: PackedBatch, smoothing: float = 0.0) -> Tensor:
        """What every head says at every position that is read, [R, heads] float32; there is no label to smooth."""
        assert not smoothing
        with self._autocast():
            if self.path == "fast":
                values: Tensor = self.heads(self._hidden(batch, batch.reads))
                return values
            parts = [self.heads(hidden) for hidden in self._plain_hidden(batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.heads.count, device=batch.input_ids.device)

    def _plain_hidden(self, batch: PackedBatch) -> Iterator[Tensor]:
        """[n, d] outputs of the last layer that are read of each answer."""
        read = [answer for answer in batch.answers if answer.response.reads]
        idle = self._idle_runs(batch, len(read))
        for answer in read:
            prompt = batch.rows[answer.row].prompt
            ids = torch.tensor([[*prompt, *answer.response.ids]], device=batch.input_ids.device)
            with self._arranged(plain_implementation(self.model), one_piece=False):
                hidden = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
            yield hidden[torch.tensor(answer.response.reads, device=ids.device) + len(prompt)]
        for ids in idle:
            with self._arranged(plain_implementation(self.model), one_piece=False):
                yield self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :0]


def score_values(
    scorer: ValueScorer,
    encoded: Sequence[Encoded],
    *,
    tokens_per_batch: int,
    ranks: Ranks | None = None,
    at_batch: Callable[[int, int], None] | None = None,
) -> Values:
    """Read the heads at every position of every row that is to be read, without gradients.

    Args:
        scorer: In evaluation mode.
        encoded: Rows.
        tokens_per_batch: Token budget of one forward pass.
        ranks: Processes that share the work; every one of them gets all results.
        at_batch: As for `score_rows`.
    """
    ranks = ranks or Ranks()
    sizes = [sum(len(response.reads) for response in row.responses) for row in encoded]
    flat = torch.zeros(sum(sizes), scorer.heads.count, device=scorer.model.device if ranks.size > 1 else "cpu")
    starts = [0, *accumulate(sizes)]
    for members, batch in shared_batches(encoded, tokens_per_batch, scorer.model.device, ranks, at_batch):
        with torch.no_grad():
            values = scorer(batch).to(flat.device)
        done = 0
        for index in members:
            flat[starts[index] : starts[index] + sizes[index]] = values[done : done + sizes[index]]
            done += sizes[index]
    # Every place is written by one rank and zero on the others, so the sum is exact.
    ranks.sum_tensors([flat])
    return [part.clone() for part in torch.split(flat.cpu(), sizes)]
