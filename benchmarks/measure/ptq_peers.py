r"""What the deployment tools' own 8-bit quantization makes of the same model, calibration images and test images.

    qvit                w8a8, as `qvit ptq` makes it, simulated in PyTorch
    OpenVINO, NNCF      nncf.quantize, preset mixed, transformer model type, its default of fast bias correction
    ONNX Runtime        static quantization, QDQ, int8 weights per channel, after its own preprocessing

The calibration images are those of a `qvit ptq` run with the same seed; agreement is with the float model in PyTorch.

    pip install openvino nncf onnx onnxruntime onnxscript
    python benchmarks/measure/ptq_peers.py --weights W.safetensors --data TRAIN.tar --eval-data TEST.tar \
        --class-map classes.txt
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptq as ours
import torch
from record import RESULTS
from torch import Tensor, nn

from qvit.data.open import calibration_batches, data_config_of, eval_loader, open_source
from qvit.deploy.packages import openvino_core
from qvit.methods.ptq.stages import ptq
from qvit.models.create import create_model

Answer = Callable[[Tensor], Tensor]


def qvit_w8a8(model: nn.Module, images: list[Tensor], _: Path) -> Answer:
    quantized = ptq(model, "w8a8", images)
    return torch.no_grad()(quantized)


def nncf_int8(model: nn.Module, images: list[Tensor], _: Path) -> Answer:
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=images[0][:1])
    converted.reshape([-1, *images[0].shape[1:]])
    singles = [image.numpy() for batch in images for image in batch.split(1)]
    quantized = nncf.quantize(
        converted,
        nncf.Dataset(singles),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(singles),
    )
    compiled = openvino_core().compile_model(quantized, "CPU")
    return lambda batch: torch.from_numpy(compiled(batch.numpy())[0])


def onnxruntime_int8(model: nn.Module, images: list[Tensor], folder: Path) -> Answer:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared, quantized = (str(folder / name) for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
    torch.onnx.export(
        model, (images[0][:2],), plain, input_names=["images"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )  # fmt: skip
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.singles = iter([{"images": image.numpy()} for batch in images for image in batch.split(1)])

        def get_next(self) -> Any:
            return next(self.singles, None)

    quantize_static(
        prepared, quantized, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(quantized, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


ENGINES = {"qvit, w8a8": qvit_w8a8, "OpenVINO, NNCF": nncf_int8, "ONNX Runtime, static": onnxruntime_int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    for name in ("weights", "data", "eval-data", "class-map"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS / "ptq_peers.json")
    options = parser.parse_args()
    model = create_model(options.model, weights=options.weights).eval()
    config = data_config_of(model)
    calibration = open_source(options.data, class_map=options.class_map, split="train")
    scored = open_source(options.eval_data, class_map=options.class_map)
    images = list(
        calibration_batches(calibration, config, images=options.calibration_images, batch_size=32, seed=options.seed)
    )
    with torch.no_grad():
        batches = [(batch, targets, model(batch)) for batch, targets in eval_loader(scored, config, batch_size=50)]
    rows: list[dict[str, Any]] = []
    for name, build in ENGINES.items():
        with tempfile.TemporaryDirectory() as folder:
            answer = build(model, images, Path(folder))
            hits = agreements = count = exact = 0
            for batch, targets, reference in batches:
                found = answer(batch).argmax(-1)
                hits += int((found == targets).sum())
                exact += int((reference.argmax(-1) == targets).sum())
                agreements += int((found == reference.argmax(-1)).sum())
                count += len(batch)
        shares = {"top1_float": exact, "top1": hits, "agreement": agreements}
        rows.append({"engine": name, "images": count})
        rows[-1] |= {key: 100 * value / count for key, value in shares.items()}
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    ours.write(options, rows, ("openvino", "nncf", "onnxruntime"))


if __name__ == "__main__":
    main()
