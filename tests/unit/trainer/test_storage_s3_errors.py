"""What S3 answers, in the words and classes of the trainer; over a scripted server, because moto denies nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage.objects import ObjectStore


class Script(BaseHTTPRequestHandler):
    """Answers every request with the next reply; the last one stays."""

    protocol_version = "HTTP/1.1"
    replies: ClassVar[list[tuple[int, str]]] = []
    seen: ClassVar[list[str]] = []

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).seen.append(f"{self.command} {self.headers.get('If-None-Match')}")
        status, code = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        body = b"" if not code else f"<Error><Code>{code}</Code><Message>said {code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setattr("plumbline_trainer.storage.s3.MAX_ATTEMPTS", 1)
    monkeypatch.setattr("plumbline_trainer.storage.s3.CONFLICT_SECONDS", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Script.seen.clear()
    yield ObjectStore(endpoint=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_denied_names_bucket_endpoint_keys_and_remedy(scripted: ObjectStore, code: str) -> None:
    Script.replies[:] = [(403, code)]
    with pytest.raises(InputError) as caught:
        scripted.get_bytes("s3://corpus/a.jsonl")
    text = str(caught.value)
    assert caught.value.reason == "StorageDenied"
    for part in ("s3://corpus/a.jsonl", "bucket corpus", "127.0.0.1", code, "AWS_ACCESS_KEY_ID", "storage.secretName"):
        assert part in text


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")])
def test_a_busy_server_is_transient(scripted: ObjectStore, status: int, code: str) -> None:
    Script.replies[:] = [(status, code)]
    with pytest.raises(TransientError, match=code) as caught:
        scripted.put_bytes("s3://corpus/a", b"x")
    assert caught.value.reason == "StorageUnavailable"


def test_a_server_that_is_not_there_is_named_with_what_to_look_at(scripted: ObjectStore) -> None:
    del scripted
    with pytest.raises(TransientError) as caught:
        ObjectStore(endpoint="http://127.0.0.1:9").get_bytes("s3://corpus/a.jsonl")
    assert caught.value.reason == "StorageUnavailable"
    text = str(caught.value)
    for part in ("s3://corpus/a.jsonl", "bucket corpus at http://127.0.0.1:9 does not answer", "storage.endpoint"):
        assert part in text


def test_a_conflict_is_retried_until_it_is_settled(scripted: ObjectStore) -> None:
    Script.replies[:] = [(409, "ConditionalRequestConflict"), (409, "ConditionalRequestConflict"), (200, "")]
    assert scripted.put_bytes("s3://corpus/m", b"x", if_absent=True)
    assert Script.seen == ["PUT *"] * 3


def test_a_conflict_that_stays_is_transient(scripted: ObjectStore) -> None:
    Script.replies[:] = [(409, "ConditionalRequestConflict")]
    with pytest.raises(TransientError):
        scripted.put_bytes("s3://corpus/m", b"x", if_absent=True)


def test_another_region_names_the_field(scripted: ObjectStore) -> None:
    Script.replies[:] = [(400, "AuthorizationHeaderMalformed")]
    with pytest.raises(InputError, match=r"storage\.region"):
        scripted.put_bytes("s3://corpus/m", b"x")
