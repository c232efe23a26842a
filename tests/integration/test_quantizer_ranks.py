"""Codebooks learnt by several gloo processes: the same bits on every rank, and what one process would learn.

Every rank sees other data. The script of each test says which of its vectors are real in which step; one
process then plays it on the joined batch, in rank order.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from rqvae import ResidualQuantizer, codebook
from rqvae.codebook import kmeans
from rqvae.config import QuantizerConfig

SIZES, DIM, NUM_STEPS = (16, 8, 8), 6, 12
BATCH, LENGTH = 2, 20

CONFIG = QuantizerConfig(ema_decay=0.8, dead_code_interval=3, threshold_ema_dead_code=0.3)
SHARED = "one_codebook_for_all_levels"
"""Run as `every_rank_has_data`, with a shared codebook."""

BEAM = "codes_searched_with_a_beam"
"""Run as `every_rank_has_data`, with codes that the nearest entry of a level does not decide alone."""

Script = Callable[[int, int], tuple[Tensor, Tensor]]
"""Maps (rank, step) to latents [B, S, E] and mask [B, S]; step 0 is the k-means initialisation."""


def every_rank_has_data(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Ranks differ in place and spread, and the data moves, so that codes die and are re-seeded."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    latents = torch.randn(BATCH, LENGTH, DIM, generator=generator) * (1 + rank)
    latents = latents + 3 * rank
    if step > NUM_STEPS // 2:
        latents = latents * 0.3 + 4
    return latents, torch.rand(BATCH, LENGTH, generator=generator) < 0.8


def rank_one_has_padding_only(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """From the initialisation on, except for one step in the middle."""
    latents, mask = every_rank_has_data(rank, step)
    return latents, mask & (rank != 1 or step == 7)


def no_rank_has_data_after_the_start(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Dead codes are searched with nothing to put in their place."""
    latents, mask = every_rank_has_data(rank, step)
    return latents, mask & (step < 3)


UNEVEN_ROUNDING = "rounding_differs_between_ranks"
"""Run as `every_rank_has_data`, with a k-means that is off by a hair on every rank but the first, as sums in
another order on another device are."""

SCRIPTS: dict[str, Script] = {
    script.__name__: script
    for script in (every_rank_has_data, rank_one_has_padding_only, no_rank_has_data_after_the_start)
}


def learn(play: Callable[[int], list[tuple[Tensor, Tensor]]], rank: int, name: str) -> dict[str, Tensor]:
    """Initialise and take all steps on the micro-batches of `play`: the buffers, and the re-seeded codes by step."""
    torch.manual_seed(0)
    is_shared = name == SHARED
    config = CONFIG.model_copy(update={"shared_codebook": is_shared, "beam_width": 4 if name == BEAM else 1})
    quantizer = ResidualQuantizer(SIZES[:1] * 3 if is_shared else SIZES, DIM, config).train()
    # From here on the global random state is a rank's own business and must not matter.
    torch.manual_seed(rank)
    quantizer.initialize(torch.cat([latents[mask] for latents, mask in play(0)]), seed=5)
    result = {f"initial.{name}": buffer.clone() for name, buffer in quantizer.state_dict().items()}
    replaced = []
    for step in range(1, NUM_STEPS + 1):
        for latents, mask in play(step):
            quantizer(latents, mask)
        replaced.append(quantizer.update_codebook_ema(step, seed=5))
    return result | dict(quantizer.state_dict()) | {"replaced": torch.tensor(replaced)}


def run_rank(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    scripts = SCRIPTS | dict.fromkeys((SHARED, BEAM, UNEVEN_ROUNDING), every_rank_has_data)
    for name, script in scripts.items():
        if name == UNEVEN_ROUNDING:
            codebook.kmeans = lambda *args: kmeans(*args) * (1 + 1e-5 * rank)

        def micro_batches(step: int, script: Script = script) -> list[tuple[Tensor, Tensor]]:
            latents, mask = script(rank, step)
            return list(zip(latents.split(1), mask.split(1), strict=True))

        learnt = learn(micro_batches, rank, name)
        save_file(learnt, f"{directory}/{name}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(4, marks=pytest.mark.slow)],
    ids=lambda world_size: f"ranks{world_size}",
)
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[str, Tensor]]]:
    """What every rank ended with, by script."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(request.param, str(directory)), nprocs=request.param)

    def read(name: str) -> list[dict[str, Tensor]]:
        return [load_file(directory / f"{name}-{rank}.safetensors") for rank in range(request.param)]

    return read


@pytest.mark.parametrize("name", [*SCRIPTS, SHARED, BEAM, UNEVEN_ROUNDING])
def test_all_ranks_hold_the_same_bits(ranks: Callable[[str], list[dict[str, Tensor]]], name: str) -> None:
    first, *others = ranks(name)
    for other in others:
        for key, expected in first.items():
            assert torch.equal(other[key], expected), key


@pytest.mark.parametrize("name", [*SCRIPTS, SHARED, BEAM])
def test_ranks_learn_what_one_process_learns_from_the_joined_batch(
    ranks: Callable[[str], list[dict[str, Tensor]]], name: str
) -> None:
    buffers = ranks(name)
    script = SCRIPTS.get(name, every_rank_has_data)
    joined = learn(lambda step: [script(rank, step) for rank in range(len(buffers))], 0, name)
    for key, expected in joined.items():
        actual = buffers[0][key]
        if key.startswith("initial."):
            assert torch.equal(actual, expected), key  # k-means gets the same vectors in the same order
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=key)
    # Each rank has something to tell: alone, it would have learnt something else.
    alone = learn(lambda step: [script(0, step)], 0, name)
    for key in ("initial.levels.0.codebook", "levels.0.codebook"):
        same = torch.allclose(alone[key], joined[key], atol=1e-2)
        assert same == (name == "rank_one_has_padding_only" and len(buffers) == 2 and key[0] == "i"), key


def test_codes_died_and_were_reseeded(ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    """Else the tests above would have tried nothing of it."""
    replaced = ranks("every_rank_has_data")[0]["replaced"]
    assert (replaced.sum(0) > 0).sum() >= 2
    assert (replaced[[0, 1, 3, 4]] == 0).all()
    assert ranks(SHARED)[0]["replaced"].sum() > 0
    # The beam has found other codes, so other averages.
    greedy, beam = (ranks(name)[0]["levels.1.codebook"] for name in ("every_rank_has_data", BEAM))
    assert not torch.allclose(greedy, beam, atol=1e-2)
    with_padding = ranks("rank_one_has_padding_only")[0]["replaced"]
    assert with_padding.sum() > 0
    without_data = ranks("no_rank_has_data_after_the_start")[0]
    assert (without_data["replaced"][2:] == 0).all()
    assert all(torch.isfinite(tensor).all() for tensor in without_data.values())


def test_averages_count_every_real_vector_once(ranks: Callable[[str], list[dict[str, Tensor]]]) -> None:
    buffers = ranks("no_rank_has_data_after_the_start")
    expected = float(SIZES[0])
    for step in range(1, NUM_STEPS + 1):
        real = sum(int(no_rank_has_data_after_the_start(rank, step)[1].sum()) for rank in range(len(buffers)))
        expected += 0.2 * (real - expected)
    assert float(buffers[0]["levels.0.ema_cluster_size"].sum()) == pytest.approx(expected, rel=1e-5)
