"""rsLoRA, DoRA and modules trained whole: the same bits by hand, by peft, by stage and on reload."""

from __future__ import annotations

import json
import math

import numpy as np
import peft
import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_api.training import Freeze, Lora
from plumbline_trainer.engine.optimizer import named_trainables
from plumbline_trainer.models import adapters, merging
from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.probing import adapter_on
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.selection import module_names, select
from support import tiny
from support.adapted import KINDS, attach_and_move, lora_of


def rounded_by_hand(values, dtype):
    """Round to nearest even by the definition of the type: significant bits 24 or 8."""
    mantissa, exponent = np.frexp(values)
    bits = 24 if dtype == "float32" else 8
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def sum_by_halves(values):
    """Sum over columns: the first half plus the second, again and again."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        folded = values[:, :half].copy()
        folded[:, : values.shape[1] - half] += values[:, half:]
        values = folded
    return values[:, 0]


def merged_by_hand(weights, folder, dtype):
    """What peft's files say, in numpy and float64, one rounding for each weight."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    state = {
        name.removeprefix("base_model.model."): t.double().numpy()
        for name, t in load_file(str(folder / "adapter_model.safetensors")).items()
    }
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        before = weights[f"{name}.weight"]
        transposed = config["fan_in_fan_out"]
        b, a = state[f"{name}.lora_B.weight"], state[key]
        change = sum(b[:, k, None] * a[k] for k in range(config["r"])) * scale
        moved = (before.T if transposed else before) + change
        if config["use_dora"]:
            lengths = np.sqrt(sum_by_halves(moved**2))
            moved = moved * (state[f"{name}.lora_magnitude_vector"] / lengths)[:, None]
        weights[f"{name}.weight"] = rounded_by_hand(moved.T if transposed else moved, dtype)
    for key, weight in state.items():
        if "lora_" not in key and key in weights:  # The head of a tied model is stored as the embeddings.
            weights[key] = rounded_by_hand(weight, dtype)


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chain_of_every_kind_is_bit_equal_to_numpy(tmp_path, style, dtype):
    source = tiny.save_model(tmp_path / "base", style, dtype=dtype, seed=3)
    model, tokenizer = load_base(source, dtype)
    by_hand = {name: weight.detach().double().numpy().copy() for name, weight in merging.stored_weights(model).items()}
    for seed, kind in enumerate(("rsLora", "dora", "saved", "everything")):
        lora = lora_of(kind, style, alpha=6.0 + seed)
        training, _ = load_base(source, dtype)
        attach_and_move(training, lora, seed)
        adapters.save_adapter(training, lora, tmp_path / kind)
        merging.merge_into(model, adapters.read_adapter(tmp_path / kind), torch_dtype(dtype))
        merged_by_hand(by_hand, tmp_path / kind, dtype)
    for name, weight in merging.stored_weights(model).items():
        assert np.array_equal(weight.detach().double().numpy(), by_hand[name]), name
    save_full(model, tokenizer, tmp_path / "merged", dtype)
    again, _ = load_base(tmp_path / "merged", dtype)
    assert again.config.tie_word_embeddings
    assert merging.weights_digest(merging.stored_weights(again).items()) == merging.weights_digest(
        merging.stored_weights(model).items()
    )


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_computes_what_the_adapter_did(tmp_path, style, kind):
    source = tiny.save_model(tmp_path / "base", style, seed=1)
    lora = lora_of(kind, style)
    adapted, tokenizer = load_base(source, "float32")
    plain, _ = load_base(source, "float32")
    ids = torch.tensor([tokenizer.hf("A plumb line is a cord.")["input_ids"]])
    with torch.no_grad():
        start = plain(ids).logits
        attach_and_move(adapted, lora, 5)
        moved = adapted(ids).logits
        with adapters.adapters_disabled(adapted):
            assert torch.equal(adapted(ids).logits, start)
        assert torch.equal(adapted(ids).logits, moved)
        adapter = adapters.adapter_of(adapted, lora)
        with adapter_on(plain, adapter):
            torch.testing.assert_close(plain(ids).logits, moved, atol=2e-5, rtol=1e-5)
        assert torch.equal(plain(ids).logits, start)
        digest, lost = merging.merged_digest(adapted, adapter, torch.float32)
        again = merging.merge_into(plain, adapter, torch.float32)
        assert digest == merging.weights_digest(merging.stored_weights(plain).items())
        assert lost.ratio == pytest.approx(again.ratio)
        assert lost.weights == again.weights
        assert lost.ratio < 1e-3
        assert (moved - start).abs().max() > 1e-2
        torch.testing.assert_close(plain(ids).logits, moved, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_merges_our_files_to_the_same_weights(tmp_path, style, kind):
    """peft is the oracle: it reads what we write and merges in float64; ours is that, rounded once."""
    source = tiny.save_model(tmp_path / "base", style, seed=1)
    lora = lora_of(kind, style)
    training, _ = load_base(source, "float32")
    attach_and_move(training, lora, 5)
    adapters.save_adapter(training, lora, tmp_path / "adapter")
    ids = torch.arange(9)[None]
    base, _ = load_base(source, "float32")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, training(ids).logits, atol=2e-5, rtol=1e-5)
        theirs = loaded.double().merge_and_unload()
    model, _ = load_base(source, "float32")
    merging.merge_into(model, adapters.read_adapter(tmp_path / "adapter"), torch.float32)
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    for name, weight in merging.stored_weights(model).items():
        gap = (weight.double() - expected[name]).abs()
        assert bool((gap <= weight.abs().double() * 2.0**-23 + 1e-30).all()), name


