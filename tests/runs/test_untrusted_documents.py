"""Documents that a stranger wrote: nothing is run, nothing has no end, each refusal names file and key."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.models._factory
import torch
from command_line import Qvit, qvit  # noqa: F401
from report_runs import write_run
from tiny_models import SMALL, Evil, small_config

from qvit import files
from qvit.allocate.units import Unit
from qvit.data.collection import read_class_map
from qvit.deploy.file.skeleton import skeleton
from qvit.documents.base import checked, read_document
from qvit.documents.run import Costs, Outcome, Result
from qvit.errors import QvitError, UsageError
from qvit.measure import Sensitivity
from qvit.models.architecture import Architecture, check_arguments
from qvit.models.create import create_model
from qvit.models.families import constructor_arguments, inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.report import load_runs
from qvit.report.analysis import write_analysis_page
from qvit.report.page import render_page
from qvit.runs.directory import read_config
from qvit.runs.finished import evaluate_run, load_run
from qvit.runs.jobs import Job, work
from qvit.runs.run import resume, train
from qvit.runs.teaching import teacher_model
from qvit.training.config import TrainConfig
from qvit.training.recipe import read_recipe

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(small_config(method="lsq+", budget="4bit", epochs=1), run, quiet=True)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A pickle, what appears when it is run, and a timm that unpickles, as those before 1.0.26 did."""
    file, marker = tmp_path / "weights.pth", tmp_path / "executed"
    file.write_bytes(pickle.dumps(Evil(marker)))

    def load(model: Any, path: str, *args: Any, **kwargs: Any) -> None:
        pickle.loads(Path(path).read_bytes())

    monkeypatch.setattr(timm.models._factory, "load_checkpoint", load)
    return file, marker


def edit(file: Path, change: Change) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


# Code


def test_timm_would_run_the_pickle(evil: tuple[Path, Path]) -> None:
    timm.create_model("vit_digits", checkpoint_path=str(evil[0]), **SMALL)
    assert evil[1].exists(), "the file is harmless: the tests below prove nothing"


@pytest.mark.parametrize(
    "key", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"]
)
def test_weights_are_never_read_by_arguments(run: Path, evil: tuple[Path, Path], qvit: Qvit, key: str) -> None:  # noqa: F811
    file, marker = evil
    value: Any = {"file": str(file)} if "cfg" in key else str(file)
    recipe = run.parent / "recipe.toml"
    shown = json.dumps(value) if isinstance(value, str) else f'{{ file = "{file}" }}'
    recipe.write_text(f'model = "vit_digits"\nepochs = 1\ndata = "digits"\n[model_kwargs]\n{key} = {shown}\n')
    edit(run / "config.json", lambda data: data["model_kwargs"].update({key: value}))
    assert str(run / "config.json") in qvit("evaluate", run, "--data", "digits").failed(1)
    for call in (load_run, read_config, resume):
        with pytest.raises(QvitError, match=f"config.json: model_kwargs: a model takes no argument '{key}'"):
            call(run)
    (run / "result.json").unlink()
    assert key in qvit("train", "--resume", run).failed(1)
    assert f"the recipe {recipe}" in qvit("train", recipe, "--out", run.parent / "new").failed(2)
    edit(
        run / "config.json",
        lambda data: data.update(model_kwargs={}, teacher="vit_digits", teacher_kwargs={key: value}),
    )
    assert f"teacher_kwargs: a model takes no argument '{key}'" in qvit("train", "--resume", run).failed(1)
    qvit("report", run, "--out", run.parent / "page.html")
    with pytest.raises(QvitError, match=key):
        skeleton("vit_digits", SMALL | {key: value}, QuantPlan.preset("w4a4"), tensors=99, file_bytes=9999)
    with pytest.raises(UsageError, match=key):
        TrainConfig.create(model="vit_digits", model_kwargs={key: value})
    with pytest.raises(UsageError, match=key):
        create_model("vit_digits", **{key: value})
    with pytest.raises(UsageError, match=key):
        teacher_model("vit_digits", str(run / "model.safetensors"), {key: value}, 10)
    assert not marker.exists()


