"""Quality of generated text: variety, repetition, and what the base LM thinks of it.

Every model continues the same held-out prompts at temperature 1 by the same number of tokens; beside them stands the
text itself. A sample counts up to the end of its text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline import TokenDataset
from launch.prompt_lengths import long_documents
from launch.ranks import Ranks
from launch.sampling import Sampler, continue_all, until_end
from rqvae import BaseLM

PROMPT_TOKENS = 16
REPETITION = 4
"""Tokens of the n-grams whose repetition is counted."""
MAUVE_MISSING = "mauve-text is not installed; it comes with the extra `eval` (pip install '.[eval]')"


def quality_report(
    rows: dict[str, Sampler],
    base_lm: BaseLM | None,
    dataset: TokenDataset,
    num_samples: int,
    num_tokens: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """The report's `sample_quality`: by row distinct_1 to distinct_4, repetition, base_lm_perplexity, mauve,
    mean_tokens. Empty where no document is long enough."""
    texts = long_documents(dataset, PROMPT_TOKENS + num_tokens, num_samples)
    if len(texts) == 0:
        return {}
    prompts = texts[:, :PROMPT_TOKENS].tolist()
    continuations = {"text": texts[:, PROMPT_TOKENS:].tolist()}
    for name, sampler in rows.items():
        drawn = continue_all(sampler, prompts, num_tokens, 3 << 20, ranks)
        continuations[name] = [until_end(tokens, dataset.eos_token_id) for tokens in drawn]
    report: dict[str, Any] = {}
    features = {}
    for name, samples in continuations.items():
        report[name] = {
            **{f"distinct_{n}": distinct(samples, n) for n in range(1, 5)},
            "repetition": float(np.mean([repetition(tokens) for tokens in samples])),
            "mean_tokens": float(np.mean([len(tokens) for tokens in samples])),
        }
        if base_lm is not None:
            nats, features[name] = judge(base_lm, prompts, samples)
            report[name]["base_lm_perplexity"] = float(np.exp(nats / max(1, sum(map(len, samples)))))
    for name, result in mauve_scores(features).items():
        report[name]["mauve"] = result
    report["samples"], report["prompt_tokens"] = len(texts), PROMPT_TOKENS
    report["new_tokens"] = num_tokens
    if features and not _has_mauve():
        report["mauve_note"] = MAUVE_MISSING
    return report


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams (Li 2016, section 5.3)."""
    counts = Counter(
        gram for tokens in samples for gram in zip(*(tokens[i:] for i in range(n)), strict=False)
    )
    return len(counts) / max(1, counts.total())


def repetition(tokens: Sequence[int], n: int = REPETITION) -> float:
    """Share of the n-grams of a sample that stood in it before (Welleck 2020, section 6.1: seq-rep-n)."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def judge(
    base_lm: BaseLM, prompts: Sequence[list[int]], samples: Sequence[list[int]]
) -> tuple[float, NDArray[np.float64]]:
    """Nats of all samples behind their prompts under the base LM, and its last states [n, H] at their ends."""
    total, features = 0.0, []
    device = base_lm.lm.device
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt + sample], device=device)
        total += float(base_lm(ids, torch.ones_like(ids)).nats[0, len(prompt) :].double().sum())
        features.append(base_lm.lm.model(input_ids=ids).last_hidden_state[0, -1].double().cpu().numpy())
    return total, np.stack(features)


def _has_mauve() -> bool:
    try:
        import mauve  # noqa: F401
    except ImportError:
        return False
    return True


def mauve_scores(features: dict[str, NDArray[np.float64]]) -> dict[str, float | None]:
    """MAUVE (Pillutla 2021) of every row against the text, on states of the base LM; None without the library."""
    rows = [name for name in features if name != "text"]
    if not _has_mauve():
        return dict.fromkeys(rows)
    import mauve

    return {
        name: float(
            mauve.compute_mauve(
                p_features=features["text"], q_features=features[name], seed=0, verbose=False
            ).mauve
        )
        for name in rows
    }
