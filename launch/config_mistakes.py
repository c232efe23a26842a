"""Mistakes between fields of a run configuration that are valid one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from data_pipeline.config import DataConfig
from data_pipeline.yaml_config import merge
from launch.config_sections import STAGES, Stage, TrainConfig
from launch.engine_config import mistakes_of_engine
from rqvae.config import LatentModelConfig, RQTransformerConfig, RQVAEConfig, StrictModel

_ARCHITECTURE = "codec.backbone.architecture"
# Settings that act in some stages only.
_CODEC_STAGES = ("rqvae", "joint")
_ONLY_IN = {
    "frozen_steps": _CODEC_STAGES,
    "switch_warmup_steps": _CODEC_STAGES,
    "quantizer_warmup_steps": _CODEC_STAGES,
    "stochastic_codes": ("rq_transformer",),
    "rate_weight": ("joint",),
    "rate_warmup_steps": ("joint",),
    "free_nats": ("joint",),
    "initial_weights": ("base_lm", "rqvae", "rq_transformer"),
}


def _section(model: type[StrictModel], values: Any) -> Any:
    """`values` as `model`, or None where they are not valid by themselves (reported elsewhere)."""
    try:
        return model.model_validate(values)
    except ValidationError:
        return None


def mistakes_across_fields(values: Mapping[str, Any], stage: Stage | None) -> list[str]:
    """All of them; sections with mistakes of their own are left out."""
    data: DataConfig | None = _section(DataConfig, values.get("data"))
    codec: RQVAEConfig | None = _section(RQVAEConfig, values.get("codec"))
    mistakes: list[str] = []
    if data is not None and codec is not None:
        mistakes += _mistakes_of_data_and_codec(data, codec)
    latent_model: LatentModelConfig | None = _section(LatentModelConfig, values.get("latent_model") or {})
    if codec is not None and latent_model is not None:
        mistakes += _mistakes_of_codec_and_latent_model(codec, latent_model)

    train_values = values.get("train") or {}
    sections = values.get("stages") or {}
    if not isinstance(train_values, Mapping) or not isinstance(sections, Mapping):
        return mistakes
    chosen = stage or values.get("stage")
    if codec is not None and codec.model == "identity" and chosen in _CODEC_STAGES:
        mistakes.append(
            f"codec.model: identity leaves the stage {chosen} nothing to train; go on with "
            "launch/precompute_codes.py and the stage rq_transformer"
        )
    if codec is not None and codec.model == "anchor" and chosen == "joint":
        mistakes.append(
            "codec.model: anchor has certain codes, which a prior cannot change; train the stages rqvae and "
            "rq_transformer"
        )
    # With a stage chosen, the others are not going to run: an override of steps may not suit them.
    stages = [chosen] if chosen in STAGES else [name for name in STAGES if name in sections]
    for name in stages:
        section = sections.get(name) or {}
        if not isinstance(section, Mapping):
            continue
        train = _section(TrainConfig, merge(train_values, section))
        if train is not None:
            mistakes += _mistakes_of_training(train, name, section)
            if train.streaming is not None and data is not None:
                mistakes += [
                    f"data.{field}: has no effect where training is streamed; remove it, or train.streaming"
                    for field in ("mixture", "shuffle_block", "on_corrupt")
                    if getattr(data, field) != DataConfig.model_fields[field].default
                ]
            if train.stochastic_codes and codec is not None and codec.model != "rqvae":
                mistakes.append(
                    f"stages.{name}.stochastic_codes: codec.model: {codec.model} has nothing to draw from; remove it"
                )
    return list(dict.fromkeys(mistakes))


def _mistakes_of_data_and_codec(data: DataConfig, codec: RQVAEConfig) -> Iterator[str]:
    factor = codec.compression_factor
    architecture = codec.backbone.architecture
    if data.sample_length % factor:
        yield (
            f"data.sample_length: {data.sample_length} tokens do not divide into chunks of "
            f"codec.compression_factor={factor}; use a multiple of {factor}"
        )
    if data.document_grid % factor:
        yield (
            f"data.document_grid: {data.document_grid} is not a multiple of "
            f"codec.compression_factor={factor}, so a chunk could hold two documents; "
            f"use a multiple of {factor}"
        )
    if data.sample_length > architecture.max_position_embeddings:
        yield (
            f"data.sample_length: {data.sample_length} exceeds {_ARCHITECTURE}.max_position_embeddings="
            f"{architecture.max_position_embeddings}"
        )
    trained_vocabulary = getattr(data.tokenizer, "vocab_size", None)
    if trained_vocabulary is not None and trained_vocabulary > architecture.vocab_size:
        yield (
            f"data.tokenizer.vocab_size: {trained_vocabulary} tokens do not fit into the "
            f"{architecture.vocab_size} embeddings of {_ARCHITECTURE}.vocab_size"
        )


def _mistakes_of_codec_and_latent_model(codec: RQVAEConfig, latent_model: LatentModelConfig) -> Iterator[str]:
    try:
        RQTransformerConfig.for_codec(codec, latent_model)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            yield f"latent_model.{detail['msg'].removeprefix('Value error, ')}"
    if codec.sees_future and latent_model.reads_tokens:
        yield (
            f"latent_model.spatial_input: {latent_model.spatial_input} needs codes that do not depend on the text "
            "after them, and codec.resample: reference or original makes such codes; use spatial_input: codes"
        )


def _mistakes_of_training(train: TrainConfig, stage: Stage, section: Mapping[str, Any]) -> Iterator[str]:
    def where(name: str) -> str:
        return f"stages.{stage}.{name}" if name.partition(".")[0] in section else f"train.{name}"

    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"{where('global_batch_size')}: {train.global_batch_size} is not a multiple of "
            f"micro_batch_size={train.micro_batch_size}"
        )
    if train.keep_every is not None and train.keep_every % train.checkpoint_every:
        yield (
            f"{where('keep_every')}: {train.keep_every} is not a multiple of "
            f"checkpoint_every={train.checkpoint_every}, so nothing would be there to keep"
        )
    if train.warmup_steps > train.steps:
        yield f"{where('warmup_steps')}: {train.warmup_steps} exceeds steps={train.steps}"
    if stage in _CODEC_STAGES:
        for name in ("frozen_steps", "quantizer_warmup_steps"):
            if getattr(train, name) > train.steps:
                yield f"{where(name)}: {getattr(train, name)} exceeds steps={train.steps}"
        if train.frozen_steps + train.switch_warmup_steps > max(train.steps, train.frozen_steps):
            yield (
                f"{where('switch_warmup_steps')}: {train.switch_warmup_steps} exceeds the "
                f"{train.steps - train.frozen_steps} steps after the frozen phase"
            )
    for name, stages in _ONLY_IN.items():
        if stage not in stages and section.get(name):
            yield f"stages.{stage}.{name}: has an effect in {' and '.join(stages)} only; remove it"
    if train.streaming is not None and stage == "rq_transformer":
        yield (
            f"{where('streaming')}: the stage rq_transformer reads codes, which are not streamed; set it under "
            "stages.S of the other stages S only"
        )
    elif train.streaming is not None and train.global_batch_size % train.streaming.streams:
        yield (
            f"{where('streaming')}.streams: train.global_batch_size={train.global_batch_size} is not a multiple of "
            f"{train.streaming.streams}"
        )
    if train.phase_method == "zero_lr" and train.offload_optimizer == "nvme":
        yield f"{where('phase_method')}: zero_lr cannot reset moments on a disk (offload_optimizer nvme); use rebuild"
    yield from mistakes_of_engine(train, where)
