"""Continuations of token sequences by any of the models, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from launch.ranks import Ranks
from launch.scored_models import Models, Pair
from rqvae import BaseLM, LatentGenerator
from rqvae.generation_options import DrawSettings
from rqvae.sampling import draw, keyed_numbers

BATCH = 32
"""Sequences drawn together."""

Sampler = Callable[[list[list[int]], list[int], int, int], list[list[int]]]
"""(contexts, their keys, number of new tokens, seed) -> new tokens at temperature 1, past any end of text. What is
drawn for a context is a function of the seed and its key, whatever else is in the batch."""


def samplers(models: Models, tokenizer: PreTrainedTokenizerBase) -> dict[str, Sampler]:
    """By row of the tables: every model that can generate."""
    found: dict[str, Sampler] = {}
    if models.base_lm is not None:
        base_lm = models.base_lm
        found["base_lm"] = lambda contexts, keys, count, seed: continue_with_base_lm(
            base_lm, contexts, count, seed, keys=keys
        )
    for name, pair in (("latent", models.pair), ("identity_codec", models.identity)):
        if pair is not None and not pair.codec.config.sees_future:
            found[name] = _latent_sampler(pair, tokenizer)
    return found


def _latent_sampler(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    generator = LatentGenerator(*pair, tokenizer)

    def continued(contexts: list[list[int]], keys: list[int], count: int, seed: int) -> list[list[int]]:
        return generator.generate_tokens(
            contexts, count, 1.0, seed, stop_at_end_of_text=False, row_keys=keys
        ).token_ids

    return continued


def continue_all(
    sampler: Sampler, contexts: Sequence[list[int]], count: int, seed: int, ranks: Ranks
) -> list[list[int]]:
    """Continue all contexts, each rank some batches of them; every rank gets all of it."""
    # Contexts of similar length together: less padding to compute.
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    starts = range(0, len(order), BATCH)
    mine: list[list[int]] = []
    for index in ranks.share(len(starts)):
        part = order[starts[index] : starts[index] + BATCH]
        mine += sampler([contexts[i] for i in part], part, count, seed)
    drawn = dict(zip(order, ranks.gather_lists(mine), strict=True))
    return [drawn[i] for i in range(len(order))]


@torch.inference_mode()
def continue_with_base_lm(
    base_lm: BaseLM,
    contexts: list[list[int]],
    count: int,
    seed: int,
    temperature: float = 1.0,
    keys: Sequence[int] | None = None,
) -> list[list[int]]:
    """Draw `count` tokens behind each context; every text starts from the end-of-text token, as in training.

    Args:
        keys: what the draws of every context are keyed by beside the seed; by default its index.
    """
    device = base_lm.lm.device
    longest = 1 + max(map(len, contexts))
    ids = torch.full((len(contexts), longest), base_lm.eos_token_id, dtype=torch.long)
    mask = torch.zeros(len(contexts), longest, dtype=torch.long)
    for row, context in enumerate(contexts):
        start = longest - len(context)
        ids[row, start:] = torch.tensor(context, dtype=torch.long)
        mask[row, start - 1 :] = 1
    ids, mask = ids.to(device), mask.to(device)
    of_rows = torch.tensor(list(keys or range(len(contexts))), device=device)
    numbers = keyed_numbers(seed, of_rows, count, 1)[..., 0]
    settings = DrawSettings(temperature)
    cache = DynamicCache(config=base_lm.lm.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    drawn = []
    for index in range(count):
        hidden = base_lm.lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        ids = draw(base_lm.lm.lm_head(hidden[:, -1]), numbers[:, index], settings)[:, None]
        drawn.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(drawn, dim=1).tolist()


def until_end(tokens: Sequence[int], eos_token_id: int) -> list[int]:
    """Tokens up to the end of the text, which is the last one kept."""
    tokens = list(tokens)
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
