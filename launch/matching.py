"""Training compute of a trial before it is run, and the steps that bring one trial to another's. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

from launch.config import RunConfig
from launch.sweep import PlannedTrial, TrainedStage
from launch.training_flops import encoding_flops, stage_flops


def planned_flops(trial: PlannedTrial, encoded_tokens: int) -> dict[str, float]:
    """Training FLOPs by stage of all that the trial's last model stands on; `encoding` is the pass over the text.

    The base LM counts where the codec starts from it, or where it is what is trained.

    Args:
        encoded_tokens: of `tokens_to_encode`.
    """
    config = trial.config
    parts: dict[str, float] = {}
    for stage in trial.stages:
        if stage == "base_lm" and not (trial.starts_from_base_lm or trial.stages == ("base_lm",)):
            continue
        staged = config.for_stage(stage)
        parts[stage] = stage_flops(stage, staged, staged.train.steps)
        if stage == "rq_transformer":
            parts["encoding"] = encoding_flops(config, encoded_tokens)
    return parts


def match_compute(trial: PlannedTrial, reference: Mapping[str, float], encoded_tokens: int) -> int:
    """Steps of the trial's last stage at which it has cost what `reference` (of `planned_flops`) costs.

    Raises:
        ValueError: the stages before cost too much already, or the codec's steps would have to be chosen.
    """
    last = trial.stages[-1]
    if last == "rqvae" or (last == "joint" and trial.config.for_stage(last).train.frozen_steps):
        raise ValueError(
            f"trials.{trial.name}.match_compute: the stage {last} is not matched, since its phases are steps too; "
            "set its steps" + ("" if last == "joint" else ", or add the stage rq_transformer")
        )
    own = planned_flops(trial, encoded_tokens)
    left = sum(reference.values()) - sum(cost for part, cost in own.items() if part != last)
    config = trial.config.for_stage(last)
    steps = round(left / stage_flops(last, config, 1))
    if steps <= config.train.warmup_steps:
        raise ValueError(
            f"trials.{trial.name}.match_compute: {sum(reference.values()):.3g} FLOPs of "
            f"{trial.spec.match_compute} leave {left:.3g} for {last}, or {steps} steps, which its warm-up of "
            f"{config.train.warmup_steps} steps would fill; give the reference more steps, or this trial's earlier "
            "stages fewer"
        )
    return steps


def with_steps(config: RunConfig, stage: TrainedStage, steps: int) -> RunConfig:
    """A copy that trains a stage for so many steps."""
    section = getattr(config.stages, stage).model_copy(update={"steps": steps})
    return config.model_copy(update={"stages": config.stages.model_copy(update={stage: section})})
