"""The files that the peers of `bench/backend.py` load: ONNX, OpenVINO's, GGUF, made by their own tools.

    python backend_files.py FOLDER LAYERS QUICK NAME RECIPE    (one file, in a process of its own: memory comes back)

ONNX Runtime gets MiniLM exported with eager attention (faster there than the SDPA export), OpenVINO converts the torch
modules. Weights of 4 bits stand in groups of 128 (MiniLM: of 32 for ONNX Runtime), every linear, the head too; of
llama.cpp in its own blocks of 32. OpenVINO's int8 MiniLM is NNCF's with calibrated ranges; its int8 and 4-bit decoders
hold int8 and int4 weights, and OpenVINO quantises what they read at run time, as it does by default.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import assets
import backend_models as models
import numpy as np
from common import note

CALIBRATION, QUICK_CALIBRATION = 256, 64
GROUP = 128

# file -> the model it is of
FILES = {
    "cache.npz": "decoder",
    "planish.stats": "minilm",
    "minilm.onnx": "minilm",
    "minilm-int8.onnx": "minilm",
    "minilm-4bit.onnx": "minilm",
    "minilm-lean.onnx": "minilm",
    "minilm-1x128.xml": "minilm",
    "minilm-8x128.xml": "minilm",
    "minilm-1x128-int8.xml": "minilm",
    "minilm-8x128-int8.xml": "minilm",
    "minilm-1x128-4bit.xml": "minilm",
    "minilm-8x128-4bit.xml": "minilm",
    "decoder-prefill.onnx": "decoder",
    "decoder-prefill-int8.onnx": "decoder",
    "decoder-prefill-4bit.onnx": "decoder",
    "decoder-prefill.xml": "decoder",
    "decoder-prefill-int8.xml": "decoder",
    "decoder-prefill-4bit.xml": "decoder",
    "decoder-token.onnx": "decoder",
    "decoder-token-int8.onnx": "decoder",
    "decoder-token-4bit.onnx": "decoder",
    "decoder-token.xml": "decoder",
    "decoder-token-int8.xml": "decoder",
    "decoder-token-4bit.xml": "decoder",
    "decoder-q4_0.gguf": "decoder",
    "decoder-q8_0.gguf": "decoder",
}


def case_named(name: str) -> models.Case:
    """The case of a file of a single shape."""
    return next(c for c in models.CASES if name.startswith(c.key))


def torch_model(case: models.Case, layers: int) -> Any:
    return models.minilm() if case.model == "minilm" else models.decoder(layers)


def statistics(path: Path, layers: int, quick: bool) -> None:
    """What the backend learns of MiniLM's activations for the recipe of the command line, of both float dtypes."""
    import torch

    import planish

    compiled = torch.compile(models.minilm(), backend="planish", dynamic=False, options={"recipe": sys.argv[5]})
    with torch.no_grad(), planish.calibrating(compiled, row_mask="attention_mask") as found:
        for batch in calibration(quick):
            compiled(**{name: torch.from_numpy(value) for name, value in batch.items()})
    found.save(path)


def cache(path: Path, layers: int, quick: bool) -> None:
    models.write_cache(models.decoder(layers), path.parent)


def onnx_file(path: Path, layers: int, quick: bool) -> None:
    """The float model."""
    import torch

    if path.name == "minilm.onnx":
        path.symlink_to(assets.minilm_onnx("dynamo", "eager"))
        return
    case = case_named(path.name)
    given = models.inputs(case, path.parent)
    torch.onnx.export(
        models.decoder(layers),
        models.arguments(case, given),
        path,
        dynamo=True,
        input_names=list(given),
        output_names=["logits", *(f"new_{i}" for i in range(layers))],
        opset_version=20,
        external_data=True,
    )


def onnx_int8(path: Path, layers: int, quick: bool) -> None:
    """ONNX Runtime's dynamic quantisation, per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)
    source = path.with_name(path.name.replace("-int8", "")).resolve()
    prepared = path.with_name(path.stem + "-prepared.onnx")
    large = path.name.startswith("decoder")
    if large:  # the preparation stumbles over the transposed weight of the head, and has nothing to fuse in it
        model = onnx.load(source)
        del model.graph.value_info[:]
        onnx.save(model, prepared, save_as_external_data=True, location=prepared.name + ".data")
    else:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_dynamic(
        str(prepared), str(path), per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=large
    )
    for left in path.parent.glob(prepared.name + "*"):
        left.unlink()


def onnx_4bit(path: Path, layers: int, quick: bool) -> None:
    """ONNX Runtime's MatMulNBits, int8 activations inside (accuracy level 4: its fastest)."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.ERROR)
    source = path.with_name(path.name.replace("-4bit", ""))
    block = 32 if path.name.startswith("minilm") else GROUP
    work = MatMulNBitsQuantizer(
        onnx.load(source.resolve()), bits=4, block_size=block, is_symmetric=True, accuracy_level=4
    )
    work.process()
    onnx.save(
        work.model.model, path, save_as_external_data=path.name.startswith("decoder"), location=path.name + ".data"
    )


