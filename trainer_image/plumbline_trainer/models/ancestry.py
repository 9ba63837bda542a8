"""What a policy was made from, read from manifests: every dataset and model in its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from plumbline_api import layout
from plumbline_api.stagerun import StageInput

from plumbline_trainer.storage.manifests import read_manifest

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

TRAINING_ROLES = frozenset(
    {"model", "models", "base", "dataset", "reference", "rehearsal", "ewc", "kl", "prompts", "rewards", "critic"}
)
"""First parts of the roles of inputs that shape weights; what an evaluation reads shapes none."""


@dataclass
class Ancestry:
    """External inputs that a policy learned from."""

    datasets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Digest → how it was read, once for every way."""
    models: set[str] = field(default_factory=set)
    """Digests."""
    outputs: set[tuple[str, str]] = field(default_factory=set)
    """Stage type and fingerprint of every output on the way, the policy's own first."""

    def learned_from(self, item: StageInput, split: str) -> bool:
        """Whether rows of a dataset's split may have been trained on.

        Held-out rows of a dataset are safe where training read it with the same settings, because the split is a
        function of the prompt and the settings.
        """
        if item.digest is None or item.digest not in self.datasets:
            return False
        return split == "train" or any(settings != item.settings for settings in self.datasets[item.digest])


def trace(context: StageContext, item: StageInput) -> Ancestry:
    """Follow a policy's manifests down to external inputs."""
    found = Ancestry()
    run = context.run
    open_items: list[tuple[str, StageInput]] = [("model", item)]
    while open_items:
        _, current = open_items.pop()
        if current.fingerprint is None or current.stage_type is None:
            if current.digest is not None and current.kind == "dataset":
                ways = found.datasets.setdefault(current.digest, [])
                if current.settings not in ways:
                    ways.append(current.settings)
            elif current.digest is not None:
                found.models.add(current.digest)
            continue
        if (current.stage_type, current.fingerprint) in found.outputs:
            continue
        found.outputs.add((current.stage_type, current.fingerprint))
        root = layout.stage_root(run.storage.uri, run.pipeline.namespace, current.stage_type, current.fingerprint)
        read = read_manifest(context.store, root)
        if read is None:
            continue
        parents = [parent for parent in read[0].parents if parent.role.split(".")[0] in TRAINING_ROLES]
        open_items += [(parent.role, parent.to_input()) for parent in parents]
    return found
