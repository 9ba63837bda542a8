"""Builds the operator's and the trainer's image with whichever of Docker, Podman and buildah is there.

A built image is named by the hash of what went into it, so an unchanged tree builds nothing. With buildah, where no registry need be
reachable, the base image is a debootstrap of Debian. Times on 2 cores: base 1.5 min and the trainer's dependencies (6.3 GB) 4 min, once;
after a change of code 10 s.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ClusterFailedError, ClusterUnavailableError
from cluster.packages import IMAGE_PACKAGES, ensure_packages, ensure_root
from cluster.places import REPOSITORY, cache_root, content_key, locked

SUITE = "bookworm"
BASE_PACKAGES = ("ca-certificates", "python3", "python3-venv")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
SHARED_INPUTS = (".dockerignore", "pyproject.toml", "README.md", "LICENSE")
PASSED_ON = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")


@dataclass(frozen=True)
class Recipe:
    """One of our images: its Dockerfile, the files besides the sources that go in, and fixed build arguments."""

    name: str
    dockerfile: str
    requirements: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...] = ()


RECIPES = {
    "operator": Recipe("operator", "operator/Dockerfile", ("requirements/operator.txt",)),
    "trainer": Recipe(
        "trainer",
        "trainer_image/Dockerfile",
        ("requirements/trainer.txt", "requirements/demo.txt"),
        (("WITH_DEMO_MODEL", "1"),),
    ),
}


def recipe_inputs(recipe: Recipe, repository: Path = REPOSITORY) -> list[Path]:
    """Files that decide the image, in the order of .dockerignore: settings, requirements, every source file."""
    named = [repository / name for name in (*SHARED_INPUTS, recipe.dockerfile, *recipe.requirements)]
    sources = [
        path
        for pattern in ("operator/plumbline_*", "trainer_image/plumbline_*")
        for package in repository.glob(pattern)
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    ]
    return [*named, *sources]


def image_reference(recipe: Recipe, base: str, repository: Path = REPOSITORY) -> str:
    """Full name of the image with the hash of its inputs as tag. `localhost` keeps every engine from asking a registry for it."""
    arguments = [f"{key}={value}" for key, value in recipe.arguments]
    return f"localhost/plumbline-{recipe.name}:{content_key([base, *arguments], recipe_inputs(recipe, repository), repository)}"


def find_engine() -> str | None:
    """`docker` or `podman`, whichever answers, in this order."""
    for engine in ("docker", "podman"):
        if shutil.which(engine):
            with contextlib.suppress(subprocess.TimeoutExpired):
                if subprocess.run([engine, "info"], capture_output=True, timeout=20).returncode == 0:
                    return engine
    return None


def build_image(name: str, engine: str | None = None, base: str | None = None, tags: tuple[str, ...] = ()) -> str:
    """Build one of RECIPES unless it is built; returns its reference and gives it further tags.

    `engine` is docker, podman or buildah (default: the first that is usable); `base` a BASE_IMAGE other than the default one.
    """
    engine = engine or find_engine() or "buildah"
    recipe = RECIPES[name]
    if engine == "buildah":
        ensure_packages(IMAGE_PACKAGES)
        base = base or build_base_image()
    with locked(cache_root() / "images" / f"{name}.lock"), build_context(recipe) as context:
        reference = image_reference(recipe, base or "", context)
        if not image_exists(engine, reference):
            _build(engine, recipe, reference, base, context)
            if engine == "buildah":
                _remove_older(recipe, reference)
    for tag in tags:
        run_engine(engine, "tag", reference, tag)
    return reference


def build_arguments(recipe: Recipe, engine: str, reference: str, base: str | None, context: Path) -> list[str]:
    """Arguments of `build`. buildah runs without a daemon or namespaces and sees the host's certificates, as a proxy may need."""
    values = dict(recipe.arguments)
    if base:
        values["BASE_IMAGE"] = base
    values |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    arguments = ["build", "--file", str(context / recipe.dockerfile), "--tag", reference]
    if engine == "buildah":
        arguments += ["--layers", "--isolation", "chroot", "--network", "host"]
        if CERTIFICATES.exists():
            arguments += ["--volume", f"{CERTIFICATES.parent}:{CERTIFICATES.parent}:ro"]
            values |= {"PIP_CERT": str(CERTIFICATES), "SSL_CERT_FILE": str(CERTIFICATES)}
    for key, value in values.items():
        arguments += ["--build-arg", f"{key}={value}"]
    return [*arguments, str(context)]


