"""Calibrate a compiled model by running it: collect statistics in float, compile with them at the next call.

    compiled = torch.compile(model, backend="planish", options={"recipe": "w8a8-static"})
    with planish.calibrating(compiled) as statistics:
        for batch in batches:
            compiled(batch)
    statistics.save("statistics.safetensors")
    compiled(batch)                                  # compiles

Inside, every compiled function of the process runs eagerly, in float. Dynamo's graphs are captured as they will be
when they are compiled, and evaluated behind the passes of the recipe that run before any that reads statistics.

The names of a graph's values depend on how it was captured (which sizes were open), so statistics are kept by site:
the module that reads or makes a value, the op, which of that op's nodes in this module, and the port. In a model of
which only parts are compiled, the sites of each part stand under the name that the part has in the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from planish.calibrate.collect import NORMS, QUANTISABLE, Accumulator, sites
from planish.capture.from_dynamo import Captured, DynamoGraph
from planish.integrate.backend_options import BackendOptions, read_options
from planish.ir.errors import FOREIGN, PlanishError
from planish.ir.evaluator import Evaluator
from planish.ir.graph import Graph, Value
from planish.ir.row_mask import RowMask, rows_of
from planish.ir.stats import Stats
from planish.passes.base import Exactness, Pass
from planish.passes.manager import Pipeline

__all__ = ["calibrating"]

HEAD = "behind"  # Stats.source: the passes behind which they were collected
ROWS = 2048  # sampled rows per value


@dataclass
class Calibration:
    """What is known of the part of a model that some weights belong to.

    Attributes:
        stats: by site.
        prefix: of the part's sites in them.
        data: inputs of the part's graphs, for passes that evaluate them.
    """

    stats: Stats
    prefix: str
    data: list[Mapping[str, torch.Tensor]] = field(default_factory=list)


_known: Any = WeakTensorKeyDictionary()  # the calibration of every weight
_lock = threading.RLock()


@contextmanager
def calibrating(model: Any, *, row_mask: str | None = None, seed: int = 0) -> Iterator[Stats]:
    """Collect statistics from every call inside the block; compile with them at the next call after it.

    Args:
        model: what torch.compile returned, or a module that holds what it returned.
        row_mask: the argument that is non-zero where a row (a token) counts; rows of padding are left out.
        seed: of the sampling of rows.

    Yields:
        The statistics, filled when the block ends; keep them with `save`, and give them (or the file) to a later
        process as `options={"calibration": ...}`.

    Raises:
        PlanishError: no function compiled for planish was called inside, or an activation is not finite.
    """
    stats = Stats()
    session = Session(stats, _options_of(model), _names(model), row_mask, seed)
    with torch.compiler.set_stance("default", force_backend=session):
        yield stats
    session.finish()


class Session:
    """The backend of torch.compile while statistics are collected.

    Args:
        stats: what is filled in the end.
        options: of the backend that will compile.
        names: what the model calls its tensors, by their `id`.
        row_mask, seed: see `calibrating`.
    """

    def __init__(
        self, stats: Stats, options: BackendOptions, names: Mapping[int, str], row_mask: str | None, seed: int
    ) -> None:
        passes = options.pipeline.passes
        self.stats = stats
        self.head = passes[: head_of(passes)]
        self.keeps_data = any(p.reads_data for p in passes)
        self.names = names
        self.row_mask = row_mask
        self.seed = seed
        self.found: dict[str, Accumulator] = {}
        self.parts: dict[str, tuple[list[torch.Tensor], list[Mapping[str, torch.Tensor]]]] = {}
        self.calls = 0
        self.open = True
        self.__name__ = "planish.calibrating"

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Observe a graph, if it holds anything to quantise."""
        try:
            dynamo = DynamoGraph(module, inputs)
            captured = dynamo.capture(inputs, guard=False)
        except (PlanishError, *FOREIGN):
            return module.forward  # the backend will say why
        written = dynamo.written(captured)
        if written:
            dynamo.release(written)
            captured = dynamo.capture(inputs, guard=False)
        return _Observed(self, module, dynamo) if sites(captured.graph) else module.forward

    def behind(self, captured: Captured) -> Graph:
        """The graph on which statistics are collected."""
        if not self.head:
            return captured.graph
        return Pipeline(self.head).run(captured.graph, validate=False)[0]

    def finish(self) -> None:
        """Fill the statistics and tell the weights of them.

        Raises:
            PlanishError: nothing was collected.
        """
        self.open = False
        if not self.calls:
            raise PlanishError(
                "calibration: no data; nothing that was compiled for planish ran inside of the block",
                hint="call the compiled model: with planish.calibrating(compiled): compiled(batch)",
            )
        self.stats.channels.update({site: a.finish() for site, a in self.found.items() if a.count})
        self.stats.source.update({"batches": str(self.calls), "rows": str(ROWS), "seed": str(self.seed)})
        self.stats.source[HEAD] = _text(self.head)
        with _lock:
            for prefix, (tensors, data) in self.parts.items():
                calibration = Calibration(self.stats, prefix, data)
                for tensor in tensors:
                    _known[tensor] = calibration
        _recalibrated([t for tensors, _ in self.parts.values() for t in tensors])
        self.found.clear()
        self.parts.clear()


