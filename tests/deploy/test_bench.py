"""Benchmarks: fair turns by a clock that the test winds, ratios, agreement, who takes part, and the peers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engines import FakeArtifact, fake_engines  # noqa: F401
from tiny_models import SMALL, calibrated_model, digit_batches, digits_model
from torch import Tensor

from qvit.deploy.bench import hardware, peers
from qvit.deploy.bench.lineup import chosen
from qvit.deploy.bench.peers import PEERS, Material, Peer
from qvit.deploy.bench.timing import (
    Contender,
    Times,
    answers,
    batch_of,
    compare,
    measure,
    profiles,
    quartiles,
    rows_of,
)
from qvit.errors import QvitError, UsageError
from qvit.runs.bench import BenchRequest, _named, bench

IMAGES = torch.zeros(1, 1, 8, 8)


class Clock:
    """Time passes only in the runners that it makes; every call is noted."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: Callable[[], float] | float) -> Callable[[Tensor], None]:
        def run(_: Tensor) -> None:
            self.calls += name
            self.now += seconds() if callable(seconds) else seconds

        return run


# measure


def test_turns_are_interleaved_go_back_and_forth_and_begin_with_a_call_that_is_not_counted() -> None:
    clock = Clock()
    runners = {"a": clock.runner("a", 1.0), "b": clock.runner("b", 2.0)}
    times = measure(runners, IMAGES, rounds=2, seconds=8.0, clock=clock)
    assert clock.calls == "a aaaa b bb b bb a aaaa".replace(" ", "")
    assert times.seconds == {"a": [1.0] * 8, "b": [2.0] * 4}
    assert times.rounds == 2


def test_an_engine_slower_than_its_turn_is_called_once_a_round() -> None:
    clock = Clock()
    times = measure({"slow": clock.runner("s", 10.0)}, IMAGES, rounds=3, seconds=3.0, clock=clock)
    assert clock.calls == "s s ss".replace(" ", "")  # the first call alone is not counted
    assert times.seconds["slow"] == [10.0] * 3


def test_a_slow_spell_of_the_machine_hits_all_engines() -> None:
    clock = Clock()
    slow = lambda seconds: lambda: seconds * (3.0 if clock.now > 100.0 else 1.0)  # noqa: E731
    runners = {"a": clock.runner("a", slow(1.0)), "b": clock.runner("b", slow(2.0))}
    found = measure(runners, IMAGES, rounds=20, seconds=100.0, clock=clock, max_seconds=1e9).seconds
    share = {name: sum(value > 2.5 * min(values) for value in values) / len(values) for name, values in found.items()}
    assert share["a"] == pytest.approx(share["b"], abs=0.1) and 0.2 < share["a"] < 0.9


def test_no_round_begins_that_would_end_too_late_and_the_first_is_whole() -> None:
    clock = Clock()
    runners = {name: clock.runner(name, 1.0) for name in "ab"}
    times = measure(runners, IMAGES, rounds=10, seconds=10.0, max_seconds=9.0, clock=clock)
    assert times.rounds == 2 and clock.now == 6.0 and all(len(own) == 2 for own in times.seconds.values())
    late = measure({"a": clock.runner("a", 50.0)}, IMAGES, rounds=10, max_seconds=1.0, clock=clock)
    assert late.rounds == 1 and late.seconds["a"] == [50.0]


def test_progress_counts_turns() -> None:
    clock, seen = Clock(), []
    runners = {name: clock.runner(name, 1.0) for name in "ab"}
    measure(runners, IMAGES, rounds=2, seconds=2.0, clock=clock, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_clock_that_stands_still_ends_a_turn_all_the_same() -> None:
    times = measure({"a": lambda images: None}, IMAGES, rounds=1, seconds=1e-8, clock=lambda: 0.0)
    assert times.seconds["a"] == [0.0] * 10


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"seconds": 0.0}, {"max_seconds": -1.0}])
def test_measure_refuses_limits_without_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="positive"):
        measure({"a": lambda images: None}, IMAGES, **wrong)
    with pytest.raises(UsageError, match="no engine"):
        measure({}, IMAGES)


