"""Unsloth's part of `launch/benchmark.py inference`, run by the Python of its own environment (`make unsloth`).

    .venv-unsloth/bin/python launch/unsloth_peer.py < request.json

It imports nothing of this project. The request: directory, prompts (token ids of equal length), new_tokens, warm_up,
repeats, dtype, threads. The answer is the last line of standard output, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any


def main() -> int:
    """Read the request, generate, print the answer."""
    request: dict[str, Any] = json.load(sys.stdin)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(tempfile.gettempdir())  # it writes unsloth_compiled_cache/ into the working directory
    import unsloth  # isort: skip  # before transformers, which it patches
    import torch

    torch.set_num_threads(request["threads"])
    length = len(request["prompts"][0])
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=request["directory"],
        max_seq_length=length + request["new_tokens"],
        dtype=getattr(torch, request["dtype"]),
        load_in_4bit=False,
    )
    unsloth.FastLanguageModel.for_inference(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor(request["prompts"], device=model.device)

    def generate(count: int) -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )[:, length:]

    def timed(count: int) -> float:
        start = time.perf_counter()
        generate(count)
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        generate(request["warm_up"])
        answer = {
            "seconds": [timed(request["new_tokens"]) for _ in range(request["repeats"])],
            "first_s": [timed(1) for _ in range(request["repeats"])],
            "token_ids": generate(request["new_tokens"]).tolist(),
            "version": unsloth.__version__,
            "device": str(ids.device),
            "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        }
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