class _Observed:
    """A graph that runs in float while its activations are looked at."""

    def __init__(self, session: Session, module: fx.GraphModule, dynamo: DynamoGraph) -> None:
        self.session = session
        self.module = module
        self.dynamo = dynamo
        self.graphs: dict[tuple[int, ...], tuple[str, Graph, Captured]] = {}

    def __call__(self, *inputs: Any) -> Any:
        if self.session.open:
            with torch.no_grad(), _lock:
                self._observe(inputs)
        else:
            self.graphs.clear()
        return self.module(*inputs)

    def _observe(self, inputs: Sequence[Any]) -> None:
        held = [inputs[i] for i in self.dynamo.held]
        key = tuple(map(id, held))
        if key not in self.graphs:
            captured = self.dynamo.capture(inputs, guard=False)
            prefix = _prefix(captured, inputs, self.session.names)
            self.graphs[key] = prefix, self.session.behind(captured), captured
            known = {id(t) for t in self.session.parts.setdefault(prefix, ([], []))[0]}
            self.session.parts[prefix][0].extend(t for t in held if id(t) not in known)
        prefix, graph, captured = self.graphs[key]
        batch = {n: _tensor(inputs[i]) for n, i in zip(captured.inputs, captured.given, strict=True)}
        if self.session.keeps_data:
            self.session.parts[prefix][1].append({n: t.clone() for n, t in batch.items()})
        self._add(prefix, graph, batch)
        self.session.calls += 1

    def _add(self, prefix: str, graph: Graph, batch: Mapping[str, torch.Tensor]) -> None:
        session, wanted, keys = self.session, sites(graph), site_keys(graph)
        masked = session.row_mask if session.row_mask in {v.name for v in graph.inputs} else None
        mask = None if masked is None else RowMask(graph, masked)
        if mask is not None:
            mask.start(batch)

        def observe(value: Value, tensor: Any) -> None:
            data = rows_of(value, tensor, wanted[value], mask).float().cpu()
            if not bool(torch.isfinite(data).all()):
                raise PlanishError(
                    f"activation %{value.name}: is not finite on the calibration data",
                    where=str(value.producer) if value.producer is not None else None,
                )
            name = prefix + keys[value.name][0]
            if name not in session.found:
                session.found[name] = Accumulator(wanted[value], ROWS, session.seed)
            session.found[name].add(data)

        observed = [value for value in wanted if value.name in keys]
        Evaluator(graph, torch.float32).run(batch, observe=observe, observed=observed)


def head_of(passes: Sequence[Pass]) -> int:
    """How many passes run before statistics are collected: up to the first that reads them or rounds."""
    for index, instance in enumerate(passes):
        if instance.needs_stats or instance.exactness is Exactness.LOSSY:
            return index
    return len(passes)


