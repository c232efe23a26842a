"""From the run configuration to a latent model that trains, is saved and comes back: every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import TokenDataset, build, finish_codes, load_tokenizer, write_code_shard
from launch import generate, tasks
from launch.benchmark_inference import race
from launch.config import BenchmarkConfig, EvaluationConfig, RunConfig, load_config
from launch.dry_run import dry_run
from launch.eval import evaluate
from launch.latent_model import describe_match, latent_model_config
from launch.optimizer import parameter_groups
from launch.paths import codes_directory
from launch.race_models import trained
from launch.race_prompts import prompts_from
from launch.speed_model import Machine
from rqvae import RQVAE, BaseLM, FlatTransformer, LatentModel, RQTransformer, load_latent_model
from tests.integration.conftest import NANO, write_corpus

BACKBONE = [
    "latent_model.spatial_backbone.architecture={vocab_size: 320, hidden_size: 64, intermediate_size: 128, "
    "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32}",
]
FLAT = "latent_model.model=flat_transformer"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point at token shards and at codes drawn at random."""
    directory = tmp_path_factory.mktemp("latent")
    draw = np.random.default_rng(0)
    write_corpus(directory / "text.jsonl", 200)
    overrides = [
        f"data.directory={directory / 'tokens'}",
        f"data.source.paths={directory / 'text.jsonl'}",
        f"run_root={directory}",
    ]
    config = load_config(NANO, overrides=overrides)
    build(config.data, num_workers=1)
    for split in ("train", "validation", "test"):
        tokens = TokenDataset(config.data.directory, split)
        for shard in range(len(tokens.shards)):
            write_code_shard(
                codes_directory(config),
                split,
                shard,
                draw.integers(32, size=(len(tokens.shard_range(shard)), 16, 3)),
                token_dataset=tokens,
                codec_hash="c0dec",
                compression_factor=4,
                codebook_sizes=(32, 32, 32),
            )
    finish_codes(codes_directory(config), config.data.directory, codec_hash="c0dec")
    return overrides


def run_config(data: list[str], *overrides: str) -> RunConfig:
    return load_config(NANO, stage="rq_transformer", overrides=[*data, *overrides])


@pytest.mark.parametrize(
    ("overrides", "model_class"),
    [
        ([], RQTransformer),
        ([FLAT], FlatTransformer),
        ([FLAT, "latent_model.match=compute"], FlatTransformer),
        ([FLAT, "latent_model.match=parameters", "latent_model.head=shared"], FlatTransformer),
        (["latent_model.head=shared"], RQTransformer),
        (["latent_model.spatial_input=tokens"], RQTransformer),
        (["latent_model.spatial_input=both"], RQTransformer),
        (BACKBONE, RQTransformer),
        ([*BACKBONE, "latent_model.spatial_input=tokens"], RQTransformer),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_every_option_trains_and_is_saved(
    data: list[str], tmp_path: Path, overrides: list[str], model_class: type[LatentModel]
) -> None:
    config = run_config(data, *overrides)
    task = tasks.RQTransformerTask(config)
    torch.manual_seed(0)
    model = task.create_model()
    assert type(model) is model_class
    assert model.config == latent_model_config(config, "c0dec")
    batch = task.dataset("train").read(range(4))
    tokens = (batch["document_ids"] > 0).sum()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, task.backbone_parameters(model), config.train), lr=3e-3
    )
    losses = []
    for step in range(12):
        out = task.forward(model, batch, tokens, step)
        losses.append(task.metrics(out.sums)["loss"])
        assert out.loss.item() == pytest.approx(losses[-1], rel=1e-4)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    model.save_pretrained(tmp_path)
    again = task.load_model(tmp_path)
    assert again.config == load_latent_model(tmp_path).config == model.config
    assert torch.equal(task.forward(again, batch, tokens, 0).loss, task.forward(model, batch, tokens, 0).loss)


@pytest.mark.parametrize("by", ["parameters", "compute"])
def test_the_match_is_resolved_and_said(data: list[str], capsys: pytest.CaptureFixture[str], by: str) -> None:
    config = run_config(data, FLAT, f"latent_model.match={by}")
    reference = tasks.RQTransformerTask(run_config(data)).create_model()
    model = tasks.RQTransformerTask(config).create_model()
    ratio = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in reference.parameters())
    line = describe_match(config)
    assert line is not None
    assert line.startswith(f"flat_transformer of {model.config.spatial_layers} layers, matched by {by}")
    assert f"{ratio:.3f} x the parameters" in line
    assert tasks.RQTransformerTask(config).notes() == [line]
    assert dry_run(config, 1) == 0
    assert line in capsys.readouterr().out
    assert describe_match(run_config(data, FLAT)) is None
    assert tasks.RQTransformerTask(run_config(data)).notes() == []


