"""Analyses of robustness: what each point quantizes, and how measuring goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import digit_batches, digits_model

from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import quantizers_of
from qvit.report.analysis import render_analysis, write_analysis_page
from qvit.runs import analysis as module
from qvit.runs import run as run_module
from qvit.runs.analysis import (
    AnalysisProbe,
    Point,
    analyze,
    analyze_heads,
    analyze_parts,
    analyze_widths,
    attention_layers,
    head_points,
    part_of,
    part_points,
    width_points,
)
from qvit.runs.finished import load_run
from qvit.runs.subject import (
    Request,
    fingerprint,
    logits,
    open_subject,
    paired_standard_error,
    percent_equal,
    standard_error,
)

REQUEST = Request(
    model="vit_digits",
    data="digits",
    images=40,
    calibration_images=32,
    device="cpu",
    model_kwargs={"depth": 2, "embed_dim": 16, "num_heads": 2},
)


def images(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images that are labelled by chance."""
    return [(batch, torch.arange(len(batch)) % 10) for batch in digit_batches(count, seed=5)]


@pytest.fixture(scope="module")
def probe() -> AnalysisProbe:
    return AnalysisProbe(digits_model(depth=2), digit_batches())


class TestPoints:
    def test_parts_divide_the_blocks(self) -> None:
        cost = inspect_model(digits_model(depth=2))
        found = {name: part_of(site) for name, site in cost.sites.items()}
        assert found["blocks.0.mlp.fc2.input"] == "gelu"
        assert {found[f"blocks.0.mlp.{site}"] for site in ("fc1.input", "fc1.weight", "fc2.weight")} == {"fc"}
        assert {found[f"blocks.1.attn.{site}"] for site in ("qkv.input", "query", "proj.weight", "probs")} == {"msa"}
        assert found["head.weight"] is found["patch_embed.proj.input"] is None
        assert sum(part == "gelu" for part in found.values()) == 2

    @pytest.mark.parametrize("part", ["gelu", "fc", "msa"])
    def test_a_part_alone_is_quantized(self, probe: AnalysisProbe, part: str) -> None:
        model = probe.apply(Point("parts", 3, part=part).widths(probe.cost))
        on = {site for site, quantizer in quantizers_of(model) if quantizer.enabled}
        assert on == {name for name, site in probe.cost.sites.items() if part_of(site) == part}
        assert all(int(w) == 3 for site, q in quantizers_of(model) if site in on for w in q.bit_width.flatten())

    def test_one_head_of_one_layer_is_lowered_and_no_other(self, probe: AnalysisProbe) -> None:
        lowered = Point("heads", 2, layer="blocks.1.attn", head=1, others=8).widths(probe.cost)
        reference = Point("heads", 8, others=8).widths(probe.cost)
        changed = {name for name in lowered if lowered[name] != reference[name]}
        names = ("qkv.query_weight", "qkv.key_weight", "qkv.value_weight", "query", "key", "value", "probs", "output")
        assert changed == {f"blocks.1.attn.{name}" for name in (*names, "proj.weight")}
        assert all(lowered[name] == (8, 2) for name in changed)

    def test_lowering_a_head_leaves_the_output_of_the_others_alone(self, probe: AnalysisProbe) -> None:
        seen: list[torch.Tensor] = []
        output = dict(quantizers_of(probe.model))["blocks.0.attn.output"]
        hook = output.register_forward_hook(lambda _module, _inputs, result: seen.append(result))
        for head in (None, 0):
            layer = None if head is None else "blocks.0.attn"
            point = Point("heads", 8 if head is None else 2, layer=layer, head=head, others=8)
            probe.apply(point.widths(probe.cost))(digit_batches(1)[0])
        hook.remove()
        assert torch.equal(seen[0][:, 1], seen[1][:, 1])
        assert not torch.equal(seen[0][:, 0], seen[1][:, 0])

    def test_unknown_part(self) -> None:
        with pytest.raises(UsageError, match="unknown part 'gel'; did you mean 'gelu'"):
            part_points(inspect_model(digits_model()), ["gel"])

    def test_layers_out_of_range(self) -> None:
        with pytest.raises(UsageError, match="layer 2 does not exist: this model has attention layers 0 to 1"):
            head_points(inspect_model(digits_model(depth=2)), [0, 2])

    @pytest.mark.parametrize("widths", [(1,), (9,)])
    def test_widths_out_of_range(self, widths: tuple[int, ...]) -> None:
        with pytest.raises(UsageError, match="outside of 2 to 8"):
            width_points(widths)

    def test_the_low_width_must_be_lower(self) -> None:
        with pytest.raises(UsageError, match="must be below"):
            head_points(inspect_model(digits_model()), low_bits=8, high_bits=8)

    def test_heads_come_after_their_reference(self) -> None:
        points = head_points(inspect_model(digits_model(depth=2)), None)
        assert [(point.layer, point.head) for point in points] == [
            (None, None), ("blocks.0.attn", 0), ("blocks.0.attn", 1), ("blocks.1.attn", 0), ("blocks.1.attn", 1),
        ]  # fmt: skip


