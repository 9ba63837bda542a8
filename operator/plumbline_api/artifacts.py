"""Artifact kinds and dataset formats: what stages take and yield."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal


class ArtifactKind(StrEnum):
    """What an output in storage is, and so what may take it as an input."""

    POLICY = "policy"
    REWARD_MODEL = "rewardModel"
    DATASET = "dataset"
    REPORT = "report"


DatasetFormat = Literal[
    "auto",
    "text",
    "instruction",
    "contextResponse",
    "dialogue",
    "messages",
    "promptCompletion",
    "preference",
    "unpaired",
    "ranked",
    "prompt",
]
"""How the rows of a dataset are written. `auto` is `dataset<unknown>` until preflight has read it.

- text: `{text}`, or a plain text file (paragraphs separated by blank lines)
- instruction: `{instruction, input?, output}`
- contextResponse: `{context, response}`
- dialogue: `{dialogue}` or `{text}` with `USER:` / `ASSISTANT:` turns
- messages: `{messages: [{role, content}]}`
- promptCompletion: `{prompt, completion}`, each text or messages
- preference: `{prompt, chosen, rejected, margin?}`, each text or messages; without `prompt` the common beginning is the prompt
- ranked: `{prompt, completions}`, best first, or each `{text, rank}` or `{text, score}`; as pairs: the best against the worst
- prompt: `{prompt}` alone, text or messages, to be answered
- unpaired: `{prompt, completion, label}`; the label says whether the completion is desirable: true or false, or 1 or 0
"""

DATASET_FORMATS: tuple[str, ...] = DatasetFormat.__args__  # type: ignore[attr-defined]

SUPERVISED_FORMATS = frozenset({"instruction", "contextResponse", "dialogue", "messages", "promptCompletion"})
"""Formats with a prompt and an answer to imitate."""
TEXT_FORMATS = frozenset({"text"})
PREFERENCE_FORMATS = frozenset({"preference", "ranked"})
"""Formats with a chosen and a rejected answer; of ranked rows, the best and the worst."""
RANKING_FORMATS = PREFERENCE_FORMATS
"""Formats that put the answers to one prompt in an order."""
UNPAIRED_FORMATS = frozenset({"unpaired"}) | PREFERENCE_FORMATS
"""Formats that say of an answer whether it is desirable; of a pair, the chosen one is and the rejected one is not."""
PROMPT_FORMATS = SUPERVISED_FORMATS | PREFERENCE_FORMATS | {"unpaired", "prompt"}
"""Formats with a prompt that a policy can answer; the answer of a row, where it has one, is there to compare with."""
REFERENCE_FORMATS = SUPERVISED_FORMATS | PREFERENCE_FORMATS
"""Formats whose rows hold an answer to compare with; that of an unpaired row may be an undesirable one."""
LIKELIHOOD_FORMATS = SUPERVISED_FORMATS | TEXT_FORMATS | PREFERENCE_FORMATS
"""Formats with tokens whose likelihood can be measured; of preference and ranked rows, the chosen or best answer."""

FORMAT_DESCRIPTIONS: dict[str, str] = {
    "text": "raw text",
    "instruction": "instruction rows (instruction, input, output)",
    "contextResponse": "instruction rows (context, response)",
    "dialogue": "dialogues (USER: … ASSISTANT: …)",
    "messages": "chats (messages with role and content)",
    "promptCompletion": "instruction rows (prompt, completion)",
    "preference": "preference rows (prompt, chosen, rejected)",
    "unpaired": "unpaired rows (prompt, completion, label)",
    "ranked": "ranked rows (prompt, completions)",
    "prompt": "prompts without answers (prompt)",
    "auto": "rows of a format that preflight detects",
}

_COMMON_FIELDS = ("weight",)
FORMAT_FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text", *_COMMON_FIELDS),
    "instruction": ("instruction", "output", "input", *_COMMON_FIELDS),
    "contextResponse": ("context", "response", *_COMMON_FIELDS),
    "dialogue": ("dialogue", "text", *_COMMON_FIELDS),
    "messages": ("messages", *_COMMON_FIELDS),
    "promptCompletion": ("prompt", "completion", *_COMMON_FIELDS),
    "preference": ("chosen", "rejected", "prompt", "margin", *_COMMON_FIELDS),
    "unpaired": ("prompt", "completion", "label", *_COMMON_FIELDS),
    "ranked": ("prompt", "completions", *_COMMON_FIELDS),
    "prompt": ("prompt", *_COMMON_FIELDS),
}
"""Fields of a format's rows, for which `columns` may name other columns."""
