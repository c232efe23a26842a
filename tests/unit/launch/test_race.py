"""`launch/benchmark.py inference` on random weights of a tiny shape: rows, reasons, figures, page, command line."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch import benchmark, unsloth_row
from launch.benchmark_inference import about, race, report_speed, warm_up
from launch.config import BenchmarkConfig, RunConfig, load_config
from launch.parameters import parameters_without_storage
from launch.race_command import AXES, points
from launch.race_models import Racers, fill_at_random, parameter_bytes, random_weights
from launch.race_page import write_race
from launch.race_prompts import random_prompts
from launch.race_rows import NAMES, Output, Row, agreement
from launch.speed_model import Machine
from tests.integration.conftest import NANO

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
DATA = ["data.directory=none", "data.source.paths=[none]"]
MACHINE = Machine(1e9, 1e9, 1e-6)
SETTINGS = BenchmarkConfig(prompt_tokens=7, new_tokens=10, repeats=2)
OURS = {"generate", "static", "lean", "lookup", "assisted", "identity", "deferred", "streaming"}
FIGURES = {
    "key", "name", "kind", "is_streaming", "tokens_per_s", "ms_per_token", "spread_ms_per_token", "first_text_ms",
    "weight_bytes",
    "peak_growth_bytes", "kv_bytes_per_token", "decoder_kv_bytes_per_token", "split_ms_per_token", "overhead_share",
    "speedup_over_fastest_ar", "speedup_over_generate", "agreement", "predicted_ms_per_token",
    "predicted_over_measured", "bits_per_byte", "note",
}  # fmt: skip


def config(*overrides: str) -> RunConfig:
    return load_config(NANO, overrides=[*DATA, *overrides])


@pytest.fixture(scope="module")
def racers() -> Racers:
    run = config()
    return random_weights(run, torch.float32, CPU, assistant=run.codec.backbone.architecture)


@pytest.fixture(scope="module")
def table(racers: Racers) -> dict[str, Any]:
    prompts = random_prompts(320, 1, SETTINGS.prompt_tokens)
    return race(racers, prompts, SETTINGS, lambda: MACHINE, OURS, {"base_lm": 2.0, "latent_bound": 3.0})


def test_every_row_is_there_or_has_a_reason(table: dict[str, Any]) -> None:
    assert {row["key"] for row in table["rows"]} == OURS
    missing = {row["key"]: row["reason"] for row in table["missing"]}
    assert set(missing) == set(NAMES) - OURS
    assert set(missing.values()) == {"left out by --rows"}


def test_figures_of_rows(table: dict[str, Any], racers: Racers) -> None:
    rows = {row["key"]: row for row in table["rows"]}
    for row in rows.values():
        assert set(row) >= FIGURES, row["name"]
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"])
    fastest = min(row["ms_per_token"] for row in rows.values() if row["kind"] == "ar")
    assert rows["deferred"]["speedup_over_fastest_ar"] == fastest / rows["deferred"]["ms_per_token"]
    assert rows["generate"]["speedup_over_generate"] == 1.0
    # Greedy decoding in fp32 writes the same tokens however it is done.
    for key in OURS - {"identity"}:
        assert rows[key]["agreement"] == 1.0, key
    # 1 layer, 1 head of 32, keys and values, 4 bytes; spatial: 1 layer of 64, one position in 4 tokens.
    assert rows["generate"]["kv_bytes_per_token"] == table["ar_kv_bytes_per_token"] == 2 * 32 * 4
    assert rows["streaming"]["kv_bytes_per_token"] == 2 * 64 * 4 / 4
    assert rows["streaming"]["decoder_kv_bytes_per_token"] == 2 * 32 * 4
    assert rows["identity"]["decoder_kv_bytes_per_token"] == 0
    assert table["ar_kv_bytes_over_compression_factor"] == 2 * 32 * 4 / 4
    assert rows["assisted"]["weight_bytes"] == 2 * rows["generate"]["weight_bytes"]
    for key in ("deferred", "streaming", "identity"):
        split = rows[key]["split_ms_per_token"]
        assert list(split) == ["encode", "spatial", "depth", "decode"]
        assert sum(split.values()) <= rows[key]["ms_per_token"] * 1.5
        assert rows[key]["overhead_share"] > 0
        assert rows[key]["predicted_ms_per_token"] == pytest.approx(
            sum(rows[key]["predicted_split_ms_per_token"].values())
        )
    # Deferred decoding shows nothing before the end.
    assert rows["deferred"]["first_text_ms"] == pytest.approx(rows["deferred"]["ms_per_token"] * 10)
    assert (rows["generate"]["bits_per_byte"], rows["streaming"]["bits_per_byte"]) == (2.0, 3.0)
    assert rows["identity"]["bits_per_byte"] is None
    assert {key for key, row in rows.items() if row["note"].startswith("does not count")} == {
        "lookup",
        "assisted",
    }


def test_what_the_report_and_the_demo_read(table: dict[str, Any], racers: Racers) -> None:
    speed = report_speed(table, about(racers))
    rows = {row["key"]: row for row in table["rows"]}
    assert speed["speedup"] == rows["generate"]["ms_per_token"] / rows["deferred"]["ms_per_token"]
    assert speed["speedup_over_lean_loop"] == rows["lean"]["ms_per_token"] / rows["deferred"]["ms_per_token"]
    wanted = {
        "ar_tokens_per_s",
        "latent_tokens_per_s",
        "ar_ms",
        "encode_ms",
        "spatial_ms",
        "depth_ms",
        "decode_ms",
    }
    assert wanted | {"rows", "lean_loop_agreement", "kept_tokens", "threads", "dtype", "environment"} <= set(
        speed
    )
    with pytest.raises(ValueError, match="--report needs the rows generate, lean"):
        report_speed({**table, "rows": [rows["generate"], rows["deferred"]]}, {})


def test_a_batch_has_no_speculation(racers: Racers) -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 2, "repeats": 1})
    wanted = {"generate", "lookup", "assisted", "deferred", "unsloth_decoder"}
    result = race(racers, random_prompts(320, 2, 7), settings, lambda: MACHINE, wanted)
    missing = {row["key"]: row["reason"] for row in result["missing"]}
    assert {row["key"] for row in result["rows"]} | set(missing) == set(NAMES)
    assert (
        missing["lookup"]
        == missing["assisted"]
        == "transformers speculates for one sequence at a time, not 2"
    )
    assert "the mask that keeps documents apart" in missing["unsloth_decoder"]
    assert result["rows"][0]["tokens_per_s"] == pytest.approx(2e3 / result["rows"][0]["ms_per_token"])


def test_what_has_no_models_says_so() -> None:
    racers = random_weights(config(), torch.float32, CPU, with_identity=False)
    settings = SETTINGS.model_copy(update={"repeats": 1})
    result = race(racers, random_prompts(320, 1, 7), settings, lambda: MACHINE, {"generate", "assisted"})
    missing = {row["key"]: row["reason"] for row in result["missing"]}
    assert "--assistant" in missing["assisted"]


def test_unsloth_has_a_reason(racers: Racers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = random_prompts(320, 1, 7)
    monkeypatch.setattr(unsloth_row, "PYTHON", tmp_path / ".venv-unsloth" / "bin" / "python")
    nowhere = unsloth_row.unsloth_row(racers, prompts, SETTINGS, [[0]])
    assert nowhere == {"reason": ".venv-unsloth is not installed; run: make unsloth"}
    # Any Python that has no Unsloth.
    monkeypatch.setattr(unsloth_row, "PYTHON", Path(sys.executable))
    assert "which is not among --rows" in unsloth_row.unsloth_row(racers, prompts, SETTINGS, None)["reason"]
    assert "No module named 'unsloth'" in unsloth_row.unsloth_row(racers, prompts, SETTINGS, [[0]])["reason"]


@pytest.mark.slow
@pytest.mark.skipif(not unsloth_row.PYTHON.is_file(), reason="make unsloth")
def test_unsloth_writes_what_transformers_writes(racers: Racers) -> None:
    wanted = {"generate", "unsloth"}
    result = race(racers, random_prompts(320, 1, 7), SETTINGS, lambda: MACHINE, wanted)
    rows = {row["key"]: row for row in result["rows"]}
    assert set(rows["unsloth"]) >= FIGURES, result["missing"]
    assert rows["unsloth"]["agreement"] == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_unsloth_races_on_a_gpu() -> None:
    """In 16 bits, as it is used; `make unsloth` must have been run."""
    on_gpu = random_weights(config(), torch.bfloat16, torch.device("cuda"))
    result = race(
        on_gpu,
        random_prompts(320, 1, 7),
        SETTINGS,
        lambda: MACHINE,
        {"generate", "lean", "deferred", "unsloth"},
    )
    assert {row["key"] for row in result["rows"]} == {"generate", "lean", "deferred", "unsloth"}, result[
        "missing"
    ]


def row(key: str, run: Any) -> Row:
    return Row(key, run, 1, True, (), 0.0)


def test_a_peer_that_fails_or_does_not_compile_moves_to_the_missing() -> None:
    def fails(count: int) -> Output:
        raise RuntimeError("no such kernel\nand more")

    def compiles(count: int) -> Output:
        time.sleep(30)
        return Output([], None)

    found = {"static": row("static", fails), "compiled": row("compiled", compiles)}
    missing: dict[str, str] = {}
    warm_up(found, missing, BenchmarkConfig(compile_limit_s=0.1))
    assert not found
    assert missing["static"] == "RuntimeError: no such kernel"
    assert missing["compiled"] == "not compiled within 0.1 s (benchmark.compile_limit_s)"
    with pytest.raises(RuntimeError, match="no such kernel"):
        warm_up({"deferred": row("deferred", fails)}, {}, BenchmarkConfig())


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_hold_one_backbone(tied: bool) -> None:
    run = config(f"codec.backbone.architecture.tie_word_embeddings={str(tied).lower()}")
    made = random_weights(run, torch.bfloat16, CPU)
    vae, model = made.latent.vae, made.latent.rq_transformer
    models: list[nn.Module] = [made.lm, vae, model]
    assert not any(tensor.is_meta for m in models for tensor in [*m.parameters(), *m.buffers()])
    assert {p.dtype for m in models for p in m.parameters()} == {torch.bfloat16}
    assert made.lm.model is vae.encoder.backbone  # type: ignore[union-attr,comparison-overlap]
    assert vae.decoder.backbone is made.lm.model  # type: ignore[union-attr]
    assert vae.decoder.head.weight is made.lm.lm_head.weight  # type: ignore[union-attr]
    embeddings = 2 * 320 * 64
    assert (made.lm.lm_head.weight is made.lm.model.embed_tokens.weight) == tied
    assert parameter_bytes(made.lm, vae) == parameter_bytes(vae)
    assert parameter_bytes(made.lm) > (1 if tied else 2) * embeddings
    assert vae.quantizer.levels[0].codebook.dtype == torch.float32  # type: ignore[union-attr,index]


def test_random_values_have_no_equal_rows() -> None:
    with parameters_without_storage():
        linear = nn.Linear(1000, 3000)
    fill_at_random([linear], torch.float32, CPU)
    assert len(linear.weight.unique(dim=0)) == 3000
    assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_agreement_counts_places() -> None:
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert agreement([[1]], [[1, 2]]) == 0.5
    assert agreement([[1]], None) is None


@pytest.mark.parametrize("name", sorted(AXES))
def test_all_points_of_an_axis_are_configurations(name: str) -> None:
    parser = argparse.ArgumentParser()
    benchmark.add_inference_arguments(parser)
    file = str(ROOT / "configs" / "benchmarks" / "qwen3_0.6b.yaml")
    found = list(points(parser.parse_args(["--random", file, "--axis", name, "benchmark.repeats=1"])))
    assert found[0] == (None, None, ["benchmark.repeats=1"])
    assert [value for _, value, _ in found[1:]] == list(AXES[name].values)
    made = [load_config(file, overrides=overrides) for _, _, overrides in found[1:]]
    assert all(run.benchmark.repeats == 1 for run in made)
    assert len({run.to_yaml() for run in made}) == len(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", str(NANO), *DATA, "--data", "x"], "--data is for trained models"),
        (["--model", "x"], "--model needs --data"),
        (
            ["--model", "x", "--data", "y", "codec.compression_factor=8"],
            "codec: unknown key; valid here: bench",
        ),
        (["--model", "x", "--data", "y", "--axis", "depth"], "trained models are as they are"),
        # These two are found after the models' packages are imported.
        pytest.param(
            ["--random", str(NANO), *DATA, "codec.backbone.decoder=none"],
            "a backbone in its decoder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--random", str(NANO), *DATA, "--assistant", str(ROOT / "configs/backbones/tiny.yaml")],
            "--assistant has",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_arguments_that_contradict_each_other(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(["inference", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_row_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["inference", "--random", str(NANO), "--rows", "generate,warp"])
    assert "no warp; choose from generate" in capsys.readouterr().err


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The command as a process of its own: its directory of outputs, and what it printed."""
    directory = tmp_path_factory.mktemp("race")
    command = [
        sys.executable, "launch/benchmark.py", "inference", "--random", str(NANO), "--dtype", "float32",
        "--rows", "generate,lean,lookup,assisted,deferred,streaming", "--axis", "compression_factor",
        "--json", str(directory / "race.json"), "--html", str(directory / "race.html"),
        *DATA, "data.document_grid=16", "benchmark.new_tokens=8", "codec.compression_factor=2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "base LM, lean loop: 1 of 1" in done.stderr  # a line of progress for every row
    return directory, done.stdout


def test_the_command(ran: tuple[Path, str]) -> None:
    directory, out = ran
    result = json.loads((directory / "race.json").read_text())
    assert set(result) == {"is_trained", "note", "dtype", "threads", "environment", "tables"}
    assert not result["is_trained"]
    assert result["note"].startswith("random weights: speed only")
    assert [(t["axis"], t["value"]) for t in result["tables"]] == [
        (None, None), ("compression_factor", 4), ("compression_factor", 8), ("compression_factor", 16)
    ]  # fmt: skip
    assert [t["compression_factor"] for t in result["tables"]] == [2, 4, 8, 16]
    for table in result["tables"]:
        assert {row["key"] for row in [*table["rows"], *table["missing"]]} == set(NAMES)
    for text in (
        "float32, ",
        "random weights: speed only",
        "not run: no draft model",
        "Page: ",
        "Result: ",
        "Next: ",
    ):
        assert text in out


def test_the_page_names_every_row_and_loads_nothing(ran: tuple[Path, str]) -> None:
    page = (ran[0] / "race.html").read_text()
    assert all(name in page for name, _ in NAMES.values())
    assert "not run: no draft model" in page
    assert page.count("<svg") == 4
    for loading in ("<script", "<link", "src=", "@import", 'href="http'):
        assert loading not in page


def test_a_trained_page_has_bits_per_byte(table: dict[str, Any], racers: Racers, tmp_path: Path) -> None:
    result = {
        **about(racers),
        "is_trained": True,
        "tables": [{"axis": None, "value": None, **table}],
    }
    page = write_race(result, tmp_path / "below" / "race.html").read_text()
    assert "bits per byte</th>" in page
    assert page.count("left out by --rows") == len(table["missing"])


@pytest.mark.slow  # its page is made once more, if another worker has it
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here to show the page in")
def test_chromium_shows_the_page_without_sideways_scrolling(ran: tuple[Path, str], tmp_path: Path) -> None:
    probe = "<script>document.title = 'w' + document.documentElement.scrollWidth;</script></body>"
    (tmp_path / "probe.html").write_text((ran[0] / "race.html").read_text().replace("</body>", probe))
    shown = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=500,900", "--dump-dom", (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>w500</title>" in shown.stdout or "<title>w485</title>" in shown.stdout
