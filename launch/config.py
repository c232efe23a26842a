"""The run configuration: each package's own section plus training, tracking, evaluation and benchmark.

    config = load_config("configs/tiny.yaml", stage="rqvae", overrides=["train.steps=200"])

Free of torch, so that submitting a job stays light.

Which value wins for a training setting of stage S: a command-line override `train.x=v`, then `stages.S.x`
(file or override), then `train.x` of the file, then the default documented here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError

from data_pipeline.config import DataConfig, StreamingConfig
from data_pipeline.yaml_config import ConfigError, apply_overrides, merge, read_yaml, validate
from launch.engine_config import EngineConfig, mistakes_of_engine
from rqvae.config import LatentModelConfig, RQTransformerConfig, RQVAEConfig, StrictModel

Stage = Literal["base_lm", "rqvae", "rq_transformer", "joint"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_ARCHITECTURE = "codec.backbone.architecture"
# Where the path of an architecture file may stand.
_ARCHITECTURES = (_ARCHITECTURE, "latent_model.spatial_backbone.architecture")
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


class TrainConfig(EngineConfig):
    """One stage's training. `train:` holds the values for every stage, `stages.S:` those that differ in S."""

    steps: int = Field(default=1000, gt=0)
    """Optimizer steps of the stage in all, the frozen phase included."""
    frozen_steps: int = Field(default=0, ge=0)
    """Steps of phase one of the codec, in which the backbones' weights stay as they are while everything
    above and below them learns. Between 0 (no such phase) and `steps`."""
    phase_method: Literal["rebuild", "zero_lr"] = "rebuild"
    """How backbones are frozen. rebuild: the engine is built anew after phase one; least memory. zero_lr: one engine
    trains both phases, with a learning rate of 0 for the backbones in phase one; no second start, but gradients and
    optimizer state of everything from the beginning. Both train alike."""
    quantizer_warmup_steps: int = Field(default=0, ge=0)
    """First steps of the codec's training without quantization; k-means then initialises the codebooks.
    About a quarter of `steps` gave the best reconstruction at small scale. 0: on the first batch."""
    stochastic_codes: bool = False
    """The latent model is trained on codes drawn from the quantizer's soft assignments at every step, with these
    as targets (Lee 2022, section 3.2.3; `codec.quantizer.code_temperature`). Needs codes that were precomputed
    with --latents."""

    rate_weight: float = Field(default=1.0, ge=0)
    """Stage joint: weight of the codes' divergence KL(q || prior) in the loss (beta of Higgins 2017); 1 is the bound
    itself."""
    rate_warmup_steps: int = Field(default=0, ge=0)
    """Stage joint: steps over which that weight rises linearly from 0 when quantization begins, so that text is
    reconstructed before codes cost anything. (With the full weight from the start they may lose all they say.)"""
    free_nats: float = Field(default=0.0, ge=0)
    """Stage joint: a level's mean divergence per latent of a micro-batch below this costs no less (free bits, Kingma
    2016)."""

    initial_weights: str | None = None
    """Directory of a converted model of the same stage and shape to start from, instead of random weights and
    pretrained backbones. Set it for one stage: `stages.STAGE.initial_weights`."""

    global_batch_size: int = Field(default=8, gt=0)
    """Samples per optimizer step over all ranks. The world size does not change it."""
    micro_batch_size: int = Field(default=1, gt=0)
    """Samples per rank in one forward pass. Gradients accumulate over
    global_batch_size / (micro_batch_size * world size) passes, which must be a whole number."""

    backbone_learning_rate_ratio: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of the backbone's weights over `learning_rate`. Below 1 for a pretrained backbone."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step over the peak."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises linearly from 0 at the start of the stage. At most `steps`."""
    switch_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the backbone's learning rate rises from 0 when it is unfrozen, since Adam's moments
    of these weights start at zero there. At most `steps` - `frozen_steps`."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine falls to the minimum, wsd (warm-up, stable, decay) stays at the peak and
    falls linearly over the last `wsd_decay_fraction` of the steps, constant stays."""
    wsd_decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of `steps` over which the wsd schedule decays. Used by `schedule: wsd` only."""

    log_every: int = Field(default=10, gt=0)
    """Optimizer steps between two training lines in metrics.jsonl."""
    eval_every: int = Field(default=200, gt=0)
    """Optimizer steps between two validations. The last step is always validated."""
    eval_samples: int = Field(default=64, gt=0)
    """Samples of the validation split per validation, over all ranks."""
    checkpoint_every: int = Field(default=200, gt=0)
    """Optimizer steps between two checkpoints. The last step is always saved."""
    checkpoint_every_s: float | None = Field(default=None, gt=0)
    """Seconds without a checkpoint after which one is saved in between, and kept only until the next. Bounds what a
    crash can cost. Null: by steps only."""
    keep_last: int = Field(default=2, gt=0)
    """Number of newest complete checkpoints that are kept."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints at multiples of this many steps are kept for good. A multiple of `checkpoint_every`."""
    on_checkpoint_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (disk full): stop, or say so and train on until the next one. The last of
    a phase, and that of a stop, must succeed in either case. What was there before stays intact."""
    num_workers: int = Field(default=1, ge=0)
    """Threads or processes per rank that read data ahead. 0 reads in the training loop."""
    worker_kind: Literal["thread", "process"] = "thread"
    """Threads cost least: a batch from a process goes through a pipe. Processes keep what reading costs off the
    training process's interpreter."""
    streaming: StreamingConfig | None = None
    """Read the training samples from shards in sequence, as object stores like it; null reads each sample by
    itself, in an order that is random over the whole split. For the stages that train on tokens."""
    max_time_s: float | None = Field(default=None, gt=0)
    """Seconds after which the run saves a checkpoint and stops, to be continued later. Null: no limit."""


