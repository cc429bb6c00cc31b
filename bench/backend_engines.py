"""The rows of `bench/backend.py`: each engine on each case, as a function that runs the model once.

A builder takes a `Job` and returns a function of no arguments that runs the case's inputs and gives the first output
as float32. Whatever happens once (reading files, compiling, prepacking) happens in the builder or in its first call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import backend_models as models
import numpy as np

Inputs = dict[str, np.ndarray]
Run = Callable[[Inputs], np.ndarray]
# Group-wise 4-bit weights, every linear, the head too; nothing of random weights is worth calibrating.
W4A16 = "raise,merge-linears,quantize{weights=int4:g128 embeddings=none}"
# What ONNX Runtime (accuracy level 4) and llama.cpp do inside at 4 bits: activations of 8.
W4A8 = "raise,merge-linears,quantize{weights=int4:g128 activations=int8:token embeddings=none}"
MINILM_RECIPE = "w8a8-token"
W8A8 = "raise,merge-linears,quantize{weights=int8:channel activations=int8:token embeddings=none}"


@dataclass(frozen=True)
class Engine:
    """One row.

    Attributes:
        name: in the table.
        tool: which builder makes it.
        options: of the builder.
        models: that it runs.
        bits: "float", "8" or "4": whom it is compared with.
        environment: "own" or "peers", which holds what planish does not install.
        quick: whether `--quick` runs it.
    """

    name: str
    tool: str
    options: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("minilm", "decoder")
    bits: str = "float"
    environment: str = "own"
    quick: bool = True

    @property
    def key(self) -> str:
        return self.name.replace(" ", "-").replace("(", "").replace(")", "").replace("/", "-").lower()


@dataclass(frozen=True)
class Job:
    """What a worker is to run."""

    engine: Engine
    case: models.Case
    threads: int
    layers: int
    folder: Path
    recipe: str = ""  # of planish on MiniLM


ENGINES = (
    Engine("eager fp32", "torch", {"dtype": "float32"}),
    Engine("eager bf16", "torch", {"dtype": "bfloat16"}),
    Engine("Inductor fp32", "torch", {"dtype": "float32", "compile": {}}),
    Engine("Inductor fp32 frozen", "torch", {"dtype": "float32", "compile": {"freezing": True}}),
    Engine("Inductor bf16", "torch", {"dtype": "bfloat16", "compile": {}}),
    Engine("Inductor bf16 frozen", "torch", {"dtype": "bfloat16", "compile": {"freezing": True}}),
    Engine(
        "Inductor bf16 max-autotune", "torch",
        {"dtype": "bfloat16", "compile": {"freezing": True, "max_autotune": True}}, quick=False,
    ),
    Engine(
        "torchao int8 dynamic", "torchao", {"dtype": "float32", "compile": {"freezing": True}}, bits="8",
        environment="peers",
    ),
    Engine(
        "torchao int8 dynamic bf16", "torchao", {"dtype": "bfloat16", "compile": {"freezing": True}}, bits="8",
        environment="peers",
    ),
    Engine("onnxruntime fp32", "onnxruntime", {"file": ""}),
    Engine("onnxruntime int8 dynamic", "onnxruntime", {"file": "-int8"}, bits="8"),
    Engine("onnxruntime 4-bit", "onnxruntime", {"file": "-4bit"}, bits="4"),
    Engine("onnxruntime, planish's w8a8-dynamic file", "onnxruntime", {"file": "-lean"}, ("minilm",), bits="8"),
    Engine("OpenVINO bf16", "openvino", {"file": "", "precision": "bf16"}),
    Engine("OpenVINO int8", "openvino", {"file": "-int8", "precision": "f32"}, bits="8"),
    Engine("OpenVINO int8 bf16", "openvino", {"file": "-int8", "precision": "bf16"}, bits="8"),
    Engine("OpenVINO 4-bit", "openvino", {"file": "-4bit", "precision": "f32"}, bits="4"),
    Engine("OpenVINO 4-bit bf16", "openvino", {"file": "-4bit", "precision": "bf16"}, bits="4"),
    Engine("llama.cpp Q8_0", "llama", {"file": "q8_0"}, ("decoder",), bits="8", environment="peers"),
    Engine("llama.cpp Q4_0", "llama", {"file": "q4_0"}, ("decoder",), bits="4", environment="peers"),
    Engine("planish W8A8 fp32", "planish", {"dtype": "float32", "recipe": W8A8}, bits="8"),
    Engine("planish W8A8 bf16", "planish", {"dtype": "bfloat16", "recipe": W8A8}, bits="8"),
    Engine("planish W4A16 fp32", "planish", {"dtype": "float32", "recipe": W4A16}, ("decoder",), bits="4"),
    Engine("planish W4A16 bf16", "planish", {"dtype": "bfloat16", "recipe": W4A16}, ("decoder",), bits="4"),
    Engine("planish W4A8 fp32", "planish", {"dtype": "float32", "recipe": W4A8}, ("decoder",), bits="4"),
    Engine("planish W4A8 bf16", "planish", {"dtype": "bfloat16", "recipe": W4A8}, ("decoder",), bits="4"),
)  # fmt: skip


def engine_of(name: str) -> Engine:
    return next(e for e in ENGINES if e.name == name)


# -- torch ------------------------------------------------------------------------------------------------


def float_model(job: Job) -> Any:
    """The module in the engine's dtype."""
    import torch

    torch.set_num_threads(job.threads)
    made = models.minilm() if job.case.model == "minilm" else models.decoder(job.layers)
    return made.requires_grad_(False).to(getattr(torch, job.engine.options["dtype"]))