def test_weights_have_an_option(evil: tuple[Path, Path], qvit: Qvit) -> None:  # noqa: F811
    said = qvit("cost", "vit_digits", "-m", f"checkpoint_path={evil[0]}").failed(2)
    assert "use --weights" in said and not evil[1].exists()


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_digits", "local-dir:/tmp/x", "hf_hub:a/b", "/tmp/vit_digits", "a/b"])
def test_models_are_those_of_the_registry(run: Path, name: str) -> None:
    with pytest.raises(QvitError, match="no name of timm's registry|cannot get 'a/b'"):  # tests have no network
        create_model(name)
    edit(run / "config.json", lambda data: data.update(model=name))
    with pytest.raises(QvitError, match="no name of timm's registry"):
        load_run(run)


def test_every_plain_argument_of_the_supported_models_is_known() -> None:
    modules = {"attn_block", "attn_block_token_only", "block_fn", "block_layers", "block_layers_token", "embed_layer"}
    modules |= {"mlp_block", "mlp_block_token_only", "mlp_layer", "patch_layer"}
    assert constructor_arguments() - set(Architecture.model_fields) <= modules | {"args", "device", "dtype"}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"img_size": (32, 64), "patch_size": [4, 8], "mlp_ratio": 4, "drop_path_rate": 0.1},
        {"depths": (2, 2), "num_heads": [2, 4], "window_size": 4, "act_layer": "quick_gelu"},
        {"class_token": False, "global_pool": "avg", "reg_tokens": 4, "init_values": 1e-5, "fc_norm": None},
    ],
)
def test_architectures_pass(kwargs: dict[str, Any]) -> None:
    check_arguments(kwargs)


# Size

TOO_LARGE: dict[str, dict[str, Any]] = {
    "width": {"embed_dim": 16384},
    "depth": {"depth": 100_000},
    "depths": {"depths": [200, 200]},
    "heads": {"num_heads": 10**6},
    "both": {"depth": 256, "embed_dim": 8192},
    "classes": {"num_classes": 10**9},
    "image": {"img_size": 10**6},
    "digits": {"mlp_ratio": 1e300},
    "negative": {"reg_tokens": -1},
    "kind": {"depth": "12"},
    "text": {"act_layer": "os.system"},
    "nested": {"window_size": [[4]]},
}


@pytest.mark.parametrize("kwargs", TOO_LARGE.values(), ids=TOO_LARGE)
def test_impossible_models_are_refused_at_once(run: Path, kwargs: dict[str, Any]) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UsageError, match="depths add up" if "depths" in kwargs else next(iter(kwargs))):
        create_model("vit_digits", **kwargs)
    edit(run / "config.json", lambda data: data["model_kwargs"].update(kwargs))
    with pytest.raises(QvitError, match=r"config\.json: model_kwargs"):
        load_run(run)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_model_beyond_the_limits_is_refused_before_it_takes_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="parameters; at most|GB of memory"):
        create_model("vit_digits", embed_dim=8192, depth=64, num_heads=64)
    with pytest.raises(UsageError, match="into 1,048,576 patches"):
        create_model("vit_digits", img_size=2048, patch_size=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_model_takes_no_more_than_its_file_of_weights(run: Path) -> None:
    edit(run / "config.json", lambda data: data["model_kwargs"].update(embed_dim=2048, depth=8))
    with pytest.raises(QvitError, match=r"model\.safetensors has [\d,]+ bytes, its model takes"):
        load_run(run)


def test_random_numbers_are_those_of_the_model_alone() -> None:
    torch.manual_seed(3)
    ours = create_model("vit_digits", **SMALL)
    following = torch.rand(4)
    torch.manual_seed(3)
    plain = timm.create_model("vit_digits", **SMALL)
    assert torch.equal(torch.rand(4), following)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in ours.state_dict().items())


def plan_file(path: Path, sites: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"format": "qvit-plan", "version": 1, "name": "a", "sites": sites}))
    return path