class StagesConfig(StrictModel):
    """What differs from `train` in each stage. A stage without settings uses `train` as it is."""

    base_lm: TrainConfig = TrainConfig()
    """Autoregressive baseline, and at small scale the pretrained backbone of the codec."""
    rqvae: TrainConfig = TrainConfig()
    """The codec."""
    rq_transformer: TrainConfig = TrainConfig()
    """The latent model, on the codes of a finished codec."""
    joint: TrainConfig = TrainConfig()
    """Codec and latent model together."""


class TrackingConfig(StrictModel):
    """Weights & Biases, a mirror of metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with a login (WANDB_API_KEY or netrc), else offline, to be sent later by `wandb sync`.
    Logins are never read from this file."""
    project: str = Field(default="rqvae-text", min_length=1)
    """Project the runs are listed under."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one GPU (or rank) in the run's precision, for model FLOPs utilisation. Null: from a table of
    GPUs, in bf16; where that knows nothing, the utilisation is not logged."""
    reconstructions: int = Field(default=4, ge=0)
    """Validation samples whose reconstruction by the codec is kept at every validation, in the run directory's
    `reconstructions/`. The mirror gets a table of them about ten times a run."""
    entity: str | None = None
    """User or team that owns the project. Null: the login's default."""


class EvaluationConfig(StrictModel):
    """What launch/eval.py measures on the test split."""

    max_samples: int | None = Field(default=None, gt=0)
    """Test samples to evaluate, from the start of the split. Null: all."""
    batch_size: int = Field(default=8, gt=0)
    """Samples per forward pass."""
    num_reconstructions: int = Field(default=4, ge=0)
    """Samples shown in the report with their reconstruction."""
    prompts: tuple[str, ...] = ("Return the", "Raised when", "This function")
    """Prompts continued by the latent model and by the base LM, side by side in the report."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Tokens of each continuation."""
    calibration_samples: int = Field(default=64, ge=0)
    """Validation samples that temperatures and the zero-rate latent are fitted on. 0 leaves those rows out."""
    stochastic_codes: bool = False
    """Also the bound for stochastic codes, E[NLL(tokens | codes)] + KL(q || prior), which a codec with a rate
    term is trained on; one more pass of decoder and latent model."""
    importance_documents: int = Field(default=0, ge=0)
    """Documents on which the importance-weighted bound is formed; position by position, so it is slow."""
    importance_samples: int = Field(default=8, gt=0)
    """Its particles per document."""
    brier_documents: int = Field(default=128, ge=0)
    """Documents that BrierLM is estimated on; 0 leaves it out."""
    brier_offsets: int = Field(default=4, gt=0)
    """Offsets in each of them."""
    quality_samples: int = Field(default=64, ge=0)
    """Prompts continued by every model for the figures of generation quality; 0 leaves them out."""


class BenchmarkConfig(StrictModel):
    """What launch/benchmark.py measures for the report."""

    batch_size: int = Field(default=1, gt=0)
    """Sequences decoded at once."""
    prompt_tokens: int = Field(default=32, gt=0)
    """Tokens of the prompt, not counted in the speed."""
    new_tokens: int = Field(default=128, gt=0)
    """Tokens generated and kept per sequence, the same for every row of the table."""
    repeats: int = Field(default=5, gt=0)
    """Timed repetitions; the median is reported."""
    compile_limit_s: float = Field(default=180.0, gt=0)
    """Seconds that `generate` gets to compile the base LM; if they do not do, its row says so."""