def onnx_lean(path: Path, layers: int, quick: bool) -> None:
    """planish's own file for ONNX Runtime."""
    import planish

    batches = calibration(quick)
    planish.convert(assets.minilm_onnx(), path, recipe="w8a8-dynamic", calibration=batches, target="ort")


def calibration(quick: bool) -> list[dict[str, np.ndarray]]:
    texts = assets.sentences("calibration", QUICK_CALIBRATION if quick else CALIBRATION)
    return [assets.encode(texts[i : i + 8], models.LENGTH) for i in range(0, len(texts), 8)]


def openvino_file(path: Path, layers: int, quick: bool) -> None:
    """The float model, of one shape."""
    import openvino as ov
    import torch

    case = case_named(path.name)
    given = models.inputs(case, path.parent)
    with torch.no_grad():
        arguments = models.arguments(case, given)
        made = ov.convert_model(torch_model(case, layers), example_input=arguments)
    for port, (name, value) in zip(made.inputs, given.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(list(value.shape)))
    made.validate_nodes_and_infer_types()
    ov.save_model(made, str(path), compress_to_fp16=False)


def openvino_quantised(path: Path, layers: int, quick: bool) -> None:
    """NNCF's int8 model, or one with its int8 or int4 weights."""
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    case = case_named(path.name)
    kind = path.stem.removeprefix(case.key + "-")
    plain = ov.Core().read_model(str(path.with_name(case.key + ".xml")))
    if case.model == "minilm" and kind == "int8":
        batches = calibration(quick)
        if case.batch != 8:
            batches = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(8)]
        made = nncf.quantize(
            plain, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches),
            preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
    elif kind == "int8":
        made = nncf.compress_weights(plain, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        made = nncf.compress_weights(
            plain, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0, all_layers=True
        )
    ov.save_model(made, str(path), compress_to_fp16=False)


def gguf_file(path: Path, layers: int, quick: bool) -> None:
    """The decoder for llama.cpp, whose rotary positions turn neighbours: rows of queries and keys are reordered."""
    import gguf
    from gguf import GGMLQuantizationType as Kind
    from gguf import quants

    kind = Kind[path.stem.rpartition("-")[2].upper()]
    model = models.decoder(layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(models.WIDTH)
    writer.add_feed_forward_length(models.HIDDEN)
    writer.add_head_count(models.HEADS)
    writer.add_head_count_kv(models.KEYS)
    writer.add_layer_norm_rms_eps(models.EPSILON)
    writer.add_rope_freq_base(models.THETA)
    writer.add_rope_dimension_count(models.SIZE)
    writer.add_vocab_size(models.VOCABULARY)
    writer.add_tokenizer_model("none")
    names = {
        "query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output", "gate": "ffn_gate",
        "up": "ffn_up", "down": "ffn_down", "before_attention": "attn_norm", "before_mlp": "ffn_norm",
    }  # fmt: skip
    whole = {
        "embedding.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "head.weight": "output.weight",
    }
    for name, value in model.state_dict().items():
        data = value.numpy()
        if name in whole:
            to = whole[name]
        else:
            _, number, part, _ = name.split(".")
            to = f"blk.{number}.{names[part]}.weight"
            if part in ("query", "key"):
                data = data.reshape(-1, 2, models.SIZE // 2, models.WIDTH).swapaxes(1, 2).reshape(data.shape)
        if data.ndim == 1:
            writer.add_tensor(to, data)
        else:
            writer.add_tensor(to, quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def maker_of(name: str) -> Callable[[Path, int, bool], None]:
    if name == "cache.npz":
        return cache
    if name == "planish.stats":
        return statistics
    if name.endswith(".gguf"):
        return gguf_file
    if name.endswith(".xml"):
        return openvino_quantised if name.endswith(("-int8.xml", "-4bit.xml")) else openvino_file
    if name.endswith("-lean.onnx"):
        return onnx_lean
    if name.endswith("-int8.onnx"):
        return onnx_int8
    return onnx_4bit if name.endswith("-4bit.onnx") else onnx_file


def make(
    folder: Path, layers: int, quick: bool, wanted: list[str], python: dict[str, Path], recipe: str
) -> dict[str, str]:
    """Make what is missing of the files; what could not be made, with the last line that its tool wrote.

    Args:
        recipe: of planish, for whose passes statistics are collected (anew, if the folder has those of another).
        python: the interpreter by ending of the file; that of this process where it is not there.
    """
    failed = {}
    stamp = folder / "planish.recipe"
    if not stamp.exists() or stamp.read_text() != recipe:
        (folder / "planish.stats").unlink(missing_ok=True)
        stamp.write_text(recipe)
    for name in (n for n in FILES if n in wanted and not (folder / n).exists()):
        note(f"file: {name}")
        own = python.get(name.rpartition(".")[2], sys.executable)
        command = [str(part) for part in (own, __file__, folder, layers, int(quick), name, recipe)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            failed[name] = lines[-1][:200]
            note(f"    failed: {failed[name]}")
    return failed


def main() -> int:
    folder, layers, quick, name = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
    warnings.simplefilter("ignore")
    try:
        maker_of(name)(folder / name, layers, quick)
    except BaseException:  # half a file would be taken for a whole one
        for left in folder.glob(name + "*"):
            left.unlink()
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
