"""The object store, the same promises over files and over S3 (moto's server)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage import ranges, uris
from plumbline_trainer.storage.objects import ObjectStore

MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ObjectStore, str]:
    if request.param == "file":
        return ObjectStore(), f"file://{tmp_path}/store"
    endpoint = request.getfixturevalue("s3_endpoint")
    request.getfixturevalue("credentials")
    bucket = "bucket-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:16]
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=bucket)
    return ObjectStore(endpoint=endpoint), f"s3://{bucket}/some/prefix"


def test_a_file_comes_back_with_its_digest(place: tuple[ObjectStore, str], tmp_path: Path) -> None:
    store, root = place
    source = tmp_path / "source"
    source.write_bytes(os.urandom(40 * MEBIBYTE + 17))  # above the multipart threshold
    expected = hashlib.sha256(source.read_bytes()).hexdigest()
    assert store.put_file(f"{root}/a/b.bin", source) == expected
    target = tmp_path / "out" / "b.bin"
    assert store.get_file(f"{root}/a/b.bin", target) == expected
    assert target.read_bytes() == source.read_bytes()
    assert store.hash(f"{root}/a/b.bin") == (expected, source.stat().st_size)
    assert [path.name for path in target.parent.iterdir()] == ["b.bin"]


def test_only_the_first_of_many_conditional_writers_wins(place: tuple[ObjectStore, str]) -> None:
    store, root = place
    uri = f"{root}/manifest.json"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.put_bytes(uri, b"writer %d" % i, if_absent=True), range(8)))
    assert won.count(True) == 1
    assert store.get_bytes(uri) == b"writer %d" % won.index(True)
    assert store.put_bytes(uri, b"anyway")
    assert store.get_bytes(uri) == b"anyway"


def test_a_repeated_conditional_write_of_the_same_bytes_is_not_lost_on_s3(s3_endpoint: str, credentials: None) -> None:
    """After a lost answer botocore sends the request again, and meets its own object."""
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="repeat")
    store = ObjectStore(endpoint=s3_endpoint)
    assert store.put_bytes("s3://repeat/m", b"mine", if_absent=True)
    assert store.put_bytes("s3://repeat/m", b"mine", if_absent=True)
    assert not store.put_bytes("s3://repeat/m", b"other", if_absent=True)


def test_listing_stat_glob_and_delete(place: tuple[ObjectStore, str]) -> None:
    store, root = place
    for name in ("a.jsonl", "b.jsonl", "c.txt", "deep/d.jsonl"):
        store.put_bytes(f"{root}/data/{name}", name.encode())
    store.put_bytes(f"{root}/database/x", b"")  # shares the prefix as text, not as a folder
    assert [info.uri.removeprefix(root) for info in store.list(f"{root}/data")] == [
        "/data/a.jsonl",
        "/data/b.jsonl",
        "/data/c.txt",
        "/data/deep/d.jsonl",
    ]
    assert [info.uri[-7:] for info in store.glob(f"{root}/data/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert len(store.glob(f"{root}/data/**/*.jsonl")) == 3
    assert len(store.glob(f"{root}/data/[ab].jsonl")) == 2
    found = store.stat(f"{root}/data/a.jsonl")
    assert found is not None
    assert (found.size, store.exists(f"{root}/data/zz")) == (7, False)
    assert store.stat(f"{root}/data") is None
    store.delete_prefix(f"{root}/data")
    assert store.list(f"{root}/data") == []
    assert store.exists(f"{root}/database/x")
    with pytest.raises(FileNotFoundError):
        store.get_bytes(f"{root}/data/a.jsonl")


def test_the_etag_changes_with_the_content(place: tuple[ObjectStore, str]) -> None:
    store, root = place
    store.put_bytes(f"{root}/x", b"one")
    before = store.stat(f"{root}/x")
    store.put_bytes(f"{root}/x", b"two")
    after = store.stat(f"{root}/x")
    assert before is not None
    assert after is not None
    assert before.etag != after.etag


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "",
        "a//b",
        "./a",
        "a/./b",
        "a\0b",
        "a\nb",
        "a\\b",
        "%2e%2e/x",
        "a/%2E%2e/x",
        "a/%00",
    ],
)
def test_paths_stay_below_their_root(path: str) -> None:
    with pytest.raises(InputError):
        uris.join("s3://bucket/prefix", path)


@pytest.mark.parametrize(
    "uri", ["s3://bucket/../other", "file:///a/../../b", "pvc://claim/../x", "s3://b/a\0", "ftp://x/y"]
)
def test_locations_with_tricks_are_refused(uri: str) -> None:
    with pytest.raises(InputError):
        uris.parse(uri)


def test_a_claim_is_its_mount() -> None:
    assert uris.parse("pvc://corpus/a/b.jsonl").key == "/mnt/claims/corpus/a/b.jsonl"


def test_a_missing_bucket_says_who_acts(s3_endpoint: str, credentials: None) -> None:
    with pytest.raises(InputError, match=r"no bucket nowhere at http.*storage\.endpoint") as caught:
        ObjectStore(endpoint=s3_endpoint).put_bytes("s3://nowhere/x", b"")
    assert caught.value.reason == "StorageMissing"


def test_no_credentials_says_who_acts(s3_endpoint: str, credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(InputError, match=r"storage\.secretName.*AWS_ACCESS_KEY_ID") as caught:
        ObjectStore(endpoint=s3_endpoint).get_bytes("s3://bucket/x")
    assert caught.value.reason == "StorageDenied"


def test_a_server_that_is_not_there_is_transient(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = ObjectStore(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("plumbline_trainer.storage.s3.MAX_ATTEMPTS", 1)
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:9") as caught:
        store.get_bytes("s3://bucket/x")
    assert caught.value.reason == "StorageUnavailable"


def test_a_folder_that_may_not_be_written_says_who_acts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError) as caught:
        ObjectStore().put_bytes(f"file://{tmp_path}/file/x", b"")
    assert caught.value.reason == "StorageDenied"


def test_an_object_replaced_while_it_is_read_is_never_a_mixture(
    s3_endpoint: str, credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="replaced")
    monkeypatch.setattr("plumbline_trainer.storage.ranges.RANGE", 1024)
    client.put_object(Bucket="replaced", Key="x", Body=b"a" * 5000)
    store, original = ObjectStore(endpoint=s3_endpoint), ranges.read_range

    def replace_first(*arguments: Any) -> bytes:
        client.put_object(Bucket="replaced", Key="x", Body=b"b" * 5000)
        return original(*arguments)

    monkeypatch.setattr("plumbline_trainer.storage.ranges.read_range", replace_first)
    with pytest.raises(TransientError, match=r"PreconditionFailed|412"):
        store.get_file("s3://replaced/x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 50_000])
def test_ranges_of_every_size_come_back_whole(
    s3_endpoint: str, credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="sizes")
    monkeypatch.setattr("plumbline_trainer.storage.ranges.RANGE", 1024)
    content = os.urandom(size)
    client.put_object(Bucket="sizes", Key="x", Body=content)
    store, digest = ObjectStore(endpoint=s3_endpoint), hashlib.sha256(content).hexdigest()
    assert store.get_file("s3://sizes/x", tmp_path / "x") == digest
    assert (tmp_path / "x").read_bytes() == content
    assert store.hash("s3://sizes/x") == (digest, size)


def test_parts_of_uploads_that_nobody_completed_are_dropped(s3_endpoint: str, credentials: None) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="orphans")
    for key in ("run/checkpoints/1-a/x", "other/x"):
        upload = client.create_multipart_upload(Bucket="orphans", Key=key)["UploadId"]
        client.upload_part(Bucket="orphans", Key=key, UploadId=upload, PartNumber=1, Body=b"x")
    ObjectStore(endpoint=s3_endpoint).abort_uploads("s3://orphans/run/checkpoints")
    left = client.list_multipart_uploads(Bucket="orphans")["Uploads"]
    assert [item["Key"] for item in left] == ["other/x"]