class RunConfig(StrictModel):
    """Everything that one run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's directory under `run_root`: letters, digits, dots, hyphens and underscores."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, sample order and everything drawn at random in training."""
    run_root: str = "runs"
    """Directory that the run directories are created in, relative to where the command is started."""
    stage: Stage | None = None
    """The stage that `train` is for. Set by `--stage`; a run directory's config.yaml carries it."""
    data: DataConfig
    codec: RQVAEConfig
    latent_model: LatentModelConfig = LatentModelConfig()
    train: TrainConfig = TrainConfig()
    """With a stage chosen: the settings of that stage."""
    stages: StagesConfig = StagesConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

    def for_stage(self, stage: Stage) -> RunConfig:
        """A copy with `stage` set and `train` merged for it."""
        section: TrainConfig = getattr(self.stages, stage)
        values = merge(self.train.model_dump(exclude_unset=True), section.model_dump(exclude_unset=True))
        return self.model_copy(update={"stage": stage, "train": TrainConfig.model_validate(values)})

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back to an equal configuration.

        With a stage chosen the text describes that stage only, without the `stages` section.
        """
        values = self.model_dump(mode="json", exclude={"stages"})
        if self.stage is None:
            values["stages"] = {
                name: getattr(self.stages, name).model_dump(mode="json", exclude_unset=True)
                for name in STAGES
            }
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, stage: Stage | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, compose and check a run configuration.

    Args:
        path: YAML file, with `extends: parent.yaml` if it has one parent.
        stage: the stage to train; `train` of the result is merged for it.
        overrides: `a.b=value`, applied in order over the file; the value is parsed as YAML. A path of an
            architecture file given in this way is relative to the working directory.

    Raises:
        ConfigError: a ValueError that lists every mistake with its dotted path.
    """
    values = read_config_file(path)
    return compose_config(values, f"{path} with overrides" if overrides else str(path), stage, overrides)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The values of a run configuration's file and its parents, architecture files in their places; not checked.

    Raises:
        ConfigError: the file cannot be read, or is of another kind.
    """
    values = read_yaml(path, inline=_ARCHITECTURES)
    if "trials" in values:
        raise ConfigError(
            str(path),
            [
                f"trials: this is a sweep, not a run; start it with: python launch/experiments.py --sweep {path}"
            ],
        )
    return values


def compose_config(
    values: Mapping[str, Any], source: str, stage: Stage | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """`load_config` of values that have been read.

    Args:
        source: where they come from; begins the error message.
    """
    values = inline_architectures(apply_overrides(_without_overridden(values, overrides), overrides))
    written_for = values.get("stage")
    if stage is not None and written_for is not None and stage != written_for:
        raise ConfigError(
            source,
            [
                f"stage: this file holds the settings of {written_for} only; "
                f"for {stage} use the file it was made from"
            ],
        )
    mistakes: list[str] = []
    config: RunConfig | None = None
    try:
        config = validate(RunConfig, values, source)
    except ConfigError as error:
        mistakes += error.mistakes
    mistakes += _mistakes_across_fields(values, stage)
    if config is None or mistakes:
        raise ConfigError(source, mistakes)
    return config if stage is None or written_for is not None else config.for_stage(stage)


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Gradient accumulation steps of `config.train` on `world_size` ranks.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    train = config.train
    per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"{config.name} on {world_size} ranks",
            [
                f"train.global_batch_size: {train.global_batch_size} samples cannot be split into passes of "
                f"{per_pass} (micro_batch_size {train.micro_batch_size} x {world_size} ranks); "
                f"use a multiple of {per_pass}, or another micro_batch_size or number of ranks"
            ],
        )
    if train.streaming is not None and train.streaming.streams % world_size:
        raise ConfigError(
            f"{config.name} on {world_size} ranks",
            [
                f"train.streaming.streams: {train.streaming.streams} streams cannot be shared out equally; use a "
                f"multiple of {world_size}, or another number of ranks"
            ],
        )
    return train.global_batch_size // per_pass


def _without_overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` without the stages' own settings of what a `train.x=v` override sets for all stages."""
    paths = [override.partition("=")[0].strip().split(".") for override in overrides]
    sections = values.get("stages")
    if not isinstance(sections, Mapping):
        return dict(values)
    kept = dict(sections)
    for stage, section in sections.items():
        for path in paths:
            if path[0] == "train" and len(path) > 1:
                kept[stage] = section = _without(section, path[1:])
    return {**values, "stages": kept}


def _without(values: Any, path: Sequence[str]) -> Any:
    """`values` without what stands at `path`."""
    if not isinstance(values, Mapping) or path[0] not in values:
        return values
    if len(path) == 1:
        return {key: value for key, value in values.items() if key != path[0]}
    return {**values, path[0]: _without(values[path[0]], path[1:])}


def inline_architectures(values: dict[str, Any], directory: Path = Path()) -> dict[str, Any]:
    """`values` with the paths of architecture files, relative to `directory`, replaced by the files' content."""
    for dotted in _ARCHITECTURES:
        names = dotted.split(".")
        node: Any = values
        for name in names:
            node = node.get(name) if isinstance(node, Mapping) else None
        if isinstance(node, str):
            content = read_yaml(directory / node)
            for name in reversed(names):
                content = {name: content}
            values = merge(values, content)
    return values


def _section(model: type[StrictModel], values: Any) -> Any:
    """`values` as `model`, or None where they are not valid by themselves (reported elsewhere)."""
    try:
        return model.model_validate(values)
    except ValidationError:
        return None


def _mistakes_across_fields(values: Mapping[str, Any], stage: Stage | None) -> list[str]:
    """Mistakes between fields that are valid one by one; sections with mistakes of their own are left out."""
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