def _build(engine: str, recipe: Recipe, reference: str, base: str | None, context: Path) -> None:
    log = cache_root() / "images" / f"{recipe.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    nice = ["nice", "-n", "5"] if shutil.which("nice") else []
    with log.open("w") as output:
        command = [*engine_command(engine), *build_arguments(recipe, engine, reference, base, context)]
        done = subprocess.run(
            [*nice, *command], stdout=output, stderr=subprocess.STDOUT, env=engine_environment(recipe.name)
        )
    shutil.rmtree(
        cache_root() / "tmp" / recipe.name, ignore_errors=True
    )  # gigabytes of wheels, fetched again in a minute when needed
    if done.returncode:
        raise ClusterFailedError(
            f"building the {recipe.name} image failed. {log} ends:\n{log.read_text(errors='replace')[-3000:]}"
        )


@contextlib.contextmanager
def build_context(recipe: Recipe) -> Iterator[Path]:
    """A copy of the recipe's files: what is hashed is what is built, also while somebody edits the tree."""
    with tempfile.TemporaryDirectory(prefix="plumbline-context-") as name:
        context = Path(name)
        for path in recipe_inputs(recipe):
            target = context / path.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        yield context


def storage_options() -> list[str]:
    """buildah's own storage below our cache folder."""
    folder = cache_root() / "containers"
    return ["--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]


def engine_command(engine: str) -> list[str]:
    return ["buildah", *storage_options()] if engine == "buildah" else [engine]


def engine_environment(purpose: str = "shared") -> dict[str, str]:
    """buildah keeps cache mounts and temporary layers under TMPDIR; /tmp may be small."""
    temporary = cache_root() / "tmp" / purpose
    temporary.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": str(temporary), "DOCKER_BUILDKIT": "1"}


def run_engine(engine: str, *arguments: str, check: bool = True) -> str:
    """Run the engine and return its output."""
    done = subprocess.run(
        [*engine_command(engine), *arguments], capture_output=True, text=True, env=engine_environment()
    )
    if check and done.returncode:
        raise ClusterFailedError(f"{engine} {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def image_exists(engine: str, reference: str) -> bool:
    return bool(run_engine(engine, "images", "--quiet", reference, check=False).strip())


def _remove_older(recipe: Recipe, reference: str) -> None:
    """Forget earlier builds of the same image; layers that the newest one uses stay."""
    name = reference.partition(":")[0]
    listed = run_engine("buildah", "images", "--format", "{{.Name}}:{{.Tag}}", check=False).split()
    for other in listed:
        if other.startswith(f"{name}:") and other != reference:
            run_engine("buildah", "rmi", other, check=False)


def build_base_image() -> str:
    """Debian with Python as `localhost/plumbline-base:<key>`: the BASE_IMAGE where no registry can be reached."""
    key = content_key([SUITE, *BASE_PACKAGES, os.uname().machine])
    reference = f"localhost/plumbline-base:{key}"
    if image_exists("buildah", reference):
        return reference
    ensure_root("building a base image with debootstrap")
    ensure_packages(IMAGE_PACKAGES)
    with locked(cache_root() / "images" / "base.lock"):
        if image_exists("buildah", reference):
            return reference
        root = cache_root() / "images" / f"base-{key}.unfinished"
        shutil.rmtree(root, ignore_errors=True)
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", SUITE, str(root)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ClusterUnavailableError(
                f"debootstrap of {SUITE} failed: {(done.stdout + done.stderr).strip()[-600:]}",
                "make Debian's package archive reachable",
            )
        for folder in (root / "var/cache/apt/archives", root / "var/lib/apt/lists"):
            for file in folder.glob("*"):
                if file.is_file():
                    file.unlink()
        container = run_engine("buildah", "from", "scratch").strip()
        try:
            run_engine("buildah", "copy", "--quiet", container, str(root), "/")
            run_engine("buildah", "config", "--cmd", '["python3"]', "--env", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", container)  # fmt: skip
            run_engine("buildah", "commit", "--quiet", container, reference)
        finally:
            run_engine("buildah", "rm", container, check=False)
        shutil.rmtree(root)
    return reference


def main() -> int:
    """`hack/build-images [--engine E] [--base-image REF] [--tag TAG] [operator] [trainer]`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="hack/build-images", description="Build the operator's and the trainer's image."
    )
    parser.add_argument("images", nargs="*", metavar="operator|trainer", help="which (default: both)")
    parser.add_argument("--engine", choices=("docker", "podman", "buildah"), help="default: the first that is usable")
    parser.add_argument(
        "--base-image", help="BASE_IMAGE (default: the Dockerfile's; with buildah a debootstrap of Debian)"
    )
    parser.add_argument("--prefix", default="localhost", help="registry and path of the names (default: %(default)s)")
    parser.add_argument("--tag", default="dev", help="tag besides the hash of the inputs (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.images) - set(RECIPES):
        parser.error(f"unknown image {', '.join(sorted(unknown))}: choose from {', '.join(RECIPES)}")
    try:
        for name in options.images or RECIPES:
            tag = f"{options.prefix}/plumbline-{name}:{options.tag}"
            print(build_image(name, options.engine, options.base_image, (tag,)), tag)
    except (ClusterUnavailableError, ClusterFailedError) as error:
        print(f"build-images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
