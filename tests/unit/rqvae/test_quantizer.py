from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rqvae import Quantizer, ResidualQuantizer
from rqvae import codebook as module
from rqvae.codebook import compute_perplexity, kmeans, nearest, sum_by_code
from rqvae.collectives import gather_rows
from rqvae.config import QuantizerConfig

DIM = 6


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make(sizes: tuple[int, ...] = (8, 8, 4), **config: float) -> ResidualQuantizer:
    return ResidualQuantizer(sizes, DIM, QuantizerConfig(**config)).train()  # type: ignore[arg-type]


def all_real(latents: Tensor) -> Tensor:
    return torch.ones(latents.shape[:2], dtype=torch.bool)


def buffers(quantizer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in quantizer.named_buffers()}


def assert_same_buffers(actual: nn.Module, expected: dict[str, Tensor], exact: bool = True) -> None:
    for name, buffer in actual.named_buffers():
        if exact:
            assert torch.equal(buffer, expected[name]), name
        else:
            torch.testing.assert_close(buffer, expected[name])


# Nearest code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("block", [1, 500, 1 << 22])
def test_nearest_equals_brute_force_in_fp64(
    monkeypatch: pytest.MonkeyPatch, block: int, scale: float
) -> None:
    monkeypatch.setitem(module.BLOCK_DISTANCES, "cpu", block)
    vectors, codebook = torch.randn(301, DIM) * scale, torch.randn(40, DIM) * scale
    distances = (vectors[:, None].double() - codebook.double()).square().sum(-1)
    best = distances.sort(dim=1).values
    is_clear = best[:, 1] - best[:, 0] > 1e-5 * scale**2
    assert is_clear.float().mean() > 0.99
    assert torch.equal(nearest(vectors, codebook)[is_clear], distances.argmin(1)[is_clear])


def test_nearest_takes_the_lowest_index_on_ties() -> None:
    codebook = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]).repeat(9, 1)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).repeat(7, 1)
    assert nearest(vectors, codebook).tolist() == [1, 2, 1] * 7


def test_nearest_of_nothing() -> None:
    assert nearest(torch.zeros(0, DIM), torch.randn(4, DIM)).shape == (0,)


class _LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_does_not_grow_as_vectors_times_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.BLOCK_DISTANCES, "cpu", 1000)
    vectors, codebook = torch.randn(1000, DIM), torch.randn(100, DIM)
    with _LargestTensor() as largest:
        nearest(vectors, codebook)
    assert largest.numel <= vectors.numel() < len(vectors) * len(codebook)


def test_sum_by_code_equals_a_loop() -> None:
    vectors, codes = torch.randn(50, DIM), torch.randint(6, (50,))
    counts, sums = sum_by_code(vectors, codes, 9)
    for code in range(9):
        assert counts[code] == (codes == code).sum()
        torch.testing.assert_close(sums[code], vectors[codes == code].sum(0))


def test_gather_rows_in_one_process_is_indexing() -> None:
    rows = torch.randn(10, DIM)
    totals = []

    def chosen(total: int) -> Tensor:
        totals.append(total)
        return torch.tensor([7, 0, 7])

    assert torch.equal(gather_rows(rows, chosen), rows[[7, 0, 7]])
    assert totals == [10]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1, 1, 1, 1], 4), ([9, 0, 0], 1), ([3, 3, 0, 0], 2), ([0, 0], 1), ([0.5, 0.25, 0.25], 2**1.5)],
)
def test_perplexity_of_known_usages(counts: list[float], expected: float) -> None:
    usage = torch.tensor(counts, dtype=torch.float32)
    assert float(compute_perplexity(usage)) == pytest.approx(expected)
    assert float(compute_perplexity(1000 * usage)) == pytest.approx(expected)


# k-means ------------------------------------------------------------------------------------------------


def distortion(vectors: Tensor, centroids: Tensor) -> float:
    return float((vectors - centroids[nearest(vectors, centroids)]).square().sum(1).mean())


