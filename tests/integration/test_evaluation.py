"""Evaluation of a whole project: the same figures in any batches and on any number of ranks, and what they say."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import TokenDataset, load_tokenizer
from launch.config import RunConfig, load_config
from launch.eval import evaluate
from launch.latent_model import latent_model_config
from launch.precision import DTYPES
from rqvae import RQVAE, BaseLM, IdentityCodec, RQTransformer
from tests.integration.conftest import NANO, REPOSITORY, run

SETTINGS = (
    "evaluation.max_samples=null",
    "evaluation.calibration_samples=8",
    "evaluation.brier_documents=40",
    "evaluation.brier_offsets=2",
    "evaluation.quality_samples=4",
    "evaluation.stochastic_codes=true",
    "evaluation.importance_documents=3",
    "evaluation.importance_samples=2",
)


@pytest.fixture(scope="module")
def project(nano_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    """Untrained models of every kind, their codebooks from latents of their own."""
    config = load_config(NANO, overrides=[*nano_data, *SETTINGS])
    directory = tmp_path_factory.mktemp("evaluation") / "model"
    train = TokenDataset(config.data.directory, "train")
    torch.manual_seed(0)
    codec = RQVAE(config.codec).eval()
    batch = train.read(range(16))
    with torch.no_grad():
        latents = codec.encoder(batch["input_ids"], batch["document_ids"])
    codec.quantizer.initialize(latents.flatten(0, 1), seed=0)
    codec.save_pretrained(directory / "rqvae")
    RQTransformer(latent_model_config(config, codec.codec_hash())).save_pretrained(
        directory / "rq_transformer"
    )
    BaseLM(config.codec.backbone.architecture, train.eos_token_id).save_pretrained(directory / "base_lm")
    load_tokenizer(config.data.directory).save_pretrained(directory / "tokenizer")
    tokens = load_config(
        NANO,
        overrides=[
            *nano_data,
            "codec.model=identity",
            "codec.compression_factor=2",  # not that of the codec beside it
            "codec.codebook_levels=null",
            "codec.codebook_size=null",
        ],
    )
    identity = IdentityCodec(tokens.codec)
    identity.save_pretrained(directory / "identity_codec/rqvae")
    on_tokens = RQTransformer(latent_model_config(tokens, identity.codec_hash()))
    on_tokens.save_pretrained(directory / "identity_codec/rq_transformer")
    return config, directory


def figures(report: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(report, dict):
        for key, value in report.items():
            yield from figures(value, f"{path}.{key}")
    elif isinstance(report, list):
        for i, value in enumerate(report):
            yield from figures(value, f"{path}.{i}")
    elif isinstance(report, int | float):
        yield path, float(report)


def test_figures_do_not_depend_on_batches_or_ranks(project: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, directory = project
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        *["launch/eval.py", "--model", str(directory), "--data", config.data.directory],
        *["--json", str(tmp_path / "two.json"), "--config", str(NANO), *SETTINGS, "evaluation.batch_size=3"],
        *[f"data.directory={config.data.directory}", "data.source.paths=unused"],
    ]
    result = run(command, timeout_s=900)
    assert result.returncode == 0, result.stdout + result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    by_document = tmp_path / "documents.jsonl"
    one = evaluate(directory, Path(config.data.directory), "test", config.evaluation, by_document=by_document)
    for key in ("environment", "samples"):
        one.pop(key), two.pop(key)
    of_two = dict(figures(two))
    assert set(dict(figures(one))) == set(of_two)
    for name, value in figures(one):
        assert of_two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name

    bits, nats = one["bits_per_byte"], one["nats_per_token"]
    rows = {
        "uniform",
        "unigram",
        "zero_rate",
        "base_lm",
        "base_lm_calibrated",
        "identity_codec",
        "latent_bound",
    }
    assert rows | {"latent_bound_calibrated", "stochastic_bound"} <= set(bits)
    assert one["missing"] == {}
    assert nats["latent_bound"] == pytest.approx(nats["latent_codes"] + nats["latent_reconstruction"])
    assert nats["uniform"] == pytest.approx(math.log(320), rel=0.02)
    # Calibration can only help on the text it is fitted on; on other text it does not hurt much.
    assert nats["latent_bound_calibrated"] < nats["latent_bound"] * 1.01
    assert nats["zero_rate"] < nats["uniform"] * 1.05
    # Without quantizing, counted by hand; the codebooks of a codec that was not trained lose what it knew.
    codec, tokens, right = RQVAE.from_pretrained(directory / "rqvae"), 0, 0
    split = TokenDataset(config.data.directory, "test")
    for place in range(len(split)):
        batch = split.read([place])
        out = codec(batch["input_ids"], document_ids=batch["document_ids"], quantize=False)
        tokens += int((batch["document_ids"] > 0).sum())
        right += int(out.correct.sum())
    reconstruction = one["reconstruction"]
    assert reconstruction["continuous_token_accuracy"] == pytest.approx(right / tokens)
    assert reconstruction["continuous_nats_per_token"] != pytest.approx(reconstruction["nats_per_token"])
    low, high = one["bits_per_byte_intervals"]["base_lm"]
    assert low < bits["base_lm"] < high
    documents = [json.loads(line) for line in by_document.read_text().splitlines()]
    assert (
        len(documents)
        == one["evaluation"]["documents"]
        == TokenDataset(config.data.directory, "test").num_documents
    )
    total = sum(row["nats"]["base_lm"] for row in documents)
    assert total / one["evaluation"]["bytes"] / math.log(2) == pytest.approx(bits["base_lm"], rel=1e-6)


def test_a_figure_that_cannot_be_had_is_named(project: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, directory = project
    settings = config.evaluation.model_copy(
        update={"max_samples": 2, "brier_documents": 0, "quality_samples": 0, "importance_documents": 0}
    )
    (tmp_path / "rqvae").symlink_to(directory / "rqvae")
    report = evaluate(tmp_path, Path(config.data.directory), "validation", settings)
    assert set(report["missing"]) == {
        "latent_bound",
        "base_lm",
        "identity_codec",
        "calibrated rows and zero_rate",
    }
    assert set(report["bits_per_byte"]) == {"uniform", "unigram", "latent_reconstruction"}


def test_figures_in_bf16_are_near_those_in_fp32(project: tuple[RunConfig, Path]) -> None:
    config, directory = project
    settings = config.evaluation.model_copy(
        update={"max_samples": 16, "importance_documents": 0, "brier_documents": 8, "quality_samples": 2}
    )
    reports = {
        precision: evaluate(directory, Path(config.data.directory), "test", settings, precision=precision)
        for precision in DTYPES
    }
    assert [report["evaluation"].pop("precision") for report in reports.values()] == list(DTYPES)
    for report in reports.values():  # what is drawn differs, and what the machine does
        for key in ("environment", "samples", "brier_lm", "sample_quality", "prompt_lengths", "codebook"):
            report.pop(key)
    fp32, bf16 = (dict(figures(report)) for report in reports.values())
    assert set(fp32) == set(bf16)
    assert any(bf16[name] != value for name, value in fp32.items())
    for name, value in fp32.items():
        assert bf16[name] == pytest.approx(value, rel=0.05, abs=0.02), name


def test_standard_tasks_do_not_depend_on_ranks(project: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """The real harness, every kind of request; the requests are shared out over two ranks."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")
    tasks = ["--tasks", "arc_easy,lambada_openai,wikitext", "--max-length", "48", "--limit", "3"]
    options = [*["--model", str(project[1]), "--local-data", str(REPOSITORY / "tests/offline_tasks")], *tasks]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    reports = {}
    for name, launcher in (("one", [sys.executable]), ("two", torchrun)):
        path = tmp_path / f"{name}.json"
        result = run([*launcher, "launch/eval_tasks.py", *options, "--json", str(path)], timeout_s=900)
        assert result.returncode == 0, result.stdout + result.stderr
        reports[name] = json.loads(path.read_text())["tasks"]
    assert set(reports["one"]) == {"base_lm", "latent", "identity_codec"}
    assert reports["one"]["latent"]["contexts_truncated"] > 0
    of_two = dict(figures(reports["two"]))
    assert set(of_two) == {name for name, _ in figures(reports["one"])}
    for name, value in figures(reports["one"]):
        assert of_two[name] == pytest.approx(value, rel=1e-4), name
