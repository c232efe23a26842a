from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import MixtureDataset, StepLoader, TokenDataset, build
from data_pipeline.errors import FingerprintMismatchError, MixtureError
from data_pipeline.interleave import Interleave
from tests.unit.data_pipeline.conftest import MakeConfig

WEIGHTS = {"web": 0.65, "books": 0.25, "code": 0.1}


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_every_prefix_has_the_weights_within_one_sample(weights: list[int]) -> None:
    interleave = Interleave([weight / 10 for weight in weights])
    positions = np.arange(2 * interleave.period + 3)
    sources, ranks = interleave(positions)
    for source, weight in enumerate(weights):
        counts = np.cumsum(sources == source)
        assert np.abs(counts - (positions + 1) * weight / sum(weights)).max() < 1
        # the samples of a source are numbered without a gap
        assert np.array_equal(ranks[sources == source], np.arange(counts[-1]))
    position = len(positions) // 3
    assert interleave.counts(position) == np.bincount(sources[:position], minlength=len(weights)).tolist()


def test_far_positions_are_found_at_once_and_alone() -> None:
    interleave = Interleave([0.7, 0.2, 0.1])
    far = np.arange(10**12, 10**12 + 50)
    sources, ranks = interleave(far)
    assert interleave.counts(10**12) == [7 * 10**11, 2 * 10**11, 10**11]
    assert interleave(far[17:18]) == (sources[17], ranks[17])


def test_weights_without_a_short_period_are_refused() -> None:
    with pytest.raises(ValueError, match="round them to fewer digits"):
        Interleave([1234567891, 987654321])


@pytest.fixture(scope="module")
def directories(
    built: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three datasets of one tokenizer: the small one, and its text packed with other phases."""
    root = tmp_path_factory.mktemp("mixture")
    tokenizer = {"kind": "pretrained", "path": str(built / "tokenizer"), "eos_token": "<|endoftext|>"}
    for seed, name in enumerate(("books", "code"), start=1):
        build(make_config(root / name, tokenizer=tokenizer, seed=seed), num_workers=1)
    return {"web": built, "books": root / "books", "code": root / "code"}


@pytest.fixture(scope="module")
def mixture(directories: dict[str, Path]) -> MixtureDataset:
    return MixtureDataset({name: TokenDataset(path, "train") for name, path in directories.items()}, WEIGHTS)


def ids(dataset: MixtureDataset, steps: int, **options: int) -> list[list[int]]:
    with StepLoader(dataset, global_batch_size=16, seed=3, num_workers=0, **options) as loader:
        return [next(loader)[1]["sample_index"].tolist() for _ in range(steps)]


def test_a_batch_holds_the_samples_of_its_parts(mixture: MixtureDataset) -> None:
    sizes = [len(part) for part in mixture.parts.values()]
    wanted = [sizes[0] + 3, 5, sizes[0] + sizes[1] + 7, 2]
    batch = mixture.read(wanted)
    assert batch["sample_index"].tolist() == wanted
    web, books, code = mixture.parts.values()
    expected = [books.read([3]), web.read([5]), code.read([7]), web.read([2])]
    for name in ("input_ids", "document_ids", "num_bytes"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in expected]))
    with pytest.raises(IndexError):
        mixture.read([len(mixture)])


def test_each_part_walks_its_own_epochs_in_the_weights_proportions(mixture: MixtureDataset) -> None:
    loader = StepLoader(mixture, global_batch_size=16, seed=3)
    consumed = [index for step in range(2 * len(mixture) // 16) for index in loader.indices(step).tolist()]
    first = 0
    for name, part in mixture.parts.items():
        mine = [index - first for index in consumed if first <= index < first + len(part)]
        first += len(part)
        assert abs(len(mine) - WEIGHTS[name] * len(consumed)) < 1
        for epoch in range(len(mine) // len(part)):
            assert sorted(mine[epoch * len(part) : (epoch + 1) * len(part)]) == list(range(len(part)))
    assert len(consumed) * WEIGHTS["web"] > 3 * len(mixture.parts["web"])


@pytest.mark.parametrize("start", [1, 37, 1000])
def test_a_mixture_resumes_at_any_step_on_any_number_of_ranks(mixture: MixtureDataset, start: int) -> None:
    loader = StepLoader(mixture, global_batch_size=16, seed=3)
    whole = [loader.indices(step).tolist() for step in range(start, start + 5)]
    for world_size in (1, 2, 4):
        ranks = [
            ids(mixture, 5, rank=rank, world_size=world_size, start_step=start) for rank in range(world_size)
        ]
        assert [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)] == whole


def test_state_and_metrics_count_each_part(mixture: MixtureDataset) -> None:
    with StepLoader(mixture, global_batch_size=16, seed=3, num_workers=2) as loader:
        for _ in range(5):
            next(loader)
        state = loader.state()
        assert state["source_samples"] == {"web": 52, "books": 20, "code": 8}
        assert loader.metrics() == {
            "data/source_web_samples": 52,
            "data/source_books_samples": 20,
            "data/source_code_samples": 8,
        }
    other = MixtureDataset(mixture.parts, {**WEIGHTS, "code": 0.2})  # type: ignore[arg-type]
    loader = StepLoader(other, global_batch_size=16, seed=3)
    with pytest.raises(FingerprintMismatchError, match="fingerprint was"):
        loader.load_state(state)


def test_evaluation_goes_through_all_parts_until_one_is_used_up(directories: dict[str, Path]) -> None:
    parts = {name: TokenDataset(path, "validation") for name, path in directories.items()}
    mixture = MixtureDataset(parts, WEIGHTS)
    few = mixture.evaluation_indices(20).tolist()
    assert len(set(few)) == 20
    assert sum(index < len(parts["web"]) for index in few) == 13
    everything = mixture.evaluation_indices(10**5).tolist()
    assert len(set(everything)) == len(everything)
    assert abs(len(everything) - len(parts["web"]) / WEIGHTS["web"]) < 3


def test_a_draw_follows_the_weights(mixture: MixtureDataset) -> None:
    drawn = mixture.draw(2000, torch.Generator().manual_seed(0))
    assert ((drawn < len(mixture.parts["web"])).float().mean() - 0.65).abs() < 1e-3
    assert drawn.min() >= 0 and drawn.max() < len(mixture) and len(drawn.unique()) > 300


def test_datasets_that_do_not_fit_are_refused_naming_all_that_differs(
    built: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    changes = {"sample_length": 64, "tokenizer": {"kind": "bpe", "vocab_size": 300}}
    build(make_config(tmp_path / "other", **changes), num_workers=1)
    parts = {"web": TokenDataset(built, "train"), "other": TokenDataset(tmp_path / "other", "train")}
    with pytest.raises(MixtureError) as caught:
        MixtureDataset(parts, {"web": 1, "other": 1})
    for fragment in (
        "sample_length is 32 in web, 64 in other",
        "vocab_size is 320 in web, 300 in other",
        f"tokenizer hash is {parts['web'].manifest.tokenizer_sha256[:16]} in web",
    ):
        assert fragment in str(caught.value)
    assert "document_grid" not in str(caught.value)
