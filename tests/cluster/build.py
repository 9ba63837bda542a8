"""Makes everything that takes minutes, and starts nothing: a later `up` then takes seconds."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from cluster.binaries import PROGRAMS, build_program
from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.images import RECIPES, build_base_image, build_image, find_engine
from cluster.kind import kind_is_usable
from cluster.packages import IMAGE_PACKAGES, NODE_PACKAGES, ensure_packages, ensure_root

Step = tuple[str, Callable[[], object]]
KIND_NEEDS = ("kubernetes", "helm", "versitygw")
"""What is called on the host beside kind's own node: kubectl, helm and the S3 server."""


def build_everything(own: bool = False) -> int:
    """Build the Go programs and, beside them, the images; says how long each took.

    Exit code 0: all is there; 1: a build failed; 3: this machine lacks something. One part that fails does not keep the others back.
    """
    programs, images = steps(own)
    with ThreadPoolExecutor(2) as pool:
        codes = [code for chain in pool.map(run_steps, (programs, images)) for code in chain]
    return 1 if 1 in codes else max(codes, default=0)


def steps(own: bool) -> tuple[list[Step], list[Step]]:
    """Programs and images, each in order: what is needed first comes first."""
    with_kind = not own and kind_is_usable()
    wanted = KIND_NEEDS if with_kind else tuple(PROGRAMS)
    programs: list[Step] = [(name, lambda name=name: build_program(PROGRAMS[name])) for name in wanted]  # type: ignore[misc]
    images: list[Step] = []
    engine = find_engine() if with_kind else "buildah"
    if not with_kind:
        images += [("packages", install_packages), ("base image", build_base_image)]
    images += [(f"{name} image", lambda name=name: build_image(name, engine)) for name in RECIPES]  # type: ignore[misc]
    return programs, images


def install_packages() -> None:
    """The operating system's programs that the node and the image builds need."""
    ensure_root("a node of our own")
    ensure_packages(NODE_PACKAGES | IMAGE_PACKAGES)


def run_steps(chain: list[Step]) -> list[int]:
    """Exit code of every step."""
    return list(_codes(chain))


def _codes(chain: list[Step]) -> Iterator[int]:
    for name, work in chain:
        begun = time.monotonic()
        try:
            work()
        except (ClusterUnavailableError, ClusterFailedError) as error:
            print(f"build: {name}: {error}", flush=True)
            yield 3 if isinstance(error, ClusterUnavailableError) else 1
        else:
            print(f"build: {name}: {time.monotonic() - begun:.0f} s", flush=True)
            yield 0
