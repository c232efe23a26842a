"""Generate text in latent space.

    python launch/generate.py --model runs/tiny/model --prompt "Return the"

DIR of `--model` holds `rqvae`, `rq_transformer` and `tokenizer`. Texts go to standard output, one after another, or
as JSON lines with `--jsonl`; speed goes to standard error. A model's quality is in its report.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rqvae import LatentGenerator, load_codec, load_latent_model


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of the exported models")
    parser.add_argument("--prompt", action="append", help="text to continue; may be given several times")
    parser.add_argument(
        "--prompts", type=argparse.FileType(), help="file with one prompt a line; - for stdin"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jsonl", action="store_true", help="print JSON lines {prompt, text}")
    args = parser.parse_args(arguments)
    prompts = list(args.prompt or [])
    if args.prompts:
        prompts += args.prompts.read().splitlines()
    if not prompts:
        parser.error("give --prompt or --prompts")
    if args.temperature < 0:
        parser.error("--temperature must be 0 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for part in ("rqvae", "rq_transformer", "tokenizer"):
            if not (args.model / part).is_dir():
                raise ValueError(f"'{args.model}' has no '{part}' (launch/convert_checkpoint.py writes it)")
        vae = load_codec(args.model / "rqvae").to(device)
        latent_model = load_latent_model(args.model / "rq_transformer").to(device)
        tokenizer = AutoTokenizer.from_pretrained(args.model / "tokenizer")
        generator = LatentGenerator(vae, latent_model, tokenizer)
        start = time.perf_counter()
        texts = generator.generate(prompts, args.max_new_tokens, args.temperature, args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    for prompt, text in zip(prompts, texts, strict=True):
        if args.jsonl:
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
        else:
            print(prompt + text + ("\n" if len(prompts) > 1 else ""))
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    print(f"{num_tokens} tokens in {seconds:.2f} s ({num_tokens / seconds:.0f} tokens/s)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
