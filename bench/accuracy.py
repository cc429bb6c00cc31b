"""What quantisation costs real models in accuracy, beside the other quantisers, and what each pass contributes.

    python bench/accuracy.py [--quick] [--json FILE] [--only KEY ...] [--no-peers] [--no-ablation] [--keep DIR]
                             [--resume FILE ...]

Gemma 3 270M: perplexity on 40 windows of 512 tokens of the Brown corpus over that of float in the same run, and the KL
divergence from float's logits. Every linear of its blocks is quantised; the embedding, which is the head too, stays in
float in every row, planish's and the peers'. MiniLM-L6: cosine of mean-pooled embeddings to float's on 500 sentences
of Brown, WordSim353, and retrieval of WordNet definitions (MRR). Each row of planish is a recipe, in the formats that
the row names, calibrated twice: on Wikipedia articles 1 to 39, and on random tokens, bad on purpose.

figures calibrated on Wikipedia (mean over both sets +- half their distance); targets are held with Wikipedia
bits    per weight of the quantised linears: codes, scales, zero points, cluster ids, float branches (16 bits)
without the figure of the same recipe with one pass or option left out (fewer windows; in the table beside the
        recipe's own figure on those)

The whole takes hours: `--json` is written after each figure, and `--resume` measures only what is in none of the
files that earlier runs wrote, cut off ones too.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import accuracy_rows as rows
import assets
from accuracy_encoder import Encoder
from accuracy_gemma import Gemma, bits_per_weight
from common import Outcome, Target, arguments, note, table

SOURCES = ("wikipedia", "random")
Model = Gemma | Encoder


def quantised(model: Model, row: rows.Row, source: str, left_out: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The graph of a row and what its passes did."""
    import planish

    passes = planish.Pipeline(row.passes(left_out))
    stats = model.stats(source) if any(p.needs_stats for p in passes.passes) else None
    mask = None if isinstance(model, Gemma) else "attention_mask"
    start = time.perf_counter()
    graph, report = passes.run(model.graph, stats=stats, data=model.batches(source), row_mask=mask, validate=False)
    done = {
        p.name: {"applied": len(p.applied), "declined": dict(p.reasons()), "misses": p.misses} for p in report.passes
    }
    return graph, {"pipeline": str(passes), "seconds": time.perf_counter() - start, "passes": done}


def short_figure(model: Model, graph: Any) -> float:
    """The ratio or cosine of a graph on the part of the texts that ablations are judged on."""
    if isinstance(model, Gemma):
        return model.judge_graph(graph, model.short).ratio
    return model.judge_graph(graph, short=True).cosine


def measure(model: Model, row: rows.Row, source: str, short: bool) -> dict[str, Any]:
    """The figures of a row calibrated on one source; `short`: that of the ablations' texts too."""
    graph, figures = quantised(model, row, source)
    start = time.perf_counter()
    figures.update(asdict(model.judge_graph(graph)), bits=bits_per_weight(graph, model.weights))
    if short:
        figures["short"] = short_figure(model, graph)
    seconds = f"{figures['seconds']:.0f} s + {time.perf_counter() - start:.0f} s"
    note(f"{row.name} {source}: {headline(figures)}, {seconds}")
    return figures


def ablate(model: Model, row: rows.Row, own: dict[str, Any], save: Any) -> None:
    """The figure of a row, and of what is left of it without each pass; calibrated on Wikipedia."""
    whole = own[SOURCES[0]]["short"]
    found = own.setdefault("without", {"all": whole})
    for label in row.without:
        if label not in found:
            found[label] = short_figure(model, quantised(model, row, SOURCES[0], label)[0])
            note(f"{row.name} without {label}: {found[label]:.4f}, with all {whole:.4f}")
            save()


def headline(figures: dict[str, Any]) -> str:
    name = "ratio" if "ratio" in figures else "cosine"
    return f"{name} {figures[name]:.4f}"


def run_rows(
    model: Model, wanted: list[rows.Row], ablation: bool, sources: tuple[str, ...], figures: dict[str, Any], save: Any
) -> None:
    """Measure into `figures` what of the rows is not in them."""
    for row in wanted:
        own = figures.setdefault(row.name, {"bound": row.bound, "recipe": row.recipe, "sources": sources})
        for source in sources:
            short = ablation and source == SOURCES[0]
            if source not in own or (short and "short" not in own[source]):
                own[source] = measure(model, row, source, short)
                save()
        if ablation and row.without:
            ablate(model, row, own, save)


def complete(row: rows.Row, figures: dict[str, Any], ablation: bool, sources: tuple[str, ...]) -> bool:
    """True if nothing of a row is left to measure."""
    own = figures.get(row.name, {})
    measured = all(s in own for s in sources)
    return measured and (not ablation or set(row.without) <= own.get("without", {}).keys())


