"""Several recipes on one model: size, bits per weight, and how far the outputs move.

    python examples/compare_recipes.py                                      a small encoder, made here
    python examples/compare_recipes.py model.onnx --calibrate data.npz      any other model (MiniLM, say)

The last batch of the data is kept back: recipes are calibrated on the others and compared on it, in ONNX Runtime.
`--recipes` chooses some by name or by the path of a YAML file; by default all that come with planish are tried.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx.parser
from onnx import ModelProto, numpy_helper

import planish
from planish.calibrate.data import load_calibration
from planish.integrate.recipes import builtin_names
from planish.ir.errors import PlanishError
from planish.report.results import Results

Inputs = dict[str, np.ndarray]
WIDTH, HIDDEN, HEADS = 64, 256, 4
LOUD = [5, 40]

LAYER = """
  {p}n1 = LayerNormalization <axis = -1> ({x}, {p}g1, {p}b1)
  {p}q0 = MatMul ({p}n1, {p}wq)
  {p}k0 = MatMul ({p}n1, {p}wk)
  {p}v0 = MatMul ({p}n1, {p}wv)
  {p}q1 = Reshape ({p}q0, heads)
  {p}k1 = Reshape ({p}k0, heads)
  {p}v1 = Reshape ({p}v0, heads)
  {p}q = Transpose <perm = [0, 2, 1, 3]> ({p}q1)
  {p}k = Transpose <perm = [0, 2, 3, 1]> ({p}k1)
  {p}v = Transpose <perm = [0, 2, 1, 3]> ({p}v1)
  {p}s = MatMul ({p}q, {p}k)
  {p}t = Mul ({p}s, scale)
  {p}a = Softmax <axis = -1> ({p}t)
  {p}m0 = MatMul ({p}a, {p}v)
  {p}m1 = Transpose <perm = [0, 2, 1, 3]> ({p}m0)
  {p}m = Reshape ({p}m1, merged)
  {p}o = MatMul ({p}m, {p}wo)
  {p}x = Add ({x}, {p}o)
  {p}n2 = LayerNormalization <axis = -1> ({p}x, {p}g2, {p}b2)
  {p}u0 = MatMul ({p}n2, {p}wu)
  {p}u = Gelu ({p}u0)
  {p}d = MatMul ({p}u, {p}wd)
  {p}y = Add ({p}x, {p}d)
"""


def make_model(layers: int = 2) -> ModelProto:
    """A pre-norm encoder whose norms have two loud channels, as trained transformers have."""
    rng = np.random.default_rng(0)
    body, x = "", "x"
    weights = {
        "heads": np.array([0, 0, HEADS, WIDTH // HEADS]),
        "merged": np.array([0, 0, WIDTH]),
        "scale": np.float32((WIDTH // HEADS) ** -0.5),
    }
    for number in range(layers):
        p = f"l{number}_"
        body += LAYER.format(p=p, x=x)
        x = f"{p}y"
        for name, inputs, outputs in (
            *(("w" + letter, WIDTH, WIDTH) for letter in "qkvo"),
            ("wu", WIDTH, HIDDEN),
            ("wd", HIDDEN, WIDTH),
        ):
            weights[p + name] = rng.normal(size=(inputs, outputs)) / inputs**0.5
            if name in ("wq", "wk", "wv", "wu"):
                weights[p + name][LOUD] /= 10
        for number_ in "12":
            weights[f"{p}g{number_}"] = np.exp(0.2 * rng.normal(size=WIDTH))
            weights[f"{p}g{number_}"][LOUD] *= 25
            weights[f"{p}b{number_}"] = 0.1 * rng.normal(size=WIDTH)
            weights[f"{p}b{number_}"][LOUD] = 20
    head = '<ir_version: 10, opset_import: ["": 20]>\n'
    signature = f"encoder (float[batch, tokens, {WIDTH}] x) => (float[batch, tokens, {WIDTH}] {x})"
    model = onnx.parser.parse_model(f"{head}{signature}\n{{{body}}}")
    for name, array in weights.items():
        kept = np.asarray(array) if np.asarray(array).dtype.kind == "i" else np.asarray(array, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(kept, name))
    return model


def batches(count: int) -> list[Inputs]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(4, 16, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(path: Path, inputs: Inputs) -> np.ndarray:
    """The first output in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return np.asarray(session.run(None, {k: v for k, v in inputs.items() if k in names})[0])


def compare(model: Path, recipes: list[str], data: list[Inputs], folder: Path) -> None:
    """A line for each recipe; what one refuses is a line too."""
    *calibration, judged = data
    expected = run(model, judged).astype(np.float64)
    print(f"{'recipe':20} {'KB':>9} {'bits':>6} {'cosine':>8} {'error':>8} {'worst dB':>9} {'seconds':>8}")
    print(f"{'(float)':20} {model.stat().st_size / 1e3:9.1f}")
    for recipe in recipes:
        name = Path(recipe).stem
        out = folder / f"{name}.onnx"
        try:
            done = planish.convert(model, out, recipe, calibration=calibration)
            got = run(out, judged).astype(np.float64)
        except PlanishError as error:
            print(f"{name:20} {str(error).splitlines()[0]}")
            continue
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        cosine = float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected))
        results = done.report.results
        assert isinstance(results, Results)
        known = [db for s in results.sites for db in (s.weight_db, s.activation_db) if db is not None]
        print(
            f"{name:20} {(done.bytes_after or 0) / 1e3:9.1f} {results.bits_per_weight or 0:6.2f} {cosine:8.5f} "
            f"{error:8.5f} {min(known, default=float('nan')):9.1f} {done.seconds:8.1f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="an .onnx file; by default a small encoder")
    parser.add_argument("--calibrate", type=Path, help="for a model of your own: .npz, or a folder of .npz")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="by default every recipe there is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            if options.model is None:
                model, data = folder / "encoder.onnx", batches(9)
                onnx.save(make_model(), model)
            elif options.calibrate is None:
                parser.error("a model of your own needs --calibrate")
            else:
                model = options.model
                data = list(load_calibration(options.calibrate, planish.capture(model)))
            if len(data) < 2:
                raise PlanishError("data: one batch; expected two or more, to calibrate on and to compare on")
            compare(model, options.recipes or builtin_names(), data, folder)
        except PlanishError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
