"""Judges: what counts as a word and a sentence, both orders, position bias."""

from __future__ import annotations

import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_api.evaluation import ModelJudge, RuleJudge
from plumbline_trainer.evaluation import judges
from plumbline_trainer.evaluation.judges import Question
from plumbline_trainer.models.tokenizer import make_tokenizer
from support import tiny


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("  \n ", 0),
        ("...", 0),
        ("Paris.", 1),
        ("Paris", 1),
        ("It is 3.5 metres long.", 1),
        ("Use a level, e.g. a spirit level, or a cord.", 1),
        ("Ask Dr. Smith. He knows!", 2),
        ("Really?! Yes…", 2),
        ('He said "Stop." Then he left.', 2),
        ("1. Bananas\n2. Oranges\n3. Grapes", 3),
        ("One line\nand another", 2),
        ("Water boils at 100 °C (212 °F).", 1),
    ],
)
def test_sentences_are_counted_as_people_count_them(text, count):
    assert judges.count_sentences(text) == count


def test_words_hold_a_letter_or_a_digit():
    assert judges.count_words("- Well , that's 3 – or 4 !") == 5


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (RuleJudge(max_words=3), "Put it down.", "Put it down right now."),
        (RuleJudge(max_sentences=1), "Put it down.", "Put it down. Now."),
        (RuleJudge(matches=r"(?i)\bplease\b"), "Please stop.", "Stop."),
    ],
)
def test_rules_decide_and_tie(rule, good, bad):
    questions = [
        Question("1", "?", good, bad),
        Question("2", "?", bad, good),
        Question("3", "?", good, good),
        Question("4", "?", bad, bad),
    ]
    verdicts = judges.judge_by_rule(rule, questions)
    assert [v.outcome for v in verdicts] == [1.0, 0.0, 0.5, 0.5]
    assert [v.reason for v in verdicts] == ["policy", "baseline", "both", "neither"]


def test_an_empty_answer_fulfils_no_length_rule():
    for rule in (RuleJudge(max_words=3), RuleJudge(max_sentences=1)):
        assert not judges.make_rule(rule)("")


def test_a_bad_expression_is_the_users_mistake():
    with pytest.raises(InputError, match=r"judge.rule.matches: \"\(\" is not a regular expression"):
        judges.make_rule(RuleJudge(matches="("))


def model_verdicts(prefers, questions, max_length=4096):
    """Verdicts with a judge that is a function of the two answers it is shown."""
    tokenizer = make_tokenizer(tiny.make_tokenizer())

    def score(rows):
        scores = []
        for row in rows:
            text = tokenizer.hf.decode(row.prompt)
            first = text.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
            second = text.split("[Answer B]\n")[1].split("\n\nReply")[0]
            letters = [tokenizer.hf.decode(response.ids) for response in row.responses]
            assert letters == ["A", "B"]
            scores.append([torch.tensor([value]) for value in prefers(first, second)])
        return scores

    judge = ModelJudge(source="file:///judge")
    return judges.judge_by_model(judge, tokenizer, score, questions, max_length=max_length)


QUESTIONS = [Question("1", "Why?", "short", "a longer one"), Question("2", "How?", "the long way", "so")]


def test_a_fair_judge_is_not_moved_by_the_order():
    verdicts = model_verdicts(lambda a, b: (float(len(a)), float(len(b))), QUESTIONS)
    assert [v.outcome for v in verdicts] == [0.0, 1.0]
    assert [v.first_preferred for v in verdicts] == [0.5, 0.5]


def test_a_judge_that_always_takes_the_first_gives_ties_and_shows_its_bias():
    verdicts = model_verdicts(lambda a, b: (1.0, 0.0), QUESTIONS)
    assert [v.outcome for v in verdicts] == [0.5, 0.5]
    assert [v.first_preferred for v in verdicts] == [1.0, 1.0]
    assert verdicts[0].reason == "orders disagree"


def test_an_undecided_judge_ties():
    assert [v.outcome for v in model_verdicts(lambda a, b: (0.0, 0.0), QUESTIONS)] == [0.5, 0.5]


def test_a_question_that_does_not_fit_the_judge_is_refused():
    with pytest.raises(InputError, match="takes 64 tokens"):
        model_verdicts(lambda a, b: (0.0, 0.0), QUESTIONS, max_length=64)
