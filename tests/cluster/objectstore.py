"""A real S3 server (versitygw) over a folder: conditional writes, checksums, multipart uploads, wrong keys refused."""

import secrets
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cluster.binaries import find_program
from cluster.controlplane import choose_free_ports
from cluster.state import ClusterState, wait_until

REGION = "us-east-1"
BUCKET = "plumbline"


@dataclass(frozen=True)
class ObjectStore:
    """How to reach the server; `endpoint` is good for the host and, when bound to the bridge, for pods."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str = BUCKET
    region: str = REGION
    folder: str = ""

    def environment(self) -> dict[str, str]:
        """Variables that boto3 and the trainer read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """The boto3 client with the server's keys; threads may share it."""
        return _client(self)


@cache
def _client(store: ObjectStore) -> Any:
    """Made once: boto3 reads the whole description of S3 for every client."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=store.endpoint,
        aws_access_key_id=store.access_key,
        aws_secret_access_key=store.secret_key,
        region_name=store.region,
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 2}, connect_timeout=3),
    )


def server_arguments(address: str, port: int, folder: Path) -> list[str]:
    """Command line of versitygw; the keys go by environment, where `ps` does not show them."""
    return [
        "--port",
        f"{address}:{port}",
        "--region",
        REGION,
        "--quiet",
        "posix",
        "--sidecar",
        str(folder / "metadata"),
        str(folder / "objects"),
    ]


def start_object_store(state: ClusterState, address: str = "127.0.0.1") -> ObjectStore:
    """Start the server, wait until it answers and make the bucket. Reuses a running one."""
    if state.object_store and state.process("versitygw"):
        return ObjectStore(**state.object_store)
    folder = state.folder / "s3"
    for name in ("metadata", "objects"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    port = choose_free_ports(address, 1)[0]
    store = ObjectStore(
        endpoint=f"http://{address}:{port}",
        access_key="plumbline-test",
        secret_key=secrets.token_hex(20),
        folder=str(folder / "objects"),
    )
    state.start(
        "versitygw",
        [str(find_program("versitygw")), *server_arguments(address, port, folder)],
        {"ROOT_ACCESS_KEY": store.access_key, "ROOT_SECRET_KEY": store.secret_key},
    )
    wait_until(lambda: make_bucket(store), "S3 server answers", state, "versitygw")
    state.object_store = asdict(store)
    state.save()
    return store


def make_bucket(store: ObjectStore) -> bool:
    """Make the bucket unless it exists; False while the server cannot be reached."""
    from botocore.exceptions import ClientError, EndpointConnectionError, HTTPClientError

    client = store.client()
    try:
        client.create_bucket(Bucket=store.bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise
    except (EndpointConnectionError, HTTPClientError):
        return False
    return True
