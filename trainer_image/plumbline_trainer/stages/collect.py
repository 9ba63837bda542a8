"""Reads back how a stage ended whose pod is gone, and says it again."""

from __future__ import annotations

from plumbline_api.stagerun import RESULT_FILE_NAME, StageResult

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import read_manifest


def run(context: StageContext) -> StageOutput:
    """The committed output's figures: nothing is computed, nothing is written.

    Raises:
        InputError: what the stage itself reported, if it failed.
        TransientError: reason ResultLost, if storage knows of no end.
    """
    found = read_manifest(context.store, context.output_root)
    told = _told(context)
    if found is None:
        if told is not None and told.outcome == "Failed":
            raise InputError(told.message, reason=told.reason)
        raise TransientError(
            f"stage {context.run.stage} left neither an output nor a result in {context.run_root}", reason="ResultLost"
        )
    manifest, digest = found
    same = told is not None and told.manifest_digest == digest
    return StageOutput(
        folder=context.scratch,
        kind=manifest.kind,
        metrics=dict(manifest.metrics),
        tokens=told.tokens if same and told is not None else manifest.tokens,
        first_step=told.first_step if same and told is not None else manifest.first_step,
        last_step=told.last_step if same and told is not None else manifest.last_step,
        message=manifest.aborted or "read back from storage",
        manifest_digest=digest,
    )


def _told(context: StageContext) -> StageResult | None:
    try:
        return StageResult.model_validate_json(context.store.get_bytes(uris.join(context.run_root, RESULT_FILE_NAME)))
    except (FileNotFoundError, ValueError):
        return None
