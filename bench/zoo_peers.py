"""The same zoo models through the peers' own transforms, float only: is the function the same afterwards?

    python bench/zoo_peers.py [--quick] [--json FILE] [--only NAME ...]

- llm-compressor 0.14: `oneshot` with `SmoothQuantModifier()` and with `SpinQuantModifier()`, their registered
  mappings and defaults, on the two batches that planish gets for its statistics;
- Brevitas 0.13.4: `EqualizeGraph` (its weight equalisation) and, as in its LLM entry point with `rotation=fx`,
  the merge of norm gains, LayerNorm to RMSNorm and `GraphRotationEqualization`, on the graph of
  `torch._dynamo.export`.

The tools work in float32, as they are made to; the outputs before and after are compared in float64. They run in
a virtual environment of their own, which is made where it is missing (`~/.cache/planish/venv-peers`): llm-compressor
asks for transformers below 5.18.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
import common
import zoo_models

if TYPE_CHECKING:
    import torch

PINS = (
    "torch==2.13.0",
    "transformers==5.17.0",
    "llmcompressor==0.14.0",
    "brevitas==0.13.4",
    "diffusers==0.42.1",
    "scipy",
)
TOLERANCE = 1e-5  # relative: the weights that the tools write are float32
LIMIT = 120  # seconds for one model and all tools


class NotSupported(RuntimeError):
    """The tool does not say how to treat this model, or refuses it."""


# -- inside the peers' environment ---------------------------------------------------------------


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _changed(before: Mapping[str, torch.Tensor], module: torch.nn.Module) -> bool:
    import torch

    after = module.state_dict()
    return set(before) != set(after) or any(
        a.shape != after[n].shape or not torch.equal(a, after[n].to(a.dtype)) for n, a in before.items()
    )


def _tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}


def _tokenizer() -> Any:
    """A tokenizer that is never asked: `oneshot` wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="[UNK]", pad_token="a")


def llm_compressor(modifier: str, data: bool) -> Callable[..., torch.nn.Module]:
    """`oneshot` with one modifier as it comes."""

    def apply(name: str, module: torch.nn.Module, batches: list[zoo_models.Inputs]) -> torch.nn.Module:
        from llmcompressor import oneshot
        from llmcompressor.modifiers import transform
        from torch.utils.data import DataLoader
        from transformers import PreTrainedModel

        if not isinstance(module, PreTrainedModel):
            raise NotSupported("not a transformers model")
        loader = DataLoader([_tensors(b) for b in batches], batch_size=None) if data else None
        module.config.use_cache = False
        with tempfile.TemporaryDirectory() as folder:  # where `oneshot` reads the model's config from once more
            module.config.save_pretrained(folder)
            module.config._name_or_path = folder
            return oneshot(  # type: ignore[no-any-return]
                model=module, processor=_tokenizer(), dataset=loader, recipe=[getattr(transform, modifier)()],
                pipeline="basic" if data else "datafree", log_dir=None,
            )  # fmt: skip

    return apply


def _exported(module: torch.nn.Module, batch: zoo_models.Inputs) -> torch.nn.Module:
    """The fx graph that Brevitas works on, made as its LLM entry point makes it."""
    import torch
    from brevitas_examples.common.dynamo_utils import dynamo_export_ctx, patch_dynamo_export

    patch_dynamo_export()
    if hasattr(module, "config") and hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    torch._dynamo.reset()
    with torch.no_grad(), dynamo_export_ctx():
        graph, _ = torch._dynamo.export(module)(**_tensors(batch))
    return graph  # type: ignore[no-any-return]


def brevitas_equalise(name: str, module: torch.nn.Module, batches: list[zoo_models.Inputs]) -> torch.nn.Module:
    """Cross-layer weight equalisation."""
    import torch
    from brevitas.graph.equalize import EqualizeGraph

    graph = _exported(module, batches[0])
    with torch.no_grad():
        return EqualizeGraph().apply(graph)  # type: ignore[no-any-return]


def brevitas_rotate(name: str, module: torch.nn.Module, batches: list[zoo_models.Inputs]) -> torch.nn.Module:
    """Merge of norm gains, LayerNorm to RMSNorm, fused rotations."""
    import torch
    from brevitas.graph.equalize import GraphRotationEqualization
    from brevitas_examples.common.dynamo_utils import dynamo_export_ctx, patch_dynamo_export
    from brevitas_examples.llm.llm_quant.ln_affine_merge import (
        apply_layernorm_affine_merge,
        apply_layernorm_to_rmsnorm,
        rmsnorm_patch,
    )

    patch_dynamo_export()
    classes = [type(m).__name__ for m in module.modules() if "RMS" in type(m).__name__]
    if classes and not hasattr(getattr(module, "config", None), "rms_norm_eps"):
        raise NotSupported(f"{classes[0]} without config.rms_norm_eps")
    if hasattr(module, "config") and hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    torch._dynamo.reset()
    with torch.no_grad(), rmsnorm_patch(module, getattr(module, "config", None)) as patcher, dynamo_export_ctx():
        graph, _ = torch._dynamo.export(module)(**_tensors(batches[0]))
    apply_layernorm_affine_merge(graph, patcher.rmsnorm_classes)
    graph = apply_layernorm_to_rmsnorm(graph)
    eq = GraphRotationEqualization(extra_state_kwargs={"scale_invariant_layers": patcher.rmsnorm_classes})
    return eq.apply(graph)  # type: ignore[no-any-return]