def test_kmeans_beats_randomly_chosen_vectors() -> None:
    vectors = torch.randn(1000, DIM)
    generator = torch.Generator().manual_seed(3)
    random = kmeans(vectors, 32, 0, generator.manual_seed(3))
    trained = kmeans(vectors, 32, 10, generator.manual_seed(3))
    assert distortion(vectors, trained) < 0.8 * distortion(vectors, random)


def test_kmeans_converges_to_the_means_of_its_clusters() -> None:
    vectors = torch.randn(400, DIM)
    centroids = kmeans(vectors, 5, 100, torch.Generator().manual_seed(0))
    counts, sums = sum_by_code(vectors, nearest(vectors, centroids), 5)
    torch.testing.assert_close(centroids, sums / counts[:, None])


def test_kmeans_moves_empty_clusters() -> None:
    # Most of the first centroids are drawn from one point, and all but one of them lose all their vectors.
    vectors = torch.cat([torch.zeros(100, DIM), torch.randn(60, DIM)])
    used = [
        int(sum_by_code(vectors, nearest(vectors, centroids), 32)[0].count_nonzero())
        for centroids in (kmeans(vectors, 32, n, torch.Generator().manual_seed(0)) for n in (0, 20))
    ]
    assert used[0] <= 26
    assert used[1] == 32


@pytest.mark.parametrize("num_vectors", [1, 3, 8])
def test_initialise_with_fewer_vectors_than_codes(num_vectors: int) -> None:
    quantizer = make((8, 8))
    vectors = torch.randn(num_vectors, DIM)
    quantizer.initialize(vectors, seed=0)
    for buffer in quantizer.buffers():
        assert torch.isfinite(buffer).all()
    out = quantizer(vectors[None], all_real(vectors[None]))
    # Each vector has a code of its own, up to the small noise that tells copies apart.
    assert float(out.distortion[-1]) < 1e-4 * float(vectors.square().sum())
    assert out.codes[0, :, 0].unique().numel() == num_vectors


def test_initialise_without_vectors_is_an_error() -> None:
    with pytest.raises(ValueError, match="no real latent vectors"):
        make().initialize(torch.zeros(0, DIM), seed=0)


def test_initialise_works_on_residuals_level_by_level() -> None:
    quantizer = make((16, 16, 16))
    vectors = torch.randn(2000, DIM)
    quantizer.initialize(vectors, seed=0)
    left = quantizer(vectors[None], all_real(vectors[None])).distortion
    energy = float(vectors.square().sum())
    # Every level removes a good part of what is left; codebooks fitted to the unquantized vectors would not.
    assert left[0] < 0.7 * energy
    assert left[1] < 0.7 * left[0]
    assert left[2] < 0.7 * left[1]


def test_initialise_is_a_function_of_its_seed_and_forgets_what_was_pending() -> None:
    vectors = torch.randn(300, DIM)
    first, second, third = make(), make(), make()
    second(vectors[None], all_real(vectors[None]))
    first.initialize(vectors, seed=1)
    second.initialize(vectors, seed=1)
    third.initialize(vectors, seed=2)
    assert_same_buffers(second, buffers(first))
    assert not torch.equal(third.levels[0].codebook, first.levels[0].codebook)
    before = second.levels[0].codebook.clone()
    second.update_codebook_ema(step=1, seed=0)
    torch.testing.assert_close(second.levels[0].codebook, before)


def test_after_initialise_codes_are_the_ratio_of_their_averages() -> None:
    quantizer = make()
    quantizer.initialize(torch.randn(300, DIM), seed=0)
    for level in quantizer.levels:
        assert torch.equal(level.ema_embed_sum, level.codebook * level.ema_cluster_size[:, None])


# Forward ------------------------------------------------------------------------------------------------


def test_codes_are_greedy_on_what_the_levels_before_left_over() -> None:
    quantizer = make((16, 8, 4))
    latents = torch.randn(2, 5, DIM)
    out = quantizer(latents, all_real(latents))
    assert out.codes.shape == (2, 5, 3)
    residual = latents.double()
    for i, level in enumerate(quantizer.levels):
        codebook = level.codebook.double()
        expected = (residual[:, :, None] - codebook).square().sum(-1).argmin(-1)
        assert torch.equal(out.codes[..., i], expected)
        residual = residual - codebook[expected]
        torch.testing.assert_close(out.distortion[i].double(), residual.square().sum())
    torch.testing.assert_close(out.quantized.double(), latents.double() - residual)
    torch.testing.assert_close(quantizer.embed(out.codes), out.quantized)


