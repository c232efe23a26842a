"""Generate text in latent space.

    python launch/generate.py --model runs/tiny/model --prompt "Return the"
    python launch/generate.py --model runs/tiny/model --prompts - --jsonl --batch-size 32 < prompts.txt

DIR of `--model` holds `rqvae`, `rq_transformer` and `tokenizer`. Texts go to standard output, one after another, or
as JSON lines with `--jsonl`. Speed, and what the report beside the model says of its quality, go to standard error.

A text is a function of the model, the prompt, its place among the prompts and the seed: `--batch-size`, `--mode` and
`--stream` change the speed only (in bf16 also what rounding decides). `--temperature`, `--top-k` and `--top-p` take
one value, or one for every level of the codes: 1.0,1.0,0.7,0.5.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.progress import Progress
from launch.inference_models import load_generator, quality_note, trained_length
from launch.precision import add_precision
from rqvae import LatentGenerator
from rqvae.generation_options import GenerationOptions


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = _parse(arguments)
    try:
        options = GenerationOptions(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            top_k=args.top_k,
            top_p=args.top_p,
            token_temperature=args.token_temperature,
            mode=args.mode,
            stop=args.stop or (),
            min_new_tokens=args.min_new_tokens,
            num_levels=args.num_levels,
            best_of=args.best_of,
        )
        generator = load_generator(args.model, args.precision, args.int8, args.compile)
        for line in _notes(args, generator):
            print(line, file=sys.stderr)
        work = _stream if args.stream else _generate
        speed = work(generator, args.prompts, options, args.batch_size, args.jsonl)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rate = speed.tokens / speed.seconds
    print(f"{speed.tokens} tokens in {speed.seconds:.2f} s ({rate:.0f} tokens/s)", file=sys.stderr)
    if speed.first_text_s is not None:
        print(f"first text after {1e3 * speed.first_text_s:.0f} ms", file=sys.stderr)
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """`prompts` are all of them, in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of the exported models")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument(
        "--prompts", type=argparse.FileType(), help="file with one prompt a line; - for stdin"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="prompts generated together")
    output = parser.add_argument_group("output")
    output.add_argument("--jsonl", action="store_true", help="print JSON lines {prompt, text}")
    output.add_argument(
        "--stream",
        action="store_true",
        help="print text as soon as it is decoded: prompt after prompt, or with --jsonl a batch at a time as "
        "lines {row, text}",
    )
    length = parser.add_argument_group("length")
    length.add_argument("--max-new-tokens", type=int, default=64)
    length.add_argument("--min-new-tokens", type=int, default=0, help="no end of text within so many")
    length.add_argument("--stop", action="append", help="string to end at; may be given several times")
    draws = parser.add_argument_group("draws")
    draws.add_argument(
        "--temperature", type=_values(float), default=1.0, help="0 takes the most likely codes"
    )
    draws.add_argument("--top-k", type=_values(int), default=0, help="the likeliest codes only; 0: all")
    draws.add_argument(
        "--top-p", type=_values(float), default=1.0, help="the likeliest codes of this share only"
    )
    draws.add_argument(
        "--token-temperature",
        type=float,
        help="of the tokens that codes leave open (default: the last level's)",
    )
    draws.add_argument("--seed", type=int, default=0)
    draws.add_argument(
        "--best-of", type=int, default=1, help="candidates by prompt, of which the likeliest counts"
    )
    work = parser.add_argument_group("speed")
    work.add_argument("--mode", choices=("auto", "deferred", "streaming"), default="auto")
    work.add_argument("--num-levels", type=int, help="leading levels drawn of every latent: faster, coarser")
    add_precision(work)
    work.add_argument(
        "--int8",
        action="store_true",
        help="weights in 8 bits, which saves memory and on a CPU costs time (needs pip install torchao)",
    )
    work.add_argument(
        "--compile",
        action="store_true",
        help="one launch per level of the depth loop: a CUDA graph, or on a CPU torch.compile, which takes a while",
    )
    args = parser.parse_args(arguments)
    lines = args.prompts.read().splitlines() if args.prompts else []
    args.prompts = [*(args.prompt or []), *lines]
    if not args.prompts:
        parser.error("give --prompt or --prompts")
    if args.batch_size < 1:
        parser.error("--batch-size must be 1 or more")
    if args.stream and args.mode == "auto":
        args.mode = "streaming"
    return args


def _values(kind: type) -> Callable[[str], Any]:
    """A value, or several with commas between them."""

    def parse(text: str) -> Any:
        values = [kind(part) for part in text.split(",")]
        return values if len(values) > 1 else values[0]

    parse.__name__ = f"{kind.__name__}, or a list with commas"  # argparse names it in errors
    return parse


def _notes(args: argparse.Namespace, generator: LatentGenerator) -> Iterator[str]:
    yield quality_note(args.model)
    trained = trained_length(args.model)
    counts = [_count(generator, prompt) + args.max_new_tokens for prompt in args.prompts]
    if trained is not None and (longer := sum(count > trained for count in counts)):
        yield (
            f"note: {longer} of {len(counts)} prompts and their new tokens are longer than the {trained} tokens of "
            "the training samples; what lies behind them was never trained"
        )


def _count(generator: LatentGenerator, text: str) -> int:
    return len(generator.tokenizer(text, add_special_tokens=False)["input_ids"])


class _Speed(NamedTuple):
    tokens: int
    """Of the texts, prompts left out."""
    seconds: float
    first_text_s: float | None = None


def _batches(
    options: GenerationOptions, prompts: list[str], size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first row of every batch, and its arguments: prompts keep their draws whatever the batch size."""
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        batch = replace(options, row_keys=range(start, start + len(part)))
        yield start, {"prompts": part, **{field.name: getattr(batch, field.name) for field in fields(batch)}}


def _generate(
    generator: LatentGenerator, prompts: list[str], options: GenerationOptions, batch_size: int, jsonl: bool
) -> _Speed:
    tokens, seconds = 0, 0.0
    # A bar says nothing about a single batch.
    with Progress(len(prompts), "generate", unit="prompts", shown=len(prompts) > batch_size) as progress:
        for _, arguments in _batches(options, prompts, batch_size):
            start = time.perf_counter()
            texts = generator.generate(**arguments)
            seconds += time.perf_counter() - start
            for prompt, text in zip(arguments["prompts"], texts, strict=True):
                tokens += _count(generator, text)
                if jsonl:
                    print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
                else:
                    print(prompt + text + ("\n" if len(prompts) > 1 else ""))
            progress.update(len(texts), tokens_per_s=tokens / seconds)
    return _Speed(tokens, seconds)


def _stream(
    generator: LatentGenerator, prompts: list[str], options: GenerationOptions, batch_size: int, jsonl: bool
) -> _Speed:
    begin, first = time.perf_counter(), None
    texts = [""] * len(prompts)
    for start, arguments in _batches(options, prompts, batch_size if jsonl else 1):
        if not jsonl:
            print(prompts[start], end="", flush=True)
        for piece in generator.stream(**arguments):
            first = first or time.perf_counter() - begin
            texts[start + piece.row] += piece.text
            if jsonl:
                line = json.dumps({"row": start + piece.row, "text": piece.text}, ensure_ascii=False)
                print(line, flush=True)
            else:
                print(piece.text, end="", flush=True)
        if not jsonl:
            print("\n" if len(prompts) > 1 else "")
    seconds = time.perf_counter() - begin
    return _Speed(sum(_count(generator, text) for text in texts), seconds, first)


if __name__ == "__main__":
    sys.exit(main())