def site_keys(graph: Graph) -> dict[str, list[str]]:
    """The sites of every value that statistics are kept of: what reads it and what makes it, in order."""
    counts: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op.name not in QUANTISABLE and node.op.name not in NORMS:
            continue
        place = f"{node.source}:{node.op.name}"
        number = counts[place] = counts.get(place, -1) + 1
        for port in QUANTISABLE.get(node.op.name, ()):
            value = node.port(port)
            if value is not None and value.constant is None:
                found.setdefault(value.name, []).append(f"{place}#{number}.{port}")
        found.setdefault(node.result.name, []).append(f"{place}#{number}.out")
    return found


def calibration_of(weights: Iterable[torch.Tensor], given: Stats | None) -> Calibration | None:
    """What is known of a graph with these weights: from this process, or the statistics that were given."""
    with _lock:
        for weight in weights:
            if weight in _known:
                found: Calibration = _known[weight]
                return found
    return None if given is None else Calibration(given, "")


def translated(calibration: Calibration, graph: Graph, head: Sequence[Any]) -> Stats:
    """The statistics of a graph's values, by their names.

    Args:
        head: the passes behind which the graph stands.

    Raises:
        PlanishError: they were collected behind other passes, or hold nothing of this graph.
    """
    stats, keys = calibration.stats, site_keys(graph)
    behind = stats.source.get(HEAD)
    if behind is not None and behind != _text(head):
        raise PlanishError(f"statistics: collected behind '{behind}'; the recipe reads them behind '{_text(head)}'")
    prefix = calibration.prefix or _only_prefix(stats, keys)
    channels = {}
    for name, places in keys.items():
        record = next((stats.channels[prefix + place] for place in places if prefix + place in stats), None)
        record = stats.channels.get(name) if record is None and behind is None else record
        value = graph.values[name]
        if record is not None and value.shape is not None and value.shape[record.axis] == len(record.minimum):
            channels[name] = record
    if not channels:
        raise PlanishError(
            f"statistics: none of this graph's {len(keys)} sites is among their {len(stats)}",
            hint="they are of another model, or of one of which other parts were compiled",
        )
    return Stats(channels, dict(stats.source))


def _only_prefix(stats: Stats, keys: Mapping[str, Sequence[str]]) -> str:
    """The part of the model that a graph is, where the statistics say so beyond doubt; else its whole."""
    places = [place for found in keys.values() for place in found]
    if any(place in stats for place in places):
        return ""
    found = {s.removesuffix(p) for s in stats for p in places if s.endswith("." + p)}
    return next(iter(found)) if len(found) == 1 else ""


def _text(passes: Sequence[Any]) -> str:
    return ",".join(str(p) for p in passes)


def _tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value)


def _prefix(captured: Captured, inputs: Sequence[Any], names: Mapping[int, str]) -> str:
    """What stands before a part's names in the model."""
    for path, index in captured.held.items():
        name = names.get(id(inputs[index]))
        if name is not None and name.endswith("." + path):
            return name.removesuffix(path)
    return ""


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _names(model: Any) -> dict[int, str]:
    """The names of a model's tensors, without what torch.compile puts between."""
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        return {}
    tensors = [*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False)]
    found: dict[int, str] = {}
    for name, tensor in tensors:
        found.setdefault(id(tensor), name.replace("_orig_mod.", ""))
    return found


def _options_of(model: Any) -> BackendOptions:
    """The options of the first part of a model that was compiled for planish; those by default if there is none."""
    from planish.integrate.backend import backend

    for part in [model, *_modules(model)]:
        for held in (getattr(part, "dynamo_ctx", None), part, getattr(part, "_compiled_call_impl", None)):
            found = _wrapper(held)
            if found is not None and getattr(found, "compiler_fn", None) is backend:
                return read_options(found.kwargs.get("options"), found.kwargs.get("mode"))
    return read_options(None)


def _wrapper(held: Any) -> Any:
    """The backend that stands innermost in what torch.compile made."""
    context = held if hasattr(held, "callback") else getattr(held, "_torchdynamo_context", None)
    found: Any = getattr(context, "callback", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found


def _recalibrated(tensors: Sequence[torch.Tensor]) -> None:
    """Forget what was folded of these weights before."""
    from planish.integrate.backend import recalibrated

    recalibrated(tensors)