def torch_run(job: Job, module: Any) -> Run:
    """A function of named arrays; the last arguments are kept as tensors, so that copies are not timed."""
    import torch

    dtype = getattr(torch, job.engine.options["dtype"])
    held: list[tuple[Inputs, tuple[torch.Tensor, ...]]] = []

    def run(given: Inputs) -> np.ndarray:
        if not held or held[0][0] is not given:
            held[:] = [(given, models.arguments(job.case, given, dtype))]
        with torch.no_grad():
            made = module(*held[0][1])
        first = made[0] if isinstance(made, tuple) else made
        return first.float().numpy()  # type: ignore[no-any-return]

    return run


def compiled(module: Any, options: dict[str, Any]) -> Any:
    """By Inductor; `freezing` prepacks weights for oneDNN, `max_autotune` tries templates."""
    import torch

    return torch.compile(module, dynamic=False, options=options or None)


def torch_builder(job: Job) -> Run:
    module = float_model(job)
    if "compile" in job.engine.options:
        module = compiled(module, job.engine.options["compile"])
    return torch_run(job, module)


def torchao_builder(job: Job) -> Run:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = float_model(job)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch_run(job, compiled(module, job.engine.options["compile"]))


def planish_builder(job: Job) -> Run:
    """Through the backend, strictly: a graph that is not rewritten is an error, not a float time."""
    import torch

    options: dict[str, Any] = {"recipe": job.recipe or job.engine.options["recipe"], "strict": True}
    statistics = job.folder / "planish.stats"
    if job.case.model == "minilm" and statistics.exists():
        options["calibration"] = str(statistics)
    module = float_model(job)
    return torch_run(job, torch.compile(module, backend="planish", dynamic=False, options=options))


# -- the others -------------------------------------------------------------------------------------------


def path_of(job: Job, ending: str) -> Path:
    """The file of a job; that of ONNX serves both shapes of MiniLM."""
    one = "minilm" if job.case.model == "minilm" and ending == "onnx" else job.case.key
    return job.folder / f"{one}{job.engine.options['file']}.{ending}"


def onnxruntime_builder(job: Job) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads sleep between runs
    session = ort.InferenceSession(
        str(path_of(job, "onnx")), options, providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion"],  # the fused node is slower than its parts
    )  # fmt: skip
    names = {i.name for i in session.get_inputs()}

    def run(given: Inputs) -> np.ndarray:
        return session.run(None, {k: v for k, v in given.items() if k in names})[0]  # type: ignore[no-any-return]

    return run


def openvino_builder(job: Job) -> Run:
    import openvino as ov

    core = ov.Core()
    made = core.compile_model(
        core.read_model(str(path_of(job, "xml"))),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": job.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": job.engine.options["precision"],
        },
    )
    request = made.create_infer_request()

    def run(given: Inputs) -> np.ndarray:
        request.infer(given, share_inputs=True)
        return request.get_output_tensor(0).data  # type: ignore[no-any-return]

    return run


def llama_builder(job: Job) -> Run:
    """llama.cpp; its cache of 256 tokens holds what it made of them itself."""
    import llama_cpp.llama_cpp as cpp

    path = job.folder / f"decoder-{job.engine.options['file']}.gguf"
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    settings = cpp.llama_context_default_params()
    settings.n_ctx = 512
    settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = job.threads
    context = cpp.llama_init_from_model(model, settings)
    if not model or not context:
        raise RuntimeError(f"{path.name}: not loaded")
    memory = cpp.llama_get_memory(context)

    def feed(ids: np.ndarray) -> None:
        row = (cpp.llama_token * ids.shape[1])(*ids[0].tolist())
        if cpp.llama_decode(context, cpp.llama_batch_get_one(row, ids.shape[1])):
            raise RuntimeError("llama_decode failed")

    if job.case.past:
        feed(models.tokens(job.case.past + 1)[:, : job.case.past])

    def run(given: Inputs) -> np.ndarray:
        cpp.llama_memory_seq_rm(memory, 0, job.case.past, -1)
        feed(given["ids"])
        logits = cpp.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, (models.VOCABULARY,))[None, None].copy()

    return run


BUILDERS: dict[str, Callable[[Job], Run]] = {
    "torch": torch_builder,
    "torchao": torchao_builder,
    "planish": planish_builder,
    "onnxruntime": onnxruntime_builder,
    "openvino": openvino_builder,
    "llama": llama_builder,
}
