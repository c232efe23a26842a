"""Sections of a run configuration that the commands here own: training, stages, tracking, evaluation, benchmark."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from data_pipeline.config import StreamingConfig
from launch.engine_config import EngineConfig
from rqvae.config import StrictModel

Stage = Literal["base_lm", "rqvae", "rq_transformer", "joint"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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
