"""The `planish` command.

Every command returns its exit code: 0 done (identity, equal), 1 not an identity or different, 2 an
error the user can act on, 70 a bug of planish. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from planish.integrate.convert import CalibrationOptions
    from planish.ir.graph import Node
    from planish.report.terminal import Terminal

NEGATIVE, ERROR, BUG, BROKEN_PIPE = 1, 2, 70, 141

app = typer.Typer(
    name="planish",
    help="Rewrite neural networks so that they quantise well, and check that their function stays the same.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "An .onnx file, the text of a graph (.ir), or module:callable, which returns a torch model and its inputs."
Model = Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.")]
Validate = Annotated[bool, typer.Option("--validate/--no-validate", help="Check every exact pass in float64.")]
Calibrate = Annotated[
    str | None,
    typer.Option("--calibrate", help="Calibration data: .npz, a folder of .npz, .txt, or saved statistics."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="For text: the folder with tokenizer.json or vocab.txt."),
]
RowMask = Annotated[
    str | None,
    typer.Option("--row-mask", help="The input that is non-zero where a row (a token) counts."),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Calibrate on this many samples, spread evenly over the data."),
]
Batch = Annotated[int, typer.Option("--batch", help="Samples per batch.")]
Length = Annotated[int, typer.Option("--length", help="For text: tokens at which a sample is cut.")]


def _version(wanted: bool) -> None:
    if wanted:
        from planish import __version__

        print(f"planish {__version__}")
        raise typer.Exit(0)


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _state["debug"] = debug
    if context.invoked_subcommand is None:
        print(context.get_help())


_state: dict[str, Any] = {"debug": False}


def _terminal(quiet: bool) -> Terminal:
    from planish.report.terminal import Terminal

    made = _state["terminal"] = Terminal(quiet)
    return made


def _print_json(data: Any) -> None:
    from planish.report.plain import dumps

    sys.stdout.write(dumps(data))


def _calibration(
    data: str | None,
    tokenizer: str | None,
    row_mask: str | None,
    samples: int | None,
    batch: int,
    length: int,
) -> CalibrationOptions | Any:
    """The options as `planish.integrate.convert` takes them; saved statistics are loaded."""
    from planish.integrate.convert import CalibrationOptions
    from planish.ir.errors import PlanishError
    from planish.ir.stats import Stats

    if data is None:
        for option, given in (("--tokenizer", tokenizer), ("--row-mask", row_mask), ("--samples", samples)):
            if given is not None:
                raise PlanishError(f"option {option}: needs --calibrate")
        return None
    if data.endswith(".safetensors"):
        return Stats.load(data)
    return CalibrationOptions(data, tokenizer, row_mask, samples, batch, length)


def _raised(model: str, terminal: Terminal, raise_: bool) -> Any:
    """The graph of a model, after the passes of the `raise` group."""
    from planish.integrate.api import capture
    from planish.passes.manager import Pipeline

    graph = capture(model)
    if not raise_:
        return graph
    return Pipeline("raise").run(graph, validate=False, progress=terminal.progress)[0]


@app.command()
def inspect(
    model: Model,
    json: Json = False,
    act: Annotated[
        str | None,
        typer.Option("--act", help="Only this act: permute, scale, shift, rotate, linear or split."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="A row for each space, with all its tensors and blockers.")
    ] = False,
    raise_: Annotated[bool, typer.Option("--raise/--no-raise", help="Find linears, norms and attention first.")] = True,
    quiet: Quiet = False,
) -> int:
    """Print the channel spaces of a model: what may be transformed free of cost, and what blocks the rest."""
    from planish.ir.errors import PlanishError, nearest
    from planish.ir.ops.base import ACTS
    from planish.report.inspection import inspect as analyse

    acts = [a.value for a in ACTS]
    if act is not None and act not in acts:
        raise PlanishError(f"act '{act}': unknown; expected {', '.join(acts)}", hint=nearest(act, acts))
    terminal = _terminal(quiet or json)
    found = analyse(_raised(model, terminal, raise_), progress=terminal.progress)
    if json:
        _print_json(found.as_dict())
    else:
        from planish.report.terminal import show_inspection

        show_inspection(terminal, found, everything=everything, act=act)
    return 0


@app.command()
def lint(
    model: Model,
    mapping: Annotated[
        str,
        typer.Option("--mapping", "-m", help="A YAML file: smooth and balance layers.", show_default=False),
    ],
    json: Json = False,
    raise_: Annotated[bool, typer.Option("--raise/--no-raise", help="Find linears, norms and attention first.")] = True,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Apply the mapping and compare outputs in float64.")
    ] = True,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> int:
    """Judge a smoothing mapping (llm-compressor's form): is it an identity on this model, and if not, why.

    Exit code 0: an identity; 1: not one; 2: bad input.
    """
    from planish.report.mapping import lint as judge
    from planish.report.mapping import read_mappings

    terminal = _terminal(quiet or json)
    read_mappings(mapping)  # complain about the file before the model is read
    found = judge(_raised(model, terminal, raise_), mapping, check=check, seed=seed, progress=terminal.progress)
    if json:
        _print_json(found.as_dict())
    else:
        from planish.report.terminal import show_lint

        show_lint(terminal, found)
    return 0 if found.identity else NEGATIVE


@app.command()
def optimize(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="The .onnx file to write.", show_default=False)],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe's name, or a YAML file.", show_default=False)],
    calibrate: Calibrate = None,
    tokenizer: Tokenizer = None,
    row_mask: RowMask = None,
    samples: Samples = None,
    batch: Batch = 8,
    length: Length = 128,
    target: Annotated[
        str | None,
        typer.Option("--target", help="onnx (standard operators) or ort (ONNX Runtime's own too)."),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", help="Version of ONNX's default domain; the model's own by default."),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option("--report", help="Write what was done, site by site, to a JSON file."),
    ] = None,
    plots: Annotated[
        str | None,
        typer.Option("--plots", help="Draw histograms of what each site reads, before and after, to a folder (PNG)."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every site, and every place that a pass declined.")
    ] = False,
    seed: Seed = 0,
    validate: Validate = True,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Rewrite and quantise a model by a recipe."""
    from planish.integrate.convert import check_apart, check_output, convert

    terminal = _terminal(quiet or json)
    inputs = {"the recipe": recipe if recipe.endswith((".yaml", ".yml")) else None, "the calibration data": calibrate}
    check_apart(output, "--output", inputs)
    if report is not None:
        check_apart(report, "--report", {"the model": model, "the output": output, **inputs})
        check_output(report)
    if plots is not None:
        from planish.report.plots import check_plots

        check_plots(plots)
    options = _calibration(calibrate, tokenizer, row_mask, samples, batch, length)
    done = convert(
        model,
        output,
        recipe,
        calibration=options,
        target=target,
        opset=opset,
        seed=seed,
        validate=validate,
        progress=terminal.progress,
    )
    if report is not None:
        _write_json(report, done.as_dict())
    if plots is not None:
        from planish.report.plots import draw
        from planish.report.results import Results

        assert isinstance(done.report.results, Results)
        draw(done.report.results, plots, progress=terminal.progress)
    if json:
        _print_json(done.as_dict())
    elif not quiet:
        from planish.report.terminal import show_conversion

        show_conversion(terminal, done, output, everything=everything)
    return 0


def _write_json(path: str, data: Any) -> None:
    from planish.ir.files import atomic
    from planish.report.plain import dumps

    with atomic(path) as handle:
        handle.write(dumps(data).encode())


@app.command()
def opt(
    model: Model,
    pipeline: Annotated[str, typer.Option("--pipeline", "-p", help="Passes, separated by commas.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Write .onnx, .ir or .mlir; without it the text goes to stdout."),
    ] = None,
    calibrate: Calibrate = None,
    tokenizer: Tokenizer = None,
    row_mask: RowMask = None,
    samples: Samples = None,
    batch: Batch = 8,
    length: Length = 128,
    stats: Annotated[
        str | None,
        typer.Option("--stats", help="Save the statistics that were collected (.safetensors)."),
    ] = None,
    dump: Annotated[
        str | None,
        typer.Option("--dump", help="Write the graph after each pass, and the difference, to a folder."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="For .onnx: onnx or ort, by default what the pass lower says, else onnx; for .mlir as convert.",
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", help="For .onnx: version of the default domain."),
    ] = None,
    seed: Seed = 0,
    validate: Validate = True,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Quiet = False,
) -> int:
    """Run passes on a model, as mlir-opt does."""
    from planish.codegen.lower import Lower
    from planish.codegen.onnx_emission import check_target
    from planish.integrate.api import capture, to_onnx
    from planish.integrate.convert import check_apart, check_emission, check_output, for_opset, run_pipeline
    from planish.ir.errors import PlanishError
    from planish.passes.manager import DumpInstrument, Pipeline

    terminal = _terminal(quiet or json)
    passes = Pipeline(pipeline)
    if output is not None and Path(output).suffix not in (".onnx", ".ir", ".mlir"):
        raise PlanishError(f"{output}: unknown kind of output; expected .onnx, .ir or .mlir")
    form = None
    if output is not None and output.endswith(".mlir"):
        from planish.integrate.emit import form_of

        form, target = form_of(output, target, opset), None
    goal = target or next((p.target for p in reversed(passes.passes) if isinstance(p, Lower)), "onnx")
    check_target(goal)
    written = output is not None and output.endswith(".onnx")
    if written:
        passes = for_opset(passes, opset)
    if stats is not None:
        check_apart(stats, "--stats", {"the model": model, "the output": output, "the calibration data": calibrate})
    if output is not None:
        check_apart(output, "--output", {"the calibration data": calibrate})
    for path in (output, stats):
        if path is not None:
            check_output(path)
    options = _calibration(calibrate, tokenizer, row_mask, samples, batch, length)
    if stats is not None and options is None:
        raise PlanishError("option --stats: needs --calibrate")
    graph = capture(model)
    instruments = [DumpInstrument(dump)] if dump is not None else []
    result, report, collected = run_pipeline(
        graph,
        passes,
        calibration=options,
        seed=seed,
        validate=validate,
        instruments=instruments,
        progress=terminal.progress,
        ready=lambda raised: check_emission(raised, goal, opset if written else None),
    )
    if stats is not None and collected is not None:
        collected.save(stats)
    if output is None:
        if not json:
            from planish.ir.text import print_graph

            sys.stdout.write(print_graph(result))
    elif form is not None:
        form.write(result)
    elif output.endswith(".ir"):
        from planish.ir.store import save

        save(result, output)
    else:
        to_onnx(result, output, target=goal, opset=opset)
    last = max((i for i, p in enumerate(passes.passes) if "quantised" in p.gives), default=None)
    if written and last is not None and not any(isinstance(p, Lower) for p in passes.passes[last:]):
        report.passes[last].notes.append(
            f"not lowered: an engine's optimiser may compute other numbers; put lower{{target={goal}}} behind it"
        )
    if json:
        _print_json({"pipeline": str(passes), **report.as_dict()})
    elif output is not None and not quiet:
        from planish.report.terminal import show_report

        show_report(terminal, report)
    return 0


@app.command()
def kernels(
    model: Model,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print which nodes become which kernel, and what did not fuse and why.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Print the kernel sheet for sm_80, sm_89, sm_90, sm_100, sm_120 or gfx942."),
    ] = None,
    rows: Annotated[
        str, typer.Option("--rows", help="With --target: rows of the activations, separated by commas.")
    ] = "1,512",
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Quantise first: a recipe's name, or a YAML file."),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", "-p", help="Run these passes first, separated by commas."),
    ] = None,
    closing: Annotated[
        bool,
        typer.Option("--closing/--no-closing", help="Let a gemm finish rows: quantise per token for the next one."),
    ] = True,
    emit: Annotated[
        str | None,
        typer.Option("--emit", help="Write each kernel as a standalone Triton file to a folder, and plan.txt."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="With --emit: the kernels' float: f16, bf16 or f32.")] = "f16",
    calibrate: Calibrate = None,
    tokenizer: Tokenizer = None,
    row_mask: RowMask = None,
    samples: Samples = None,
    batch: Batch = 8,
    length: Length = 128,
    seed: Seed = 0,
    validate: Validate = True,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Cut a quantised model into fused Triton kernels. A float model needs a recipe or a pipeline.

    Nothing here is timed on a GPU.
    """
    from planish.codegen.select import Options, select
    from planish.codegen.triton import check_dtype, emit_plan

    terminal = _terminal(quiet or json)
    check_dtype(dtype)
    if target is not None:
        from planish.report.kernels import check_sheet

        check_sheet(target, rows)
    options = _calibration(calibrate, tokenizer, row_mask, samples, batch, length)
    graph = _quantised(model, recipe, pipeline, options, terminal, seed=seed, validate=validate)
    made = select(graph, Options(closing=closing))
    files = [] if emit is None else emit_plan(made, emit, dtype)
    if emit is not None and not (plan or json or target):
        terminal.show(*(str(Path(emit) / f"{file.name}.py") for file in files))
        return 0
    if target is not None:
        from planish.report.kernels import sheet_as_dict, sheet_of, show_sheet

        lines = sheet_of(made, target, rows)
        if json:
            _print_json(sheet_as_dict(lines))
        else:
            if plan:
                from planish.report.kernels import show_plan

                show_plan(terminal, made)
            show_sheet(terminal, lines)
        return 0 if all(line.machine is not None and not line.machine.spills for line in lines) else NEGATIVE
    if json:
        from planish.report.kernels import as_dict

        _print_json(as_dict(made) | ({"files": [f"{file.name}.py" for file in files]} if emit is not None else {}))
    else:
        from planish.report.kernels import show_plan

        show_plan(terminal, made)
    return 0


def _quantised(
    model: str,
    recipe: str | None,
    pipeline: str | None,
    calibration: Any,
    terminal: Terminal,
    *,
    seed: int,
    validate: bool,
) -> Any:
    """The graph of a model after the passes of a recipe or a pipeline; without either it has to be quantised."""
    from planish.integrate.api import capture
    from planish.integrate.convert import run_pipeline
    from planish.integrate.recipes import load_recipe
    from planish.ir.errors import PlanishError
    from planish.passes.manager import Pipeline

    if recipe is not None and pipeline is not None:
        raise PlanishError("options --recipe and --pipeline: expected one of them")
    if recipe is None and pipeline is None:
        if calibration is not None:
            raise PlanishError("option --calibrate: needs --recipe or --pipeline")
        graph = _raised(model, terminal, True)
        if not any(node.op.name.startswith("dequantize") for node in graph.nodes):
            if any(_is_lowered(node) for node in graph.nodes):
                raise PlanishError(
                    f"{model}: it is quantised in ONNX Runtime's own form, which kernels do not read",
                    hint="--recipe NAME on the float model",
                )
            raise PlanishError(f"{model}: nothing in it is quantised", hint="--recipe NAME quantises it first")
        return graph
    if recipe is not None:
        chosen = load_recipe(recipe)
        if chosen.needs.calibration and calibration is None:
            raise PlanishError(f"recipe '{chosen.name}': needs calibration data", hint="give some: --calibrate")
        passes = chosen.passes()
    else:
        assert pipeline is not None
        passes = Pipeline(pipeline)
    return run_pipeline(
        capture(model), passes, calibration=calibration, seed=seed, validate=validate, progress=terminal.progress
    )[0]


def _is_lowered(node: Node) -> bool:
    """True for an operator of ONNX Runtime's own that reads constant codes."""
    own = node.op.name.startswith("com.microsoft::")
    return own and any(v is not None and v.is_constant and v.dtype in ("i8", "u8") for v in node.operands)


@app.command("convert")
def convert_model(
    model: Model,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The .onnx, .ir or .mlir file to write.", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", help="For .onnx: onnx or ort; for .mlir: linalg, torch, tosa or stablehlo."),
    ] = None,
    opset: Annotated[int | None, typer.Option("--opset", help="For .onnx: version of the default domain.")] = None,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="For .mlir: NAME=N, the size of a symbol of the inputs; repeatable."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write a model in another form, its function unchanged. For .mlir every size is concrete."""
    from planish.integrate.api import capture
    from planish.integrate.convert import check_apart, check_output
    from planish.integrate.emit import form_of

    form = form_of(output, target, opset, size or [])
    check_apart(output, "--output", {"the model": model})
    check_output(output)
    written = form.write(capture(model))
    if json:
        _print_json(written.as_dict())
    elif not quiet:
        print("\n".join(written.lines()))
    return 0


@app.command()
def verify(
    first: Annotated[str, typer.Argument(help="The model that is right.", show_default=False)],
    second: Annotated[
        str | None,
        typer.Argument(help="The model to compare with it; with --oracle, by default itself.", show_default=False),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option("--inputs", help="An .npz file with inputs, beside the random ones."),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative error up to which they are equal.")] = 1e-5,
    count: Annotated[int, typer.Option("--random", help="Sets of random inputs.", min=0)] = 2,
    oracle: Annotated[
        str | None,
        typer.Option("--oracle", help="mlir: outputs by code of torch-mlir and LLVM, not by torch's kernels."),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Evaluate two models in float64 on the same inputs and compare their outputs.

    Exit code 0: equal; 1: different; 2: bad input.
    """
    from planish.integrate.api import verify as compare

    terminal = _terminal(quiet or json)
    found = compare(first, second, inputs=inputs, tolerance=tolerance, count=count, seed=seed, oracle=oracle)
    if json:
        _print_json(found.as_dict())
    else:
        from planish.report.terminal import show_comparison

        show_comparison(terminal, found)
    return 0 if found.equal else NEGATIVE


