"""Adapters and merging: the same bits by hand, by stage and on reload."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_api.training import Lora
from plumbline_trainer.engine.optimizer import named_trainables
from plumbline_trainer.models import adapters, merging
from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.selection import module_names, select
from support import tiny
from support.threads import computing_on


def perturbed_adapter(model, lora, seed):
    """An adapter with a B that is not zero, as after training."""
    adapters.attach_lora(model, lora, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named_trainables(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chain_of_three_is_bit_equal_to_numpy(tmp_path, style, dtype):
    source = tiny.save_model(tmp_path / "base", style, dtype=dtype, seed=3)
    model, tokenizer = load_base(source, dtype)
    by_hand = {name: weight.detach().double().numpy().copy() for name, weight in merging.stored_weights(model).items()}
    for seed in (1, 2, 3):
        lora = Lora(rank=4, alpha=6.0 + seed)
        training, _ = load_base(source, dtype)
        perturbed_adapter(training, lora, seed)
        adapters.save_adapter(training, lora, tmp_path / f"adapter-{seed}")
        adapter = adapters.read_adapter(tmp_path / f"adapter-{seed}")
        merging.merge_into(model, adapter, torch_dtype(dtype))
        for name, delta in adapter.deltas.items():
            change = delta.b.double().numpy() @ delta.a.double().numpy() * ((6.0 + seed) / 4)
            merged = by_hand[f"{name}.weight"] + (change.T if delta.transposed else change)
            by_hand[f"{name}.weight"] = rounded_by_hand(merged, dtype)
    for name, weight in merging.stored_weights(model).items():
        assert np.array_equal(weight.detach().double().numpy(), by_hand[name]), name
    save_full(model, tokenizer, tmp_path / "merged", dtype)
    again, _ = load_base(tmp_path / "merged", dtype)
    assert merging.weights_digest(merging.stored_weights(again).items()) == merging.weights_digest(
        merging.stored_weights(model).items()
    )


def rounded_by_hand(values, dtype):
    """Round to nearest even by the definition of the type: significant bits 24 or 8."""
    mantissa, exponent = np.frexp(values)
    bits = 24 if dtype == "float32" else 8
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def test_rounding_to_bfloat16_is_one_rounding():
    # 1 + 2^-8 is a tie of bfloat16; a hair above it float32 still says "tie", and two roundings go down.
    values = torch.tensor(
        [1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-40), 0.0], dtype=torch.float64
    )
    assert merging.round_to(values, torch.bfloat16).tolist() == [1.0078125, 1.0, 1.015625, -1.0078125, 0.0]
    assert values.float().to(torch.bfloat16)[0] == 1.0
    random = torch.randn(4096, dtype=torch.float64)
    assert (
        merging.round_to(random, torch.bfloat16).double().numpy().tolist()
        == rounded_by_hand(random.numpy(), "bfloat16").tolist()
    )


def test_merging_does_not_depend_on_threads():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 700, generator=generator)
    delta = merging.Delta(
        torch.randn(16, 700, generator=generator), torch.randn(300, 16, generator=generator) * 0.01, 2.0
    )
    alone = merging.merge_delta(weight, delta, torch.float32)
    with computing_on(2):
        assert torch.equal(alone, merging.merge_delta(weight, delta, torch.float32))


def test_a_whole_adapter_is_merged_alike_by_any_number_of_threads(tmp_path):
    source = tiny.save_model(tmp_path / "base", seed=1)
    adapted, _ = load_base(source, "float32")
    perturbed_adapter(adapted, Lora(rank=4), 5)
    adapter = adapters.adapter_of(adapted, Lora(rank=4))
    found = []
    for threads in (1, 3):
        with computing_on(threads):
            plain, _ = load_base(source, "float32")
            lost = merging.merge_into(plain, adapter, torch.float32)
            digest = merging.weights_digest(merging.stored_weights(plain).items())
            assert merging.merged_digest(adapted, adapter, torch.float32) == (digest, lost)
            found.append((digest, lost))
    assert found[0] == found[1]
    assert found[0][1].weights == sum(d.b.shape[0] * d.a.shape[1] for d in adapter.deltas.values())


def test_two_deltas_on_one_shared_weight_are_both_merged():
    first, second = torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(6, 5, bias=False)
    second.weight = first.weight
    model = torch.nn.ModuleDict({"a": first, "b": second})
    generator = torch.Generator().manual_seed(0)
    deltas = {
        name: merging.Delta(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 0.5)
        for name in ("a", "b")
    }
    expected = first.weight.detach().clone()
    for delta in deltas.values():
        expected = merging.merge_delta(expected, delta, torch.float32)
    merging.merge_into(model, merging.Adapter(deltas, 2, 1.0), torch.float32)
    assert torch.equal(first.weight, expected)
    assert first.weight is second.weight


def test_large_weights_whose_sum_overflows_are_finite():
    delta = merging.Delta(torch.zeros(1, 4), torch.zeros(4, 1), 1.0)
    weight = torch.full((4, 4), 3e38)
    assert torch.equal(merging.merge_delta(weight, delta, torch.float32), weight)


def test_a_small_delta_is_lost_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 256, generator=generator) * 0.02).bfloat16()
    delta = merging.Delta(
        torch.randn(16, 256, generator=generator) / 16, torch.randn(256, 16, generator=generator) * 1e-4, 2.0
    )
    lost, kept = merging.LostPart(), merging.LostPart()
    merging.merge_delta(weight, delta, torch.bfloat16, lost)
    merging.merge_delta(weight.float(), delta, torch.float32, kept)
    assert lost.ratio > merging.LOST_PART_WARNING
    assert lost.unchanged_share > 0.5
    assert kept.ratio < 1e-3


def test_diverged_weights_are_refused():
    delta = merging.Delta(torch.ones(1, 4), torch.full((4, 1), float("nan")), 1.0)
    with pytest.raises(InputError, match="diverged"):
        merging.merge_delta(torch.ones(4, 4), delta, torch.bfloat16)


@pytest.mark.parametrize("style", tiny.STYLES)
def test_merged_model_computes_what_the_adapter_did(tmp_path, style):
    source = tiny.save_model(tmp_path / "base", style, seed=1)
    lora = Lora(rank=4)
    adapted, tokenizer = load_base(source, "float32")
    plain, _ = load_base(source, "float32")
    ids = torch.tensor([tokenizer.hf("A plumb line is a cord.")["input_ids"]])
    start = plain(ids).logits
    perturbed_adapter(adapted, lora, 5)
    with torch.no_grad():
        moved = adapted(ids).logits
        with adapters.adapters_disabled(adapted):
            assert torch.equal(adapted(ids).logits, start)
    adapter = adapters.adapter_of(adapted, lora)
    digest, lost = merging.merged_digest(adapted, adapter, torch.float32)
    merging.merge_into(plain, adapter, torch.float32)
    assert digest == merging.weights_digest(merging.stored_weights(plain).items())
    assert lost.ratio < 1e-3
    assert (moved - start).abs().max() > 1e-2
    torch.testing.assert_close(plain(ids).logits, moved, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("style", tiny.STYLES)
def test_default_targets_are_every_linear_layer_but_the_head(style):
    model = tiny.make_model(style, tie=False)
    expected = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
    }.get(style, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    assert {name.rpartition(".")[2] for name in select(module_names(model), Lora(), None).adapted} == expected


def test_fresh_adapter_changes_nothing_and_is_keyed_by_seed(tmp_path):
    first, second, other = (tiny.make_model("llama") for _ in range(3))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = first(ids).logits
        for model, seed in ((first, 7), (second, 7), (other, 8)):
            torch.rand(3)  # The global generator has no say.
            adapters.attach_lora(model, Lora(rank=4), seed)
        assert torch.equal(first(ids).logits, before)
    states = [adapters.adapter_state(model) for model in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    bound = 64**-0.5
    a = states[0]["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_initial_factor_is_pinned():
    """A change of these values is a change of every run: raise the numerics versions of the training stages."""
    factor = adapters.initial_factor(7, "m", 16, 64)
    assert hashlib.sha256(factor.numpy().tobytes()).hexdigest() == PINNED_FACTOR


PINNED_FACTOR = "073f9ac4f3430b63cbb07ca184efbe7ca923099789ac5747d8651d1ffde6f02f"


def test_trainables_are_float32_over_a_frozen_base():
    model = tiny.make_model("llama").bfloat16()
    adapters.attach_lora(model, Lora(rank=4), 0)
    trainables = named_trainables(model)
    assert len(trainables) == 2 * 2 * 7
    assert all("lora_" in name for name in trainables)
    assert {parameter.dtype for parameter in trainables.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trainables} == {torch.bfloat16}


@pytest.mark.parametrize("target", ["q_porj", "lm_head", "embed_tokens"])
def test_targets_that_match_nothing_are_named(target):
    with pytest.raises(InputError, match=rf'lora.targets: "{target}" .*down_proj, gate_proj, k_proj'):
        adapters.attach_lora(tiny.make_model("llama", tie=False), Lora(targets=["q_proj", target]), 0)


def test_saved_adapter_has_no_paths_and_loads_in_peft(tmp_path):
    import json

    import peft

    source = tiny.save_model(tmp_path / "base", "qwen2")
    model, _ = load_base(source, "float32")
    lora = Lora(rank=4, targets=["q_proj", "v_proj"])
    perturbed_adapter(model, lora, 2)
    adapters.save_adapter(model, lora, tmp_path / "adapter")
    adapters.save_adapter(model, lora, tmp_path / "again")
    for name in (adapters.ADAPTER_CONFIG, adapters.ADAPTER_WEIGHTS):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "adapter" / adapters.ADAPTER_CONFIG).read_text()
    assert json.loads((tmp_path / "adapter" / adapters.ADAPTER_CONFIG).read_text())["target_modules"] == [
        "q_proj",
        "v_proj",
    ]
    base, _ = load_base(source, "float32")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_adapter_state_goes_back_in():
    model, other = tiny.make_model("gpt2"), tiny.make_model("gpt2")
    perturbed_adapter(model, Lora(rank=4), 2)
    adapters.attach_lora(other, Lora(rank=4), 9)
    adapters.load_adapter_state(other, adapters.adapter_state(model))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(InputError, match="does not fit"):
        adapters.load_adapter_state(other, {})


def test_an_adapter_of_another_model_is_refused():
    small = tiny.make_model("llama")
    perturbed_adapter(small, Lora(rank=4), 0)
    adapter = adapters.adapter_of(small, Lora(rank=4))
    with pytest.raises(InputError, match="another model"):
        merging.merge_into(tiny.make_model("llama", width=32), adapter, torch.float32)
    with pytest.raises(InputError, match="does not have"):
        merging.merge_into(tiny.make_model("gpt2"), adapter, torch.float32)
