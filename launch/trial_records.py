"""What became of a trial: its record, whether it still holds, and the same trial in another sweep. Free of torch.

A trial that some sweep has finished is not run again under another name: its record names the other's directory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.steps import REPOSITORY
from launch.sweep import PlannedTrial, short_hash
from launch.trials import tokens_as_they_are

RECORD = "trial.json"


def write_record(trial: PlannedTrial, values: Mapping[str, Any]) -> None:
    """What became of a trial, in its directory.

    Args:
        trial: as planned, its steps not matched yet.
    """
    path = REPOSITORY / trial.directory / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    content = {**values, "settings": settings_hash(trial)}
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_record(trial: PlannedTrial) -> dict[str, Any]:
    """What `write_record` wrote of this trial with these settings, else that it was not run."""
    path = REPOSITORY / trial.directory / RECORD
    if not path.is_file():
        return {"state": "not run", "reason": trial.spec.not_run}
    values = _read(path)
    if values.get("settings") != settings_hash(trial):
        return {"state": "not run", "reason": "its settings have changed since it was run"}
    twin = values.get("same_as")
    if twin is not None and not _has_finished(REPOSITORY / twin / RECORD, values["content"]):
        return {"state": "not run", "reason": f"its figures were those of {twin}, which is another trial now"}
    return values


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def find_twin(trial: PlannedTrial, content: str) -> tuple[Path, dict[str, Any]] | None:
    """A finished trial of another sweep, or of this one, that is the same by `content_hash`: directory and record.

    None where this trial has been run itself.
    """
    own = trial.directory / RECORD
    if (REPOSITORY / own).is_file() and "same_as" not in _read(REPOSITORY / own):
        return None
    for path in sorted((REPOSITORY / trial.shared.parent).glob(f"*/*/{RECORD}")):
        directory = trial.shared.parent / path.parent.parent.name / path.parent.name
        if directory != trial.directory and _has_finished(path, content):
            return directory, _read(path)
    return None


def _has_finished(path: Path, content: str) -> bool:
    """A trial with this content has been run there, not taken from elsewhere."""
    if not path.is_file():
        return False
    values = _read(path)
    return values["state"] == "finished" and values.get("content") == content and "same_as" not in values


def content_hash(trial: PlannedTrial, measure: Sequence[str], ranks: int) -> str:
    """Names what a trial trains and measures, whatever it is called and whichever sweep it is in.

    Args:
        trial: with its final number of steps.
    """
    config = trial.config
    parts = {"seed", "train", "evaluation", "benchmark", "codec", "latent_model"}
    if trial.stages == ("base_lm",):  # its codec is tokens as they are
        config = config.model_copy(update={"codec": tokens_as_they_are(config)})
        parts.remove("latent_model")
    values = config.model_dump(mode="json", include=parts) | {"data": config.data.run_values()}
    stages = config.stages.model_dump(mode="json", exclude_unset=True)
    stages = {stage: settings for stage, settings in stages.items() if stage in trial.stages}
    how = {"measure": list(measure), "ranks": ranks, "from_base_lm": trial.starts_from_base_lm}
    return short_hash({**values, **how, "stages": stages, "trained": trial.stages})


def settings_hash(trial: PlannedTrial) -> str:
    """Names all that a trial's figures depend on, the trial that its compute is matched to included."""
    values = trial.config.model_dump(mode="json", exclude={"tracking", "stages"})
    stages = trial.config.stages.model_dump(mode="json", exclude_unset=True)
    spec = trial.spec.model_dump(mode="json", include={"pretrained_backbone", "match_compute"})
    reference = None if trial.reference is None else settings_hash(trial.reference)
    return short_hash({**values, "stages": stages, "trained": trial.stages, **spec, "reference": reference})