TOOLS: dict[str, Callable[..., Any]] = {
    "SmoothQuant": llm_compressor("SmoothQuantModifier", True),
    "SpinQuant": llm_compressor("SpinQuantModifier", False),
    "Brevitas equalise": brevitas_equalise,
    "Brevitas rotate": brevitas_rotate,
}


def judge(name: str, tool: str, seed: int) -> dict[str, Any]:
    """The verdict on one tool and one model: equivalent, NOT equivalent, nothing done, not supported."""
    import torch
    from torch.utils._pytree import tree_leaves

    module, inputs = zoo_models.build(name, seed)
    expected = [t for t in tree_leaves(zoo_models.float64_outputs(module, inputs)) if isinstance(t, torch.Tensor)]
    batches = zoo_models.more_inputs(name, seed, 2)
    before = _weights(module)
    try:
        after = TOOLS[tool](name, module, batches)
        given = _tensors(inputs) if isinstance(after, torch.fx.GraphModule) else inputs
        got = [t for t in tree_leaves(zoo_models.float64_outputs(after, given)) if isinstance(t, torch.Tensor)]
    except NotSupported as error:
        return {"verdict": "not supported", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  whatever the tool raises is its answer
        cause = error.__cause__ or error
        reason = (str(cause).splitlines() or [""])[0]
        return {"verdict": "not supported", "reason": f"{type(cause).__name__}: {reason}"[:300]}
    error = zoo_models.largest_difference(got, expected)
    if not error <= TOLERANCE:
        return {"verdict": "NOT equivalent", "error": error}
    changed = isinstance(after, torch.fx.GraphModule) or _changed(before, after)
    if isinstance(after, torch.fx.GraphModule):
        values = sorted(float(v.double().abs().sum()) for v in before.values() if v.is_floating_point())
        now = sorted(float(v.double().abs().sum()) for v in _weights(after).values() if v.is_floating_point())
        changed = values != now
    return {"verdict": "equivalent" if changed else "nothing done", "error": error}


def worker() -> int:
    """Serve requests from stdin, as `zoo_measure` does."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import logging

    import torch

    torch.set_num_threads(1)
    from loguru import logger

    logger.remove()
    logging.disable(logging.ERROR)
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        found = {tool: judge(request["name"], tool, request["seeds"][0]) for tool in request["tools"]}
        answers.write(json.dumps({"name": request["name"], "tools": found}, default=float) + "\n")
    return 0


# -- outside -------------------------------------------------------------------------------------


def environment() -> Path:
    """The Python of the peers' virtual environment, which is made where it is missing."""
    return common.environment("venv-peers", PINS)


def run(names: list[str], seed: int = 0, limit: float = LIMIT) -> dict[str, dict[str, Any]]:
    """Verdicts by model and tool. A tool that hangs or dies is named so, and the next one goes on."""
    from common import note
    from zoo import Worker

    serve = Worker([str(environment()), str(Path(__file__)), "--worker"])
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = {}
        for tool in TOOLS:
            answer = serve.ask({"name": name, "seeds": [seed], "tools": [tool]}, limit)
            died = {"verdict": "not supported", "reason": answer.get("reason", "")}
            found[name][tool] = answer.get("tools", {}).get(tool, died)
        note(f"{name:24} " + ", ".join(f"{tool}: {v['verdict']}" for tool, v in found[name].items()))
    serve.stop()
    return found


def cell(verdict: Mapping[str, Any]) -> str:
    """A verdict in a table."""
    if verdict["verdict"] == "NOT equivalent":
        return f"NOT equivalent ({verdict['error']:.0e})"
    return str(verdict["verdict"])


def counts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """How often each verdict, by tool."""
    return {tool: Counter(verdicts[tool]["verdict"] for verdicts in found.values()) for tool in TOOLS}


def main() -> int:
    from common import Outcome, arguments, table
    from zoo import QUICK

    options = arguments(
        __doc__.splitlines()[0],
        only={"nargs": "+", "metavar": "NAME", "help": "these models only"},
        worker={"action": "store_true", "help": "serve requests (used by the script itself)"},
    )
    if options.worker:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # not bench/kernels.py
        return worker()
    names = options.only or [n for n in zoo_models.entries() if not options.quick or n in QUICK]
    found = run(names)
    table("the peers", ["model", *TOOLS], [[n, *(cell(v[t]) for t in TOOLS)] for n, v in found.items()])
    for tool, verdicts in counts(found).items():
        print(f"{tool}: " + ", ".join(f"{v} {n}" for v, n in verdicts.most_common()))
    return Outcome("zoo_peers", {"verdicts": found}).finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
