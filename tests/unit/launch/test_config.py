from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.yaml_config import ConfigError
from launch.config import (
    STAGES,
    EvaluationConfig,
    RunConfig,
    TrainConfig,
    check_world_size,
    load_config,
    load_measurement,
)

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = CONFIGS / "tiny_rqvae.yaml"
RUNNABLE = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "backbones" and "trials" not in yaml.safe_load(path.read_text())
)


def write(directory: Path, **changes: Any) -> Path:
    """A child of tiny.yaml with the given top-level sections."""
    path = directory / "child.yaml"
    path.write_text(yaml.safe_dump({"extends": str(TINY), **changes}))
    return path


def mistakes(path: Path, *overrides: str, stage: Any = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, stage=stage, overrides=overrides)
    assert isinstance(caught.value, ValueError)
    return caught.value.mistakes


@pytest.mark.parametrize("stage", [None, *STAGES])
@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_every_shipped_config_loads_for_every_stage(path: Path, stage: Any) -> None:
    codec = load_config(path).codec.model
    if codec == "identity" and stage in ("rqvae", "joint"):
        assert "nothing to train" in mistakes(path, stage=stage)[0]
        return
    if codec == "anchor" and stage == "joint":
        assert "certain codes" in mistakes(path, stage=stage)[0]
        return
    config = load_config(path, stage=stage)
    assert config.stage == stage
    assert config.name in (path.stem, f"benchmark-{path.stem}", f"sweep-{path.stem}")
    assert check_world_size(config, 1) >= 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_config_names_the_backbone_of_its_size(path: Path) -> None:
    written = yaml.safe_load((CONFIGS / "backbones" / re.sub("_(rqvae|identity)", "", path.name)).read_text())
    assert load_config(path).codec.backbone.architecture.model_dump() == written


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_0.6b", 596_049_920),
        ("qwen3_1.7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
    ],
)
def test_qwen3_architectures_have_the_published_parameter_counts(name: str, expected: int) -> None:
    a = load_config(CONFIGS / f"{name}.yaml").codec.backbone.architecture
    attention = a.hidden_size * a.head_dim * (2 * a.num_attention_heads + 2 * a.num_key_value_heads)
    norms = 2 * a.hidden_size + 2 * a.head_dim
    layer = attention + 3 * a.hidden_size * a.intermediate_size + norms
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tie_word_embeddings else 2)
    assert embeddings + a.num_hidden_layers * layer + a.hidden_size == expected


def test_all_mistakes_are_reported_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        trian={"steps": 5},
        train={"learning_rte": 1e-3, "zero_stage": 7},
        codec={"quantizer": {"ema_decya": 0.9}},
        stages={"rqvae": {"frozen_stpes": 3}},
        data={"sample_lenght": 256},
        tracking={"wandb": "offlin"},
    )
    found = mistakes(path)
    for fragment in (
        "trian: unknown key; did you mean train?",
        "train.learning_rte: unknown key; did you mean train.learning_rate?",
        "train.zero_stage",
        "codec.quantizer.ema_decya: unknown key; did you mean codec.quantizer.ema_decay?",
        "stages.rqvae.frozen_stpes: unknown key; did you mean stages.rqvae.frozen_steps?",
        "data.sample_lenght: unknown key; did you mean data.sample_length?",
        "tracking.wandb",
    ):
        assert any(line.startswith(fragment) for line in found), (fragment, found)
    assert len(found) == 7


