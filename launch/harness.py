"""The models of this project as a model of lm-evaluation-harness.

What its requests mean for the latent model:

- `loglikelihood`: the context is padded on the left to whole chunks and encoded, and the continuation begins a chunk
  of its own, as in generation. The score is -(NLL(codes of the continuation) + NLL(continuation | codes)), a bound of
  log p(continuation | codes of the context). Choosing among answers by it is a heuristic: the bounds of two answers
  need not be equally tight.
- `is_greedy`: greedy generation really writes the continuation; of an autoregressive model the scoring pass tells.
- `loglikelihood_rolling`: a bound, over windows of `max_length` tokens, each a document of its own. The
  autoregressive models get the same windows, so that both see the same context.
- `generate_until`: generation.

An autoregressive model begins every text with its end-of-text token, as it was trained to here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from launch.ranks import Ranks
from launch.sampling import continue_with_base_lm
from launch.scored_models import Pair
from rqvae import BaseLM, LatentGenerator, latent_bound
from rqvae.token_codec import TokenCodec

DEFAULT_NEW_TOKENS = 128
"""Of `generate_until` where a task does not say."""


class Request(NamedTuple):
    """A continuation to be scored behind a context."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """What is known of a continuation from scoring it."""

    nats: float
    is_greedy: bool | None = None
    """Whether greedy generation writes it; None if only generation tells."""


class TokenScorer(ABC):
    """Scores and continues token sequences."""

    is_bound: bool

    @abstractmethod
    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score every continuation."""

    @abstractmethod
    def generate(
        self, contexts: list[list[int]], count: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """`count` new tokens behind every context; 0 is greedy."""


def _padded(
    rows: Sequence[tuple[int, list[int]]], multiple: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of (empty places, tokens) as input_ids and document_ids, of a length that is a multiple."""
    length = -(-max(phase + len(tokens) for phase, tokens in rows) // multiple) * multiple
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    documents = torch.zeros_like(ids)
    for row, (phase, tokens) in enumerate(rows):
        ids[row, phase : phase + len(tokens)] = torch.tensor(tokens)
        documents[row, phase : phase + len(tokens)] = 1
    return ids.to(device), documents.to(device)


class BaseLMScorer(TokenScorer):
    """An autoregressive model: exact."""

    is_bound = False

    def __init__(self, base_lm: BaseLM):
        self._base_lm = base_lm

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        rows = [(0, request.context + request.continuation) for request in requests]
        scored = self._base_lm(*_padded(rows, 1, self._base_lm.lm.device))
        nats, correct = scored.nats.double(), scored.correct
        spans = [slice(len(r.context), len(r.context) + len(r.continuation)) for r in requests]
        return [
            Score(float(nats[row, span].sum()), bool(correct[row, span].all()))
            for row, span in enumerate(spans)
        ]

    def generate(
        self, contexts: list[list[int]], count: int, temperature: float, seed: int
    ) -> list[list[int]]:
        return continue_with_base_lm(self._base_lm, contexts, count, seed, temperature)


class LatentScorer(TokenScorer):
    """A codec and its latent model: bounds.

    Where codes are not tokens, those of an answer's last chunk are paid for whole, however little of it is filled.

    Raises:
        ValueError: the codec sees the future, so that the codes of a context would tell its continuation.
    """

    is_bound = True

    def __init__(self, pair: Pair, tokenizer: PreTrainedTokenizerBase):
        self._pair = pair
        self._generator = LatentGenerator(*pair, tokenizer)

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Score]:
        factor = self._pair.codec.config.compression_factor
        rows = [(-len(r.context) % factor, r.context + r.continuation) for r in requests]
        bound = latent_bound(*self._pair, *_padded(rows, factor, self._pair.latent_model.device))
        codes, tokens = bound.code_nats.double(), bound.token_nats.double()
        if isinstance(self._pair.codec, TokenCodec):
            # The answer's length says which places of its last chunk hold nothing. Charging for them would favour
            # answers that end with a chunk: no text that the model was trained on stops inside of one.
            codes = codes * (bound.codes < self._pair.codec.absent)
        codes = codes.sum(-1)
        starts = [-(-len(request.context) // factor) for request in requests]
        return [
            Score(float(codes[row, start:].sum() + tokens[row, start * factor :].sum()))
            for row, start in enumerate(starts)
        ]

    def generate(
        self, contexts: list[list[int]], count: int, temperature: float, seed: int
    ) -> list[list[int]]:
        return self._generator.generate_tokens(
            contexts, count, temperature, seed, stop_at_end_of_text=False
        ).token_ids


class HarnessModel(LM):
    """A scorer behind lm-eval's interface.

    Args:
        max_length: tokens that the model may see at once; longer contexts lose their beginning, which is counted.
        ranks: the evaluator gives each rank its part of the requests.

    Attributes:
        truncated: hashes of the contexts that have lost their beginning. A set, since the harness repeats requests
            to give all ranks as many.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        batch_size: int,
        ranks: Ranks,
        device: torch.device,
    ):
        super().__init__()
        self.scorer, self.tokenizer = scorer, tokenizer
        self.max_length, self.batch_size = max_length, batch_size
        self.truncated: set[int] = set()
        self.ranks, self._device = ranks, device
        self._rank, self._world_size = ranks.rank, ranks.world_size

    # What the evaluator needs on several ranks ---------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors in a row."""
        return torch.stack(self.ranks.gather(tensor.cpu())).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The ranks' objects, on rank `dst`."""
        gathered = self.ranks.gather(obj)
        return gathered if self.ranks.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.ranks.gather(None)

    # Requests ------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of continuations, and whether greedy generation writes them."""
        pairs = [self._fitted(self.encode_pair(*request.args)) for request in requests]
        scores = self._scored(pairs)
        unknown = [pair for pair, score in zip(pairs, scores, strict=True) if score.is_greedy is None]
        written = self._greedy([(pair.context, len(pair.continuation)) for pair in unknown])
        verdicts = iter(text == pair.continuation for text, pair in zip(written, unknown, strict=True))
        return [
            (-score.nats, next(verdicts) if score.is_greedy is None else score.is_greedy) for score in scores
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts, window by window."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.encode(request.args[0])
            for start in range(0, len(ids), self.max_length):
                windows.append(Request([], ids[start : start + self.max_length]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self._scored(windows), strict=True):
            totals[owner] -= score.nats
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first of the stop strings, or the end of the text."""
        asked: list[tuple[list[int], int]] = []
        for request in requests:
            context, settings = request.args
            count = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self.max_length - 1)
            asked.append((self._shortened(self.encode(context), count), count))
        is_drawn = [bool(request.args[1].get("do_sample")) for request in requests]
        greedy = iter(self._greedy([job for job, draws in zip(asked, is_drawn, strict=True) if not draws]))
        texts = []
        for request, (ids, count), draws in zip(requests, asked, is_drawn, strict=True):
            settings = request.args[1]
            if draws:  # alone, so that the draw does not depend on what else is asked
                tokens = self.scorer.generate([ids], count, float(settings.get("temperature", 1.0)), seed=0)[
                    0
                ]
            else:
                tokens = next(greedy)
            texts.append(self._until(tokens, settings.get("until") or []))
        return texts

    def _until(self, tokens: list[int], stops: str | list[str]) -> str:
        """The text up to its end, or to the first of the stop strings."""
        end = self.tokenizer.eos_token_id
        text = str(self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens))
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text

    # Tokens --------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_pair(self, context: str, continuation: str) -> Request:
        """Cut the tokens of both together where the context ends; spaces at its end go to the continuation."""
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        whole, before = self.encode(kept + continuation), self.encode(kept)
        return Request(whole[: len(before)], whole[len(before) :])

    def _fitted(self, request: Request) -> Request:
        if len(request.continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(request.continuation)} tokens does not fit max_length {self.max_length}; "
                "raise --max-length"
            )
        return Request(self._shortened(request.context, len(request.continuation)), request.continuation)

    def _shortened(self, context: list[int], new: int) -> list[int]:
        room = self.max_length - new
        if len(context) <= room:
            return context
        self.truncated.add(hash(tuple(context)))
        return context[len(context) - room :]

    def _scored(self, requests: list[Request]) -> list[Score]:
        """All scores, in batches of similar length."""
        scores = [Score(0.0, is_greedy=True)] * len(requests)  # of nothing at all
        order = sorted(
            range(len(requests)), key=lambda i: len(requests[i].context + requests[i].continuation)
        )
        for part in _parts([i for i in order if requests[i].continuation], self.batch_size):
            for i, score in zip(part, self.scorer.score([requests[i] for i in part]), strict=True):
                scores[i] = score
        return scores

    def _greedy(self, asked: list[tuple[list[int], int]]) -> list[list[int]]:
        """So many tokens behind every context, by greedy generation; a context is continued once."""
        longest: dict[tuple[int, ...], int] = {}
        for context, count in asked:
            longest[tuple(context)] = max(longest.get(tuple(context), 0), count)
        written: dict[tuple[int, ...], list[int]] = {}
        order = sorted(longest, key=lambda key: (longest[key], len(key)))
        for part in _parts(order, self.batch_size):
            count = max(longest[key] for key in part)
            drawn = (
                self.scorer.generate([list(key) for key in part], count, 0.0, 0)
                if count
                else [[]] * len(part)
            )
            written |= dict(zip(part, drawn, strict=True))
        return [written[tuple(context)][:count] for context, count in asked]


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
