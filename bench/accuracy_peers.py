"""Other quantisers on the same models: ONNX Runtime's, llm-compressor's, torchao's.

ONNX Runtime's weight quantisers (RTN, HQQ, k-quant) run here, on MiniLM's file and on each linear of Gemma as an ONNX
model of one MatMul, whose numbers are read back through ONNX Runtime. llm-compressor and torchao run in an environment
of their own (`~/.cache/planish/venv-peers`, made as `bench/zoo_peers.py` makes it; torchao is added), one process for
each, which writes the hidden states that the quantised model gives to its head; they are judged here, as planish's are.

llm-compressor's SmoothQuant is left out: on Gemma 3 it divides the weight of a norm that multiplies by 1 + weight, and
is no identity (relative error .95). Its AWQ, which knows these norms, is in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
from common import note

if TYPE_CHECKING:
    import torch
    from accuracy_encoder import Encoder
    from accuracy_gemma import Gemma

LIMIT = 1500  # seconds for one peer
TORCHAO = "torchao==0.18.0"

# name: tool, its settings, bits per weight (scales of 16 bits, zero points of the weight's), rows it stands beside
GROUP = {"w4g128": 4 + (16 + 4) / 128, "w4g32": 4 + (16 + 4) / 32, "w2g64": 2 + (16 + 2) / 64, "w4g64": 4 + 16 / 64}
INSIDE: dict[str, dict[str, Any]] = {
    "llm-compressor GPTQ W4A16 g128": {
        "tool": "gptq", "bits": 4, "group": 128, "symmetric": False, "size": GROUP["w4g128"],
        "rows": ["gemma w4a16-g128", "gemma w2a16-g64-split"],
    },
    "llm-compressor AWQ W4A16 g128": {
        "tool": "awq", "bits": 4, "group": 128, "symmetric": False, "size": GROUP["w4g128"],
        "rows": ["gemma w4a16-g128", "gemma w2a16-g64-split"],
    },
    "llm-compressor GPTQ W4A8 g128": {
        "tool": "gptq", "bits": 4, "group": 128, "symmetric": False, "activations": "token", "size": GROUP["w4g128"],
        "rows": ["gemma w4a8-g128"],
    },
    "llm-compressor GPTQ W8A8 token": {
        "tool": "gptq", "bits": 8, "activations": "token", "size": 8.02, "rows": ["gemma w8a8-token"],
    },
    "llm-compressor GPTQ W8A8 static": {
        "tool": "gptq", "bits": 8, "activations": "tensor", "size": 8.02, "rows": ["gemma w8a8-static"],
    },
    "llm-compressor GPTQ W4A4 g64": {
        "tool": "gptq", "bits": 4, "group": 64, "activations": "group", "size": GROUP["w4g64"],
        "rows": ["gemma w4a4-g64-r32"],
    },
    "llm-compressor GPTQ W2A16 g64": {
        "tool": "gptq", "bits": 2, "group": 64, "symmetric": False, "size": GROUP["w2g64"],
        "rows": ["gemma w2a16-g64-split"],
    },
    "torchao int8 dynamic": {"tool": "torchao-int8", "size": 8.02, "rows": ["gemma w8a8-token"]},
    "torchao int4 weight-only g128": {
        "tool": "torchao-int4", "group": 128, "size": GROUP["w4g128"], "rows": ["gemma w4a16-g128"],
    },
    "torchao int4 weights g128, int8 dynamic": {
        "tool": "torchao-w4a8", "group": 128, "size": 4 + 16 / 128, "rows": ["gemma w4a8-g128"],
    },
}  # fmt: skip


def measure(model: Gemma | Encoder, quick: bool, known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and figures of all peers on a model, but for those that are known."""
    from accuracy_gemma import Gemma

    if isinstance(model, Gemma):
        yield from onnxruntime_gemma(model, quick, known)
        if not quick:
            yield from inside_gemma(model, known)
    else:
        yield from onnxruntime_encoder(model, known)


# -- ONNX Runtime --------------------------------------------------------------------------------------------