@app.command("passes")
def list_passes(json: Json = False) -> int:
    """List the passes and their options."""
    from planish.report.catalogue import passes

    found = passes()
    if json:
        _print_json(found)
        return 0
    for entry in found:
        facts = "needs calibration" if entry["needs_stats"] else ""
        print(f"{entry['name']}  [{entry['exactness']}]" + (f"  ({facts})" if facts else ""))
        print(f"    {entry['summary']}")
        for option in entry["options"]:
            print(f"    {option['name']}={option['default']}  {option['type']}")
    return 0


@app.command("recipes")
def list_recipes(json: Json = False) -> int:
    """List the recipes that come with planish."""
    from planish.report.catalogue import recipes

    found = recipes()
    if json:
        _print_json(found)
        return 0
    for entry in found:
        others = [t for t in entry["needs"]["targets"] if t != entry["target"]]
        needs = "  (needs calibration)" if entry["needs"]["calibration"] else ""
        print(f"{entry['name']}  [{', '.join([entry['target'], *others])}]{needs}")
        print(f"    {entry['summary']}")
        print(f"    {entry['pipeline']}")
        if entry["source"]:
            print(f"    source: {entry['source']}")
    return 0


# -- errors --------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code. The outermost frame: here every error becomes a message."""
    import warnings

    warnings.showwarning = _show_warning
    _state.update(debug=False, terminal=None)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader went away; keep the interpreter from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted")
    except MemoryError as error:
        return _fail("out of memory", error)
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror or error}", error)
    except Exception as error:
        return _explain(error)


