"""A one-layer image around the distribution's static busybox: pod sandbox and shell for smoke tests, made without any builder."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from cluster.packages import find_program_of_system

APPLETS = (
    "sh",
    "sleep",
    "cat",
    "echo",
    "true",
    "false",
    "ls",
    "wget",
    "nslookup",
    "nc",
    "id",
    "touch",
    "test",
    "env",
    "date",
)


def write_busybox_archive(path: Path, name: str) -> None:
    """Write an OCI image archive with the given full reference; deterministic for one busybox binary."""
    program = find_program_of_system("busybox")
    assert program is not None
    layer = busybox_layer(Path(program).read_bytes())
    configuration = {
        "architecture": architecture(),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "2147483647"], "User": "65532:65532", "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
    }
    config = encode(configuration)
    manifest = encode(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
        }
    )
    entry = descriptor("application/vnd.oci.image.manifest.v1+json", manifest)
    index = encode({"schemaVersion": 2, "manifests": [{**entry, "annotations": {"io.containerd.image.name": name}}]})
    with tarfile.open(path, "w") as archive:
        add_file(archive, "oci-layout", encode({"imageLayoutVersion": "1.0.0"}))
        add_file(archive, "index.json", index)
        for blob in (manifest, config, layer):
            add_file(archive, f"blobs/sha256/{digest(blob).removeprefix('sha256:')}", blob)


def busybox_layer(program: bytes) -> bytes:
    """Tar of /bin/busybox with its applets as links, a writable /tmp and a user database with the user 65532."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for folder, mode in (
            ("bin", 0o755),
            ("etc", 0o755),
            ("tmp", 0o1777),
            ("proc", 0o755),
            ("dev", 0o755),
            ("sys", 0o755),
        ):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            layer.addfile(entry)
        add_file(layer, "bin/busybox", program, 0o755)
        for applet in APPLETS:
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, "busybox", 0o777
            layer.addfile(entry)
        add_file(layer, "etc/passwd", b"root:x:0:0::/:/bin/sh\nplumbline:x:65532:65532::/tmp:/bin/sh\n")
        add_file(layer, "etc/group", b"root:x:0:\nplumbline:x:65532:\n")
    return buffer.getvalue()


def add_file(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


def architecture() -> str:
    import platform

    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encode(document: object) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


def descriptor(media_type: str, data: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data)}