def test_all_levels_equal_brute_force_in_fp64_wherever_the_margin_is_above_rounding() -> None:
    num_vectors, dim, size, levels = 65_536, 16, 128, 8
    quantizer = ResidualQuantizer((size,) * levels, dim, QuantizerConfig()).eval()
    for depth, level in enumerate(quantizer.levels):
        level.codebook *= 0.7**depth
    latents = torch.randn(1, num_vectors, dim)
    codes = quantizer(latents, all_real(latents)).codes[0]
    residual = latents[0].double()
    undecided = torch.zeros(num_vectors, dtype=torch.bool)
    for depth, level in enumerate(quantizer.levels):
        codebook = level.codebook.double()
        distances = torch.cdist(residual, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        best = distances.square().topk(2, largest=False)
        # Two fp32 roundings of the terms that cancel; 0.3 was the most that ever decided differently.
        scale = residual.square().sum(1) + codebook.square().sum(1).max()
        undecided |= best.values[:, 1] - best.values[:, 0] < 2 * torch.finfo(torch.float32).eps * scale
        expected = best.indices[:, 0]
        assert torch.equal(codes[~undecided, depth], expected[~undecided])
        residual = residual - codebook[expected]
    assert undecided.float().mean() < 1e-4


def test_a_beam_that_keeps_everything_finds_the_nearest_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.BLOCK_DISTANCES, "cpu", 2000)  # more than one block
    sizes = (6, 5, 4)
    quantizer = make(sizes, beam_width=30).eval()
    latents = torch.randn(2, 40, DIM)
    every = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    distances = (latents[:, :, None].double() - quantizer.embed(every).double()).square().sum(-1)
    out = quantizer(latents, all_real(latents))
    assert torch.equal(out.codes, every[distances.argmin(-1)])
    assert not torch.equal(out.codes, make(sizes).eval()(latents, all_real(latents)).codes)
    torch.testing.assert_close(out.distortion[-1].double(), distances.amin(-1).sum())


def test_the_wider_the_beam_the_nearer_the_sum() -> None:
    quantizer = make((16,) * 6).eval()
    quantizer.initialize(torch.randn(1000, DIM), seed=0)
    latents = torch.randn(4, 200, DIM)
    distortion = []
    for width in (1, 2, 8):
        quantizer.config = QuantizerConfig(beam_width=width)
        distortion.append(float(quantizer(latents, all_real(latents)).distortion[-1]))
    assert distortion[1] < 0.9 * distortion[0] and distortion[2] < 0.8 * distortion[0]


def test_a_beam_learns_from_the_residuals_of_the_sums_it_chose() -> None:
    quantizer, latents = make((8, 8, 4), beam_width=4), torch.randn(2, 20, DIM)
    codes = quantizer(latents, all_real(latents)).codes.flatten(0, 1)
    codebooks = [level.codebook.clone() for level in quantizer.levels]
    quantizer.update_codebook_ema(step=1, seed=0)
    residual = latents.flatten(0, 1)
    for index, level in enumerate(quantizer.levels):
        counts, sums = sum_by_code(residual, codes[:, index], level.codebook_size)
        torch.testing.assert_close(level.ema_cluster_size, 0.99 + 0.01 * counts)
        torch.testing.assert_close(level.ema_embed_sum, 0.99 * codebooks[index] + 0.01 * sums)
        residual = residual - codebooks[index][codes[:, index]]