@pytest.mark.parametrize("style", tiny.STYLES)
def test_a_fresh_adapter_of_every_kind_changes_nothing(style):
    ids = torch.arange(12)[None]
    for kind in KINDS:
        model = tiny.make_model(style)
        with torch.no_grad():
            before = model(ids).logits
            adapters.attach_lora(model, lora_of(kind, style), 7).eval()
            # DoRA divides the lengths of rows by themselves, computed another way.
            torch.testing.assert_close(model(ids).logits, before, atol=2e-5 if lora_of(kind).dora else 0, rtol=0)


def test_trainables_are_float32_over_a_bfloat16_base():
    model = tiny.make_model("llama").bfloat16()
    adapters.attach_lora(model, lora_of("everything"), 0)
    trainables = named_trainables(model)
    saved = [name for name in trainables if "lora_" not in name]
    assert saved == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ]
    assert len(trainables) == 3 * 2 * 7 + len(saved)
    assert {parameter.dtype for parameter in trainables.values()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_adapter_state_of_every_kind_goes_back_in():
    model, other = tiny.make_model("gpt2"), tiny.make_model("gpt2")
    attach_and_move(model, lora_of("everything", "gpt2"), 2)
    adapters.attach_lora(other, lora_of("everything", "gpt2"), 9).eval()
    adapters.load_adapter_state(other, adapters.adapter_state(model))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_scale_of_rslora_is_alpha_over_root_rank():
    model = tiny.make_model("llama")
    lora = Lora(rank=16, alpha=8.0, rs_lora=True, targets=["q_proj"])
    adapters.attach_lora(model, lora, 0)
    assert {delta.scale for delta in adapters.adapter_of(model, lora).deltas.values()} == {2.0}


def test_rounding_of_a_whole_module_counts_as_lost():
    model = tiny.make_model("llama").bfloat16()
    lora = Lora(rank=4, targets=["q_proj"], modules_to_save=["norm"])
    adapters.attach_lora(model, lora, 0)
    with torch.no_grad():
        model.model.norm.weight.add_(2.0**-12)  # Far below bfloat16's step at 1.
    adapter = adapters.adapter_of(model, lora)
    _, lost = merging.merged_digest(model, adapter, torch.bfloat16)
    assert lost.ratio == 1.0
    assert lost.unchanged_share == 1.0


class TestTiedEmbeddings:
    """Traps 23 and 24: a trained head must not alter the embeddings unsaid, and no untied weights under a tied config."""

    @pytest.mark.parametrize("only", ["lm_head", "embed_tokens"])
    def test_one_of_the_two_is_refused(self, only):
        with pytest.raises(
            InputError, match=r"lora.modulesToSave: .* one weight .*Name both: \[lm_head, embed_tokens\]"
        ):
            adapters.attach_lora(tiny.make_model("llama", tie=True), Lora(modules_to_save=[only]), 0)

    def test_both_stay_one_weight(self, tmp_path):
        source = tiny.save_model(tmp_path / "base", "qwen2", tie=True)
        lora = Lora(rank=2, targets=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
        training, tokenizer = load_base(source, "float32")
        attach_and_move(training, lora, 1)
        adapter = adapters.adapter_of(training, lora)
        model, _ = load_base(source, "float32")
        merging.merge_into(model, adapter, torch.float32)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        save_full(model, tokenizer, tmp_path / "merged", "float32")
        again, _ = load_base(tmp_path / "merged", "float32")
        ids = torch.arange(9)[None]
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, training(ids).logits, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("only", ["lm_head", "embed_tokens"])
    def test_untied_models_train_either(self, tmp_path, only):
        source = tiny.save_model(tmp_path / "base", "qwen2", tie=False)
        lora = Lora(rank=2, targets=["q_proj"], modules_to_save=[only])
        training, tokenizer = load_base(source, "float32")
        attach_and_move(training, lora, 1)
        model, _ = load_base(source, "float32")
        before = {name: weight.clone() for name, weight in merging.stored_weights(model).items()}
        merging.merge_into(model, adapters.adapter_of(training, lora), torch.float32)
        changed = {
            name for name, weight in merging.stored_weights(model).items() if not torch.equal(weight, before[name])
        }
        assert {name for name in changed if "q_proj" not in name} == {
            "lm_head.weight" if only == "lm_head" else "model.embed_tokens.weight"
        }
        save_full(model, tokenizer, tmp_path / "merged", "float32")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
        again, _ = load_base(tmp_path / "merged", "float32")
        ids = torch.arange(9)[None]
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, training(ids).logits, atol=2e-5, rtol=1e-5)


def test_an_adapter_with_weights_of_unknown_meaning_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny.make_model("llama")
    lora = lora_of("saved")
    adapters.attach_lora(model, lora, 0)
    adapters.save_adapter(model, lora, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    with pytest.raises(InputError, match=r"does not name: .*(norm|lm_head|embed_tokens)"):
        adapters.read_adapter(tmp_path)
    state = load_file(str(tmp_path / "adapter_model.safetensors"))
    state.pop(next(name for name in state if "lora_B" in name))
    save_file(state, str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="only a part of"):
        adapters.read_adapter(tmp_path)


def test_dora_on_rows_of_zeros_is_refused():
    model = tiny.make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    with pytest.raises(InputError, match=r"lora.dora: model.layers.1.mlp.up_proj has outputs .* all zero"):
        adapters.attach_lora(model, Lora(dora=True), 0)


class TestSelection:
    names = module_names(tiny.make_model("llama", tie=False, layers=3))

    @pytest.mark.parametrize(
        ("freeze", "layers", "others"),
        [
            ({"layers": 2}, {"0", "1"}, set()),
            ({"layers": -1}, {"0", "1"}, set()),
            ({"modules": ["embed_tokens"]}, set(), {"model.embed_tokens"}),
            ({"layers": 1, "modules": ["lm_head", "model.norm"]}, {"0"}, {"lm_head", "model.norm"}),
            ({"modules": ["layers.2"]}, {"2"}, set()),
            (
                {"modules": ["layers.1.*_proj"]},
                set(),
                {
                    f"model.layers.1.{name}"
                    for name in (
                        "mlp.up_proj",
                        "mlp.gate_proj",
                        "mlp.down_proj",
                        "self_attn.q_proj",
                        "self_attn.k_proj",
                        "self_attn.v_proj",
                        "self_attn.o_proj",
                    )
                },
            ),
        ],
    )
    def test_what_is_frozen(self, freeze, layers, others):
        found = select(self.names, None, Freeze.model_validate(freeze)).frozen
        assert set(found) == {f"model.layers.{number}" for number in layers} | others

    def test_frozen_layers_get_no_adapter(self):
        found = select(self.names, Lora(), Freeze(layers=-1))
        assert {name.split(".")[2] for name in found.adapted} == {"2"}
        assert len(found.adapted) == 7

    def test_a_module_trained_whole_gets_no_adapter(self):
        found = select(self.names, Lora(modules_to_save=["layers.0.mlp.up_proj"]), None)
        assert found.saved == ("model.layers.0.mlp.up_proj",)
        assert "model.layers.0.mlp.up_proj" not in found.adapted
        assert "model.layers.1.mlp.up_proj" in found.adapted

    def test_freezing_a_tied_head_freezes_the_embeddings(self):
        names = module_names(tiny.make_model("llama", tie=True))
        assert select(names, None, Freeze(modules=["lm_head"])).frozen == ("lm_head", "model.embed_tokens")

    @pytest.mark.parametrize(
        ("lora", "freeze", "said"),
        [
            (
                {"targets": ["q_porj"]},
                None,
                r'lora.targets: "q_porj" matches no layer of the model. There are: down_proj',
            ),
            (
                {"targets": ["mlp"]},
                None,
                r'lora.targets: "mlp" is not a linear layer of the blocks. There are: down_proj',
            ),
            (
                {"targets": ["lm_head"]},
                None,
                r'"lm_head" is not a linear layer .* Train it whole with lora.modulesToSave',
            ),
            ({"modulesToSave": ["nrom"]}, None, r'lora.modulesToSave: "nrom" matches no module .*There are: .*norm'),
            ({"modulesToSave": ["mlp"]}, None, r'lora.modulesToSave: "mlp" holds modules, not weights'),
            ({"targets": ["q_proj"], "modulesToSave": ["q_proj"]}, None, r"q_proj\" is among lora.targets, too"),
            ({"modulesToSave": ["norm"]}, {"modules": ["model.norm"]}, r'"model.norm" is frozen by freeze'),
            (
                {"targets": ["q_proj"]},
                {"modules": ["self_attn"]},
                r"freeze: every layer that lora would adapt is frozen",
            ),
            (None, {"layers": 9}, r"freeze.layers: 9, but the model has 3 blocks"),
            (None, {"modules": ["nrom"]}, r'freeze.modules: "nrom" matches no module of the model. There are: .*norm'),
            (None, {"layers": 3, "modules": ["norm", "embed_tokens", "lm_head"]}, r"freeze: nothing is left to train"),
        ],
    )
    def test_what_does_not_fit_is_named(self, lora, freeze, said):
        with pytest.raises(InputError, match=said):
            select(
                self.names,
                None if lora is None else Lora.model_validate(lora),
                None if freeze is None else Freeze.model_validate(freeze),
            )

    def test_a_model_without_linear_layers_takes_no_lora(self):
        import dataclasses

        with pytest.raises(InputError, match="lora: the model has no linear layers"):
            select(dataclasses.replace(self.names, linear=()), Lora(), None)

    @pytest.mark.parametrize("style", tiny.STYLES)
    def test_blocks_are_found(self, style):
        names = module_names(tiny.make_model(style))
        assert [name.rpartition(".")[2] for name in names.blocks] == ["0", "1"]