class TestProbe:
    @pytest.mark.parametrize("bits", [2, 5, 8])
    def test_one_calibration_serves_every_width(self, probe: AnalysisProbe, bits: int) -> None:
        plain = calibrate(quantize(probe.float_model, QuantPlan.preset(f"w{bits}a{bits}")), digit_batches())
        batch = digit_batches(1, seed=3)[0]
        switched = probe.apply(Point("widths", bits).widths(probe.cost))
        assert torch.allclose(switched(batch), plain.eval()(batch), atol=1e-6)

    def test_rows(self, probe: AnalysisProbe) -> None:
        row = probe.measure(Point("widths", 8), images())
        assert row["top1"] == pytest.approx(probe.measure(Point("widths", 8), images())["top1"])
        assert row["bit_operations"] == probe.cost.bit_operations(probe.cost.uniform(8))
        assert row["images"] == 16 and 0 <= row["agreement"] <= 100
        coarse = probe.measure(Point("widths", 2), images())
        assert 0 < row["divergence"] < coarse["divergence"] and coarse["divergence_standard_error"] > 0
        assert probe.measure(Point("parts", 8, part="fc"), images())["bit_operations"] is None

    def test_the_three_functions(self) -> None:
        model = digits_model()
        assert [row["bit_width"] for row in analyze_widths(model, digit_batches(), images(), widths=(2, 8))] == [2, 8]
        rows = analyze_parts(model, digit_batches(), images(), parts=("gelu",), widths=(4,))
        assert [(row["part"], row["bit_width"]) for row in rows] == [("gelu", 4)]
        assert [row["head"] for row in analyze_heads(model, digit_batches(), images())] == [None, 0, 1]

    def test_standard_error(self) -> None:
        assert standard_error(50.0, 100) == pytest.approx(5.0)
        assert standard_error(100.0, 7) == 0.0
        first, second = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 0, 1, 0]).bool()
        assert paired_standard_error(first, second) == pytest.approx(100 * (0.56 / 5) ** 0.5)
        assert paired_standard_error(first, first) == 0.0

    @pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
    def test_other_families(self, name: str) -> None:
        model = create_model(name, **({"depths": (1, 1, 1, 1)} if name.startswith("swin") else {"depth": 1}))
        cost = inspect_model(model)
        assert attention_layers(cost)
        parts = {point.part for point in part_points(cost)}
        assert parts == ({"gelu", "fc", "msa"} if name.startswith("swin") else {"fc", "msa"})