def test_the_length_of_a_code_costs_what_the_formula_says() -> None:
    quantizer = make((12, 7), rate_weight=0.4).eval()
    for level in quantizer.levels:
        level.ema_cluster_size.copy_(torch.rand(level.codebook_size) ** 4)
    quantizer.ema_distortion.copy_(torch.tensor([3.0, 1.5]))
    latents = torch.randn(3, 50, DIM)
    codes = quantizer(latents, all_real(latents)).codes.flatten(0, 1)
    nearer = make((12, 7)).eval()(latents, all_real(latents)).codes.flatten(0, 1)
    residual = latents.flatten(0, 1).double()
    for index, level in enumerate(quantizer.levels):
        lengths = -(level.ema_cluster_size / level.ema_cluster_size.sum()).double().log()
        distances = (residual[:, None] - level.codebook.double()).square().sum(-1)
        expected = (distances + 0.4 * 3.0 * lengths).argmin(1)
        assert torch.equal(codes[:, index], expected)
        residual = residual - level.codebook[expected].double()
    assert (codes[:, 0] != nearer[:, 0]).float().mean() > 0.1


def test_the_more_length_costs_the_fewer_nats_and_the_more_distortion() -> None:
    latents = torch.randn(8, 100, DIM) * torch.tensor([3.0, 1, 1, 0.3, 0.3, 0.3])
    nats, left = [], []
    for weight in (0.0, 0.3, 1.0):
        torch.manual_seed(1)
        quantizer = make((16, 16), rate_weight=weight, ema_decay=0.9, threshold_ema_dead_code=0.0)
        quantizer.initialize(latents.flatten(0, 1), seed=0)
        for step in range(60):
            out = quantizer(latents, all_real(latents))
            quantizer.update_codebook_ema(step, seed=0)
        nats.append(sum(float(level.compute_perplexity().log()) for level in quantizer.levels))
        left.append(float(out.distortion[-1]))
    assert nats[0] > nats[1] + 0.1 and nats[1] > nats[2] + 0.1
    assert left[0] < left[1] < left[2]


@pytest.mark.parametrize("is_drawn", [True, False])
def test_the_scale_does_not_grow_by_what_it_causes(is_drawn: bool) -> None:
    """Nothing but the choice of codes moves here: latents stay, and no prior asks for fewer bits."""
    latents = torch.randn(1, 2000, DIM)
    quantizer = make((64, 64), rate_weight=0.0 if is_drawn else 1.0, ema_decay=0.9, threshold_ema_dead_code=0)
    quantizer.initialize(latents[0], seed=0)
    before = quantizer.ema_distortion.clone()
    for step in range(150):
        drawn = quantizer.sample(latents, torch.rand(1, 2000, 2))[0] if is_drawn else None
        out = quantizer(latents, all_real(latents), codes=drawn)
        quantizer.update_codebook_ema(step, seed=0)
    scale = quantizer.ema_distortion
    # A nat costs what the first level's says; the second level may well have more to do.
    assert (scale < 1.5 * before).all() if is_drawn else scale[0] < 1.5 * before[0]
    assert (out.distortion[0] / 2000 > scale[0]).all()  # which is what would be fed back


def test_embed_sums_the_levels_it_is_given() -> None:
    quantizer = make()
    codes = torch.randint(4, (2, 3, 3))
    for levels in (1, 2, 3):
        expected = sum(quantizer.levels[i].codebook[codes[..., i]] for i in range(levels))
        torch.testing.assert_close(quantizer.embed(codes[..., :levels]), expected)


def test_the_gradient_passes_straight_through() -> None:
    quantizer = make()
    latents = torch.randn(2, 5, DIM, requires_grad=True)
    above = torch.randn(2, 5, DIM)
    (quantizer(latents, all_real(latents)).quantized * above).sum().backward()
    assert torch.equal(latents.grad, above)


def test_commitment_loss_and_gradient_equal_the_formula() -> None:
    quantizer = make()
    latents = torch.randn(2, 5, DIM, requires_grad=True)
    mask = all_real(latents)
    mask[1, 3:] = False
    out = quantizer(latents, mask)
    out.commitment_loss.backward()
    loss, gradient = 0.0, torch.zeros_like(latents)
    for levels in range(1, 4):
        difference = (latents.detach() - quantizer.embed(out.codes[..., :levels])) * mask[..., None]
        loss += float(difference.square().sum() / DIM)
        gradient += 2 * difference / DIM
    assert float(out.commitment_loss.detach()) == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(latents.grad, gradient)


