"""The S3 server of the test bed keeps the promises that the commit protocol needs."""

import hashlib
from base64 import b64encode
from dataclasses import replace

import pytest
from botocore.exceptions import ClientError
from cluster.objectstore import ObjectStore

pytestmark = pytest.mark.component


def code_of(error: pytest.ExceptionInfo[ClientError]) -> int:
    return int(error.value.response["ResponseMetadata"]["HTTPStatusCode"])


def test_only_the_first_conditional_write_wins(object_store: ObjectStore) -> None:
    client = object_store.client()
    client.put_object(Bucket=object_store.bucket, Key="race/manifest.json", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=object_store.bucket, Key="race/manifest.json", Body=b"second", IfNoneMatch="*")
    assert code_of(refused) == 412
    body = client.get_object(Bucket=object_store.bucket, Key="race/manifest.json")["Body"].read()
    assert body == b"first"


def test_a_wrong_checksum_is_refused(object_store: ObjectStore) -> None:
    wrong = b64encode(hashlib.sha256(b"other").digest()).decode()
    with pytest.raises(ClientError) as refused:
        object_store.client().put_object(
            Bucket=object_store.bucket, Key="damaged", Body=b"content", ChecksumSHA256=wrong
        )
    assert code_of(refused) == 400


def test_wrong_keys_are_refused(object_store: ObjectStore) -> None:
    stranger = replace(object_store, secret_key="0" * 40)
    with pytest.raises(ClientError) as refused:
        stranger.client().list_objects_v2(Bucket=object_store.bucket)
    assert code_of(refused) == 403
