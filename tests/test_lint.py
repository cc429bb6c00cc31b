"""`planish lint`: the verdict on a smoothing mapping, by analysis and by numbers."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from block_models import WIDTH, Builder, block, save
from helpers import check_text
from onnx import helper

from planish.capture.from_onnx import from_onnx
from planish.cli import main
from planish.ir.errors import PlanishError
from planish.ir.graph import Graph
from planish.ir.rewriter import Rewriter
from planish.passes.manager import Pipeline
from planish.report.mapping import lint, read_mappings

QKV = [["re:.*q", "re:.*k", "re:.*v"], "re:layers.*norm"]


def raised(model: Any) -> Graph:
    graph, _ = Pipeline("raise").run(from_onnx(model), validate=False)
    check_text(graph)
    return graph


def test_a_complete_mapping_is_an_identity(seed: int) -> None:
    found = lint(raised(block(2)), [QKV], seed=seed)
    assert [v.smooth for v in found.verdicts] == ["layers.0.norm", "layers.1.norm"]
    assert found.verdicts[1].balance == ("layers.1.q", "layers.1.k", "layers.1.v")
    assert found.identity
    for verdict in found.verdicts:
        assert verdict.reasons == ()
        assert verdict.error is not None
        assert verdict.error < 1e-13
        assert verdict.agree


def test_a_reader_that_is_left_out_is_named(seed: int) -> None:
    (verdict,) = lint(raised(block()), [[["re:.*q", "re:.*k"], "layers.0.norm"]], seed=seed).verdicts
    assert not verdict.identity
    assert verdict.reasons == ("layers.0.v reads it too, and the mapping leaves it out",)
    assert verdict.error is not None
    assert verdict.error > 1e-6
    assert verdict.agree


def test_a_residual_that_reads_the_norm_breaks_it(seed: int) -> None:
    (verdict,) = lint(raised(block(residual="post")), [QKV], seed=seed).verdicts
    assert not verdict.identity
    assert verdict.agree
    assert "layers.0.down writes it too, and the mapping leaves it out" in verdict.reasons
    assert any(r.startswith("a scale cannot pass layer_norm /norm/Norm: ") for r in verdict.reasons)


def test_relu_passes_a_scale_and_gelu_does_not(seed: int) -> None:
    for op, identity in (("Relu", True), ("Gelu", False)):
        make = Builder(seed)
        up = make.linear("x", "up", WIDTH, 16)
        down = make.linear(make.node(op, [up], "active"), "down", 16, WIDTH)
        (verdict,) = lint(raised(make.model(down)), {"mappings": [[["down"], "up"]]}, seed=seed).verdicts
        assert verdict.identity is identity
        assert verdict.agree
        if not identity:
            assert verdict.reasons[0].startswith("a scale cannot pass gelu %active: ")
            assert verdict.reasons[1] == "down reads what gelu %active writes, not what up writes"


def test_a_norm_read_by_a_gate_breaks_it(seed: int) -> None:
    make = Builder(seed)
    normed = make.norm("x", "norm")
    gate = make.node("Sigmoid", [normed], "gate")
    product = make.node("Mul", [normed, gate], "product")
    (verdict,) = lint(raised(make.model(make.linear(product, "out"))), [[["out"], "norm"]], seed=seed).verdicts
    assert not verdict.identity
    assert verdict.agree
    assert any("silu" in r or "sigmoid" in r for r in verdict.reasons)


def test_a_balance_layer_that_reads_something_else(seed: int) -> None:
    make = Builder(seed)
    first = make.linear(make.norm("x", "a.norm"), "a.out")
    second = make.linear(make.norm(first, "b.norm"), "b.out")
    (verdict,) = lint(raised(make.model(second)), [[["b.out"], "a.norm"]], seed=seed).verdicts
    assert verdict.reasons == (
        "a.out reads it too, and the mapping leaves it out",
        "b.out reads what b.norm writes, not what a.norm writes",
    )
    assert verdict.agree


def test_a_gain_that_acts_as_one_plus_weight(seed: int) -> None:
    make = Builder(seed)
    normed = make.norm("x", "norm")
    graph = raised(make.model(make.linear(normed, "out")))
    node = next(n for n in graph.nodes if n.op.name == "layer_norm")
    with Rewriter(graph) as rewriter:
        made = rewriter.insert("rms_norm", node.operands, {"gain_offset": 1.0}, before=node, source="/norm/Norm")
        rewriter.replace_node(node, made.result)
    check_text(graph)
    (verdict,) = lint(graph, [[["out"], "norm"]], seed=seed).verdicts
    assert verdict.reasons == ("norm: its gain acts as weight + 1, so that scaling the weight does not scale the gain",)
    assert not verdict.identity
    assert verdict.agree
    mapping = {"mappings": [[["out"], "norm"]], "offset_gains": "converted"}
    (verdict,) = lint(graph, mapping, seed=seed).verdicts  # the tool scales weight + 1
    assert verdict.reasons == ()
    assert verdict.identity
    assert verdict.agree


def test_a_weight_with_two_readers_is_scaled_for_both(seed: int) -> None:
    make = Builder(seed)
    normed = make.norm("x", "norm")
    shared = make.weight("tied.weight", WIDTH, WIDTH)
    first = make.node("MatMul", [normed, shared], "first")
    second = make.node("MatMul", [make.node("Relu", [first], "active"), shared], "second")
    (verdict,) = lint(raised(make.model(second)), [[["tied"], "norm"]], seed=seed).verdicts
    assert not verdict.identity
    assert verdict.agree


def test_the_last_rows_of_a_fused_layer(seed: int) -> None:
    make = Builder(seed)
    fused = make.linear("x", "qkv", WIDTH, 3 * WIDTH)
    make.weights["ends"] = np.array([WIDTH, WIDTH, WIDTH])
    make.nodes.append(helper.make_node("Split", [fused, "ends"], ["q", "k", "v"], axis=-1, name="split"))
    scores = make.node("Mul", ["q", "k"], "scores")
    total = make.node("Add", [make.linear("v", "o"), scores], "total")
    (verdict,) = lint(raised(make.model(total)), [[["o"], "qkv"]], seed=seed).verdicts
    assert verdict.reasons == ()
    assert verdict.identity
    assert verdict.agree


def test_sizes_that_do_not_go_together(seed: int) -> None:
    make = Builder(seed)
    narrow = make.linear("x", "v", WIDTH, 4)
    wide = make.node("Concat", [narrow, narrow], "wide", axis=-1)
    (verdict,) = lint(raised(make.model(make.linear(wide, "o"))), [[["o"], "v"]], seed=seed).verdicts
    assert verdict.reasons == ("v writes 4 channels and the balance layers read 8",)
    assert verdict.error is None
    assert not verdict.identity


def test_two_smooth_layers_for_the_same_balance_layers(seed: int) -> None:
    make = Builder(seed)
    out = make.linear(make.norm(make.norm("x", "a.norm"), "b.norm"), "out")
    (verdict,) = lint(raised(make.model(out)), [[["out"], "re:.*norm"]], seed=seed).verdicts
    assert verdict.reasons == ("2 smooth layers match for the same balance layers: a.norm, b.norm",)


def test_the_judges_are_independent(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis that calls everything an identity is contradicted by the numbers."""
    monkeypatch.setattr("planish.report.mapping.judge", lambda *arguments: [])
    found = lint(raised(block()), [[["re:.*q"], "layers.0.norm"]], seed=seed)
    assert found.verdicts[0].identity
    assert not found.verdicts[0].agree
    assert not found.identity


