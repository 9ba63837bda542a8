"""Objects in S3 and what speaks its protocol, through boto3."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage.files import file_digest, replaced
from plumbline_trainer.storage.ranges import read_hashed, read_range
from plumbline_trainer.storage.uris import Location

CREDENTIAL_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN)"
DENIED = frozenset(
    [
        "AccessDenied",
        "AllAccessDisabled",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "ExpiredToken",
        "TokenRefreshRequired",
        "AccountProblem",
        "UnauthorizedAccess",
        "Forbidden",
        "403",
        "401",
        "InvalidSecurity",
        "RequestTimeTooSkewed",
    ]
)
UNKNOWN_USER = frozenset({"XAdminUserNotFound"})
"""versitygw answers a key that it does not know with 404."""
MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
CONFLICT_ATTEMPTS = 8
CONFLICT_SECONDS = 0.1
"""First wait before a conditional write that met another one under way is sent again; doubled each time."""
MAX_ATTEMPTS = 6
TRANSFER = TransferConfig(
    multipart_threshold=32 * 1024 * 1024, multipart_chunksize=16 * 1024 * 1024, max_concurrency=8, use_threads=True
)


class S3Backend:
    """Objects of the scheme s3://."""

    def __init__(self, *, endpoint: str | None, region: str | None) -> None:
        self.endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        config = Config(
            retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=40,
            # What is read is compared with a SHA-256 of ours.
            response_checksum_validation="when_required",
            s3={
                # Bodies carry a checksum in a signed header; hashing them once more for the signature adds nothing.
                "payload_signing_enabled": False,
                # Servers of our own seldom have a wildcard certificate for bucket names as host names.
                **({"addressing_style": "path"} if self.endpoint else {}),
            },
        )
        self._confirmed: set[str] = set()
        session = boto3.session.Session()
        self._client: Any = session.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=region or session.region_name or "us-east-1",
            config=config,
        )

    def put_file(self, place: Location, path: Path) -> str:
        """Upload; the server compares a checksum of what arrives.

        Small files carry their SHA-256. Large ones go in parallel parts with a CRC each, while the SHA-256 of the
        whole, which readers compare, is computed beside them: S3 knows no SHA-256 of an object in parts.
        """
        with self._explained(place, f"writing {_shown(place)}"):
            if path.stat().st_size < TRANSFER.multipart_threshold:
                data = path.read_bytes()
                self._put(place, data)
                return hashlib.sha256(data).hexdigest()
            with ThreadPoolExecutor(1) as pool:
                whole = pool.submit(file_digest, path)
                self._client.upload_file(
                    str(path), place.bucket, place.key, ExtraArgs=self._checksum("CRC32"), Config=TRANSFER
                )
                return whole.result()

    def put_bytes(self, place: Location, data: bytes, *, if_absent: bool) -> bool:
        """Write one object; with `if_absent` under If-None-Match: *."""
        extra = {"IfNoneMatch": "*"} if if_absent else {}
        with self._explained(place, f"writing {_shown(place)}"):
            for attempt in range(CONFLICT_ATTEMPTS):
                try:
                    self._put(place, data, **extra)
                except ClientError as error:
                    code = _code(error)
                    if if_absent and code in ("PreconditionFailed", "412"):
                        # A request that was repeated after a lost answer meets its own object.
                        return bool(self._client.get_object(Bucket=place.bucket, Key=place.key)["Body"].read() == data)
                    if (
                        code in ("ConditionalRequestConflict", "OperationAborted", "409")
                        and attempt + 1 < CONFLICT_ATTEMPTS
                    ):
                        time.sleep(random.uniform(0, CONFLICT_SECONDS * 2**attempt))
                        continue
                    raise
                return True
        raise AssertionError

    def _put(self, place: Location, data: bytes, **extra: str) -> None:
        self._client.put_object(Bucket=place.bucket, Key=place.key, Body=data, **self._checksum("SHA256"), **extra)

    def _checksum(self, algorithm: str) -> dict[str, str]:
        """None for servers that do not know the headers: AWS_REQUEST_CHECKSUM_CALCULATION=when_required says so."""
        wanted = self._client.meta.config.request_checksum_calculation != "when_required"
        return {"ChecksumAlgorithm": algorithm} if wanted else {}

    def get_file(self, place: Location, path: Path) -> str:
        """Download in parallel ranges, hashed meanwhile."""
        with self._explained(place, f"reading {_shown(place)}"), replaced(path) as partial:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                digest, _ = read_hashed(
                    self._client, place.bucket, place.key, lambda offset, data: _write_at(descriptor, data, offset)
                )
            finally:
                os.close(descriptor)
        return digest

    def get_bytes(self, place: Location) -> bytes:
        """Read one object."""
        with self._explained(place, f"reading {_shown(place)}"):
            data: bytes = self._client.get_object(Bucket=place.bucket, Key=place.key)["Body"].read()
            return data

    def get_range(self, place: Location, offset: int, length: int) -> bytes:
        """Read a part of an object."""
        with self._explained(place, f"reading {_shown(place)}"):
            return read_range(self._client, place.bucket, place.key, offset, length)

    def hash(self, place: Location) -> tuple[str, int]:
        """Stream an object through SHA-256."""
        with self._explained(place, f"reading {_shown(place)}"):
            return read_hashed(self._client, place.bucket, place.key)

    def head(self, place: Location) -> tuple[int, str, str] | None:
        """Size, ETag (with the version, where the bucket keeps versions) and time."""
        try:
            with self._explained(place, f"looking for {_shown(place)}"):
                found = self._client.head_object(Bucket=place.bucket, Key=place.key)
        except FileNotFoundError:
            self._confirm(place)
            return None
        version = found.get("VersionId")
        etag = found.get("ETag", "").strip('"') + (f"@{version}" if version and version != "null" else "")
        return found["ContentLength"], etag, found["LastModified"].isoformat()

    def _confirm(self, place: Location) -> None:
        """An answer to HEAD has no body: an unknown bucket or user looks like a missing object. Ask once."""
        if place.bucket not in self._confirmed:
            with self._explained(place, f"looking for {_shown(place)}"):
                self._client.list_objects_v2(Bucket=place.bucket, Prefix=place.key, MaxKeys=1)
            self._confirmed.add(place.bucket)

    def entries(self, place: Location) -> Iterator[tuple[str, int, str, str]]:
        """Objects below a prefix that ends at a `/`."""
        prefix = f"{place.key}/" if place.key else ""
        with self._explained(place, f"listing {_shown(place)}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=place.bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):
                        when = item["LastModified"].isoformat()
                        yield item["Key"].removeprefix(prefix), item["Size"], item.get("ETag", "").strip('"'), when

    def delete(self, places: Sequence[Location]) -> None:
        """Delete objects, a thousand at a time."""
        for start in range(0, len(places), 1000):
            some = places[start : start + 1000]
            with self._explained(some[0], f"deleting {_shown(some[0])}"):
                reply = self._client.delete_objects(
                    Bucket=some[0].bucket, Delete={"Objects": [{"Key": p.key} for p in some], "Quiet": True}
                )
            if errors := reply.get("Errors"):
                raise TransientError(
                    f"deleting {_shown(some[0])}: {errors[0].get('Message')}", reason="StorageUnavailable"
                )

    def abort_uploads(self, place: Location) -> None:
        """Drop the parts of uploads that nobody completed."""
        prefix = f"{place.key}/" if place.key else ""
        with self._explained(place, f"clearing {_shown(place)}"):
            for page in self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=place.bucket, Prefix=prefix
            ):
                for item in page.get("Uploads", ()):
                    self._client.abort_multipart_upload(Bucket=place.bucket, Key=item["Key"], UploadId=item["UploadId"])

    @contextmanager
    def _explained(self, place: Location, doing: str) -> Iterator[None]:
        """Turn what S3 says into what a person should do, or into an attempt that is repeated."""
        where = f"bucket {place.bucket} at {self.endpoint or 'AWS'}"
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise InputError(
                f"{doing}: no S3 credentials for {where}. Set storage.secretName to a Secret with the keys "
                f"{CREDENTIAL_KEYS}, or give the service account access; locally set them in the environment",
                reason="StorageDenied",
            ) from error
        except ParamValidationError as error:
            raise InputError(f"{doing}: {error}") from error
        except ClientError as error:
            raise self._translated(error, doing, where) from error
        except S3UploadFailedError as error:
            cause = error.__context__
            if isinstance(cause, ClientError):
                raise self._translated(cause, doing, where) from error
            raise TransientError(f"{doing} at {where}: {error}", reason="StorageUnavailable") from error
        except EndpointConnectionError as error:
            raise TransientError(
                f"{doing}: {where} does not answer. See whether the server runs, and whether its address is right "
                "(storage.endpoint; in a local run AWS_ENDPOINT_URL)",
                reason="StorageUnavailable",
            ) from error
        except (BotoCoreError, RetriesExceededError, ConnectionError, TimeoutError) as error:
            raise TransientError(f"{doing} at {where}: {error}", reason="StorageUnavailable") from error

    def _translated(self, error: ClientError, doing: str, where: str) -> Exception:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = error.response.get("Error", {}).get("Message") or code
        if code in DENIED | UNKNOWN_USER or status in (401, 403):
            return InputError(
                f"{doing}: {where} refused ({code}: {said}). Check the keys {CREDENTIAL_KEYS} of the Secret in "
                "storage.secretName and that they may read, write, list and delete below storage.uri",
                reason="StorageDenied",
            )
        if code == "NoSuchBucket":
            return InputError(
                f"{doing}: there is no {where}. Create it, or correct the URI or storage.endpoint",
                reason="StorageMissing",
            )
        if code in MISSING or (status == 404 and code not in UNKNOWN_USER):
            return FileNotFoundError(f"{doing}: not found in {where}")
        if (
            code in ("PermanentRedirect", "IllegalLocationConstraintException", "AuthorizationHeaderMalformed")
            or status == 301
        ):
            return InputError(
                f"{doing}: {where} is in another region ({said}). Set storage.region", reason="StorageDenied"
            )
        if 400 <= status < 500 and status not in (408, 409, 412, 425, 429):
            return InputError(f"{doing}: {where} refused the request ({code}: {said})", reason="StorageRefused")
        return TransientError(f"{doing}: {where} answered {code}: {said}", reason="StorageUnavailable")


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _shown(place: Location) -> str:
    return f"s3://{place.bucket}/{place.key}"
