"""Messages to ids: prefixes, ends, truncation, and no doubled begin token, for templates of every kind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plumbline_trainer.data.encode import Encoded, encode, encode_rows, tokenize
from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.data.templates import begins_with_bos, effective_template
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.tokenizer import Tokenizer, make_tokenizer
from support import tiny

LONG = 10**6
KINDS = {
    "chat": {},
    "chat, pad is end": {"pad_is_end": True},
    "chat with begin token": {"bos": True},
    "plain": {"template": False},
    "plain with begin token": {"template": False, "bos": True},
}
_TOKENIZERS: dict[str, Tokenizer] = {}


def tokenizer_of(kind: str) -> Tokenizer:
    if kind not in _TOKENIZERS:
        _TOKENIZERS[kind] = make_tokenizer(tiny.make_tokenizer(**KINDS[kind]))
    return _TOKENIZERS[kind]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return tokenizer_of(request.param)


def chat(*turns: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns))


def row(*turns: str, name: str = "r") -> Row:
    messages = chat(*turns)
    return Row(name, "g", messages[:-1], (Response("0", messages[-1:]),), source="f line 1")


def pair(prompt: str, chosen: str, rejected: str) -> Row:
    answers = (
        Response("c", (Message("assistant", chosen),), label="chosen"),
        Response("r", (Message("assistant", rejected),), label="rejected"),
    )
    return Row("p", "g", chat(prompt), answers, source="f line 1")


def text_row(text: str) -> Row:
    return Row("t", "g", (), (Response("0", (Message("text", text),)),), source="f line 1")


def trained(encoded: Encoded, tokenizer: Tokenizer, index: int = 0) -> str:
    response = encoded.responses[index]
    return str(tokenizer.hf.decode([i for i, on in zip(response.ids, response.mask, strict=True) if on]))


def test_the_prompt_is_the_generation_rendering_and_the_answer_ends(tokenizer: Tokenizer) -> None:
    encoded = encode(row("Why?", "Because."), tokenizer, method="completion", max_length=LONG).rows[0]
    generation = tokenizer.hf.apply_chat_template(
        [m.to_chat() for m in chat("Why?")],
        chat_template=effective_template(tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert encoded.prompt == tokenize(tokenizer, [generation])[0]
    response = encoded.responses[0]
    assert response.ids[-1] == tokenizer.end_tokens[0]
    assert all(response.mask)
    assert trained(encoded, tokenizer).strip().startswith("Because.")


def test_prompts_alone_equal_the_prompts_of_training(tokenizer: Tokenizer) -> None:
    one = encode(row("Why?", "Because."), tokenizer, method="completion", max_length=LONG).rows[0]
    other = encode(row("Why?", "Because."), tokenizer, method="prompt", max_length=LONG).rows[0]
    assert (other.prompt, other.responses) == (one.prompt, [])


def test_the_begin_token_comes_once(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_id
    for method, sample in (("completion", row("Hi", "Ho")), ("text", text_row("Some words"))):
        encoded = encode(sample, tokenizer, method=method, max_length=LONG).rows[0]  # type: ignore[arg-type]
        ids = encoded.prompt + encoded.responses[0].ids
        if bos is None:
            continue
        expected = 1 if begins_with_bos(tokenizer) or (tokenizer.template and "bos_token" in tokenizer.template) else 0
        assert ids.count(bos) == (expected if method == "completion" or begins_with_bos(tokenizer) else 0)


def test_assistant_loss_covers_every_turn_and_nothing_else(tokenizer: Tokenizer) -> None:
    sample = row("One?", "First.", "Two?", "Second.")
    encoded = encode(sample, tokenizer, method="assistant", max_length=LONG).rows[0]
    said = trained(encoded, tokenizer)
    assert "First." in said
    assert "Second." in said
    assert "Two?" not in said
    marked = [i for i, on in zip(encoded.responses[0].ids, encoded.responses[0].mask, strict=True) if on]
    assert sum(i in tokenizer.end_tokens for i in marked) == 2
    last = encode(sample, tokenizer, method="completion", max_length=LONG).rows[0]
    assert last.prompt + last.responses[0].ids == encoded.prompt + encoded.responses[0].ids


def test_loss_on_all_leaves_out_only_the_first_token(tokenizer: Tokenizer) -> None:
    encoded = encode(row("One?", "First."), tokenizer, method="all", max_length=LONG).rows[0]
    assert encoded.prompt == []
    assert encoded.responses[0].mask == [False] + [True] * (len(encoded.responses[0].ids) - 1)
    assert encode(row("One?", "First."), tokenizer, method="all", max_length=LONG).unshared == 0


def test_both_answers_share_the_prompt(tokenizer: Tokenizer) -> None:
    found = encode(pair("Q?", "Yes.", "No, never."), tokenizer, method="preference", max_length=LONG)
    assert found.unshared == 0
    assert [response.role for response in found.rows[0].responses] == ["chosen", "rejected"]
    assert "Yes." in trained(found.rows[0], tokenizer, 0)
    assert "never" in trained(found.rows[0], tokenizer, 1)


def test_documents_go_on_in_the_next_row(tokenizer: Tokenizer) -> None:
    whole = encode(text_row("word " * 50), tokenizer, method="text", max_length=LONG).rows[0].responses[0]
    assert whole.mask[0] is False
    assert whole.ids[-1] == tokenizer.hf.eos_token_id
    parts = encode(text_row("word " * 50), tokenizer, method="text", max_length=16)
    assert parts.split == 1
    assert [i for part in parts.rows for i in part.responses[0].ids] == whole.ids[
        : sum(len(p.responses[0].ids) for p in parts.rows)
    ]
    assert len(whole.ids) - sum(len(p.responses[0].ids) for p in parts.rows) <= 1
    assert len({part.row_id for part in parts.rows}) == len(parts.rows)
    assert all(not part.responses[0].mask[0] for part in parts.rows)


def test_a_template_without_a_stable_prompt_is_unshared_and_counted() -> None:
    hf = tiny.make_tokenizer()
    # Writes how many turns there are at the beginning: the prompt's rendering is no prefix of the whole.
    hf.chat_template = "{{ messages | length }}" + tiny.CHAT_TEMPLATE
    tokenizer = make_tokenizer(hf)
    found = encode(pair("Q?", "Yes.", "No."), tokenizer, method="preference", max_length=LONG)
    assert found.unshared == 1
    assert found.rows[0].prompt == []
    assert "no prefix" in found.examples[0]
    assert all(not response.mask[0] for response in found.rows[0].responses)


def test_a_template_without_an_end_gets_the_tokenizers() -> None:
    hf = tiny.make_tokenizer()
    hf.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = make_tokenizer(hf)
    encoded = encode(row("Q?", "A."), tokenizer, method="completion", max_length=LONG).rows[0]
    assert encoded.responses[0].ids[-1] == hf.eos_token_id
    assert encoded.responses[0].mask[-1]


def test_a_template_that_refuses_names_row_and_reason() -> None:
    hf = tiny.make_tokenizer()
    hf.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tiny.CHAT_TEMPLATE
    )
    messages = (Message("system", "S"), Message("user", "Q"))
    sample = Row("r", "g", messages, (Response("0", (Message("assistant", "A"),)),), source="s3://c/x.jsonl line 7")
    with pytest.raises(
        InputError, match=r"s3://c/x\.jsonl line 7.*\(system, user, assistant\): System role not supported"
    ):
        encode(sample, make_tokenizer(hf), method="completion", max_length=LONG)


def test_a_hostile_template_reaches_nothing() -> None:
    hf = tiny.make_tokenizer()
    hf.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="refuses"):
        encode(row("Q?", "A."), Tokenizer(hf, hf.chat_template, (1,)), method="completion", max_length=LONG)


def test_rows_that_lack_what_the_method_needs_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="f line 1: a chosen and a rejected answer are needed"):
        encode(row("Q?", "A."), tokenizer, method="preference", max_length=LONG)
    with pytest.raises(InputError, match="f line 1: raw text is needed"):
        encode(row("Q?", "A."), tokenizer, method="text", max_length=LONG)


def test_nothing_left_is_said_with_the_remedy(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"none of 1 rows.*leaves no room.*training\.maxLength"):
        encode(row("A long question. " * 20, "A."), tokenizer, method="completion", max_length=16)


TEXT = st.text(alphabet="aäb .\n<|>", min_size=1, max_size=40).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(kind=st.sampled_from(list(KINDS)), prompt=TEXT, chosen=TEXT, rejected=TEXT, longest=st.integers(8, 120))
def test_truncation_cuts_the_end_of_both_alike(
    kind: str, prompt: str, chosen: str, rejected: str, longest: int
) -> None:
    tokenizer = tokenizer_of(kind)
    whole = encode(pair(prompt, chosen, rejected), tokenizer, method="preference", max_length=LONG).rows[0]
    try:
        found = encode_rows(
            [pair(prompt, chosen, rejected), row("q", "a", name="short")]
            if longest > 60
            else [pair(prompt, chosen, rejected)],
            tokenizer,
            method="completion" if longest > 60 else "preference",
            max_length=longest,
        )
    except InputError:
        assert len(whole.prompt) + 1 > longest
        return
    for encoded in found.rows:
        if encoded.row_id != "p":
            continue
        assert encoded.prompt == whole.prompt
        for part, full in zip(encoded.responses, whole.responses, strict=False):
            assert part.ids == full.ids[: longest - len(whole.prompt)]
            assert part.truncated == (len(part.ids) < len(full.ids))
            assert len(part.ids) == len(part.mask)
            assert any(part.mask)


@settings(deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), turns=st.lists(TEXT, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0)
)
def test_ids_of_whole_dialogues_do_not_depend_on_the_method(kind: str, turns: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    rows: list[Any] = [
        encode(row(*turns), tokenizer, method=method, max_length=LONG).rows[0]
        for method in ("completion", "assistant", "all")
    ]  # type: ignore[arg-type]
    assert len({tuple(r.prompt + r.responses[0].ids) for r in rows}) == 1
    completion, assistant, whole = (sum(r.responses[0].mask) for r in rows)
    assert completion <= assistant <= whole


def test_batches_do_not_change_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chat")
    rows = [row(f"q {i}", f"a {i}", name=str(i)) if i % 3 else text_row(f"text {i}") for i in range(20)]
    together = encode_rows(rows, tokenizer, method="completion", max_length=64)
    monkeypatch.setattr("plumbline_trainer.data.encode.BATCH", 1)
    assert encode_rows(rows, tokenizer, method="completion", max_length=64) == together


def test_unpaired_takes_every_labelled_answer() -> None:
    tokenizer = make_tokenizer(tiny.make_tokenizer())
    both = encode(pair("Q?", "Yes.", "No."), tokenizer, method="unpaired", max_length=LONG).rows[0]
    assert [response.role for response in both.responses] == ["desirable", "undesirable"]
    single = Row("r", "g", chat("Q?"), (Response("0", (Message("assistant", "No."),), label="undesirable"),))
    alone = encode(single, tokenizer, method="unpaired", max_length=LONG).rows[0]
    assert [response.role for response in alone.responses] == ["undesirable"]
    assert alone.prompt == both.prompt
    assert alone.responses[0].ids == both.responses[1].ids
    with pytest.raises(InputError, match="a label"):
        encode(row("Q?", "A."), tokenizer, method="unpaired", max_length=LONG)
