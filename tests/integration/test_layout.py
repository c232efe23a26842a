"""Token shards that the configuration does not fit are refused, whatever reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline import TokenDataset
from launch.config import RunConfig, load_config
from launch.eval import evaluate
from launch.layout import check_layout
from launch.precompute_codes import EncodingJob, encode
from launch.submission_checks import check_data
from launch.tasks import create_task
from rqvae import RQVAE
from tests.integration.conftest import NANO

JOB = EncodingJob(with_latents=False, precision="fp32", task_index=0, num_tasks=1, batch_size=4)


def test_what_fits_and_what_does_not() -> None:
    config = load_config(NANO, overrides=["data.directory=none", "data.source.paths=[none]"])
    check_layout(SimpleNamespace(sample_length=64, document_grid=16), Path("shards"), config)
    with pytest.raises(
        ValueError, match=r"data\.sample_length is 64, the token shards in 'shards' have samples of 32"
    ):
        check_layout(SimpleNamespace(sample_length=32, document_grid=4), Path("shards"), config)
    with pytest.raises(
        ValueError, match=r"data\.document_grid=6, so that a chunk of .*=4 tokens may hold two documents"
    ):
        check_layout(SimpleNamespace(sample_length=64, document_grid=6), Path("shards"), config)


@pytest.fixture
def other_grid(nano_data: list[str]) -> RunConfig:
    """Chunks of 8 tokens, over shards that were built on a grid of 4."""
    return load_config(NANO, "rqvae", [*nano_data, "codec.compression_factor=8", "data.document_grid=8"])


def test_everything_that_reads_shards_looks(other_grid: RunConfig, tmp_path: Path) -> None:
    config = other_grid.model_copy(update={"run_root": str(tmp_path)})
    refused = pytest.raises(
        ValueError, match=r"data\.document_grid=4, so that a chunk of .*=8 tokens may hold two"
    )
    with refused:
        check_data(config)
    with refused:
        create_task(config).check_data(TokenDataset(config.data.directory, "train"))
    codec = RQVAE(config.codec).eval()
    with refused:
        encode(config, codec, JOB)
    codec.save_pretrained(tmp_path / "model/rqvae")
    with refused:
        evaluate(tmp_path / "model", Path(config.data.directory), "test", config.evaluation)


def test_an_empty_validation_split_is_refused_before_anything_is_done(
    nano_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import build

    overrides = [
        f"data.directory={tmp_path / 'data'}",
        f"data.source.paths={nano_corpus}",
        f"run_root={tmp_path}",
    ]
    config = load_config(NANO, "rqvae", [*overrides, "data.validation_fraction=0"])
    build(config.data)
    with pytest.raises(ValueError, match=r"no samples of the split 'validation': build with a larger data\."):
        check_data(config)
    monkeypatch.setattr(
        "launch.precompute_codes.encode_shard", lambda *_: pytest.fail("encoded before looking")
    )
    with pytest.raises(ValueError, match="the split 'validation' has no samples"):
        encode(config, RQVAE(config.codec).eval(), JOB)
