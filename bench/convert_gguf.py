"""Turn a GGUF file into a Hugging Face folder (config, tokenizer, float32 safetensors), by transformers' own reader.

    python bench/convert_gguf.py FOLDER NAME.gguf OUT

It runs as a process of its own: transformers reads GGUF with the packages gguf and accelerate, which
`assets.gemma_dir` puts on this process's path only.
"""

import sys
from pathlib import Path


def main(folder: str, name: str, out: str) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32, local_files_only=True)
    # transformers does not save a model that came from GGUF; dequantised, it is an ordinary one
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True).save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {Path(out).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
