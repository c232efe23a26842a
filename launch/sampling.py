"""Continuations of token sequences by any of the models, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from launch.ranks import Ranks
from launch.scored_models import Models, Pair
from rqvae import BaseLM, LatentGenerator
from rqvae.generation import sample

BATCH = 32
"""Sequences drawn together: fixed, as draws depend on what else is in the batch."""

Sampler = Callable[[list[list[int]], int, int], list[list[int]]]
"""(contexts, number of new tokens, seed) -> new tokens at temperature 1, past any end of text."""


def samplers(models: Models, tokenizer: PreTrainedTokenizerBase) -> dict[str, Sampler]:
    """By row of the tables: every model that can generate."""
    found: dict[str, Sampler] = {}
    if models.base_lm is not None:
        base_lm = models.base_lm
        found["base_lm"] = lambda contexts, count, seed: continue_with_base_lm(base_lm, contexts, count, seed)
    for name, pair in (("latent", models.pair), ("identity_codec", models.identity)):
        if pair is not None and not pair.codec.config.sees_future:
            found[name] = _latent_sampler(pair, tokenizer)
    return found


def _latent_sampler(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    generator = LatentGenerator(*pair, tokenizer)

    def draw(contexts: list[list[int]], count: int, seed: int) -> list[list[int]]:
        return generator.generate_tokens(contexts, count, 1.0, seed, stop_at_end_of_text=False).token_ids

    return draw


def continue_all(
    sampler: Sampler, contexts: Sequence[list[int]], count: int, seed: int, ranks: Ranks
) -> list[list[int]]:
    """Continue all contexts, each rank some batches of them; every rank gets all of it."""
    # Contexts of similar length together: less padding to compute.
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    starts = range(0, len(order), BATCH)
    mine: list[list[int]] = []
    for index in ranks.share(len(starts)):
        part = [contexts[i] for i in order[starts[index] : starts[index] + BATCH]]
        mine += sampler(part, count, seed + index)
    drawn = dict(zip(order, ranks.gather_lists(mine), strict=True))
    return [drawn[i] for i in range(len(order))]


@torch.inference_mode()
def continue_with_base_lm(
    base_lm: BaseLM, contexts: list[list[int]], count: int, seed: int, temperature: float = 1.0
) -> list[list[int]]:
    """Draw `count` tokens behind each context; every text starts from the end-of-text token, as in training."""
    device = base_lm.lm.device
    longest = 1 + max(map(len, contexts))
    ids = torch.full((len(contexts), longest), base_lm.eos_token_id, dtype=torch.long)
    mask = torch.zeros(len(contexts), longest, dtype=torch.long)
    for row, context in enumerate(contexts):
        start = longest - len(context)
        ids[row, start:] = torch.tensor(context, dtype=torch.long)
        mask[row, start - 1 :] = 1
    ids, mask = ids.to(device), mask.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    cache = DynamicCache(config=base_lm.lm.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    drawn = []
    for _ in range(count):
        hidden = base_lm.lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        ids = sample(base_lm.lm.lm_head(hidden[:, -1]), temperature, generator)[:, None]
        drawn.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(drawn, dim=1).tolist()


def until_end(tokens: Sequence[int], eos_token_id: int) -> list[int]:
    """Tokens up to the end of the text, which is the last one kept."""
    tokens = list(tokens)
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
