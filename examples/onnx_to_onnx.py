"""ONNX in, quantised ONNX out, through a recipe; prints sizes and how far the outputs moved.

    python examples/onnx_to_onnx.py                                     the MiniLM sentence encoder (fetched once)
    python examples/onnx_to_onnx.py model.onnx --calibrate data.npz     any other model

The encoder is calibrated on 64 sentences of Wikipedia and compared on 16 of the Brown corpus, by cosine of
mean-pooled embeddings. Any other model is compared on the first batch of its calibration data, output by output.
`make demo` is the measurement: more data, latency, and the other quantisers beside planish.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

import planish
from planish.calibrate.data import load_calibration
from planish.ir.errors import PlanishError

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import assets

Inputs = dict[str, np.ndarray]


def run(path: Path, inputs: Inputs) -> list[np.ndarray]:
    """The outputs of a model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return [np.asarray(a) for a in session.run(None, {k: v for k, v in inputs.items() if k in names})]


def sentences(split: Any, count: int) -> list[Inputs]:
    """Batches of 8 tokenised sentences."""
    texts = assets.sentences(split, count)
    return [assets.encode(texts[i : i + 8]) for i in range(0, count, 8)]


def compare_embeddings(before: Path, after: Path, batches: list[Inputs]) -> None:
    cosines = []
    for inputs in batches:
        mask = inputs["attention_mask"][..., None]
        one, two = ((run(path, inputs)[0] * mask).sum(1) for path in (before, after))
        cosines.append((one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1))
    cosine = np.concatenate(cosines)
    print(f"cosine to the float model over {len(cosine)} sentences: mean {cosine.mean():.5f}, worst {cosine.min():.5f}")


def compare_outputs(before: Path, after: Path, inputs: Inputs) -> None:
    for number, (one, two) in enumerate(zip(run(before, inputs), run(after, inputs), strict=True)):
        if one.dtype.kind == "f":
            error = np.linalg.norm(two - one) / max(float(np.linalg.norm(one)), 1e-30)
            print(f"output {number}: relative error {error:.5f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="an .onnx file; by default MiniLM")
    parser.add_argument("-o", "--output", type=Path, default=Path("quantised.onnx"))
    parser.add_argument("--recipe", default="w8a8-dynamic", help="see `planish recipes`")
    parser.add_argument("--calibrate", type=Path, help="for a model of your own: .npz, or a folder of .npz")
    options = parser.parse_args()
    try:
        if options.model is None:
            model, data = assets.minilm_onnx(), sentences("calibration", 64)
        elif options.calibrate is None:
            parser.error("a model of your own needs --calibrate")
        else:
            model = options.model
            data = list(load_calibration(options.calibrate, planish.capture(model)))
        done = planish.convert(model, options.output, options.recipe, calibration=data)
    except (PlanishError, assets.AssetError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    print(f"{model.name} -> {options.output}: recipe {done.recipe}, target {done.target}")
    for made in done.report.passes:
        declined = sum(made.reasons().values())
        error = "" if made.error is None else f", float64 error {made.error:.1e}"
        print(f"  {made.name}: {len(made.applied)} applied, {declined} declined{error}")
    if done.bytes_before is not None and done.bytes_after is not None:
        print(f"{done.bytes_before / 1e6:.1f} MB -> {done.bytes_after / 1e6:.1f} MB in {done.seconds:.0f} s")
    if options.model is None:
        compare_embeddings(model, options.output, sentences("judge", 16))
    else:
        compare_outputs(model, options.output, data[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
