"""Puts built images on the node without a registry and without copying gigabytes more often than once.

buildah's storage -> OCI layout with uncompressed layers (skopeo writes only layers that are new) -> containerd. Handing containerd a 6.3 GB
layer through its socket takes 122 s; linking the blob into its content folder and registering it takes 0.3 s, as both lie in our cache
folder, so a second copy on disk is saved as well. Measured for the trainer on 2 cores: export 64 s, register 0.3 s, unpack 50 s, once; after
a change of code 2 s in all, because the dependencies' layer is there already. (`buildah push` to an OCI archive and
`ctr images import`, the plain way, takes 115 + 63 + 92 s every time.)
"""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

from cluster.errors import ClusterFailedError
from cluster.images import build_image, engine_environment, storage_options
from cluster.node import containerd_client, containerd_root, run_folder
from cluster.places import cache_root, locked
from cluster.state import ClusterState

NAME_ANNOTATION = "io.containerd.image.name"
ROOT_LABEL = "containerd.io/gc.root"
LOAD_ATTEMPTS = 5
"""A blob may be collected between its registration and its label: then once more."""


def load_images(state: ClusterState, which: str) -> None:
    """Build and load the operator's image, and with `which="all"` the trainer's; records the references in the state."""
    for name in ("operator", "trainer") if which == "all" else ("operator",):
        reference = build_image(name, engine="buildah")
        load_image(state, name, reference)
        state.images[name] = reference
        state.save()


def load_image(state: ClusterState, name: str, reference: str) -> None:
    """Make an image of buildah's storage known to the node's containerd and unpack it; forget older ones of that name."""
    present = containerd_client(state, "images", "list", "--quiet").split()
    if reference not in present:
        with locked(cache_root() / "images" / "load.lock"):
            layout = cache_root() / "images" / f"layout-{name}"
            export_layout(reference, layout)
            for attempt in range(1, LOAD_ATTEMPTS + 1):
                try:
                    register_blobs(state, layout)
                    import_index(state, layout, reference)
                    break
                except ClusterFailedError:
                    if attempt == LOAD_ATTEMPTS:
                        raise
            release_blobs(state, layout)
    listed = containerd_client(state, "images", "list")
    if older := older_references(listed, reference):
        containerd_client(state, "images", "remove", "--sync", *older)


def older_references(listing: str, reference: str) -> list[str]:
    """Names in the output of `ctr images list` under which earlier builds of an image are kept, kubelet's `sha256:…` names included."""
    digests = {words[0]: words[2] for line in listing.splitlines()[1:] if len(words := line.split()) > 2}
    stem = reference.partition(":")[0] + ":"
    kept = digests.get(reference)
    outdated = {digest for name, digest in digests.items() if name.startswith(stem)} - {kept}
    return [name for name, digest in digests.items() if digest in outdated]


def export_layout(reference: str, layout: Path) -> None:
    """Write the image as the only one of an OCI layout; blobs that are there are not written again, unused ones removed."""
    options = storage_options()
    storage = f"containers-storage:[overlay@{options[1]}+{options[3]}]{reference}"
    (layout / "index.json").unlink(missing_ok=True)
    done = subprocess.run(
        ["skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers", storage, f"oci:{layout}:image"],
        capture_output=True,
        text=True,
        env=engine_environment(),
    )
    if done.returncode:
        raise ClusterFailedError(f"skopeo copy {storage}: {done.stderr.strip()}")
    used = {blob.name for blob, _ in layout_blobs(layout)}
    for blob in (layout / "blobs" / "sha256").iterdir():
        if blob.name not in used:
            blob.unlink()


def layout_blobs(layout: Path) -> list[tuple[Path, int]]:
    """Every blob of the layout's one image with its size: manifest, configuration, layers."""
    folder = layout / "blobs" / "sha256"
    entry = json.loads((layout / "index.json").read_text())["manifests"][0]
    manifest = json.loads((folder / entry["digest"].removeprefix("sha256:")).read_text())
    return [
        (folder / item["digest"].removeprefix("sha256:"), item["size"])
        for item in (entry, manifest["config"], *manifest["layers"])
    ]


def register_blobs(state: ClusterState, layout: Path) -> None:
    """Make containerd know the layout's blobs: linked into its content folder where the file system allows, else copied.

    Each is marked as a root of garbage collection, since no image refers to it yet and pods that end set a collection off.
    """
    content = containerd_root() / "io.containerd.content.v1.content" / "blobs" / "sha256"
    content.mkdir(parents=True, exist_ok=True)
    known = containerd_client(state, "content", "list", "--quiet").split()
    for blob, size in layout_blobs(layout):
        digest = f"sha256:{blob.name}"
        if digest not in known:
            try:
                os.link(blob, content / blob.name)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in (18, 1, 31):  # EXDEV, EPERM, EMLINK: containerd then copies what it reads
                    raise
            _feed(state, blob, "content", "ingest", f"--expected-digest={digest}", f"--expected-size={size}", f"plumbline-{blob.name}")  # fmt: skip
        containerd_client(state, "content", "label", digest, f"{ROOT_LABEL}=plumbline")


def release_blobs(state: ClusterState, layout: Path) -> None:
    """Take the marks away: from now on the image keeps its blobs."""
    for blob, _ in layout_blobs(layout):
        containerd_client(state, "content", "label", f"sha256:{blob.name}", f"{ROOT_LABEL}=")


def import_index(state: ClusterState, layout: Path, reference: str) -> None:
    """Import an archive that holds only the index: every blob it names is registered; containerd unpacks the layers it has not yet."""
    index = json.loads((layout / "index.json").read_text())
    index["manifests"][0]["annotations"] = {NAME_ANNOTATION: reference}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (
            ("oci-layout", (layout / "oci-layout").read_bytes()),
            ("index.json", json.dumps(index).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    file = state.folder / "image-index.tar"
    file.write_bytes(buffer.getvalue())
    containerd_client(state, "images", "import", str(file))
    file.unlink()


def _feed(state: ClusterState, file: Path, *arguments: str) -> None:
    """Run ctr with a file as its input."""
    socket = str(run_folder(state) / "containerd.sock")
    with file.open("rb") as source:
        done = subprocess.run(
            ["ctr", "--address", socket, "--namespace", "k8s.io", *arguments],
            stdin=source,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ClusterFailedError(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
