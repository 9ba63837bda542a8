"""Python functions as rewards, and likeness to a reference by the field's libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plumbline_api.online import Reward
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.rewards.functions import find_function, open_function, source_digest
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.metrics import MetricReward, make_metric

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module, as an image would hold it; the modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(text: str, path: str = "goodness.py") -> str:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return path.removesuffix(".py").replace("/", ".")

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def answers(*texts: str) -> list[Candidate]:
    return [Candidate((Message("user", f"{n}?"),), text, 1, f"ref {n}", f"row-{n}") for n, text in enumerate(texts)]


def test_a_function_is_given_prompts_answers_and_references(write: Write) -> None:
    module = write(
        "calls = []\n"
        "def score(prompts, answers, references):\n"
        "    calls.append((prompts, answers, references))\n"
        "    return [len(a) / 2 for a in answers]\n"
    )
    reward = open_function(f"{module}:score", None)
    assert reward.score(answers("a", "bcd"), Ranks()).tolist() == [0.5, 1.5]
    prompts = [[{"role": "user", "content": "0?"}], [{"role": "user", "content": "1?"}]]
    assert sys.modules[module].calls == [(prompts, ["a", "bcd"], ["ref 0", "ref 1"])]


def test_arrays_are_taken_as_well_as_lists(write: Write) -> None:
    module = write("import numpy\ndef score(p, a, r):\n    return numpy.array([1, 2], dtype=numpy.float32)\n")
    assert open_function(f"{module}:score", None).score(answers("a", "b"), Ranks()).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0]", "gave 1 scores for 2 answers"),
        ("return 1.0", "gave float; a list of 2 numbers is needed"),
        ("return None", "gave NoneType; a list of 2 numbers is needed"),
        ("return [1.0, 'x']", "gave 'x' for answer 1 of 2; a number is needed"),
        ("return [None, 1.0]", "gave None for answer 0 of 2; a number is needed"),
        ("return [True, False]", "gave True for answer 0 of 2; a number is needed"),
        ("return [0.0, float('nan')]", "gave nan for answer 1 of 2; a finite number is needed"),
        ("return [1 / 0, 1]", "failed on 2 answers: ZeroDivisionError: division by zero. Mend the function"),
    ],
)
def test_what_a_function_says_is_looked_at(write: Write, body: str, words: str) -> None:
    module = write(f"def score(prompts, answers, references):\n    {body}\n")
    name = f"{module}:score"
    with pytest.raises(InputError) as told:
        open_function(name, None).score(answers("a", "b"), Ranks())
    assert str(told.value) == f'the reward function "{name}" {words}'


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("", "absent.module:score", "there is no module absent. Install it in the trainer image"),
        ("", "goodness.inner:score", "there is no module goodness.inner"),
        ("", "goodness:score", "score is not in it (goodness)"),
        ("score = 3", "goodness:score", "score is no function (goodness)"),
        ("import absent_library", "goodness:score", "goodness needs absent_library, which is not there"),
        ("1 / 0", "goodness:score", "goodness does not import: ZeroDivisionError: division by zero"),
        ("def score(:", "goodness:score", "goodness does not import: SyntaxError"),
    ],
)
def test_a_function_that_is_not_there_is_told_by_name(write: Write, text: str, name: str, words: str) -> None:
    write(text)
    with pytest.raises(InputError) as told:
        find_function(name)
    assert str(told.value).startswith(f'reward function "{name}": ')
    assert words in str(told.value)


def test_the_digest_follows_the_source_of_the_package_and_nothing_else(write: Write, tmp_path: Path) -> None:
    write("", "rewarding_kit/__init__.py")
    write(
        "from rewarding_kit.words import count\ndef score(p, a, r):\n    return [count(x) for x in a]\n",
        "rewarding_kit/main.py",
    )
    write("def count(text):\n    return len(text)\n", "rewarding_kit/words.py")
    name = "rewarding_kit.main:score"
    first = source_digest(name)
    write("x = 1\n", "other.py")
    (tmp_path / "rewarding_kit/notes.txt").write_text("not source")
    assert source_digest(name) == first
    write("def count(text):\n    return len(text.split())\n", "rewarding_kit/words.py")
    assert source_digest(name) != first
    with pytest.raises(InputError, match="changed after preflight pinned it") as told:
        open_function(name, first)
    assert told.value.reason == "InputChanged"


def test_a_single_module_is_identified_by_its_file(write: Write) -> None:
    module = write("def score(p, a, r):\n    return [0.0] * len(a)\n")
    first = source_digest(f"{module}:score")
    write("x = 1\n", "neighbour.py")
    assert source_digest(f"{module}:score") == first
    assert open_function(f"{module}:score", first).score(answers("a"), Ranks()).tolist() == [0.0]


@pytest.mark.parametrize("name", ["builtins:len", "sys:exit"])
def test_what_has_no_source_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="has no source file"):
        source_digest(name)


def metric(name: str, answer: str, reference: str | None) -> float:
    reward = MetricReward(Reward.model_validate({"metric": name}), "rewards[2]")
    return float(reward.score([Candidate((), answer, 1, reference, "row-7")], Ranks())[0])


PAIRS = [
    ("the plumb line hangs straight down", "the plumb line hangs straight down"),
    ("the line hangs down", "the plumb line hangs straight down"),
    ("a wall leans to one side", "the wall stands true, and it does not lean"),
    ("down down down", "up"),
    ("", "something"),
]


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_bleu_is_sacrebleus(answer: str, reference: str) -> None:
    from sacrebleu import sentence_bleu

    wanted = sentence_bleu(answer, [reference], use_effective_order=True).score / 100
    assert metric("bleu", answer, reference) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_rouge_is_the_librarys(name: str, answer: str, reference: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    wanted = RougeScorer([name]).score(reference, answer)[name].fmeasure
    assert metric(name, answer, reference) == pytest.approx(wanted, abs=1e-6)


def test_metrics_by_hand() -> None:
    """Four of four words are among the reference's six: precision 1, recall 2/3, F 4/5."""
    answer, reference = PAIRS[1]
    assert metric("rouge1", answer, reference) == pytest.approx(0.8)
    assert metric("rougeL", answer, reference) == pytest.approx(0.8)
    assert metric("rouge2", answer, reference) == pytest.approx(2 * 1 / 3 * 1 / 5 / (1 / 3 + 1 / 5))
    assert metric("bleu", reference, reference) == pytest.approx(1.0)


def test_rouge_reads_every_script() -> None:
    assert make_metric("rouge1")("отвес висит прямо", "отвес висит") == pytest.approx(0.8)
    assert make_metric("rougeL")("墙是直的", "墙是直的") == 1.0


@pytest.mark.parametrize("name", ["bleu", "rouge1", "rouge2", "rougeL"])
def test_metrics_need_a_reference(name: str) -> None:
    with pytest.raises(InputError, match=r"rewards\[2\]: compares with .* row row-7 has none"):
        metric(name, "x", None)