def earlier(files: list[Path]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Rows, float figures and peers of what earlier runs wrote."""
    figures: dict[str, Any] = {}
    floats: dict[str, Any] = {}
    peers: dict[str, Any] = {}
    for file in files:
        held = json.loads(file.read_text())["figures"]
        figures.update(held["rows"])
        floats.update(held["float"])
        peers.update(held["peers"])
    return figures, floats, peers


def targets(figures: dict[str, Any]) -> list[Target]:
    """The bounds, on what Wikipedia calibrates; the mean and spread over both calibration sets stand in the table."""
    found = []
    for name, row in figures.items():
        if row.get("bound") is None:
            continue
        key = "ratio" if name.startswith("gemma") else "cosine"
        found.append(Target(f"{name} {key}", row[SOURCES[0]][key], row["bound"], at_most=key == "ratio"))
    return found


def peer_targets(figures: dict[str, Any], peers: dict[str, Any]) -> list[Target]:
    """In no row a peer is better at equal or fewer bits (to a hundredth): the best such peer's figure is the bound."""
    found = []
    for name, row in figures.items():
        if row.get("bound") is None:
            continue
        lower = name.startswith("gemma")
        key = "ratio" if lower else "cosine"
        bits = row[SOURCES[0]]["bits"]
        rivals = {
            peer: held[key]
            for peer, held in peers.items()
            if held.get("rows") and name in held["rows"] and held.get(key) is not None and held["bits"] < bits + 0.01
        }
        if rivals:
            best = (min if lower else max)(rivals, key=lambda peer: rivals[peer])
            value = row[SOURCES[0]][key]
            found.append(Target(f"{name} against {best}", value, rivals[best], at_most=lower))
    return found


def spread(row: dict[str, Any], key: str) -> str:
    """Of a row: calibrated on Wikipedia; mean over both sets and half their distance."""
    held = [row[source][key] for source in row["sources"]]
    if len(held) == 1:
        return f"{held[0]:.4f}"
    return f"{held[0]:.4f} ({mean(held):.4f} +-{(max(held) - min(held)) / 2:.4f})"


def show(figures: dict[str, Any], floats: dict[str, Any], peers: dict[str, Any]) -> None:
    """The two tables: a model each."""
    for model, key, others in (("gemma", "ratio", ("kl",)), ("minilm", "cosine", ("worst", "wordsim", "mrr"))):
        if model not in floats:
            continue
        own = [f"{floats[model][k]:.4g}" if k in floats[model] else "" for k in (key, *others)]
        lines = [["float", "32", *own, "", ""]]
        for name, row in figures.items():
            if not name.startswith(model):
                continue
            bits = f"{row[SOURCES[0]]['bits']:.2f}"
            without = " ".join(f"{k} {v:.4f}" for k, v in row.get("without", {}).items())
            lines.append(
                [
                    f"planish {name.partition(' ')[2]}",
                    bits,
                    *(spread(row, k) for k in (key, *others)),
                    "" if row["bound"] is None else f"{row['bound']:g}",
                    without,
                ]
            )
        for peer, held in peers.items():
            if held["model"] == model:
                shown = [f"{held[k]:.4f}" if held.get(k) is not None else "" for k in (key, *others)]
                lines.append([peer, f"{held['bits']:.2f}" if "bits" in held else "", *shown, "", held.get("note", "")])
        table(model, [model, "bits", key, *others, "target", "without"], lines)


def main() -> int:
    options = arguments(
        __doc__.splitlines()[0],
        only={"nargs": "+", "metavar": "KEY", "help": "only the rows whose key holds one of these"},
        no_peers={"action": "store_true", "help": "planish alone"},
        no_ablation={"action": "store_true", "help": "nothing is left out in turn"},
        resume={"type": Path, "nargs": "+", "default": [], "metavar": "FILE", "help": "figures of earlier runs"},
        keep={"type": Path, "metavar": "DIR", "help": "keep graphs and statistics in DIR, and use what is there"},
    )
    warnings.simplefilter("ignore")
    try:
        return compare(options)
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(options: Any) -> int:
    figures, floats, peers = earlier(options.resume)
    outcome = Outcome("accuracy", {"float": floats, "rows": figures, "peers": peers})
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps({"figures": outcome.figures}, indent=1, default=float) + "\n")

    ablation = not (options.no_ablation or options.quick)
    sources = SOURCES[:1] if options.quick else SOURCES
    for kind, name, listed in ((Encoder, "minilm", rows.MINILM), (Gemma, "gemma", rows.GEMMA)):
        wanted = [r for r in listed if not options.only or any(o in r.name for o in options.only)]
        left = [r for r in wanted if not complete(r, figures, ablation, sources)]
        if not wanted or (options.no_peers and not left and name in floats):
            continue
        model: Model = kind(options.quick, options.keep)
        if name not in floats:
            if isinstance(model, Gemma):
                perplexity = model.perplexity(range(len(model.tokens)))
                floats[name] = {"perplexity": perplexity, "ratio": 1.0, "kl": 0.0}
            else:
                floats[name] = asdict(model.float)
        run_rows(model, left, ablation, sources, figures, save)
        if not options.no_peers:
            import accuracy_peers

            for peer, held in accuracy_peers.measure(model, options.quick, peers):
                peers[peer] = held
                save()
        del model
    show(figures, floats, peers)
    outcome.targets = [*targets(figures), *peer_targets(figures, peers)]
    return outcome.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