class TestFile:
    def measure(self, out: Path, request: Request = REQUEST, **options: Any) -> dict[str, Any]:
        return analyze(request, out, **({"widths": (2, 4), "parts": ("gelu",)} | options))

    def test_it_goes_on_where_it_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = self.measure(tmp_path / "whole")
        original, calls = AnalysisProbe.measure, []

        def stops(self: AnalysisProbe, point: Point, *rest: Any) -> dict[str, Any]:
            calls.append(point)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(self, point, *rest)

        monkeypatch.setattr(AnalysisProbe, "measure", stops)
        with pytest.raises(KeyboardInterrupt):
            self.measure(tmp_path / "stopped")
        assert len(json.loads((tmp_path / "stopped" / "analysis.json").read_text())["points"]) == 2
        resumed = self.measure(tmp_path / "stopped")
        assert len(calls) == 3 + len(whole["points"]) - 2
        strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in r["points"]] for r in (whole, resumed)]
        assert strip[0] == strip[1]

    def test_a_complete_one_measures_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.measure(tmp_path, what=("widths",))
        monkeypatch.setattr(module, "AnalysisProbe", None)
        assert self.measure(tmp_path, what=("widths",)) == first

    def test_asking_for_more_adds(self, tmp_path: Path) -> None:
        self.measure(tmp_path, what=("widths",))
        record = self.measure(tmp_path, what=("widths", "heads"))
        assert [row["what"] for row in record["points"]] == ["widths"] * 2 + ["heads"] * 3

    def test_another_subject_is_refused(self, tmp_path: Path) -> None:
        self.measure(tmp_path, what=("widths",))
        other = Request(**{**vars(REQUEST), "images": 39})
        with pytest.raises(UsageError, match="an analysis with images 40, not 39"):
            self.measure(tmp_path, other)
        assert self.measure(tmp_path, other, what=("widths",), overwrite=True)["settings"]["images"] == 39

    def test_points_are_trained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each is a run whose plan has the point's widths, and float elsewhere; a killed one is resumed."""
        options: dict[str, Any] = {"what": ("parts",), "training": {"epochs": 2, "batch_size": 200, "threads": 1}}
        whole = self.measure(tmp_path / "whole", **options)
        for row in whole["points"]:
            run = tmp_path / "whole" / "trained" / f"parts-gelu-{row['bit_width']}-bit"
            widths = QuantPlan.load(run / "plan.json").widths()
            parts = {name: part_of(site) for name, site in inspect_model(digits_model(depth=2)).sites.items()}
            assert all(set(own) == {row["bit_width"] if parts[name] == "gelu" else 32} for name, own in widths.items())
            subject = open_subject(REQUEST)
            answers, truth = zip(*logits(load_run(run), subject.loader()), strict=True)
            assert row["top1"] == percent_equal(torch.cat(answers).argmax(-1), torch.cat(truth))
        assert whole["settings"]["training"] == options["training"]
        assert "trained with LSQ+ for 2 epochs" in render_analysis(whole)
        save = run_module.save_weights

        def dies(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(run_module, "save_weights", dies)
            self.measure(tmp_path / "killed", **options)
        again = self.measure(tmp_path / "killed", **options)
        assert [row["divergence"] for row in again["points"]] == [row["divergence"] for row in whole["points"]]
        with pytest.raises(UsageError, match="with training .*'epochs': 2"):
            self.measure(tmp_path / "killed", what=("parts",))
        assert self.measure(tmp_path / "killed", what=("parts",), overwrite=True)["settings"]["training"] is None
        assert not (tmp_path / "killed" / "trained").exists()

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "analysis.json").write_text("{")
        with pytest.raises(QvitError, match="cannot read the analysis"):
            self.measure(tmp_path)
        with pytest.raises(QvitError, match="cannot read the analysis"):
            write_analysis_page(tmp_path / "analysis.json", tmp_path / "page.html")

    def test_an_unknown_analysis(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="unknown analysis 'width'; did you mean 'widths'"):
            analyze(REQUEST, tmp_path, what=("width",))

    @pytest.mark.parametrize("layers", [(0,), None])
    def test_the_page_has_a_section_per_analysis(self, tmp_path: Path, layers: tuple[int, ...] | None) -> None:
        record = self.measure(tmp_path, layers=layers)
        page = render_analysis(record)
        assert all(f'<section id="{kind}"' in page for kind in ("widths", "parts", "heads"))
        assert "http" not in page.split("<script>")[0].replace("http-equiv", "")
        only = render_analysis(record | {"points": [row for row in record["points"] if row["what"] == "parts"]})
        assert '<section id="parts"' in only and '<section id="heads"' not in only


class TestSubject:
    def test_drawn_images_and_weights_are_the_same_each_time(self) -> None:
        first, second = open_subject(REQUEST), open_subject(REQUEST)
        assert first.settings() == second.settings()
        assert torch.equal(next(iter(first.loader()))[0], next(iter(second.loader()))[0])
        assert len(first.judged) == 40

    def test_a_draw_can_leave_out_the_first_images(self) -> None:
        subject = open_subject(REQUEST)
        whole = torch.cat(list(subject.calibration(images=48)))
        rest = torch.cat(list(subject.calibration(images=16, skip=32)))
        assert torch.equal(rest, whole[32:])

    def test_the_fingerprint_sees_every_weight(self) -> None:
        model = digits_model()
        before = fingerprint(model)
        with torch.no_grad():
            model.get_parameter("head.bias")[3] += 1e-6
        assert fingerprint(model) != before

    def test_counts_are_checked(self) -> None:
        with pytest.raises(UsageError, match="images = 0: "):
            Request.create(model="vit_digits", data="digits", images=0)
