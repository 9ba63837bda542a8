"""Model folders from outside: what loads, and what is refused with a remedy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_trainer.models import folders
from plumbline_trainer.models.dtypes import place_weights
from plumbline_trainer.models.loading import (
    check_weights,
    load_base,
    load_config,
    load_tokenizer,
    storage_dtype_of,
)
from plumbline_trainer.models.saving import save_full
from support import tiny

CHAT = [{"role": "user", "content": "Name three fruits."}, {"role": "assistant", "content": "Plums."}]


@pytest.fixture
def folder(tmp_path):
    return tiny.save_model(tmp_path / "model")


def change(folder, name, **values):
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | values))


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("tie", [True, False])
def test_a_folder_loads_and_saves_to_the_same_model(tmp_path, style, tie):
    source = tiny.save_model(tmp_path / "source", style, tie=tie, bos=True)
    model, tokenizer = load_base(source, "float32")
    save_full(model, tokenizer, tmp_path / "saved", "float32")
    save_full(model, tokenizer, tmp_path / "twice", "float32")
    again, same = load_base(tmp_path / "saved", "float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    assert (same.digest, same.end_tokens, same.template) == (tokenizer.digest, tokenizer.end_tokens, tokenizer.template)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tie
    for path in sorted((tmp_path / "saved").iterdir()):
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_types_of_storage_are_found(tmp_path):
    brain = tiny.save_model(tmp_path / "bf16", dtype="bfloat16")
    plain = tiny.save_model(tmp_path / "f32")
    assert (storage_dtype_of(brain), storage_dtype_of(plain)) == ("bfloat16", "float32")
    assert storage_dtype_of(brain, "float32") == "float32"
    model, tokenizer = load_base(brain, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_full(model, tokenizer, tmp_path / "saved", "bfloat16")
    assert storage_dtype_of(tmp_path / "saved") == "bfloat16"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_read(tmp_path, folder):
    model, _ = load_base(folder, "float32")
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(str(sharded), max_shard_size="100KB")
    assert (sharded / folders.WEIGHTS_INDEX).exists()
    again, _ = load_base(sharded, "float32")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    next(sharded.glob("model-00001*")).unlink()
    with pytest.raises(InputError, match=r"model-00001-of-\d+.safetensors is missing"):
        load_base(sharded, "float32")


def test_an_index_may_not_leave_the_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / folders.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}}))
    with pytest.raises(InputError, match="not a file name in the folder"):
        load_base(folder, "float32")


def test_pickles_are_refused_with_the_remedy(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only as pytorch_model.bin, a format that can run code.*save_pretrained"):
        load_base(folder, "float32")


def test_a_folder_without_weights_or_config_is_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_base(folder, "float32")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json"):
        load_base(folder, "float32")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter, not a model"):
        load_base(folder, "float32")
    with pytest.raises(InputError, match="is not there"):
        load_base(tmp_path / "nowhere", "float32")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="neither a GGUF file nor a model folder"):
        load_base(tmp_path / "text", "float32")


def test_code_of_the_folder_is_never_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w').write('x')\n")
    evil = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    change(folder, "config.json", auto_map=evil, _attn_implementation_internal="some/kernel", attn_implementation="a/b")
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Tok", None]})
    model, _ = load_base(folder, "float32")
    assert model.config._attn_implementation == "sdpa"
    assert not marker.exists()
    change(folder, "config.json", model_type="evil")
    with pytest.raises(InputError, match=r'model_type "evil" cannot be loaded.*built in'):
        load_base(folder, "float32")
    assert not marker.exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_asking_for_trust_is_refused_wherever_it_stands(folder, where):
    change(folder, where, nested={"deeper": [{"trust_remote_code": True}]})
    with pytest.raises(InputError, match="never run"):
        load_base(folder, "float32")


def test_quantised_weights_are_refused(folder):
    change(folder, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(InputError, match=r"quantised.*unquantised"):
        load_base(folder, "float32")


def test_missing_weights_are_not_made_up(folder):
    change(folder, "config.json", num_hidden_layers=3)
    with pytest.raises(InputError, match=r"weights that its config.json asks for are not there"):
        load_base(folder, "float32")


def test_other_shapes_are_refused(folder):
    change(folder, "config.json", intermediate_size=256)
    shapes = (
        r"6 weights have another shape than its config.json says \(model.layers.0.mlp.down_proj.weight: \[64, 128\]"
    )
    with pytest.raises(InputError, match=shapes):
        load_base(folder, "float32")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("style", tiny.STYLES)
def test_sound_weights_pass_by_their_heads_alone(tmp_path, style, tie):
    """Whatever an architecture calls them, with a head of its own or tied; without one of them they do not."""
    folder = tiny.save_model(tmp_path / "m", style, tie=tie)
    header = folders.safetensors_header(folder / "model.safetensors")
    check_weights(folder, header, "m")
    name = next(name for name in header if ".1." in name)
    del header[name]
    with pytest.raises(InputError, match=r"m: 1 weights that its config.json asks for are not there"):
        check_weights(folder, header, "m")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]"])
def test_a_config_that_is_no_json_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config.json"):
        load_base(folder, "float32")


def test_damaged_weights_are_named(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="not a safetensors file"):
        load_base(folder, "float32")


def test_a_hostile_template_stays_in_the_sandbox(folder, tmp_path):
    marker = tmp_path / "ran"
    template = "{{ cycler.__init__.__globals__.os.popen('touch " + str(marker) + "').read() }}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(Exception, match=r"unsafe|undefined|security"):
        tokenizer.hf.apply_chat_template(CHAT, tokenize=False)
    assert not marker.exists()


def test_end_tokens_come_from_template_tokenizer_and_settings(folder):
    tokenizer = load_tokenizer(folder)
    end, pad = (tokenizer.hf.convert_tokens_to_ids(t) for t in (tiny.END, tiny.PAD))
    assert tokenizer.end_tokens == (end,)
    change(folder, "generation_config.json", eos_token_id=[end, pad])
    assert load_tokenizer(folder).end_tokens == (end, pad)
    assert tokenizer.pad_id == pad
    assert tokenizer.bos_id is None


def test_the_template_decides_what_ends_a_turn(tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE.replace("<|im_end|>", "<|pad|>"))
    tokenizer = load_tokenizer(folder)
    pad, end = (tokenizer.hf.convert_tokens_to_ids(t) for t in (tiny.PAD, tiny.END))
    assert tokenizer.end_tokens == (pad, end)


def test_a_tokenizer_alone_is_enough_for_preflight(folder):
    (folder / "model.safetensors").unlink()
    assert load_tokenizer(folder).template == tiny.CHAT_TEMPLATE
    assert load_config(folder).model_type == "llama"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="it has no tokenizer"):
        load_tokenizer(folder)


def test_tiny_models_are_functions_of_their_arguments(tmp_path):
    for name in ("a", "b"):
        tiny.save_model(tmp_path / name, seed=5)
    tiny.save_model(tmp_path / "c", seed=6)
    read = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in "abc"}
    assert read["a"] == read["b"] != read["c"]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("style", ["llama", "qwen2", "gemma2"])
def test_rotary_frequencies_are_never_rounded(style):
    """Weights in bfloat16; the angles at the thousandth token would else be off by more than a radian."""
    model, exact = tiny.make_model(style), tiny.make_model(style)
    place_weights(model, "bfloat16", "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    found, wanted = dict(model.named_buffers()), dict(exact.named_buffers())
    assert any("inv_freq" in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
