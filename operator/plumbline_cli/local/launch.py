"""How a trainer is started on this machine: its environment, its files, its process."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from plumbline_api.stagerun import PROGRESS_FILE_ENV, STAGE_ENV, STAGES_AT_ONCE_ENV, TERMINATION_LOG_ENV, StageRun

from plumbline_cli.exits import BAD_INPUT, CommandError
from plumbline_cli.local.process import StageProcess, trainer_command
from plumbline_cli.local.state import JobFolder, RunFolder, replace_file

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TERM|TMPDIR|XDG_.*"
    r"|PYTHONPATH|VIRTUAL_ENV|LD_LIBRARY_PATH|DYLD_.*"
    r"|AWS_.*|HF_.*|HUGGING_FACE_HUB_TOKEN|SSL_CERT_.*|REQUESTS_CA_BUNDLE|(?i:https?_proxy|no_proxy|all_proxy)"
    r"|CUDA_.*|NVIDIA_.*|NCCL_.*|GLOO_.*|TORCH_.*|PYTORCH_.*|ROCR_.*|HIP_.*"
    r"|OMP_.*|MKL_.*|OPENBLAS_.*|KMP_.*|GOMP_.*|PLUMBLINE_BUNDLED_MODELS|PLUMBLINE_CACHE"
    r"|PLUMBLINE_ENDPOINT_TOKEN_.*"
)
"""What of the user's environment a trainer gets: where software and caches lie, credentials of storage, hub and reward
endpoints, settings of the accelerator and of threads. Anything else, tokens of other services among it, stays here."""


TRAINER_NEEDS = ("torch", "transformers", "peft", "safetensors")


def require_trainer() -> None:
    """See that the trainer is installed, before anything is written.

    Raises:
        CommandError: with the remedy.
    """
    missing = [name for name in TRAINER_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"runs on this machine need the trainer, and {', '.join(missing)} is not installed: "
            "pip install '.[trainer]' in a checkout of Plumbline",
            BAD_INPUT,
        )


class TrainerLauncher:
    """Starts attempts as processes of the trainer's launcher."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        parallel: int = 1,
    ) -> None:
        self._parallel = parallel
        self._folder, self._command = folder, trainer_command() if command is None else command
        self._environment = os.environ if environment is None else environment

    def __call__(self, run: StageRun, job: str) -> StageProcess:
        """The process of one attempt. What an earlier attempt of this name left behind is removed; its log goes on."""
        files = self._folder.job(job)
        for stale in (files.termination, files.progress):
            stale.unlink(missing_ok=True)
        shutil.rmtree(files.scratch, ignore_errors=True)
        files.scratch.mkdir(parents=True)
        replace_file(files.run, run.to_json())
        return StageProcess(
            self._command,
            environment=trainer_environment(self._environment, run, files, parallel=self._parallel),
            folder=files.scratch,
            log=files.log,
        )


def trainer_environment(
    environment: Mapping[str, str], run: StageRun, files: JobFolder, *, parallel: int = 1
) -> dict[str, str]:
    """The whole environment of a trainer, one of some that may run at once."""
    kept = {name: value for name, value in environment.items() if PASSED_ON.fullmatch(name)}
    if path := kept.get("PYTHONPATH"):  # Relative folders are meant from here, not from where the trainer works.
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(part).absolute()) for part in path.split(os.pathsep) if part)
    return {
        "PLUMBLINE_CACHE": str(cache_folder(environment)),
        **kept,
        STAGE_ENV: run.to_json(),
        TERMINATION_LOG_ENV: str(files.termination),
        PROGRESS_FILE_ENV: str(files.progress),
        STAGES_AT_ONCE_ENV: str(parallel),
        "PYTHONUNBUFFERED": "1",
        "PYDANTIC_DISABLE_PLUGINS": "__all__",  # searching for some takes a tenth of a second of every start
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # a log is read line by line
    }


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where trainers of this machine keep what can be made again, such as a dequantised model."""
    if root := environment.get("XDG_CACHE_HOME"):
        return Path(root) / "plumbline"
    return Path(environment.get("HOME") or Path.home()) / ".cache" / "plumbline"