def test_plans_have_an_end(tmp_path: Path) -> None:
    heads = plan_file(tmp_path / "a.json", {"blocks.0.attn.query": {"bit_width": [4] * 2_000_000}})
    with pytest.raises(QvitError, match="site 'blocks.0.attn.query' of the plan: bit_width has 2,000,000 widths"):
        QuantPlan.load(heads)
    sites = plan_file(tmp_path / "b.json", {f"blocks.{i}.x": {"bit_width": 4} for i in range(20_001)})
    with pytest.raises(QvitError, match="20,001 sites; at most"):
        QuantPlan.load(sites)
    with pytest.raises(QvitError, match="'name' of a plan must be a text of at most 500"):
        QuantPlan.from_json({"format": "qvit-plan", "version": 1, "name": "x" * 501, "sites": {"a": None}})


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"blocks.0.attn.query": {"bit_width": [4] * 2_000_000}}, r"plan\.json: key 'sites\.blocks.*at most 1024"),
        ({f"blocks.0.x{i}": {"bit_width": 4} for i in range(300)}, r"plan\.json has 300 kinds of tensors"),
        ({f"blocks.{i}.x": {"bit_width": 4} for i in range(600)}, r"plan\.json has 600 layers"),
        ({f"blocks.{i}.attn.query": {"bit_width": [4] * 1024} for i in range(300)}, r"plan\.json has 307,200 widths"),
        ({"blocks.0.x": {"bit_width": 1e300}}, r"plan\.json: key 'sites\.blocks\.0\.x\.bit_width\.0' must be"),
    ],
)
def test_pages_have_an_end(tmp_path: Path, sites: dict[str, Any], message: str) -> None:
    plan_file(write_run(tmp_path / "run") / "plan.json", sites)
    with pytest.raises(QvitError, match=message):
        load_runs([tmp_path / "run"])


def test_a_map_of_too_many_cells_is_left_out(tmp_path: Path) -> None:
    sites = {f"blocks.{i}.attn.query": {"bit_width": [2, 3]} for i in range(256)}
    sites |= {f"blocks.0.x{i}": {"bit_width": [3] * 1024} for i in range(100)}
    plan_file(write_run(tmp_path / "run") / "plan.json", sites)
    assert len(render_page(load_runs([tmp_path / "run"]))) < 12_000_000


@pytest.mark.parametrize("line", ["99999999\tcat", "65536\tcat", "9" * 5000 + "\tcat", "0\t" + "x" * 501])
def test_class_maps_have_an_end(tmp_path: Path, line: str) -> None:
    (tmp_path / "map.txt").write_text("1\tdog\n" + line + "\n")
    with pytest.raises(
        QvitError, match=r"line 2 of the class map .*map\.txt is out of range: .* 65,536 classes"
    ) as caught:
        read_class_map(tmp_path / "map.txt")
    assert len(str(caught.value)) < 500


# Values

WRONG: dict[str, tuple[str, Change, str]] = {
    "no classes": ("config.json", lambda d: d.pop("num_classes"), "key 'num_classes' is missing"),
    "classes": ("config.json", lambda d: d.update(num_classes=10**9), "key 'num_classes' must be at most 65536"),
    "names": ("config.json", lambda d: d.update(class_names=[1]), "key 'class_names.0' must be a text, not 1"),
    "long name": ("config.json", lambda d: d.update(class_names=["x" * 10**6]), "a text of at most 500 characters"),
    "versions": ("config.json", lambda d: d.update(versions=3), "key 'versions' must be an object, not 3"),
    "epochs": ("config.json", lambda d: d.update(epochs=10**18), "epochs = 1000000000000000000: "),
    "rate": ("config.json", lambda d: d.update(lr=1e300), r"lr = 1e\+300: "),
    "workers": ("config.json", lambda d: d.update(workers=10**9), "workers = 1000000000: "),
    "path": ("config.json", lambda d: d.update(data="x" * 300), "data: no path"),
    "unknown": ("config.json", lambda d: d.update(model="vit_digit"), "unknown model 'vit_digit'"),
    "accuracy": ("result.json", lambda d: d.update(accuracy=1e300), "key 'accuracy' must be at most 100"),
    "text": ("result.json", lambda d: d.update(bit_operations="many"), "key 'bit_operations' must be a whole number"),
    "seconds": ("result.json", lambda d: d.update(seconds={"total": -1}), "key 'seconds.total' must be at least 0"),
    "missing": ("result.json", lambda d: d.pop("weight_bytes"), "key 'weight_bytes' is missing"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_each_wrong_value_is_named(run: Path, name: str, change: Change, message: str) -> None:
    edit(run / name, change)
    with pytest.raises(QvitError, match=message) as caught:
        resume(run)
        evaluate_run(run, "digits", device="cpu")
    assert "unknown model" in message or str(run / name) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", "result.json", "cost.json", "plan.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"\xff\xfe", b'{"a": 1, "a": 2}'],
    ids=["empty", "list", "half", "nan", "digits", "deep", "bytes", "twice"],
)
def test_what_is_no_document_is_named(tmp_path: Path, name: str, content: bytes, qvit: Qvit) -> None:  # noqa: F811
    file = write_run(tmp_path / "run") / name
    file.write_bytes(content)
    assert str(file) in qvit("report", tmp_path / "run").failed(1)