def test_mistakes_across_fields_are_reported_beside_misspelt_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        tracking={"projetc": "x"},
        train={"global_batch_size": 8, "micro_batch_size": 3},
        data={"sample_length": 260, "document_grid": 10},
        codec={"compression_factor": 8},
    )
    found = "\n".join(mistakes(path))
    assert "tracking.projetc: unknown key; did you mean tracking.project?" in found
    assert "train.global_batch_size: 8 is not a multiple of micro_batch_size=3" in found
    assert "data.sample_length: 260 tokens do not divide" in found
    assert "data.document_grid: 10 is not a multiple of codec.compression_factor=8" in found
    assert found.count("micro_batch_size=3") == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["codec.compression_factor=3"], "data.sample_length: 256 tokens do not divide"),
        (
            ["codec.compression_factor=8"],
            "data.document_grid: 4 is not a multiple of codec.compression_factor=8",
        ),
        (
            ["data.tokenizer.vocab_size=8000"],
            "data.tokenizer.vocab_size: 8000 tokens do not fit into the 1024",
        ),
        (["data.sample_length=4096"], "data.sample_length: 4096 exceeds"),
        (["train.warmup_steps=601"], "train.warmup_steps: 601 exceeds steps=400"),
        (["stages.rqvae.frozen_steps=9999"], "stages.rqvae.frozen_steps: 9999 exceeds steps=460"),
        (
            ["stages.rqvae.switch_warmup_steps=9999"],
            "stages.rqvae.switch_warmup_steps: 9999 exceeds the 430",
        ),
        (
            ["stages.base_lm.frozen_steps=10"],
            "stages.base_lm.frozen_steps: has an effect in rqvae and joint only",
        ),
        (["stages.rqvae.free_nats=0.1"], "stages.rqvae.free_nats: has an effect in joint only"),
        (
            ["stages.joint.initial_weights=somewhere"],
            "stages.joint.initial_weights: has an effect in base_lm and rqvae and rq_transformer only",
        ),
        (
            ["train.checkpoint_every=2", "train.keep_every=3"],
            "train.keep_every: 3 is not a multiple of checkpoint_every=2",
        ),
        (["train.precision=bf16", "train.zero_stage=0"], "train.zero_stage: 0 keeps no fp32 master weights"),
        (["train.offload_param=cpu", "train.zero_stage=2"], "train.offload_param: cpu needs zero_stage 3"),
        (["train.offload_optimizer=nvme"], "train.nvme_path: missing"),
        (["name=a/b"], "name: "),
        (["latent_model.match=compute"], "latent_model: match: only a flat_transformer is matched"),
        (
            ["latent_model.model=flat_transformer", "latent_model.spatial_input=tokens"],
            "latent_model: spatial_input: a flat_transformer reads codes only",
        ),
        (
            ["latent_model.head=shared", "codec.codebook_size=[8, 8, 8, 8, 8, 8, 8, 4]"],
            "latent_model.head: shared needs codebooks of one size",
        ),
        (
            [
                f"latent_model.spatial_backbone.architecture={CONFIGS}/backbones/tiny.yaml",
                "latent_model.spatial_layers=7",
            ],
            "latent_model: spatial_layers (7) must be the spatial_backbone's num_hidden_layers (2)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_impossible_combinations(overrides: list[str], expected: str) -> None:
    found = mistakes(TINY, *overrides)
    assert any(line.startswith(expected) for line in found), found


def test_precedence_of_overrides_stage_sections_and_defaults(tmp_path: Path) -> None:
    path = write(
        tmp_path, train={"steps": 50, "warmup_steps": 1, "log_every": 7}, stages={"rqvae": {"steps": 700}}
    )
    rqvae = load_config(path, stage="rqvae").train
    assert (rqvae.steps, rqvae.log_every, rqvae.keep_last) == (700, 7, TrainConfig().keep_last)
    assert load_config(path, stage="joint").train.steps == 50
    assert load_config(path, stage="rqvae", overrides=["stages.rqvae.steps=800"]).train.steps == 800
    everywhere = ["train.steps=900", "stages.rqvae.steps=800"]
    for order in (everywhere, everywhere[:1]):
        assert load_config(path, stage="rq_transformer", overrides=order).train.steps == 900
    assert load_config(path, stage="rqvae", overrides=["train.steps=900"]).train.steps == 900


def test_a_stage_may_reset_a_value_to_null(tmp_path: Path) -> None:
    path = write(tmp_path, train={"max_time_s": 60}, stages={"rqvae": {"max_time_s": None}})
    assert load_config(path, stage="rqvae").train.max_time_s is None
    assert load_config(path, stage="base_lm").train.max_time_s == 60


@pytest.mark.parametrize("stage", [None, "rqvae"])
def test_yaml_round_trip(stage: Any, tmp_path: Path) -> None:
    config = load_config(TINY, stage=stage, overrides=["train.learning_rate=1e-4"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = load_config(tmp_path / "config.yaml")
    assert again.model_dump(exclude={"stages"}) == config.model_dump(exclude={"stages"})
    if stage is None:
        assert again == config
        assert again.for_stage("rqvae") == config.for_stage("rqvae")


def test_a_stages_own_config_is_refused_for_another_stage(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(load_config(TINY, stage="rqvae").to_yaml())
    assert load_config(tmp_path / "config.yaml", stage="rqvae").stage == "rqvae"
    assert "rqvae only" in mistakes(tmp_path / "config.yaml", stage="base_lm")[0]


def test_architecture_path_is_relative_to_the_naming_file_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    child = write(tmp_path / "deep")
    assert load_config(child).codec.backbone.architecture.hidden_size == 256
    narrowed = load_config(child, overrides=["codec.backbone.architecture.num_hidden_layers=1"])
    assert narrowed.codec.backbone.architecture.num_hidden_layers == 1
    monkeypatch.chdir(CONFIGS)
    larger = load_config(child, overrides=["codec.backbone.architecture=backbones/qwen3_0.6b.yaml"])
    assert larger.codec.backbone.architecture.hidden_size == 1024


def test_the_spatial_backbone_may_be_named_by_a_path_too(tmp_path: Path) -> None:
    latent_model = {
        "spatial_dim": 256,
        "spatial_layers": 2,
        "spatial_backbone": {"architecture": str(CONFIGS / "backbones/tiny.yaml"), "pretrained": "some/lm"},
    }
    config = load_config(write(tmp_path, latent_model=latent_model))
    assert config.latent_model.spatial_backbone is not None
    assert config.latent_model.spatial_backbone.architecture == config.codec.backbone.architecture
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml").latent_model == config.latent_model
    given = [f"latent_model.spatial_backbone.architecture={CONFIGS / 'backbones/qwen3_0.6b.yaml'}"]
    size = ["latent_model.spatial_dim=1024", "latent_model.spatial_layers=28"]
    larger = load_config(write(tmp_path, latent_model=latent_model), overrides=[*given, *size])
    assert larger.latent_model.spatial_backbone is not None
    assert larger.latent_model.spatial_backbone.architecture.hidden_size == 1024


def test_batch_arithmetic() -> None:
    config = load_config(TINY, overrides=["train.global_batch_size=24", "train.micro_batch_size=4"])
    assert [check_world_size(config, world) for world in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"use a multiple of 16, or another micro_batch_size"):
        check_world_size(config, 4)


def test_every_field_is_documented() -> None:
    import ast

    launch = Path(__file__).parents[3] / "launch"
    body = [
        node
        for name in ("config_sections.py", "engine_config.py")
        for node in ast.parse((launch / name).read_text()).body
    ]
    for model in (node for node in body if isinstance(node, ast.ClassDef)):
        for field, following in zip(model.body, [*model.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert documented, f"{model.name}.{ast.unparse(field.target)}"


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from launch.config import load_config; "
        "from launch.deepspeed_config import deepspeed_config; "
        f"deepspeed_config(load_config({str(TINY)!r}, 'rqvae').train, 'fp32', 2); "
        "print({'torch', 'transformers', 'deepspeed', 'wandb', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_run_config_forbids_unknown_sections() -> None:
    assert RunConfig.model_config["extra"] == "forbid"


def test_streams_are_shared_out_equally() -> None:
    config = load_config(
        TINY, "rqvae", ["train.global_batch_size=24", "train.micro_batch_size=1", "train.streaming.streams=6"]
    )
    assert [check_world_size(config, world) for world in (1, 2, 3)]
    with pytest.raises(ConfigError, match=r"train\.streaming\.streams: 6 streams .* use a multiple of 4"):
        check_world_size(config, 4)
    with pytest.raises(
        ConfigError, match=r"streaming\.streams: train\.global_batch_size=24 is not a multiple of 5"
    ):
        load_config(TINY, "rqvae", ["train.global_batch_size=24", "train.streaming.streams=5"])
    with pytest.raises(ConfigError, match=r"train\.streaming: the stage rq_transformer reads codes"):
        load_config(TINY, "rq_transformer", ["train.streaming.streams=2"])


def test_a_run_is_the_same_wherever_its_shards_are_streamed_from() -> None:
    from launch.resume import run_hash

    def hash_with(*overrides: str) -> str:
        return run_hash(load_config(TINY, "rqvae", overrides), "fp32")

    streamed = hash_with("train.streaming.streams=2")
    assert streamed == hash_with("train.streaming.streams=2", "train.streaming.url=memory://elsewhere")
    assert len({streamed, hash_with(), hash_with("train.streaming.streams=4")}) == 3


def test_models_are_measured_by_a_file_or_by_defaults_and_overrides_alone() -> None:
    path = CONFIGS / "tiny.yaml"
    of_file = load_measurement(path, ["evaluation.max_samples=3"])
    assert of_file.evaluation == load_config(path, overrides=["evaluation.max_samples=3"]).evaluation
    alone = load_measurement(None, ["benchmark.repeats=2"])
    assert (alone.benchmark.repeats, alone.evaluation) == (2, EvaluationConfig())
    with pytest.raises(ConfigError) as error:
        load_measurement(None, ["evaluation.max_sample=3", "codec.compression_factor=8"])
    assert "did you mean evaluation.max_samples?" in str(error.value)
    assert "codec: unknown key; valid here: benchmark, evaluation" in str(error.value)