def _run(arguments: list[str] | None) -> int:
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    command = typer.main.get_command(app)
    try:
        with command.make_context("planish", sys.argv[1:] if arguments is None else list(arguments)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _explain(error: Exception) -> int:
    """An error that is no system error: a wrong command line, bad input, or a bug."""
    from planish.ir.errors import PlanishError

    if isinstance(error, PlanishError):
        return _fail(str(error), error)
    if isinstance(error, typer.Abort):
        return _fail("interrupted")
    message = getattr(error, "format_message", None)
    if message is not None and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        hint = f"\n  hint: {context.command_path} --help" if context is not None else ""
        return _fail(message().rstrip(".") + hint)
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "allocate" in text and "memory" in text:
        return _fail(f"out of memory: {text}", error)
    _fail(
        f"internal error: {type(error).__name__}: {text}\n"
        "  hint: this is a bug of planish, please report it with the model; --debug shows where",
        error,
        word="",
    )
    return BUG


def _fail(text: str, error: BaseException | None = None, *, word: str = "error: ") -> int:
    terminal = _state.get("terminal")
    if terminal is not None:
        terminal.close()
    if _state["debug"] and error is not None:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    print(f"{word}{text}", file=sys.stderr)
    return ERROR


def _show_warning(message: Warning | str, category: type[Warning], *rest: object, **more: object) -> None:
    if _state["debug"] or category is UserWarning:
        print(f"warning: {message}", file=sys.stderr)
