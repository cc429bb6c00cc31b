"""Gemma 3 270M writes text with 4-bit weights, through torch.compile; tokens per second beside float.

    python examples/generate_text.py [--prompt TEXT] [--tokens 64] [--recipe NAME] [--dtype bfloat16]

The model is fetched once into the cache (a licence applies to it, see bench/assets.py). Both runs are greedy, with the
same static key-value cache; the prompt and each further token are one call. The first calls, which compile, are not
timed. What is compiled is the model as transformers made it, nothing in it is replaced.
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


def write(run: Callable[..., Any], model: Any, ids: torch.Tensor, count: int) -> tuple[list[int], float]:
    """Tokens behind a prompt [1, T], and tokens per second of those that follow the first."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + count)
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
    parser.add_argument("--recipe", default="w4a16", help="a name or a pipeline")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.gemma_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    dtype = getattr(torch, options.dtype)
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval().requires_grad_(False)
    )
    ids = tokenizer(options.prompt, return_tensors="pt").input_ids

    quantised = torch.compile(model, backend="planish", options={"recipe": options.recipe})
    with planish.calibrating(quantised):  # a text to learn from; any will do better than none
        for text in assets.sentences("calibration", 8):
            quantised(input_ids=tokenizer(text, return_tensors="pt").input_ids, use_cache=False)

    for name, run in (("float", model), (f"planish {options.recipe}", quantised)):
        write(run, model, ids, 4)  # compiles
        made, speed = write(run, model, ids, options.tokens)
        print(f"{name}, {speed:.1f} tokens per second:\n  {tokenizer.decode(made).strip()}")


if __name__ == "__main__":
    main()