def test_codebooks_are_buffers_and_forward_does_not_touch_them() -> None:
    quantizer = make()
    assert list(quantizer.parameters()) == []
    before = buffers(quantizer)
    latents = torch.randn(2, 5, DIM)
    for _ in range(3):
        quantizer(latents, all_real(latents))
    assert_same_buffers(quantizer, before)


def test_evaluation_mode_codes_alike_and_remembers_nothing() -> None:
    quantizer = make()
    latents = torch.randn(2, 5, DIM)
    trained = quantizer(latents, all_real(latents))
    quantizer.discard_pending()
    quantizer.eval()
    evaluated = quantizer(latents, all_real(latents))
    assert torch.equal(trained.codes, evaluated.codes)
    assert torch.equal(trained.quantized, evaluated.quantized)
    before = buffers(quantizer)
    quantizer.update_codebook_ema(step=1, seed=0)
    for name, buffer in quantizer.named_buffers():
        if name.endswith("ema_cluster_size"):
            torch.testing.assert_close(buffer, 0.99 * before[name])
        else:
            torch.testing.assert_close(buffer, before[name] * (0.99 if name.endswith("embed_sum") else 1))


# Moving averages ----------------------------------------------------------------------------------------


def test_update_equals_the_closed_form() -> None:
    quantizer = make(ema_decay=0.9, threshold_ema_dead_code=0)
    expected = {name: buffer.double() for name, buffer in buffers(quantizer).items()}
    for step in range(1, 4):
        latents = torch.randn(2, 20, DIM)
        codes = quantizer(latents, all_real(latents)).codes.flatten(0, 1)
        residual = latents.flatten(0, 1).double()
        assert quantizer.update_codebook_ema(step, seed=0) == [0, 0, 0]
        for i, level in enumerate(quantizer.levels):
            size, embed_sum = expected[f"levels.{i}.ema_cluster_size"], expected[f"levels.{i}.ema_embed_sum"]
            one_hot = torch.nn.functional.one_hot(codes[:, i], len(size)).double()
            chosen = expected[f"levels.{i}.codebook"][codes[:, i]]
            size = 0.9 * size + 0.1 * one_hot.sum(0)
            embed_sum = 0.9 * embed_sum + 0.1 * one_hot.T @ residual
            residual = residual - chosen
            distortion = residual.square().sum(1).mean()
            expected |= {
                "ema_distortion": expected["ema_distortion"]
                .lerp(distortion, 0.1)
                .where(torch.arange(3) == i, expected["ema_distortion"]),
                f"levels.{i}.ema_cluster_size": size,
                f"levels.{i}.ema_embed_sum": embed_sum,
                f"levels.{i}.codebook": embed_sum / size[:, None],
            }
            assert level.codebook.dtype == torch.float32
    for name, buffer in quantizer.named_buffers():
        torch.testing.assert_close(buffer.double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def test_one_update_per_step_whatever_the_micro_batches() -> None:
    latents = torch.randn(6, 20, DIM)
    whole, parts = make(), make()
    parts.load_state_dict(whole.state_dict())
    for step in range(1, 13):  # a search for dead codes among them
        whole(latents + step, all_real(latents))
        for part in (latents + step).split([1, 3, 2]):
            parts(part, all_real(part))
        assert whole.update_codebook_ema(step, 0) == parts.update_codebook_ema(step, 0)
    assert_same_buffers(parts, buffers(whole), exact=False)
    for level in range(3):
        assert torch.equal(whole.levels[level].ema_cluster_size, parts.levels[level].ema_cluster_size)


def test_an_update_uses_everything_once() -> None:
    quantizer = make(threshold_ema_dead_code=0)
    latents = torch.randn(2, 20, DIM)
    quantizer(latents, all_real(latents))
    quantizer.update_codebook_ema(1, 0)
    after_first = buffers(quantizer)
    quantizer.update_codebook_ema(2, 0)
    for i in range(3):
        name = f"levels.{i}.ema_cluster_size"
        torch.testing.assert_close(quantizer.get_buffer(name), 0.99 * after_first[name])


def test_masked_vectors_count_for_nothing() -> None:
    latents = torch.randn(2, 20, DIM)
    alone, padded = make(), make()
    padded.load_state_dict(alone.state_dict())
    padding = torch.full((2, 4, DIM), 100.0)
    mask = torch.cat([all_real(latents), torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    for step in (10, 20):
        expected = alone(latents, all_real(latents))
        out = padded(torch.cat([latents, padding], dim=1), mask)
        assert torch.equal(out.codes[:, :20], expected.codes)
        torch.testing.assert_close(out.commitment_loss, expected.commitment_loss)
        torch.testing.assert_close(out.distortion, expected.distortion)
        assert alone.update_codebook_ema(step, 0) == padded.update_codebook_ema(step, 0)
    assert_same_buffers(padded, buffers(alone))


def test_training_on_fixed_data_lowers_the_distortion() -> None:
    quantizer = make((16, 16), ema_decay=0.5)
    latents = torch.randn(1, 500, DIM)
    first = quantizer(latents, all_real(latents)).distortion
    for step in range(30):
        quantizer.update_codebook_ema(step, 0)
        last = quantizer(latents, all_real(latents)).distortion
    assert last[1] < last[0] < first[0]
    assert last[1] < 0.5 * first[1]


def test_a_long_unused_code_keeps_its_place() -> None:
    quantizer = make((2,), ema_decay=0.0, threshold_ema_dead_code=0)
    quantizer.levels[0].codebook.copy_(torch.tensor([[0.0] * DIM, [9.0] * DIM]))
    quantizer.levels[0].ema_embed_sum.copy_(quantizer.levels[0].codebook)
    for step in range(3):
        quantizer(torch.randn(1, 10, DIM) * 0.1, torch.ones(1, 10, dtype=torch.bool))
        quantizer.update_codebook_ema(step, 0)
    assert quantizer.levels[0].codebook[1].tolist() == [9.0] * DIM
    assert torch.isfinite(quantizer.levels[0].codebook).all()


# Dead codes ---------------------------------------------------------------------------------------------


def with_dead_codes(**config: float) -> tuple[ResidualQuantizer, Tensor]:
    """Codes 5 and 7 of the first level are far away and unused since long."""
    quantizer = make((8, 8), **config)
    level = quantizer.levels[0]
    level.codebook[[5, 7]] = 1000.0
    level.ema_cluster_size.copy_(torch.tensor([4.0, 4, 4, 4, 4, 1e-3, 4, 1e-3]))
    level.ema_embed_sum.copy_(level.codebook * level.ema_cluster_size[:, None])
    return quantizer, torch.randn(1, 40, DIM)


def test_dead_codes_move_onto_vectors_with_both_averages_reset() -> None:
    quantizer, latents = with_dead_codes()
    level = quantizer.levels[0]
    quantizer(latents, all_real(latents))
    assert quantizer.update_codebook_ema(step=10, seed=0) == [2, 0]
    assert int(level.dead_replaced) == 2
    uniform = level.ema_cluster_size[5]
    assert uniform == level.ema_cluster_size[7]
    assert 2.5 < float(uniform) < 4.5
    assert torch.equal(level.ema_embed_sum[[5, 7]], level.codebook[[5, 7]] * uniform)
    places = [(latents[0] == code).all(1).nonzero().flatten().tolist() for code in level.codebook[[5, 7]]]
    assert [len(found) for found in places] == [1, 1]
    assert places[0] != places[1]
    # The next update neither pulls them back nor judges them dead again.
    quantizer(latents, all_real(latents))
    assert quantizer.update_codebook_ema(step=20, seed=0) == [0, 0]
    assert level.codebook[[5, 7]].abs().max() < 5


def test_deeper_levels_are_reseeded_with_their_own_residuals() -> None:
    quantizer, latents = with_dead_codes()
    quantizer.levels[1].ema_cluster_size[3] = 1e-3
    quantizer.levels[1].codebook[3] = 1000.0
    out = quantizer(latents, all_real(latents))
    residuals = latents[0] - quantizer.embed(out.codes[0, :, :1])
    assert quantizer.update_codebook_ema(step=10, seed=0) == [2, 1]
    assert (residuals - quantizer.levels[1].codebook[3]).abs().amax(1).min() < 1e-6


@pytest.mark.parametrize(
    ("config", "step", "expected"),
    [
        ({}, 11, 0),
        ({"dead_code_interval": 11}, 11, 2),
        ({"dead_code_interval": 11}, 10, 0),
        ({"threshold_ema_dead_code": 0}, 10, 0),
        ({"threshold_ema_dead_code": 1e-6}, 10, 0),
    ],
)
def test_dead_codes_are_searched_as_configured(config: dict[str, float], step: int, expected: int) -> None:
    quantizer, latents = with_dead_codes(**config)
    quantizer(latents, all_real(latents))
    assert quantizer.update_codebook_ema(step, seed=0) == [expected, 0]


def test_reseeding_is_a_function_of_seed_and_step() -> None:
    chosen = []
    for seed, step in ((0, 10), (0, 10), (1, 10), (0, 20)):
        torch.manual_seed(0)
        quantizer, latents = with_dead_codes()
        torch.manual_seed(len(chosen))  # the global state must not matter
        quantizer(latents, all_real(latents))
        quantizer.update_codebook_ema(step, seed)
        chosen.append(quantizer.levels[0].codebook[5])
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[3])


@pytest.mark.parametrize("num_vectors", [0, 1])
def test_more_dead_codes_than_vectors(num_vectors: int) -> None:
    quantizer, latents = with_dead_codes()
    quantizer(latents, torch.arange(latents.shape[1])[None] < num_vectors)
    assert quantizer.update_codebook_ema(step=10, seed=0) == [num_vectors, 0]
    far = (quantizer.levels[0].codebook[[5, 7]] > 500).all(1)
    assert int(far.sum()) == 2 - num_vectors


def test_usage_metrics() -> None:
    quantizer, latents = with_dead_codes()
    metrics = quantizer.usage_metrics()
    assert metrics["codebook/used_fraction_0"] == 6 / 8
    assert metrics["codebook/perplexity_0"] == pytest.approx(6, abs=0.1)
    assert metrics["codebook/perplexity_1"] == pytest.approx(8)
    quantizer(latents, all_real(latents))
    quantizer.update_codebook_ema(step=10, seed=0)
    assert quantizer.usage_metrics()["codebook/dead_replaced_0"] == 2


# Precision and checkpointing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16)], ids=["bf16", "half", "to"]
)
def test_casting_a_model_down_keeps_fp32_codebooks(cast) -> None:  # type: ignore[no-untyped-def]
    quantizer = make()
    before = buffers(quantizer)
    model = cast(nn.ModuleDict({"quantizer": quantizer, "linear": nn.Linear(2, 2)}))
    assert model["linear"].weight.dtype in (torch.bfloat16, torch.float16)
    assert_same_buffers(quantizer, before)
    assert {b.dtype for b in quantizer.buffers()} == {torch.float32, torch.int64}


def test_casting_up_is_allowed() -> None:
    assert Quantizer(4, DIM).double().codebook.dtype == torch.float64


def test_low_precision_latents_are_quantized_in_fp32() -> None:
    quantizer = make()
    latents = torch.randn(2, 20, DIM).bfloat16().requires_grad_()
    out = quantizer(latents, all_real(latents))
    exact = quantizer(latents.detach().float(), all_real(latents))
    assert out.quantized.dtype == torch.bfloat16
    assert out.commitment_loss.dtype == torch.float32
    assert torch.equal(out.codes, exact.codes)
    assert torch.equal(out.distortion, exact.distortion)
    quantizer.update_codebook_ema(step=10, seed=0)
    assert {b.dtype for b in quantizer.buffers()} == {torch.float32, torch.int64}


def test_state_dict_carries_everything_between_updates() -> None:
    first = make()
    latents = torch.randn(1, 50, DIM)
    first(latents, all_real(latents))
    first.update_codebook_ema(10, 0)
    second = make()
    second.load_state_dict(first.state_dict())
    for quantizer in (first, second):
        quantizer(latents + 1, all_real(latents))
        quantizer.update_codebook_ema(20, 0)
    assert_same_buffers(second, buffers(first))
