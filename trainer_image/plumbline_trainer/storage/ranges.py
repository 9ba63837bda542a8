"""Objects of S3 read in parallel ranges and hashed in order meanwhile, so that verifying costs no second pass."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as BotoConnectionError

RANGE = 8 * 1024 * 1024
AHEAD = 8
"""Ranges under way or waiting to be hashed: with 8 MiB each, the most memory that one object takes."""
ATTEMPTS = 4
BROKEN_STREAMS = (HTTPClientError, BotoConnectionError, ConnectionError, TimeoutError)
_CONTENT_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")


def read_hashed(
    client: Any, bucket: str, key: str, sink: Callable[[int, bytes], object] | None = None
) -> tuple[str, int]:
    """Read an object; SHA-256 and size.

    Args:
        client: of boto3.
        bucket: of the object.
        key: of the object.
        sink: called with offset and bytes of each range, from several threads; None to hash only.

    Raises:
        ClientError: among others with code PreconditionFailed, if the object is replaced meanwhile.
    """
    first, size, etag = _first(client, bucket, key)
    digest = hashlib.sha256()

    def fetch(offset: int) -> bytes:
        data = first if offset == 0 else read_range(client, bucket, key, offset, min(RANGE, size - offset), etag)
        if sink is not None:
            sink(offset, data)
        return data

    if size <= len(first):
        digest.update(fetch(0))
        return digest.hexdigest(), size
    with ThreadPoolExecutor(AHEAD) as pool:
        for data in _in_order(pool, fetch, range(0, size, RANGE)):
            digest.update(data)
    return digest.hexdigest(), size


def _in_order(pool: ThreadPoolExecutor, fetch: Callable[[int], bytes], offsets: range) -> Iterator[bytes]:
    waiting: deque[Future[bytes]] = deque()
    try:
        for offset in offsets:
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
            waiting.append(pool.submit(fetch, offset))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _first(client: Any, bucket: str, key: str) -> tuple[bytes, int, str]:
    """The first range, and what its answer says of the whole: a small object takes one request."""
    for attempt in range(ATTEMPTS):
        try:
            try:
                found = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{RANGE - 1}")
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") not in ("InvalidRange", "416"):
                    raise
                found = client.get_object(Bucket=bucket, Key=key)  # an empty object has no range
            data: bytes = found["Body"].read()
        except BROKEN_STREAMS:
            if attempt + 1 == ATTEMPTS:
                raise
            continue
        told = _CONTENT_RANGE.fullmatch(found.get("ContentRange", ""))
        return data, int(told[1]) if told else len(data), str(found.get("ETag", ""))
    raise AssertionError


def read_range(client: Any, bucket: str, key: str, offset: int, length: int, etag: str = "") -> bytes:
    """Read one range, which must be within the object.

    Raises:
        ClientError: among others with code PreconditionFailed, if an ETag is given and the object has another.
    """
    same = {"IfMatch": etag} if etag else {}
    for attempt in range(ATTEMPTS):
        try:
            found = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{offset + length - 1}", **same)
            data: bytes = found["Body"].read()
            if len(data) == length:
                return data
            fault: Exception = ConnectionError(f"{len(data)} bytes of {length} came")
        except BROKEN_STREAMS as error:
            fault = error
        if attempt + 1 == ATTEMPTS:
            raise fault
    raise AssertionError
