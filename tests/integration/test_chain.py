"""The demo's chain from text to report, at the smallest size, as real processes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rqvae import RQVAE, RQTransformer
from tests.integration.conftest import NANO, run


def losses(metrics: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]


def test_chain_from_text_to_report(tmp_path: Path, nano_corpus: Path) -> None:
    overrides = [
        f"run_root={tmp_path}",
        f"data.directory={tmp_path / 'data'}",
        f"data.source.paths={nano_corpus}",
    ]
    command = [sys.executable, "launch/demo.py", "--config", str(NANO), *overrides]
    first = run(command, timeout_s=600)
    assert first.returncode == 0, first.stdout + first.stderr

    project = tmp_path / "demo"
    report = json.loads((project / "report.json").read_text())
    bits = report["bits_per_byte"]
    assert set(bits) == {
        "uniform",
        "unigram",
        "base_lm",
        "latent_bound",
        "latent_codes",
        "latent_reconstruction",
        "zero_rate",
        "base_lm_calibrated",
        "latent_bound_calibrated",
        "latent_codes_calibrated",
        "latent_reconstruction_calibrated",
    }
    assert bits["latent_bound"] == pytest.approx(bits["latent_codes"] + bits["latent_reconstruction"])
    assert 0 < bits["base_lm"] < bits["uniform"]
    assert len(report["codebook"]["levels"]) == 3
    keys = [row["key"] for row in report["speed"]["rows"]]
    assert keys == ["generate", "lean", "lookup", "deferred", "streaming"]
    stages = {"base_lm", "rqvae", "rq_transformer"}
    assert set(report["compute"]) == {*stages, "encoding", "total_base_lm", "total_latent"}
    assert (project / "report.html").stat().st_size > 10_000

    # Rank 0 has 4 of the 6 validation samples, which were kept with what ZeRO-3's forward pass made of them.
    shown = {path.name: path.read_text() for path in (project / "rqvae/reconstructions").iterdir()}
    assert sorted(shown) == ["step-00000010.txt", "step-00000020.txt"]
    for text in shown.values():
        totals = re.findall(r"# \d: (\d+) of (\d+) tokens wrong", text)
        assert len(totals) == 4
        marks = text.replace("<|endoftext|>", "").count("|") - 4  # the headings explain the marks
        assert marks == sum(int(wrong) for wrong, _ in totals)
    wrong, of = (sum(map(int, column)) for column in zip(*totals, strict=True))
    assert 0 < wrong < of

    vae = RQVAE.from_pretrained(project / "model/rqvae")
    rq_transformer = RQTransformer.from_pretrained(project / "model/rq_transformer")
    assert rq_transformer.config.codec_hash == vae.codec_hash()
    AutoModelForCausalLM.from_pretrained(project / "model/base_lm")
    assert AutoTokenizer.from_pretrained(project / "model/tokenizer").eos_token_id is not None

    # ZeRO-3 on two ranks, with the head tied to the embeddings, learns what one process with whole weights learns.
    assert json.loads((project / "model/base_lm/config.json").read_text())["tie_word_embeddings"]
    alone = run(
        [
            *[sys.executable, "launch/train.py", "--config", str(NANO), "--stage", "base_lm"],
            *["name=alone", *overrides, "train.zero_stage=0", "tracking.wandb=disabled"],
        ]
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    expected = losses(tmp_path / "alone/base_lm/metrics.jsonl")
    assert len(expected) > 5
    assert expected[-1] < 0.9 * expected[0]
    assert losses(project / "base_lm/metrics.jsonl") == pytest.approx(expected, rel=1e-5)

    again = run(command, timeout_s=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done already") == first.stdout.count(" s\n")

    # Codes of another codec are refused.
    shutil.rmtree(project / "rq_transformer")
    foreign = run(
        [
            *[sys.executable, "launch/train.py", "--config", str(NANO), "--stage", "rq_transformer"],
            *["name=demo", *overrides, "codec.codebook_size=16"],
        ]
    )
    assert foreign.returncode == 2
    assert "codes in" in foreign.stderr
