"""The benchmarks of single parts, at tiny size through their command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch import benchmark, flops
from launch.benchmark_latent import flat_of_equal_size
from launch.benchmark_loader import check_row, drop_from_page_cache
from launch.benchmark_quantizer import BARE, OURS, PEER, Shape, make_step
from launch.loader_rows import LoaderShape, OurRow
from launch.measurement import peak_in_subprocess
from rqvae import RQTransformer
from rqvae.config import RQTransformerConfig

CPU = torch.device("cpu")


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    assert benchmark.main([*arguments, "--repeats", "1", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_quantizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "quantizer", "--shape", "4", "16", "2", "64")
    (shape,) = result["shapes"]
    assert (shape["dim"], shape["codebook_size"], shape["levels"], shape["vectors"]) == (4, 16, 2, 64)
    assert [row["name"] for row in shape["rows"]] == [OURS, PEER, BARE]
    assert all(row["median_ms"] > 0 for row in shape["rows"])
    assert all(row["peak_extra_bytes"] > 0 for row in shape["rows"][:2])
    ours, peer, bare = (row["median_ms"] for row in shape["rows"])
    assert shape["speedup_over_peer"] == peer / ours
    assert shape["time_over_bare"] == ours / bare
    out = capsys.readouterr().out
    assert "x as fast as ResidualVQ" in out
    assert f"Result: {tmp_path / 'result.json'}" in out


def test_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "loss", "--timed", "50", "8", "20", "--full", "50", "8", "20")
    timing = result["timed"]["dtypes"]["float32"]
    chunked, naive = (row["median_ms"] for row in timing["rows"])
    assert timing["time_over_naive"] == chunked / naive
    assert result["memory"]["logits_with_gradients_bytes"] == 2 * 4 * 20 * 50
    assert "the time of the naive version" in capsys.readouterr().out


def test_latent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "latent", "--tokens", "16", "32", "--levels", "2")
    assert [(point["tokens"], point["levels"]) for point in result["points"]] == [(16, 2), (32, 2)]
    for point in result["points"]:
        ours, flat = point["rows"]
        assert point["speedup"] == ours["codes_per_s"] / flat["codes_per_s"]
        assert abs(ours["parameters"] / flat["parameters"] - 1) < 0.1
    assert "codes/s" in capsys.readouterr().out


def test_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--samples", "64", "--length", "32", "--batch", "8", "--workers", "1")
    result = run(tmp_path, "loader", *arguments)
    assert set(result["modes"]) == {f"{n} workers, {cache}" for n in (0, 1) for cache in ("warm", "cold")}
    for table in result["modes"].values():
        named = {*table["rows"], *(row["name"] for row in result["missing"])}
        ours = {"StepLoader", "StepLoader, blocks", "StreamLoader"}
        assert named == ours | {"webdataset", "litdata", "mosaicml-streaming"}
        speeds = {name: row["tokens_per_s"] for name, row in table["rows"].items()}
        assert table["over_best_peer"]["StepLoader"] == speeds["StepLoader"] / speeds[table["best_peer"]]
    assert all(row["reason"] and "pip install" in row["install"] for row in result["missing"])
    assert "the best of the others" in capsys.readouterr().out


def test_a_row_that_delivers_other_tokens_is_not_timed(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 1 << 16, (32, 16), dtype=np.uint16)
    row = OurRow(tmp_path / "ours", LoaderShape(32, 16, 8))
    row.write(tokens)
    check_row(row, tokens)
    tokens[3, 5] ^= 1
    with pytest.raises(RuntimeError, match=r"StepLoader does not deliver .* 31 of them right"):
        check_row(row, tokens)


def test_dropping_the_page_cache_keeps_the_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"content")
    drop_from_page_cache(tmp_path)
    assert (tmp_path / "below" / "file").read_bytes() == b"content"


def test_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "build", "--mib", "0.05", "--workers", "1", "--vocabulary", "300")
    assert result["mb"] > 0.05
    ours = result["rows"]["data_pipeline build"]["mb_per_s"]
    assert result["over"]["datasets.map"] == ours / result["rows"]["datasets.map"]["mb_per_s"]
    assert "MB of text" in capsys.readouterr().out


def test_flat_flops_grow_with_the_square_of_the_codes_and_ours_do_not() -> None:
    def ratio(levels: int) -> float:
        config = RQTransformerConfig(compression_factor=4, codebook_levels=levels, codebook_size=64)
        ours = flops.rq_transformer(config, 4096)
        return flops.flat_transformer(flat_of_equal_size(config).config, 4096) / (ours.spatial + ours.depth)

    assert ratio(8) > 3 * ratio(2)


@pytest.mark.parametrize("depth_layers", [1, 6])
def test_the_flat_model_has_as_many_parameters(depth_layers: int) -> None:
    config = RQTransformerConfig(
        compression_factor=4, codebook_levels=4, codebook_size=64, depth_layers=depth_layers
    )
    ours, flat = (
        sum(parameter.numel() for parameter in model.parameters())
        for model in (RQTransformer(config), flat_of_equal_size(config))
    )
    assert abs(flat / ours - 1) < 0.1


def test_the_peer_runs_the_same_recipe() -> None:
    shape = Shape(4, 16, 2, 64)
    step = make_step(PEER, shape, CPU)
    peer = next(
        cell.cell_contents for cell in step.__closure__ or () if hasattr(cell.cell_contents, "layers")
    )
    for layer in peer.layers:
        assert layer._codebook.decay == 0.99
        assert not layer.rotation_trick
        assert layer._codebook.threshold_ema_dead_code == pytest.approx(0.4)
    before = [layer._codebook.embed.clone() for layer in peer.layers]
    step()
    for layer, embed in zip(peer.layers, before, strict=True):
        assert not torch.equal(layer._codebook.embed, embed)  # it learns by EMA, as ours does


def test_peak_memory_sees_what_was_freed_again() -> None:
    # In a process of its own: this one may just be giving back what another test has used.
    code = (
        "import torch; from launch.measurement import peak_extra_bytes; "
        "print(peak_extra_bytes(lambda: torch.ones(64 << 18)))"  # 64 MiB
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 << 20 < int(done.stdout) < 80 << 20


def test_a_failed_measurement_says_why() -> None:
    with pytest.raises(RuntimeError, match="No module named"):
        peak_in_subprocess("launch.no_such_benchmark", {})