def onnxruntime_configs(block: int) -> Iterator[tuple[str, Any]]:
    """Names and configurations of its 4-bit quantisers."""
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    yield f"onnxruntime RTN W4 g{block}", quantizer.DefaultWeightOnlyQuantConfig(block_size=block, bits=4)
    yield f"onnxruntime HQQ W4 g{block}", quantizer.HQQWeightOnlyQuantConfig(block_size=block, bits=4)
    yield f"onnxruntime k-quant W4 g{block}", quantizer.KQuantWeightOnlyQuantConfig()
    level = quantizer.DefaultWeightOnlyQuantConfig(block_size=block, bits=4, accuracy_level=4)  # int8 activations
    yield f"onnxruntime RTN W4A8 g{block}", level


def quantise_onnx(model: Any, config: Any, block: int) -> Any:
    """An ONNX model with MatMulNBits."""
    import logging

    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    level = getattr(config, "accuracy_level", None)
    work = MatMulNBitsQuantizer(
        model, bits=4, block_size=block, is_symmetric=False, accuracy_level=level, algo_config=config
    )
    work.process()
    return work.model.model


def onnxruntime_encoder(model: Encoder, known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """On MiniLM's file, blocks of 32."""
    import encoder
    import onnx

    for name, config in onnxruntime_configs(32):
        if name in known:
            continue
        note(f"minilm: {name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            made = quantise_onnx(onnx.load(model.path), config, 32)
            onnx.save(made, path)
            judged = model.judge(encoder.ort_runner(path))
        beside = "minilm w4a8-g32" if "W4A8" in name else "minilm w4a16-g32"
        yield name, {"model": "minilm", "bits": onnx_bits(made), "rows": [beside], **asdict(judged)}


def onnx_bits(model: Any) -> float:
    """Bits per weight of its MatMulNBits nodes; floats count 16 bits."""
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    given = {a.name: a.i for a in node.attribute}
    held = {t.name: t.data_type for t in model.graph.initializer}
    zero = node.input[3] if len(node.input) > 3 else ""
    zero_bits = 0 if not zero else given["bits"] if held[zero] in (2, 3) else 16  # u8, i8: packed codes
    return float(given["bits"] + (16 + zero_bits) / given["block_size"])


def one_matmul(weight: torch.Tensor) -> Any:
    """An ONNX model y = x W^T."""
    from onnx import TensorProto, helper, numpy_helper

    outputs, inputs = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def onnxruntime_gemma(model: Gemma, quick: bool, known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """On each linear of Gemma's blocks: weights alone."""
    import gemma
    import numpy as np
    import onnxruntime as ort
    import torch

    wanted = [(name, config, 128) for name, config in list(onnxruntime_configs(128))[:2]]
    wanted.append((*list(onnxruntime_configs(32))[2], 32))  # k-quant has no blocks of 128
    for name, config, block in wanted[: 1 if quick else 3]:
        if name in known:
            continue
        start = time.perf_counter()
        net = gemma.load(model.folder)
        for linear in [m for m in net.model.layers.modules() if isinstance(m, torch.nn.Linear)]:
            made = quantise_onnx(one_matmul(linear.weight), config, block)
            session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
            (rows,) = session.run(None, {"x": np.eye(linear.in_features, dtype=np.float32)})
            linear.weight.copy_(torch.from_numpy(rows.T))
        judged = model.judge(lambda ids, net=net: net.model(input_ids=ids, use_cache=False).last_hidden_state)
        note(f"gemma: {name}, ratio {judged.ratio:.4f}, {time.perf_counter() - start:.0f} s")
        names = ["gemma w4a16-g128", "gemma w2a16-g64-split"]
        yield name, {"model": "gemma", "bits": onnx_bits(made), "rows": names, **asdict(judged)}


# -- the others, in their own environment --------------------------------------------------------------------


def inside_gemma(model: Gemma, known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """llm-compressor and torchao, calibrated on Wikipedia; what cannot be run says why."""
    import numpy as np
    from zoo_peers import environment

    python = environment()
    if subprocess.run([python, "-c", "import torchao"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", TORCHAO], check=True)
    for name, job in INSIDE.items():
        if name in known:
            continue
        note(f"gemma: {name}")
        start = time.perf_counter()
        held: dict[str, Any] = {"model": "gemma", "bits": job["size"], "rows": job["rows"]}
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            np.savez(work / "tokens.npz", calibration=model.calibration["wikipedia"], judged=model.tokens)
            (work / "job.json").write_text(json.dumps({**job, "folder": str(model.folder)}))
            log = (work / "log.txt").open("w")
            command = [str(python), __file__, "--inside", folder]
            try:
                code = subprocess.run(command, stdout=log, stderr=log, cwd=folder, timeout=LIMIT).returncode
            except subprocess.TimeoutExpired:
                code = -1
            if code:
                lines = (work / "log.txt").read_text().strip().splitlines() or ["no output"]
                held["note"] = f"not run: {'too slow' if code < 0 else lines[-1][:120]}"
            else:
                states = iter(np.load(work / "hidden.npy", mmap_mode="r"))
                held.update(asdict(model.judge(lambda _, states=states: _tensor(next(states)))))
        note(f"    {held.get('ratio', held.get('note'))}, {time.perf_counter() - start:.0f} s")
        yield name, held


def _tensor(rows: Any) -> torch.Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(rows))[None]


def inside(folder: Path) -> None:
    """In the peers' environment: quantise Gemma as the job says, write its hidden states."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():  # AWQ pins memory for a transfer to an accelerator
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    job = json.loads((folder / "job.json").read_text())
    data = np.load(folder / "tokens.npz")
    net = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, local_files_only=True).eval()
    net.requires_grad_(False)
    if job["tool"].startswith("torchao"):
        torchao(net, job)
    else:
        net = llm_compressor(net, job, torch.from_numpy(data["calibration"]))
    states = []
    with torch.no_grad():
        for row in torch.from_numpy(data["judged"]):
            states.append(net.model(input_ids=row[None], use_cache=False).last_hidden_state[0].float().numpy())
    np.save(folder / "hidden.npy", np.stack(states))


def llm_compressor(net: Any, job: dict[str, Any], calibration: torch.Tensor) -> Any:
    """`oneshot` with GPTQ or AWQ."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from zoo_peers import _tokenizer

    group, kind = job.get("group"), job.get("activations")
    weights = QuantizationArgs(
        num_bits=job["bits"], type="int", symmetric=job.get("symmetric", True),
        strategy="group" if group else "channel", group_size=group,
    )  # fmt: skip
    inputs = None
    if kind == "group":
        inputs = QuantizationArgs(
            num_bits=4, type="int", symmetric=True, strategy="group", group_size=group, dynamic=True
        )
    elif kind is not None:
        inputs = QuantizationArgs(
            num_bits=8, type="int", symmetric=kind == "token", strategy=kind, dynamic=kind == "token"
        )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    given: dict[str, Any] = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
    if job["tool"] == "awq":
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        recipe: list[Any] = [AWQModifier(), QuantizationModifier(**given)]
    else:
        recipe = [GPTQModifier(**given)]
    batches = [{"input_ids": row[None], "attention_mask": row[None] * 0 + 1} for row in calibration]
    net.config.use_cache = False
    return oneshot(
        model=net, processor=_tokenizer(), dataset=DataLoader(batches, batch_size=None), recipe=recipe,
        pipeline="sequential", log_dir=None,
    )  # fmt: skip


def torchao(net: Any, job: dict[str, Any]) -> None:
    """Its configurations, on the linears of the blocks."""
    import torch
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup

    if job["tool"] == "torchao-int8":
        config: Any = ao.Int8DynamicActivationInt8WeightConfig()
    elif job["tool"] == "torchao-int4":
        config = ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(job["group"]), mapping_type=ao.MappingType.ASYMMETRIC
        )
    else:
        config = ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(job["group"])
        )
    ao.quantize_(net.model.layers, config)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--inside"]:
        raise SystemExit("run bench/accuracy.py")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # not bench/kernels.py
    inside(Path(sys.argv[2]))