# Answers and rows


def test_answers_come_in_whole_batches_and_in_their_order() -> None:
    seen: list[int] = []

    def run(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.flatten(1)[:, :3]

    images = torch.arange(7.0)[:, None, None, None].expand(7, 1, 8, 8)
    assert torch.equal(answers(run, images, 4)[:, 0], torch.arange(7.0)) and seen == [4, 4]
    assert torch.equal(batch_of(images, 9)[:, 0, 0, 0], torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 0, 1]))


def test_compare() -> None:
    reference = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])
    assert compare(reference, reference) == {"top1": 100.0, "error": 0.0}
    constant = compare(reference.mean(-1, keepdim=True).expand(2, 3), reference)
    assert constant["error"] == pytest.approx(1.0)
    assert compare(reference.flip(0), reference)["top1"] == 0.0
    broken = reference.clone()
    broken[0, 0] = float("nan")
    assert compare(broken, reference) == {"top1": 50.0, "error": 1e9}


def test_rows_have_medians_quartiles_and_ratios() -> None:
    logits = torch.eye(4)
    contenders = [
        Contender("qvit-torch", "w8a8", "int8", lambda x: x, 10, ours=True, plan="p"),
        Contender("openvino", "int8", "int8", lambda x: x),
        Contender("pytorch", "fp32", "fp32", lambda x: x),
    ]
    seconds = {"qvit-torch p": [0.001, 0.002, 0.003, 0.1], "openvino-int8": [0.005], "pytorch-fp32": [0.01, 0.02]}
    found = {"qvit-torch p": logits.roll(1, 0), "openvino-int8": logits, "pytorch-fp32": logits}
    about: dict[str, Any] = {"judged": False, "kernels": {"qvit-torch p": {"qkv": 1.0}}}
    first, second, third = rows_of(contenders, Times(seconds, 3), 2, found, logits, {"p": logits}, **about)
    assert (first["milliseconds_median"], first["images_per_second"], first["calls"]) == (2.5, 800.0, 4)
    assert first["milliseconds_quartiles"] == [1.75, 27.25] and second["milliseconds_quartiles"] == [5.0, 5.0]
    assert [row["ratio_to_openvino_int8"] for row in (first, second, third)] == [0.5, 1.0, 3.0]
    assert [row["ratio_to_pytorch_fp32"] for row in (first, second, third)] == [0.16667, 0.33333, 1.0]
    assert (first["top1_agreement"], first["agreement_with_simulated"]) == (0.0, 0.0)
    assert (second["top1_agreement"], second["agreement_with_simulated"]) == (100.0, None)
    assert quartiles([1.0]) == (1.0, 1.0)
    assert [row["plan"] for row in (first, second)] == ["p", None]
    assert [row["kernels"] for row in (first, second)] == [{"qkv": 1.0}, None]
    assert [row["right"] for row in (first, second)] == [None, None] and first["ratio_to_right_peer"] is None
    alone = rows_of(contenders[:1], Times(seconds, 3), 2, found, logits, {}, **about)
    assert alone[0]["ratio_to_openvino_int8"] is None and alone[0]["agreement_with_simulated"] is None