# -- forms of the file ---------------------------------------------------------------------------

FORMS = {
    "smoothquant": """
        quant_stage:
          quant_modifiers:
            SmoothQuantModifier:
              smoothing_strength: 0.8
              mappings:
                - - ["re:.*q", "re:.*k"]
                  - "re:.*norm"
    """,
    "object": """
        mappings:
          - smooth_layer: "re:.*norm"
            balance_layers: ["re:.*q", "re:.*k"]
    """,
    "awq": """
        AWQModifier:
          mappings:
            - ["re:.*norm", ["re:.*q", "re:.*k"]]
    """,
    "list": """
        - [["re:.*q", "re:.*k"], "re:.*norm"]
    """,
    "nested smooth": """
        mappings:
          - [["re:.*q", "re:.*k"], ["re:.*norm"]]
    """,
}


def dedent(text: str) -> str:
    return textwrap.dedent(text).lstrip()


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_mapping(tmp_path: Path, form: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(dedent(FORMS[form]))
    (entry,) = read_mappings(path)
    assert (entry.smooth, entry.balance) == ("re:.*norm", ("re:.*q", "re:.*k"))
    assert entry.where.startswith(f"{path}:")


def test_ignored_layers_are_left_out(seed: int) -> None:
    found = lint(raised(block(2)), {"mappings": [QKV], "ignore": ["re:layers.0"]}, seed=seed)
    assert [v.smooth for v in found.verdicts] == ["layers.1.norm"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "{path}: no mappings; expected a list under the key 'mappings'"),
        ("mappings:\n  - 3\n", "{path}:2: not a mapping; expected [[balance, ...], smooth], got 3"),
        (
            "mappings:\n  - smooth_layer: a\n    balanced_layers: [b]\n",
            "{path}:3: field 'balanced_layers': unknown; expected smooth_layer, balance_layers\n"
            "  hint: did you mean 'balance_layers'?",
        ),
        (
            "mappings:\n  - smooth_layer: a\n",
            "{path}:2: field 'balance_layers': is missing; expected smooth_layer, balance_layers",
        ),
        (
            "mappings:\n  - [[], a]\n",
            "{path}:2: expected one smooth layer and a list of balance layers; got [[], 'a']",
        ),
        ("mappings:\n  - [[3], a]\n", "{path}:2: a layer's name is text; got 3"),
        (
            "mappings:\n  - [['re:('], a]\n",
            "{path}:2: 're:(' is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            "offset_gains: yes please\nmappings:\n  - [[a], b]\n",
            "{path}:1: field 'offset_gains': expected kept or converted; got 'yes please'",
        ),
        ("mappings: [\n", "{path}:2: not YAML: expected the node content, but found '<stream end>'"),
        ("mappings: !!python/object:os.system {}\n", "{path}:1: not YAML: could not determine a constructor"),
    ],
)
def test_what_is_wrong_with_a_mapping_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(PlanishError) as caught:
        read_mappings(path)
    assert str(caught.value).startswith(message.format(path=path))


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(PlanishError) as caught:
        lint(raised(block()), [[["re:.*query"], "re:.*nrm"]])
    assert str(caught.value) == "mapping:1: 're:.*nrm' matches no layer of the model\n  hint: did you mean 'norm'?"


