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
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage.files import CHUNK, file_digest, replaced
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
            # Servers of our own seldom have a wildcard certificate for bucket names as host names.
            s3={"addressing_style": "path"} if self.endpoint else {},
        )
        session = boto3.session.Session()
        self._client: Any = session.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=region or session.region_name or "us-east-1",
            config=config,
        )

    def put_file(self, place: Location, path: Path) -> str:
        """Upload in parallel parts, each with its SHA-256 for the server to check; hashed as a whole meanwhile."""
        with ThreadPoolExecutor(1) as pool, self._explained(place, f"writing {_shown(place)}"):
            whole = pool.submit(file_digest, path)
            self._client.upload_file(
                str(path), place.bucket, place.key, ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=TRANSFER
            )
            return whole.result()

    def put_bytes(self, place: Location, data: bytes, *, if_absent: bool) -> bool:
        """Write one object; with `if_absent` under If-None-Match: *."""
        extra = {"IfNoneMatch": "*"} if if_absent else {}
        with self._explained(place, f"writing {_shown(place)}"):
            for attempt in range(CONFLICT_ATTEMPTS):
                try:
                    self._client.put_object(
                        Bucket=place.bucket, Key=place.key, Body=data, ChecksumAlgorithm="SHA256", **extra
                    )
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

    def get_file(self, place: Location, path: Path) -> str:
        """Download in parallel ranges."""
        with self._explained(place, f"reading {_shown(place)}"), replaced(path) as partial:
            self._client.download_file(place.bucket, place.key, str(partial), Config=TRANSFER)
            return file_digest(partial)

    def get_bytes(self, place: Location) -> bytes:
        """Read one object."""
        with self._explained(place, f"reading {_shown(place)}"):
            data: bytes = self._client.get_object(Bucket=place.bucket, Key=place.key)["Body"].read()
            return data

    def hash(self, place: Location) -> tuple[str, int]:
        """Stream an object through SHA-256."""
        digest, size = hashlib.sha256(), 0
        with self._explained(place, f"reading {_shown(place)}"):
            body = self._client.get_object(Bucket=place.bucket, Key=place.key)["Body"]
            for chunk in body.iter_chunks(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return digest.hexdigest(), size

    def head(self, place: Location) -> tuple[int, str, str] | None:
        """Size, ETag (with the version, where the bucket keeps versions) and time."""
        try:
            with self._explained(place, f"looking for {_shown(place)}"):
                found = self._client.head_object(Bucket=place.bucket, Key=place.key)
        except FileNotFoundError:
            return None
        version = found.get("VersionId")
        etag = found.get("ETag", "").strip('"') + (f"@{version}" if version and version != "null" else "")
        return found["ContentLength"], etag, found["LastModified"].isoformat()

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
        except (BotoCoreError, RetriesExceededError, ConnectionError, TimeoutError) as error:
            raise TransientError(f"{doing} at {where}: {error}", reason="StorageUnavailable") from error

    def _translated(self, error: ClientError, doing: str, where: str) -> Exception:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = error.response.get("Error", {}).get("Message") or code
        if code in DENIED or status in (401, 403):
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
        if code in MISSING or status == 404:
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


def _shown(place: Location) -> str:
    return f"s3://{place.bucket}/{place.key}"
