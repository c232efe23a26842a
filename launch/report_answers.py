"""The questions that this project is to answer, and which sweep answers each: nothing is guessed.

A question that no sweep of the set answers reads "not run", with the command that would answer it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.report_findings import (
    Answer,
    against_ar,
    best_trial,
    by_compression,
    closing,
    extrapolated,
    race,
    uniformity,
    unquantized,
    unsloth,
    usage,
)


@dataclass(frozen=True)
class Question:
    """A question, the sweeps that can answer it, the best first, and how; `find` gives None where one cannot."""

    text: str
    sweeps: tuple[str, ...]
    find: Callable[[Mapping[str, Any]], Answer | None]
    command: str = ""
    """What would answer it, where no sweep does."""


def answers(sweeps: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, float]) -> list[Answer]:
    """All rows.

    Args:
        sweeps: content of results.json by name.
        sizes: weights of Qwen3 backbones by name.
    """
    rows = []
    for question in questions(sizes):
        tried = (question.find(sweeps[name]) for name in question.sweeps if name in sweeps)
        found = next((answer for answer in tried if answer is not None), None)
        if found is None:
            command = (
                question.command
                or f"python launch/experiments.py --sweep configs/sweeps/{question.sweeps[0]}.yaml"
            )
            found = Answer(question.text, None, "not run", command=command)
        rows.append(found)
    return rows


def questions(sizes: Mapping[str, float]) -> list[Question]:
    """In the order of the table."""

    def best(text: str, sweep: str, *names: str, codec: str | None = None) -> Question:
        return Question(text, (sweep,), lambda results: best_trial(text, results, names, codec))

    headline = ("headline", "compression")
    return [
        with_text("How much faster is decoding in latent space, at what loss?", headline, race),
        with_text("How far is a codec's held-out perplexity from plain AR's?", headline, against_ar),
        with_text("Does that hold with more text, more words and longer training?", ("small",), race),
        best("Which codes can a latent model predict?", "recipes"),
        best("Codec and latent model trained together?", "joint", codec="rqvae"),
        with_text(
            "What is gained in speed, and lost in quality, as K grows?", ("compression",), by_compression
        ),
        with_text("Are the codebooks used?", headline, usage),
        best("How should bits be spread: few large codebooks or many small ones?", "codebook", codec="rqvae"),
        best("Should sizes differ by level?", "codebook", "d2-c1024", "d2-coarse", "d2-fine", "d3-graded"),
        best("RQ-transformer or a standard transformer, at equal training compute?", "architecture"),
        with_text("Does the gap to plain AR close with size and training?", ("model_size",), closing),
        best("Does a pretrained decoder help?", "backbone"),
        best("Frozen only, warm-up, or full training?", "freezing", codec="rqvae"),
        best("Which quantizer?", "quantizer", codec="rqvae"),
        best("What should the latent model read of the past?", "latent_input"),
        with_text("Does Unsloth help?", ("unsloth",), unsloth),
        Question(
            "What is to be expected at 8B?",
            ("model_size",),
            lambda results: extrapolated("What is to be expected at 8B?", results, sizes),
        ),
        Question(
            "How do the base models do on standard tasks?",
            (),
            lambda _: None,
            "python launch/eval_tasks.py --model runs/tiny/model",
        ),
        with_text("How much do the convolutions lose by themselves?", ("convolutions",), unquantized),
        with_text("Is uniform usage a goal?", ("usage", "quantizer"), uniformity),
    ]


def with_text(
    text: str, sweeps: tuple[str, ...], find: Callable[[str, Mapping[str, Any]], Answer | None]
) -> Question:
    """A question whose text goes into its answer."""
    return Question(text, sweeps, lambda results: find(text, results))
