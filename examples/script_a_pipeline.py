"""Script a pipeline: capture, look, collect, rewrite, quantise, check, write.

    python examples/script_a_pipeline.py [FOLDER]

The model is made here, so nothing is downloaded: a pre-norm feed-forward block whose norm has a few
channels that are far larger than the rest, as trained transformers have. Quantised as it is, those
channels take the whole range of int8; the exact passes move them into the weights first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx.parser
from onnx import ModelProto, numpy_helper

import planish

WIDTH, HIDDEN = 32, 128
OUTLIERS = [3, 17, 30]

BLOCK = """
<ir_version: 10, opset_import: ["": 20]>
block (float[batch, tokens, 32] x) => (float[batch, tokens, 32] y)
{
  normed = LayerNormalization <axis = -1> (x, gain, shift)
  up = MatMul (normed, up_weight)
  hidden = Add (up, up_bias)
  active = Gelu (hidden)
  down = MatMul (active, down_weight)
  change = Add (down, down_bias)
  y = Add (change, x)
}
"""


def make_model() -> ModelProto:
    """y = x + down(gelu(up(norm(x)))), with outliers in three channels of the norm."""
    rng = np.random.default_rng(0)
    gain, shift = np.ones(WIDTH), np.zeros(WIDTH)
    gain[OUTLIERS], shift[OUTLIERS] = 20.0, 30.0
    up = rng.normal(size=(WIDTH, HIDDEN)) / WIDTH**0.5
    up[OUTLIERS] /= 20.0
    weights = {
        "gain": gain,
        "shift": shift,
        "up_weight": up,
        "up_bias": rng.normal(size=HIDDEN) / 10,
        "down_weight": rng.normal(size=(HIDDEN, WIDTH)) / HIDDEN**0.5,
        "down_bias": rng.normal(size=WIDTH) / 10,
    }
    model = onnx.parser.parse_model(BLOCK)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return model


def batches(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(4, 16, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The model's output in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def main(folder: Path) -> None:
    source = folder / "block.onnx"
    onnx.save(make_model(), source)

    # Capture, and let the raising passes find linears, norms and attention. No graph is ever changed in place.
    graph, _ = planish.Pipeline("raise").run(planish.capture(source))
    print(f"captured: {' '.join(node.op.name for node in graph.nodes)}")

    # What may be transformed free of cost, and what blocks the rest.
    for row in planish.inspect(graph).rows:
        print(f"  {row.first}, {row.size} channels: {row.group}")
        for act, obstacles in row.blockers.items():
            print(f"    no {act}: {obstacles[0]}")

    # Calibrate, and run the same quantisation without and with the exact passes.
    stats = planish.collect(graph, batches(8, seed=1))
    held_out = batches(1, seed=2)[0]
    expected = run(source, held_out)
    for label, passes in {
        "quantize alone": "quantize,lower{target=ort}",
        "shift and scale first": "shift-channels,scale-channels{insert=true},quantize,lower{target=ort}",
    }.items():
        rewritten, report = planish.Pipeline(passes).run(graph, stats=stats)
        written = folder / f"{label.replace(' ', '-')}.onnx"
        planish.to_onnx(rewritten, written, target="ort")
        difference = run(written, held_out) - expected
        print(f"{label}: relative error {np.linalg.norm(difference) / np.linalg.norm(expected):.4f} in ONNX Runtime")
        for done in report.passes:
            remarks = f"{len(done.applied)} applied"
            remarks += "" if done.error is None else f", error in float64 {done.error:.0e}"
            remarks += f", {done.inserted} op inserted" if done.inserted else ""
            print(f"  {done.name}: {remarks}")
            for reason, places in done.declined.items():
                print(f"    declined: {reason} ({places[0]})")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        main(target)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