def test_an_entry_that_matches_nothing_is_passed_over(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.yaml"
    nothing, good = "[['re:.*query', 're:.*key'], 're:.*nrm']", "[['re:.*q', 're:.*k', 're:.*v'], 're:layers.*norm']"
    path.write_text(f"- {nothing}\n- {good}\n")
    found = lint(raised(block()), path, seed=seed)
    assert found.passed_over == (f"{path}:1",)
    assert [v.smooth for v in found.verdicts] == ["layers.0.norm"]
    assert found.identity
    assert found.as_dict()["passed_over"] == [f"{path}:1"]
    assert main(["lint", str(save(block(), tmp_path / "m.onnx")), "--mapping", str(path)]) == 0
    assert f"{path}:1: matches no layer of the model; the tool passes over it\n" in capsys.readouterr().out


def test_an_entry_that_matches_in_part_is_an_error() -> None:
    with pytest.raises(PlanishError) as caught:
        lint(raised(block()), [[["re:.*q", "re:.*query"], "re:.*norm"]])
    assert str(caught.value).startswith("mapping:1: 're:.*query' matches no layer of the model")


# -- the command ---------------------------------------------------------------------------------


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save(block(), tmp_path / "m.onnx"))
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("- [['re:.*q', 're:.*k', 're:.*v'], 're:layers.*norm']\n")
    bad.write_text("- [['re:.*q', 're:.*k'], 're:layers.*norm']\n")
    assert main(["lint", model, "--mapping", str(good)]) == 0
    out = capsys.readouterr().out
    assert "layers.0.norm -> layers.0.q, layers.0.k, layers.0.v: identity (relative error " in out
    assert out.endswith("1 of 1 are identities\n")
    assert main(["lint", model, "--mapping", str(bad)]) == 1
    out = capsys.readouterr().out
    assert "NOT an identity" in out
    assert "  layers.0.v reads it too, and the mapping leaves it out\n" in out
    assert main(["lint", model, "--mapping", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory\n"


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, mapping = save(block(), tmp_path / "m.onnx"), tmp_path / "m.yaml"
    mapping.write_text("- [['re:.*q', 're:.*k'], 're:layers.*norm']\n")
    assert main(["lint", str(model), "-m", str(mapping), "--json", "--no-check"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["identity"] is False
    assert found["verdicts"][0]["reasons"] == ["layers.0.v reads it too, and the mapping leaves it out"]
    assert found["verdicts"][0]["error"] is None


def test_the_examples_are_mappings() -> None:
    folder = Path(__file__).parent.parent / "examples" / "lint"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        assert read_mappings(file)