def test_ratios_are_to_the_fastest_peer_that_answers_right() -> None:
    """Of 40 images a peer may miss 2; one that is faster and misses 3 is no standard to be held against."""
    floats = torch.eye(40)

    def missing(count: int) -> Tensor:
        return torch.cat([floats[:count].roll(1, 1), floats[count:]])

    peers_ = [Contender(name, "int8", "", lambda x: x) for name in ("wrong", "right", "slow")]
    ours = Contender("qvit-native", "w4a4", "", lambda x: x, ours=True, plan="w4a4")
    seconds = {"wrong-int8": [0.001], "right-int8": [0.004], "slow-int8": [0.008], "qvit-native w4a4": [0.002]}
    logits = {"wrong-int8": missing(3), "right-int8": missing(2), "slow-int8": floats, "qvit-native w4a4": missing(9)}
    rows = rows_of([*peers_, ours], Times(seconds, 1), 1, logits, floats, {}, judged=True, kernels={})
    assert [row["right"] for row in rows] == [False, True, True, None]
    assert [row["ratio_to_right_peer"] for row in rows] == [0.25, 1.0, 2.0, 0.5]
    logits |= {"right-int8": missing(3), "slow-int8": missing(4)}
    rows = rows_of([*peers_, ours], Times(seconds, 1), 1, logits, floats, {}, judged=True, kernels={})
    assert [row["ratio_to_right_peer"] for row in rows] == [None] * 4


def test_profiles_are_medians_of_those_who_can_tell() -> None:
    told = iter([{"qkv": 1.0, "fc1+gelu": 5.0}, {"qkv": 3.0}, {"qkv": 2.0, "fc1+gelu": 7.0}])
    contenders = [
        Contender("a", "w8a8", "", lambda x: x, ours=True, plan="p", profile=lambda images: next(told)),
        Contender("b", "w8a8", "", lambda x: x, ours=True, plan="p"),
    ]
    assert profiles(contenders, IMAGES, rounds=3) == {"a p": {"qkv": 2.0, "fc1+gelu": 5.0}}


# Who takes part


@pytest.mark.usefixtures("fake_engines")
def test_engines_are_chosen_by_name_runtime_or_as_ours() -> None:
    on_cpu = [name for name, peer in PEERS.items() if peer.engine != "tensorrt"]
    assert chosen(None) == ["qvit-torch", "qvit-wrong", *on_cpu] and len(on_cpu) == len(PEERS) - 2
    on_cuda = ["pytorch-fp32", "pytorch-bf16", "pytorch-compiled-fp32", "pytorch-compiled-bf16"]
    assert chosen(None, device="cuda")[2:] == [*on_cuda, "tensorrt-fp16", "tensorrt-int8"]
    assert chosen(None, peers=False) == ["qvit-torch", "qvit-wrong"]
    assert chosen(["openvino"]) == ["openvino-fp32", "openvino-int8"]
    assert chosen(["openvino-int8", "qvit", "openvino"]) == [
        "openvino-int8",
        "qvit-torch",
        "qvit-wrong",
        "openvino-fp32",
    ]
    with pytest.raises(UsageError, match="unknown engine 'openvin'; did you mean 'openvino'"):
        chosen(["openvin"])
    with pytest.raises(UsageError, match="is a peer"):
        chosen(["openvino"], peers=False)


