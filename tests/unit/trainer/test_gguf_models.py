"""GGUF files: dequantised to the right weights, saved as a folder, kept between stages and verified."""

from __future__ import annotations

import json
import time

import gguf
import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_trainer.models import converted, loading
from plumbline_trainer.models.loading import load_base, load_config, load_tokenizer, storage_dtype_of
from plumbline_trainer.models.merging import stored_weights
from support import tiny

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight, heads):
    """GGUF's order of rotary pairs within each head."""
    size = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, size, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer):
    """A llama model as llama.cpp's converter lays it out, in float32."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = {token["content"] for token in rules["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in rules["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(tiny.START))
    writer.add_eos_token_id(tokens.index(tiny.END))
    writer.add_pad_token_id(tokens.index(tiny.END))
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for number, layer in enumerate(model.model.layers):
        for name, short in NAMES.items():
            weight = layer.get_submodule(name).weight.detach().numpy()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            weight = weight if heads is None else interleaved(weight, heads)
            writer.add_tensor(f"blk.{number}.{short}.weight", weight.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tokenizer = tiny.make_tokenizer(pad_is_end=True)
    model = tiny.make_model("llama", seed=3, tokenizer=tokenizer)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer), model


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.delenv(converted.CACHE_ENV, raising=False)


def test_weights_tokenizer_and_settings_come_out_of_a_gguf_file(source):
    path, original = source
    model, tokenizer = load_base(path, "float32")
    expected = stored_weights(original)
    found = stored_weights(model)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    ids = torch.tensor([tokenizer.hf("A plumb line is a cord.", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert tokenizer.template == tiny.CHAT_TEMPLATE
    assert tokenizer.end_tokens == (tokenizer.hf.convert_tokens_to_ids(tiny.END),)
    assert tokenizer.pad_id == tokenizer.end_tokens[0]
    assert storage_dtype_of(path) == "float32"
    assert not hasattr(model.config, "quantization_config")
    assert load_config(path).num_hidden_layers == 2
    assert load_tokenizer(path).digest == tokenizer.digest


def test_a_kept_model_is_the_same_and_read_instead(source, tmp_path, monkeypatch):
    path, _ = source
    straight, tokenizer = load_base(path, "float32")
    monkeypatch.setenv(converted.CACHE_ENV, str(tmp_path))
    first, _ = load_base(path, "float32")
    monkeypatch.setattr(loading, "_load_gguf", lambda *_: pytest.fail("it was dequantised again"))
    second, kept_tokenizer = load_base(path, "float32")
    for model in (first, second):
        assert all(
            torch.equal(a, b) for a, b in zip(straight.state_dict().values(), model.state_dict().values(), strict=True)
        )
    assert kept_tokenizer.digest == tokenizer.digest
    assert load_tokenizer(path).digest == tokenizer.digest
    half, _ = load_base(path, "bfloat16")
    assert torch.equal(half.model.norm.weight, straight.model.norm.weight.bfloat16())


def test_a_damaged_kept_model_is_made_again(source, tmp_path, monkeypatch):
    path, original = source
    monkeypatch.setenv(converted.CACHE_ENV, str(tmp_path))
    load_base(path, "float32")
    weights = next(tmp_path.rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    assert converted.kept_folder(path) is None
    model, _ = load_base(path, "float32")
    assert torch.equal(model.model.norm.weight, original.model.norm.weight)
    assert converted.kept_folder(path) is not None


def test_a_place_that_cannot_be_written_costs_nothing(source, tmp_path, monkeypatch):
    path, _ = source
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(converted.CACHE_ENV, str(tmp_path / "file"))
    model, _ = load_base(path, "float32")
    assert model.config.num_hidden_layers == 2


def test_reading_leaves_the_library_as_it_was(source):
    path, _ = source
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_tokenizer(path)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_gguf_file_that_is_cut_is_refused(source, tmp_path):
    path, _ = source
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut.gguf"):
        load_base(cut, "float32")


def test_conversion_is_quick(source):
    path, _ = source
    load_base(path, "float32")
    started = time.process_time()
    load_base(path, "float32")
    assert time.process_time() - started < 5
