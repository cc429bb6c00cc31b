"""Gemma 3 270M writes text with 4-bit weights, through torch.compile; tokens per second beside float.

    python examples/generate_text.py [--prompt TEXT] [--tokens 64] [--recipe NAME] [--calibrate 8] [--dtype bfloat16]

The model is fetched once into the cache (a licence applies to it, see bench/assets.py). Both runs are greedy and write
into the same static cache: its size never changes, so two graphs are compiled, one of the prompt and one of a token.
That takes about a minute and is not in the tokens per second. What is compiled is the model as transformers made it,
nothing in it is replaced.

Weights are rounded to nearest here, which needs no data. `--recipe w4a16 --calibrate 8` shows the model eight sentences
first and takes several times as long to compile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import planish

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import assets

PROMPT = "The hammer, the anvil and the planishing stake are the tools of"
FOUR_BITS = "raise,quantize{weights=int4:g32 embeddings=none}"


def write(run: Callable[..., Any], cache: Any, ids: torch.Tensor, count: int) -> tuple[list[int], float]:
    """Tokens behind a prompt [1, T], and tokens per second of those that follow the first."""
    cache.reset()
    made = []
    start = 0.0
    for _ in range(count):
        logits = run(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        made.append(int(ids))
        start = start or time.perf_counter()
    return made, (count - 1) / (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--recipe", default=FOUR_BITS, help="a name or a pipeline")
    parser.add_argument("--calibrate", type=int, default=0, metavar="N", help="sentences to learn from")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

    folder = assets.gemma_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    dtype = getattr(torch, options.dtype)
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval().requires_grad_(False)
    )
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + options.tokens)

    quantised = torch.compile(model, backend="planish", options={"recipe": options.recipe})
    if options.calibrate:
        with planish.calibrating(quantised):
            for text in assets.sentences("calibration", options.calibrate):
                quantised(input_ids=tokenizer(text, return_tensors="pt").input_ids, use_cache=False)

    for name, run in (("float", model), ("planish", quantised)):
        write(run, cache, ids, 2)  # compiles
        made, speed = write(run, cache, ids, options.tokens)
        print(f"{name}, {speed:.1f} tokens per second:\n  {tokenizer.decode(made).strip()}", flush=True)


if __name__ == "__main__":
    main()
