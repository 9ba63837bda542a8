"""Policies: a base model with the adapters that were trained on it one after another, merged while loading."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from plumbline_api import layout
from plumbline_api.errors import InputError
from plumbline_api.stagerun import StageInput

from plumbline_trainer.data.sources import fetch_model
from plumbline_trainer.models.adapters import ADAPTER_CONFIG, read_adapter
from plumbline_trainer.models.dtypes import place_weights, torch_dtype
from plumbline_trainer.models.loading import load_base, storage_dtype_of
from plumbline_trainer.models.merging import (
    LOST_PART_WARNING,
    Adapter,
    LostPart,
    merge_into,
    merged_digest,
    stored_weights,
    weights_digest,
)
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.storage.manifests import FetchedOutput, fetch_output

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

CHAIN_MAX = 64
"""Adapters on one base; a longer chain is a cycle in storage."""


@dataclass(frozen=True)
class AdapterStep:
    """One adapter of a chain and what merging it did."""

    name: str
    stage_type: str
    fingerprint: str
    manifest_digest: str
    lost: LostPart


@dataclass(frozen=True)
class PolicyLineage:
    """Where the weights of a policy come from."""

    base: dict[str, Any]
    """`{name, uri, digest}` of an external model, or `{name, type, fingerprint, manifestDigest}` of full weights."""
    adapters: tuple[AdapterStep, ...] = ()
    """Adapters merged into the base, in order of training."""
    merged_digest: str | None = None
    """Digest of the merged weights in their storage type (`merging.weights_digest`); None where nothing was merged."""


@dataclass
class Policy:
    """A model ready to compute with, its tokenizer and where it comes from."""

    model: Any
    tokenizer: Tokenizer
    storage_dtype: str
    """`float32` or `bfloat16`: how the weights are stored and every delta is rounded."""
    lineage: PolicyLineage
    precision: str = "float32"
    """Type of the weights in memory."""
    quantization: str | None = None
    """How the linear layers in memory are quantised; `lineage` and storage know only the weights themselves."""


class MergeWatch(Protocol):
    """Sees a chain being merged. The model is on the CPU in its storage type."""

    def before(self, model: Any, tokenizer: Tokenizer, adapter: Adapter, name: str) -> None:
        """An adapter is about to be merged; `name` is the stage that trained it."""

    def after(self, model: Any, name: str) -> None:
        """It has been merged."""


@dataclass(frozen=True)
class _Link:
    fetched: FetchedOutput
    name: str
    stage_type: str
    fingerprint: str


@dataclass
class _Chain:
    base_folder: Path
    base: dict[str, Any]
    storage_dtype: str
    links: list[_Link] = field(default_factory=list)


def load_policy(
    context: StageContext,
    item: StageInput,
    *,
    precision: str,
    device: torch.device | str,
    stored: bool = False,
    watch: MergeWatch | None = None,
) -> Policy:
    """Load the policy that an input names: fetch its chain, verify it, merge every adapter, move to the device.

    Args:
        context: of the stage.
        item: an external model or the output of a stage that yields a policy.
        precision: `float32` or `bfloat16`, type of the weights in memory after merging in their storage type; or
            `chain`, to keep that type.
        device: where the weights go.
        stored: whether linear layers may hold their weights in the storage type, which changes no number: they widen
            them to `precision` for each product. Only for weights that stay frozen, or are widened before training.
        watch: told before and after each merge; `merge` measures there.

    Raises:
        InputError: if a part is missing or damaged, or the weights are not those that were trained on.
    """
    chain = _find_chain(context, item)
    dtype = chain.storage_dtype
    model, tokenizer = load_base(chain.base_folder, dtype)
    steps: list[AdapterStep] = []
    for link in chain.links:
        adapter = read_adapter(link.fetched.folder)
        if watch is not None:
            watch.before(model, tokenizer, adapter, link.name)
        lost = merge_into(model, adapter, torch_dtype(dtype))
        if watch is not None:
            watch.after(model, link.name)
        steps.append(AdapterStep(link.name, link.stage_type, link.fingerprint, link.fetched.digest, lost))
        if lost.ratio > LOST_PART_WARNING:
            context.log.warning("%s", lost_part_advice(link.name, lost, dtype))
    digest = weights_digest(stored_weights(model).items()) if steps else None
    if chain.links:
        _verify(chain.links[-1], digest)
    precision = dtype if precision == "chain" else precision
    place_weights(model, precision, device, stored=stored)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        storage_dtype=dtype,
        lineage=PolicyLineage(base=chain.base, adapters=tuple(steps), merged_digest=digest),
        precision=precision,
    )


def policy_meta(policy: Policy, *, form: str, merged: str | None = None) -> dict[str, Any]:
    """What the manifest of an output made from a policy says about it.

    Args:
        policy: what the stage started from.
        form: `adapter` or `full`.
        merged: digest of the weights that the output stands for, if known (`digest_with` for adapters).
    """
    meta: dict[str, Any] = {
        "form": form,
        "storageDtype": policy.storage_dtype,
        "endTokens": list(policy.tokenizer.end_tokens),
        "tokenizerDigest": policy.tokenizer.digest,
        "base": policy.lineage.base,
    }
    if policy.lineage.merged_digest is not None:
        meta["startDigest"] = policy.lineage.merged_digest
    if merged is not None:
        meta["mergedDigest"] = merged
    return meta


def digest_with(policy: Policy, adapter: Adapter) -> tuple[str, LostPart] | None:
    """Digest of the policy's weights with a new adapter merged, and the part of it that rounding loses.

    None where the weights in memory are rounded further than the stored ones, so that the first stage that merges
    them has to say; so it is where they are quantised.
    """
    if policy.quantization is not None or (policy.precision == "bfloat16" and policy.storage_dtype == "float32"):
        return None
    return merged_digest(policy.model, adapter, torch_dtype(policy.storage_dtype))


def lost_part_advice(name: str, lost: LostPart, dtype: str) -> str:
    """A warning for people whose adapter is smaller than the rounding of the weights."""
    return (
        f"merging {name} into {dtype} weights loses {lost.ratio:.0%} of what was trained "
        f"({lost.unchanged_share:.0%} of the weights do not change). Set spec.model.storageDtype: float32"
    )


def _find_chain(context: StageContext, item: StageInput) -> _Chain:
    """Follow an input down to full weights; the adapters come out in order of training."""
    links: list[_Link] = []
    current = item
    while current.fingerprint is not None:
        assert current.stage_type is not None
        fetched = fetch_output(context, _root(context, current))
        meta = fetched.manifest.meta
        if fetched.manifest.kind != "policy":
            raise InputError(
                f'"{current.name}" ({current.stage_type}) yields a {fetched.manifest.kind}, no policy that a stage can '
                "start from"
            )
        if meta.get("form") == "full":
            base = {
                "name": current.name,
                "type": current.stage_type,
                "fingerprint": current.fingerprint,
                "manifestDigest": fetched.digest,
            }
            return _Chain(fetched.folder, base, _declared_dtype(links, meta), links[::-1])
        if meta.get("form") != "adapter":
            raise InputError(f'"{current.name}" ({current.stage_type}) yields no policy that a stage can start from')
        links.append(_Link(fetched, current.name, current.stage_type, current.fingerprint))
        if len(links) > CHAIN_MAX:
            raise InputError(
                f'the chain of adapters below "{item.name}" is longer than {CHAIN_MAX}', reason="InputMissing"
            )
        parent = fetched.manifest.parent("model")
        if parent is None:
            raise InputError(
                f'the manifest of "{current.name}" names no model that its adapter was trained on; retry that stage',
                reason="InputMissing",
            )
        current = parent.to_input()
    if current.uri is None:
        raise InputError(f'the input "{current.role}" ({current.name}) names neither a stage nor a location')
    folder = fetch_model(context, current.uri, current.digest)
    if folder.is_dir() and (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise InputError(f"{current.uri} holds an adapter, not a model. Merge it into its base model first")
    declared = str(current.settings.get("storageDtype", "auto"))
    dtype = _declared_dtype(links, {"storageDtype": storage_dtype_of(folder, declared)})
    return _Chain(folder, {"name": current.name, "uri": current.uri, "digest": current.digest}, dtype, links[::-1])


def _declared_dtype(links: list[_Link], base_meta: dict[str, Any]) -> str:
    """What the first adapter was trained on; without adapters what the base says."""
    metas = [link.fetched.manifest.meta for link in reversed(links)] + [base_meta]
    return next((str(meta["storageDtype"]) for meta in metas if "storageDtype" in meta), "float32")


def _root(context: StageContext, item: StageInput) -> str:
    assert item.stage_type is not None
    assert item.fingerprint is not None
    run = context.run
    return layout.stage_root(run.storage.uri, run.pipeline.namespace, item.stage_type, item.fingerprint)


def _verify(link: _Link, digest: str | None) -> None:
    """Compare with what was recorded when the adapter was written."""
    recorded = link.fetched.manifest.meta.get("mergedDigest")
    if recorded is not None and recorded != digest:
        raise InputError(
            f'the weights merged for "{link.name}" have the digest {str(digest)[:12]}…, but {str(recorded)[:12]}… was '
            "recorded when it was trained: the model or an adapter below it has changed since. "
            "Retry from the first stage of the chain",
            reason="InputMissing",
        )