def test_a_peer_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Peer("x", "int8", ("no_such_package", "torch"), False, lambda m: None).obstacle() == (  # type: ignore[arg-type, return-value]
        'no_such_package not installed: pip install "qvit[bench]"'
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler, and there is no no-such-compiler" in str(PEERS["pytorch-compiled-fp32"].obstacle())
    assert PEERS["pytorch-fp32"].obstacle() is None
    if importlib.util.find_spec("tensorrt") is None:
        assert PEERS["tensorrt-fp16"].obstacle() == "tensorrt not installed: pip install tensorrt"


def test_a_benchmark_on_a_gpu_needs_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(UsageError, match="--device cuda needs a CUDA device"):
        bench(quick(device="cuda"))


def quick(**changes: Any) -> BenchRequest:
    values = {"model": "vit_digits", "model_kwargs": SMALL, "rounds": 1, "seconds": 1e-3, "images": 8, "threads": 1}
    return BenchRequest(**(values | changes))


@pytest.mark.usefixtures("fake_engines")
def test_bench_of_a_model_on_noise() -> None:
    before = torch.get_num_threads()
    result = bench(quick(engines=["qvit", "qvit-broken", "pytorch"], batches=(2, 3)))
    assert json.loads(json.dumps(result)) == result
    assert (result["threads"], result["batch"], result["plan"], result["images"]) == (1, [2, 3], "w8a8", "noise")
    assert result["speed_only"] and result["calibration_images"] == 8 and torch.get_num_threads() == before
    names = [(row["engine"], row["precision"], row["batch"]) for row in result["rows"]]
    engines = [("qvit-torch", "w8a8"), ("qvit-wrong", "w8a8"), ("pytorch", "fp32"), ("pytorch", "bf16")]
    assert names == [(*name, batch) for batch in (2, 3) for name in engines]
    right, wrong, exact, _ = result["rows"][:4]
    assert right["agreement_with_simulated"] == 100.0 and right["file_bytes"] > 0
    assert wrong["agreement_with_simulated"] < 100.0 and wrong["error_to_simulated"] > 0.5
    assert exact["top1_agreement"] == 100.0 and exact["error_to_float"] < 1e-6
    assert exact["ratio_to_pytorch_fp32"] == 1.0 and exact["ratio_to_openvino_int8"] is None
    assert result["skipped"] == [
        {"engine": "qvit-broken", "precision": "w8a8", "plan": "w8a8", "reason": "this CPU lacks what it needs"}
    ]


@pytest.mark.usefixtures("fake_engines")
def test_every_plan_is_a_row_of_each_engine_of_ours_and_peers_are_measured_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[list[str]] = []

    def noted(runners: Any, *args: Any, **limits: Any) -> Times:
        turns.append(list(runners))
        return measure(runners, *args, **limits)

    monkeypatch.setattr("qvit.runs.bench.measure", noted)
    engines = ["qvit-torch", "qvit-told", "pytorch-fp32"]
    result = bench(quick(plans=("w8a8", "w4a4"), engines=engines, profile=True, data="digits"))
    names = [(row["engine"], row["plan"], row["precision"]) for row in result["rows"]]
    assert names == [
        ("qvit-torch", "w8a8", "w8a8"), ("qvit-torch", "w4a4", "w4a4"), ("qvit-told", "w8a8", "w8a8"),
        ("qvit-told", "w4a4", "w4a4"), ("pytorch", None, "fp32"),
    ]  # fmt: skip
    assert turns == [
        ["qvit-torch w8a8", "qvit-torch w4a4", "qvit-told w8a8", "qvit-told w4a4", "pytorch-fp32"]
    ]  # in the same rounds
    assert result["plan"] == "w8a8, w4a4" and all(
        row["agreement_with_simulated"] == 100.0 for row in result["rows"][:4]
    )
    fine, coarse = (row["error_to_float"] for row in result["rows"][:2])
    assert 0 < fine < coarse
    assert result["rows"][0]["kernels"] is None and result["rows"][2]["kernels"]["fc1+gelu"] == 0.125
    assert result["rows"][4]["right"] is None and result["speed_only"]  # the weights are untrained


@pytest.mark.usefixtures("fake_engines")
def test_peers_are_judged_where_weights_are_trained_and_images_real(tmp_path: Path) -> None:
    torch.save(digits_model().state_dict(), tmp_path / "float.pth")
    options = {"weights": str(tmp_path / "float.pth"), "engines": ["qvit-torch", "pytorch-fp32"]}
    ours, peer = bench(quick(data="digits", **options))["rows"]
    assert (ours["right"], peer["right"], peer["ratio_to_right_peer"]) == (None, True, 1.0)
    assert ours["ratio_to_right_peer"] == ours["ratio_to_pytorch_fp32"]
    assert [row["right"] for row in bench(quick(**options))["rows"]] == [None, None]  # noise


def test_plans_may_be_packed_files(fake_engines: type[FakeArtifact], tmp_path: Path) -> None:  # noqa: F811
    for name, kwargs in (("learned", SMALL), ("other", SMALL | {"depth": 2})):
        artifact = fake_engines(calibrated_model("w4a4", **kwargs), model_kwargs=dict(kwargs))
        artifact.save(tmp_path / f"{name}.safetensors")
    file = tmp_path / "learned.safetensors"
    result = bench(quick(plans=("w8a8", str(file)), engines=["qvit-torch"]))
    assert [row["plan"] for row in result["rows"]] == ["w8a8", "learned"]
    assert result["rows"][1]["file_bytes"] == file.stat().st_size
    with pytest.raises(UsageError, match=r"other\.safetensors is a vit_digits, not this vit_digits, or one of other"):
        bench(quick(plans=(str(tmp_path / "other.safetensors"),), engines=["qvit-torch"]))


def test_two_plan_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [str(tmp_path / folder / "plan.json") for folder in "ab"]
    assert list(_named([*paths, "w8a8"]).values()) == [*paths, "w8a8"]


@pytest.mark.usefixtures("fake_engines")
def test_an_engine_that_refuses_a_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = importlib.import_module("qvit.deploy.engines")  # what later imports find, whatever tests replaced

    def refuses(artifact: Any, name: str, *, threads: int | None = None) -> Any:
        if artifact.plan.name == "w4a4":
            raise UsageError("it does not run this model")
        return create(artifact, name, threads=threads)

    create = engines.create_engine
    monkeypatch.setattr(engines, "create_engine", refuses)
    result = bench(quick(plans=("w8a8", "w4a4"), engines=["qvit-torch"]))
    assert [row["plan"] for row in result["rows"]] == ["w8a8"]
    assert result["skipped"] == [
        {"engine": "qvit-torch", "precision": "w4a4", "plan": "w4a4", "reason": "it does not run this model"}
    ]
    with pytest.raises(UsageError, match="does not run"):  # a name that is no engine's is a mistake
        bench(quick(plans=("w4a4",), engines=["qvit-unknown"]))


@pytest.mark.usefixtures("fake_engines")
def test_bench_of_a_model_on_data_and_by_another_plan() -> None:
    result = bench(quick(plans=("w4a8",), data="digits", engines=["qvit-torch"], calibration_images=16))
    (row,) = result["rows"]
    assert (row["precision"], result["batch"], result["plan"]) == ("w4a8", 1, "w4a8")
    assert "digits" in result["images"] and result["speed_only"]  # the float weights are untrained


def test_bench_of_a_file_takes_the_weights_in_it(fake_engines: type[FakeArtifact], tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "model.safetensors"
    fake_engines(calibrated_model("w8a8"), model_kwargs=dict(SMALL)).save(file)
    result = bench(quick(model=str(file), model_kwargs={}, engines=["qvit-torch", "pytorch-fp32"]))
    ours, exact = result["rows"]
    assert result["float_weights"] == "those of the file, dequantized" and ours["file_bytes"] == file.stat().st_size
    assert exact["error_to_float"] < 1e-6 < ours["error_to_float"] < 0.5
    with pytest.raises(UsageError, match="has its plan"):
        bench(quick(model=str(file), plans=("w8a8",)))
    with pytest.raises(QvitError, match="no file"):
        bench(quick(model=str(tmp_path / "nothing.safetensors")))


@pytest.mark.usefixtures("fake_engines")
def test_a_failing_peer_is_left_out_and_nothing_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(material: Material) -> Any:
        raise RuntimeError("unsupported operator\nlong story")

    monkeypatch.setitem(PEERS._found, "new-int8", Peer("new", "int8", (), False, prepare))
    result = bench(quick(engines=["new", "qvit-torch"]))
    assert result["skipped"] == [
        {"engine": "new", "precision": "int8", "plan": None, "reason": "RuntimeError: unsupported operator"}
    ]
    with pytest.raises(QvitError, match="new int8: RuntimeError: unsupported operator"):
        bench(quick(engines=["new"]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": (0,)}, "batch sizes"),
        ({"batches": (2, 2)}, "batch sizes"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"seconds": 0.0}, "seconds"),
        ({"class_map": "x"}, "go with --data"),
        ({"plans": ("w8a8", "w8a8")}, "plans are different ones, not w8a8, w8a8"),
    ],
)
def test_bench_refuses_what_cannot_be_meant(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench(quick(**wrong))


# Peers


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(digits_model(), digit_batches(1, 4), 1, tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "cpu" in peer.devices])
def test_peers_answer_like_the_float_model(name: str, material: Material, capfd: pytest.CaptureFixture[str]) -> None:
    peer = PEERS[name]
    if (obstacle := peer.obstacle()) is not None:
        pytest.skip(obstacle)
    images = digit_batches(1, 6, seed=3)[0]
    with torch.no_grad():
        reference = material.model(images)
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    capfd.readouterr()
    with peers.quiet():
        ready = peer.prepare(material)
    assert ready.file_bytes > 0 and ready.arithmetic
    for batch in (2,) if peer.compiler else (2, 3):
        with peers.quiet():
            run = ready.start(batch)
        found = compare(answers(run, images, batch), reference)
        assert found["error"] < {"fp32": 1e-5, "bf16": 0.05, "int8": 0.3}[peer.precision], found
    torch.compiler.reset()
    assert capfd.readouterr().out == ""
    if affinity is not None:
        assert os.sched_getaffinity(0) == affinity  # what comes after is not bound to fewer cores


@pytest.mark.slow
def test_tensorrt_gets_a_graph_with_int8_on_both_sides(material: Material) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from qvit.deploy.bench.peers.onnxruntime import quantized

    with peers.quiet():
        graph = onnx.load(quantized(material, symmetric=True)).graph
    values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    zeros = [values[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(zeros) > 10 and all(zero.dtype == "int8" and not zero.any() for zero in zeros)


def test_quiet_leaves_things_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    import logging
    import warnings

    with pytest.raises(ValueError, match="comes through"), peers.quiet():
        print("x")
        warnings.warn("y", stacklevel=1)
        logging.getLogger("z").error("z")
        raise ValueError("comes through")
    assert capsys.readouterr().out == "" and logging.root.manager.disable == 0
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)


@pytest.mark.parametrize("before", [None, "false"])
def test_no_usage_statistics_are_sent(before: str | None, monkeypatch: pytest.MonkeyPatch, material: Material) -> None:
    telemetry = pytest.importorskip("openvino_telemetry.backend.backend_ga4")
    pytest.importorskip("openvino")
    sent: list[Any] = []
    monkeypatch.setattr(telemetry.GA4Backend, "send", lambda self, message: sent.append(message))
    monkeypatch.delenv("CI", raising=False) if before is None else monkeypatch.setenv("CI", before)
    with peers.quiet():
        PEERS["openvino-fp32"].prepare(material)
    assert sent == [] and os.environ.get("CI") == before


# Hardware


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n", "Some CPU", ["avx2", "avx512_vnni"]),
        ("processor\t: 0\nFeatures\t: fp asimddp bf16\n", None, ["asimddp", "bf16"]),
    ],
)
def test_instructions_of_the_processor(
    text: str, name: str | None, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    assert hardware.cpu_instructions() == found
    assert name is None or hardware.hardware().startswith(name)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "nothing")
    assert hardware.cpu_instructions() is None and "cores" in hardware.hardware()


def test_what_the_extra_brings_is_what_peers_need() -> None:
    import tomllib

    data = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8"))
    extras = data["project"]["optional-dependencies"]
    brought = {item.split(">")[0] for extra in ("bench", "onnx", "openvino") for item in extras[extra]}
    assert {package for peer in PEERS.values() if "cpu" in peer.devices for package in peer.needs} <= brought