def test_lines_of_a_log_that_are_no_events_are_counted(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run") / "log.jsonl"
    before = load_runs([tmp_path / "run"])[0].log
    lines: list[Any] = [
        {"event": "step", "step": -1},
        {"event": "step", "step": 10**18},
        {"event": "step", "step": 5, "loss": "much"},
        {"event": "epoch", "step": 5, "epoch": 10**18},
        {"event": "epoch", "step": 5, "bit_widths": {"blocks.0.attn.query": [1e300]}},
        {"event": ["step"]},
        {"event": "freeze", "step": 5, "changes": [3]},
        3,
    ]
    with log.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write('{"event": "step", "step": 5, "loss": 1' + " " * (9 << 20) + "}\n")
    after = load_runs([tmp_path / "run"])[0].log
    assert after.unreadable_lines == len(lines) + 1 and (after.steps, after.epochs) == (before.steps, before.epochs)


def test_a_log_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run") / "log.jsonl"
    with log.open("ab") as file:
        file.truncate(200 << 20)
    with pytest.raises(QvitError, match=r"the log .*log\.jsonl has 209,715,200 bytes; at most"):
        load_runs([tmp_path / "run"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = nan", "lr = nan"),
        ("lr = inf", "lr = inf"),
        ("cls = 1", "unknown option 'cls'"),
        ("lr = " + "9" * 5000, "cannot be read"),
        ("data = 1979-05-27", "data = datetime.date"),
        ("a" + ".a" * 20_000 + " = 1", "a line has more than 2,000 characters"),
        ("mixup = [" + "\n[" * 1500 + "]" * 1500 + "]", "nested too deeply"),
        ("#" * 100_000, "bytes; at most"),
    ],
)
def test_recipes_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(f'model = "vit_digits"\n{text}\n')
    with pytest.raises(UsageError, match=message) as caught:
        read_recipe(tmp_path / "a.toml")
    assert str(tmp_path / "a.toml") in str(caught.value)


def test_tables_of_numbers(tmp_path: Path) -> None:
    cost = inspect_model(create_model("vit_digits", **SMALL))
    site = next(iter(cost.sites))
    for value, message in ((1e300, "no number of milliseconds"), (None, "no number"), ("9" * 99, "no number")):
        (tmp_path / "latency.json").write_text(json.dumps({site: {"4": value}}))
        with pytest.raises(UsageError, match=rf"latency\.json: site '{site}' .*{message}"):
            Unit.of(tmp_path / "latency.json", cost)
    entry = {"table": [[1e300, 0.0]], "raw": [[1e300, 0.0]]}
    table = {"format": "qvit-sensitivity", "version": 1, "model": "m", "metric": "kl", "images": 1, "seed": 0}
    table |= {"seconds": 1.0, "type_normalised": False, "widths": [2, 3], "plan": None, "sites": {"a": entry}}
    (tmp_path / "s.json").write_text(json.dumps(table))
    with pytest.raises(UsageError, match=r"s\.json: 'table' of site 'a' holds 1e\+300"):
        Sensitivity.load(tmp_path / "s.json")
    (tmp_path / "s.json").write_text(json.dumps(table | {"sites": {"a": {"table": [[1, 0]] * 2000, "raw": [[1, 0]]}}}))
    with pytest.raises(UsageError, match="has 2,000 rows"):
        Sensitivity.load(tmp_path / "s.json")


def test_an_analysis_is_checked(tmp_path: Path) -> None:
    settings = {"model": "m", "data": "d", "eval_data": None, "images": 1, "calibration_images": 1, "seed": 0}
    data: dict[str, Any] = {"format": "qvit-analysis", "version": 1, "settings": settings, "seconds": 1.0}
    for changes, message in (
        ({"points": [{}], "float": None}, "key 'points.0.what' is missing"),
        (
            {"points": [], "float": {"top1": 101.0, "standard_error": 0.0, "images": 1}},
            "key 'float.top1' must be at most",
        ),
        ({"float": None}, "key 'points' is missing"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(data | changes))
        with pytest.raises(QvitError, match=rf"the analysis .*a\.json: .*{message}"):
            write_analysis_page(tmp_path / "a.json", tmp_path / "a.html")


def test_a_config_that_is_no_run_is_run_anew(run: Path) -> None:
    from qvit.runs import jobs

    config = small_config(method="lsq+", budget="4bit", epochs=1)
    assert jobs._same_config(run, Job("a", config, work=work).config)
    (run / "config.json").write_text("[]")
    assert not jobs._same_config(run, config)


def test_many_mistakes_are_one_short_sentence() -> None:
    rows = [{"site": 3}] * 10_000
    with pytest.raises(QvitError) as caught:
        checked(Costs, {"macs": 1, "bit_operations": 1, "weight_bytes": 1, "sites": rows}, "the costs x")
    assert len(str(caught.value)) < 1000 and "more" in str(caught.value)


TRAINED_BY_0_1_0 = {
    "model": "vit_digits", "method": "qvit", "accuracy": 90.28, "float_accuracy": 92.29, "budget": "3bit",
    "bit_operations": 8336960, "weight_bytes": 18728, "seconds": 35.33, "seed": 0, "top5": 99.66, "images": 597,
    "epochs": 20,
}  # fmt: skip
QUANTIZED_BY_0_1_0 = {
    "model": "vit_digits", "method": "ptq", "accuracy": 41.37, "float_accuracy": 41.71, "top1_float": 41.71,
    "top1": 41.37, "top5": 89.95, "agreement": 89.78, "images": 597, "budget": "w4a4", "metric": None,
    "bit_operations": 14704640, "weight_bytes": 25024,
    "seconds": {"calibrate": 1.115, "sensitivity": 0.0, "allocate": 0.0, "reconstruct": 0.0}, "seconds_total": 3.96,
    "seed": 0, "calibration_images": 128, "reconstruction": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (TRAINED_BY_0_1_0, {"total": 35.33}),
        (QUANTIZED_BY_0_1_0, {"calibrate": 1.115, "sensitivity": 0, "allocate": 0, "reconstruct": 0, "total": 3.96}),
    ],
    ids=["trained", "quantized"],
)
def test_results_of_version_0_1_0_are_read(tmp_path: Path, written: dict[str, Any], seconds: dict[str, float]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(written))
    result = read_document(Outcome, tmp_path / "result.json", "result")
    assert result["seconds"] == seconds and "seconds_total" not in result
    assert checked(Outcome, result, "the result x").seconds == seconds and result["accuracy"] == written["accuracy"]
    (tmp_path / "config.json").write_text(json.dumps({"model": "vit_digits", "method": "ptq", "num_classes": 10}))
    outcome = load_runs([tmp_path])[0].result
    assert outcome is not None and outcome.seconds == seconds


def test_results_of_other_versions_are_read() -> None:
    old = {"accuracy": 90, "bit_operations": 5, "weight_bytes": 5, "seconds": {"calibrate": 1.0}, "new": [1, {"a": 2}]}
    assert checked(Result, old, "the result x").accuracy == 90
    with pytest.raises(QvitError, match="has no 'seconds'"):
        checked(Outcome, old | {"method": "ptq", "float_accuracy": 91}, "the result x")
    with pytest.raises(QvitError, match="'version' must be at most 2"):
        checked(Result, old | {"version": 3}, "the result x")


def test_numbers_of_a_log_may_be_gaps() -> None:
    assert files.parse_json('{"a": NaN, "b": 1e999, "c": 1' + "0" * 99 + ', "d": 1}', gaps=True) == {
        "a": None, "b": None, "c": None, "d": 1,
    }  # fmt: skip