def test_a_pretrained_spatial_backbone_learns_at_its_own_rate(data: list[str], tmp_path: Path) -> None:
    config = run_config(data, *BACKBONE, f"latent_model.spatial_backbone.pretrained={tmp_path}")
    spatial_backbone = config.latent_model.spatial_backbone
    assert spatial_backbone is not None
    torch.manual_seed(1)
    lm = BaseLM(spatial_backbone.architecture, eos_token_id=0)
    lm.save_pretrained(tmp_path)
    task = tasks.RQTransformerTask(config)
    model: Any = task.create_model()
    task.load_initial_weights(model)
    backbone = model.spatial.block.backbone
    assert torch.equal(backbone.norm.weight, lm.lm.model.norm.weight)
    assert torch.equal(backbone.layers[0].mlp.up_proj.weight, lm.lm.model.layers[0].mlp.up_proj.weight)
    groups = parameter_groups(model, task.backbone_parameters(model), config.train)
    named = {group["name"]: group["params"] for group in groups}
    count = sum(len(named[name]) for name in ("backbone", "backbone_no_decay"))
    assert count == len(list(backbone.parameters()))
    plain = tasks.RQTransformerTask(run_config(data))
    plain.load_initial_weights(plain.create_model())  # nothing to load
    assert list(plain.backbone_parameters(plain.create_model())) == []


@pytest.mark.parametrize(
    ("overrides", "row", "layer_calls"),
    [
        # Decoder: 1 + 1 layers, deferred over 16 tokens or once for 4.
        ([], "latent, deferred decoding", (1 + 3 * 1) / 4 + 2 / 16),
        ([FLAT, "latent_model.spatial_layers=2"], "latent, deferred decoding", 3 * 2 / 4 + 2 / 16),
        (["latent_model.spatial_input=both"], "latent, streaming decoding", (1 + 3 * 1) / 4 + 2 / 4),
        ([*BACKBONE, "latent_model.spatial_input=tokens"], "latent, streaming decoding", 1 + 2 / 4),
    ],
    ids=["rq", "flat", "both", "backbone and tokens"],
)
def test_every_kind_is_evaluated_timed_and_generated_with(
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    row: str,
    layer_calls: float,
) -> None:
    config = run_config(data, *overrides)
    directory = Path(config.data.directory)
    torch.manual_seed(0)
    # Not `create_model`, whose codec_hash is that of the codes drawn above.
    model_class = type(tasks.RQTransformerTask(config).create_model())
    model_class(latent_model_config(config)).save_pretrained(tmp_path / "rq_transformer")
    RQVAE(config.codec).save_pretrained(tmp_path / "rqvae")
    BaseLM(config.codec.backbone.architecture, eos_token_id=0).save_pretrained(tmp_path / "base_lm")
    load_tokenizer(directory).save_pretrained(tmp_path / "tokenizer")

    settings = EvaluationConfig(
        max_samples=4, max_new_tokens=8, calibration_samples=2, brier_documents=4, quality_samples=2
    )
    report = evaluate(tmp_path, directory, "test", settings)
    bits = report["bits_per_byte"]
    assert bits["latent_bound"] == pytest.approx(bits["latent_codes"] + bits["latent_reconstruction"])
    # Untrained: near log2(32) bits for each of 3 codes of every 4 tokens.
    assert report["nats_per_token"]["latent_codes"] == pytest.approx(3 * 5 / 4 * 0.693, rel=0.3)

    timing = BenchmarkConfig(prompt_tokens=4, new_tokens=16, repeats=1)
    racers = trained(tmp_path, directory, torch.float32, torch.device("cpu"))
    wanted = {"generate", "lean", "deferred", "streaming"}
    table = race(racers, prompts_from(directory, 1, 4), timing, lambda: Machine(1e9, 1e9, 1e-6), wanted)
    rows = {entry["name"]: entry for entry in table["rows"]}
    # A model that reads text has no deferred decoding; what has it streams too.
    assert ("deferred" in {entry["key"] for entry in table["missing"]}) == ("streaming" in row)
    assert "latent, streaming decoding" in rows
    assert rows["base LM, lean loop"]["agreement"] == 1.0
    assert rows[row]["layer_calls_per_token"] == pytest.approx(layer_calls)
    assert rows[row]["tokens_per_s"] > 0

    arguments = ["--model", str(tmp_path), "--prompt", "The river", "--max-new-tokens", "6"]
    assert generate.main(arguments) == 0
    assert "The river" in capsys.readouterr().out
