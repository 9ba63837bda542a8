"""Chains of adapters in storage: what a stage loads is what merge writes, and changes below are noticed."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_api.stages import Merge
from plumbline_trainer.context import StageOutput
from plumbline_trainer.models import merging
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.storage.manifests import commit_output
from safetensors.torch import load_file, save_file
from support import tiny, trainer
from support.adapted import lora_of
from support.chains import LORA, train_by_hand


def chain_of_three(folder, loras=(LORA, LORA, LORA), **model):
    base = trainer.base_model(f"file://{tiny.save_model(folder / 'base', **model)}")
    first = train_by_hand(folder, "one", base, seed=1, lora=loras[0])
    second = train_by_hand(folder, "two", trainer.output_of(first), seed=2, lora=loras[1])
    third = train_by_hand(folder, "three", trainer.output_of(second), seed=3, lora=loras[2])
    return base, (first, second, third)


def reader(folder):
    """The context of some later stage."""
    return trainer.stage_context(folder / "reader", trainer.stage_run(folder))


def merge(folder, source, **parameters):
    run = trainer.stage_run(folder, "merge", inputs=[source], parameters=Merge(**parameters).to_wire() | {"seed": 0})
    result, code = trainer.run_in_process(folder / "merging", run)
    assert code == 0, result.message
    return run, result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("kinds", [("plain", "plain", "plain"), ("rsLora", "dora", "everything")])
def test_what_a_stage_loads_is_what_merge_writes(tmp_path, dtype, style, kinds):
    loras = tuple(lora_of(kind, style, alpha=8.0) for kind in kinds)
    _, runs = chain_of_three(tmp_path, loras, style=style, dtype=dtype, seed=9)
    context = reader(tmp_path)
    policy = load_policy(context, trainer.output_of(runs[-1]), precision="chain", device="cpu")
    assert policy.storage_dtype == dtype
    assert [step.name for step in policy.lineage.adapters] == ["one", "two", "three"]
    run, result = merge(tmp_path, trainer.output_of(runs[-1]))
    written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
    loaded = merging.stored_weights(policy.model)
    assert set(written) == set(loaded)
    assert all(torch.equal(written[name], loaded[name]) for name in written)
    assert {weight.dtype for weight in written.values()} == {policy.model.dtype}
    meta = trainer.manifest_of(run).meta
    assert (meta["form"], meta["storageDtype"], meta["mergedDigest"]) == ("full", dtype, policy.lineage.merged_digest)
    again = load_policy(context, trainer.output_of(run), precision="float32", device="cpu")
    assert again.lineage.adapters == ()
    assert result.metrics["adapters"] == 3
    assert 0 < result.metrics["lostPart"] < (1e-4 if dtype == "float32" else 0.3)
    assert 0 <= result.metrics["logitKl"] < (1e-9 if dtype == "float32" else 0.01)
    assert 0 < result.metrics["logitDifference"] < (1e-4 if dtype == "float32" else 1.0)
    assert set(trainer.manifest_of(run).metrics) >= {
        f"{figure}.{stage}"
        for figure in ("lostPart", "logitKl", "logitDifference", "unchangedShare")
        for stage in ("one", "two", "three")
    }


def test_merging_by_hand_from_the_stored_files(tmp_path):
    """The whole way by hand: read the files of storage with numpy, add float64 deltas, round, compare bytes."""
    _, runs = chain_of_three(tmp_path, style="qwen2", tie=False)
    weights = load_file(str(tmp_path / "base" / "model.safetensors"))
    for run in runs:
        folder = trainer.output_folder(run)
        config = json.loads((folder / "adapter_config.json").read_text())
        factors = load_file(str(folder / "adapter_model.safetensors"))
        for key in [key for key in factors if "lora_A" in key]:
            a, b = factors[key].double().numpy(), factors[key.replace("lora_A", "lora_B")].double().numpy()
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            merged = weights[name].double().numpy() + config["lora_alpha"] / config["r"] * (b @ a)
            weights[name] = torch.from_numpy(merged.astype("float32"))
    run, _ = merge(tmp_path, trainer.output_of(runs[-1]))
    written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
    assert set(written) == set(weights)
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_merge_may_change_the_stored_type(tmp_path):
    _, runs = chain_of_three(tmp_path)
    run, _ = merge(tmp_path, trainer.output_of(runs[0]), storage_dtype="bfloat16")
    context = reader(tmp_path)
    policy = load_policy(context, trainer.output_of(runs[0]), precision="chain", device="cpu")
    written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
    for name, weight in merging.stored_weights(policy.model).items():
        assert torch.equal(written[name], weight.to(torch.bfloat16))
    assert trainer.manifest_of(run).meta["storageDtype"] == "bfloat16"
    merged = load_policy(context, trainer.output_of(run), precision="chain", device="cpu")
    assert merged.storage_dtype == "bfloat16"


def test_merging_a_full_policy_writes_it_again(tmp_path):
    base, _ = chain_of_three(tmp_path)
    run, result = merge(tmp_path, base)
    assert result.metrics["adapters"] == 0
    written = load_file(str(trainer.output_folder(run) / "model.safetensors"))
    source = load_file(str(tmp_path / "base" / "model.safetensors"))
    assert all(torch.equal(written[name], source[name]) for name in source)


def test_a_base_that_changed_is_noticed(tmp_path):
    _, runs = chain_of_three(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(str(path))
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][0, 0] += 1
    save_file(weights, str(path), metadata={"format": "pt"})
    context = reader(tmp_path)
    with pytest.raises(InputError, match='weights merged for "three" have the digest') as caught:
        load_policy(context, trainer.output_of(runs[-1]), precision="float32", device="cpu")
    assert caught.value.reason == "InputMissing"


def test_a_delta_that_rounding_swallows_is_warned_about(tmp_path, caplog):
    base = trainer.base_model(f"file://{tiny.save_model(tmp_path / 'base', dtype='bfloat16')}")
    run = train_by_hand(tmp_path, "faint", base, seed=1, size=1e-4)
    context = reader(tmp_path)
    context.log = logging.getLogger("test-of-loss")
    with caplog.at_level(logging.WARNING, logger="test-of-loss"):
        load_policy(context, trainer.output_of(run), precision="float32", device="cpu")
    assert "merging faint into bfloat16 weights loses" in caplog.text
    assert "storageDtype: float32" in caplog.text


def test_declared_storage_type_holds_for_the_chain(tmp_path):
    source = tiny.save_model(tmp_path / "base", dtype="bfloat16")
    base = trainer.external("model", f"file://{source}", name="base", kind="policy", storageDtype="float32")
    run = train_by_hand(tmp_path, "one", base, seed=1)
    context = reader(tmp_path)
    policy = load_policy(context, trainer.output_of(run), precision="chain", device="cpu")
    assert policy.storage_dtype == "float32"
    assert policy.lineage.adapters[0].lost.ratio < 1e-4


def test_full_weights_from_a_stage_are_a_base(tmp_path):
    _, runs = chain_of_three(tmp_path)
    merged, _ = merge(tmp_path, trainer.output_of(runs[0]))
    after = train_by_hand(tmp_path, "after", trainer.output_of(merged), seed=8)
    straight = train_by_hand(tmp_path, "straight", trainer.output_of(runs[0]), seed=8)
    context = reader(tmp_path)
    digests = {
        load_policy(context, trainer.output_of(run), precision="float32", device="cpu").lineage.merged_digest
        for run in (after, straight)
    }
    assert len(digests) == 1


def test_the_next_stage_trains_on_what_merge_writes(tmp_path):
    """A real second stage: its step-0 weights, by the digest that it records, are those of the merged files."""
    lora = lora_of("everything", alpha=8.0)
    base = trainer.base_model(f"file://{tiny.save_model(tmp_path / 'base', dtype='bfloat16')}")
    first = train_by_hand(tmp_path, "one", base, seed=1, lora=lora)
    merged, _ = merge(tmp_path, trainer.output_of(first))
    onto_chain = train_by_hand(tmp_path, "on-chain", trainer.output_of(first), seed=2, lora=lora)
    onto_merged = train_by_hand(tmp_path, "on-merged", trainer.output_of(merged), seed=2, lora=lora)
    digest = merging.weights_digest(load_file(str(trainer.output_folder(merged) / "model.safetensors")).items())
    assert trainer.manifest_of(first).meta["mergedDigest"] == digest
    assert trainer.manifest_of(onto_chain).meta["startDigest"] == digest
    assert trainer.manifest_of(merged).meta["mergedDigest"] == digest
    files = [trainer.output_folder(run) / "adapter_model.safetensors" for run in (onto_chain, onto_merged)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_report_is_no_policy(tmp_path):
    run = trainer.stage_run(tmp_path, "evaluate")
    context = trainer.stage_context(tmp_path, run)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    commit_output(context, StageOutput(tmp_path / "report", "report"))
    with pytest.raises(InputError, match="yields a report, no policy"):
        load_policy(context, trainer.output_of(run), precision="float32", device="cpu")


def test_adapter_of_a_tied_model_leaves_head_and_embedding_alone(tmp_path):
    source = tiny.save_model(tmp_path / "base", "gemma2")
    base = trainer.base_model(f"file://{source}")
    run = train_by_hand(tmp_path, "one", base, seed=1)
    merged, _ = merge(tmp_path, trainer.output_of(run))
    model, _ = load_base(trainer.output_folder(merged), "float32")
    before, _ = load_base(source, "float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight
    )
