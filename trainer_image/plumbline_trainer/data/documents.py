"""Row v1 as JSON, for files that a stage writes about what it has sampled."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from plumbline_trainer.data.rows import Message, Response, Row


def rows_to_lines(rows: Iterable[Row]) -> str:
    """JSON Lines, a row each."""
    return "".join(json.dumps(row_to_document(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def row_to_document(row: Row) -> dict[str, Any]:
    """A row; what it does not have is left out."""
    return {
        "id": row.id,
        "group": row.group,
        "prompt": [message.to_chat() for message in row.prompt],
        "responses": [_response_to_document(response) for response in row.responses],
        "weight": row.weight,
        "source": row.source,
    }


def row_from_document(document: dict[str, Any]) -> Row:
    """The row that a document was made of."""
    return Row(
        id=document["id"],
        group=document["group"],
        prompt=_messages(document["prompt"]),
        responses=tuple(_response(item) for item in document["responses"]),
        weight=document["weight"],
        source=document["source"],
    )


def _response_to_document(response: Response) -> dict[str, Any]:
    known = {
        "id": response.id,
        "messages": [message.to_chat() for message in response.messages],
        "score": response.score,
        "rank": response.rank,
        "label": response.label,
        "annotations": response.annotations or None,
        "policyDigest": response.policy_digest,
        "sampling": response.sampling or None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _response(document: dict[str, Any]) -> Response:
    return Response(
        id=document["id"],
        messages=_messages(document["messages"]),
        score=document.get("score"),
        rank=document.get("rank"),
        label=document.get("label"),
        annotations=document.get("annotations", {}),
        policy_digest=document.get("policyDigest"),
        sampling=document.get("sampling", {}),
    )


def _messages(items: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(item["role"], item["content"]) for item in items)
