"""Commands that make a trained model small, and show what is in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qvit.cli.console import Json, bits, print_json, print_table, say, size
from qvit.cli.options import command


@command("pack", order=7)
def pack(
    run: Annotated[Path, typer.Argument(help="A finished run of a quantized model.")],
    target: Annotated[
        Path | None, typer.Option("--out", help="The file. Default: packed.safetensors in the run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is no packed model, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the packed model of a run: integers at their bit-widths, scales, and all that is needed to run it again.

    Examples:  [cyan]qvit pack runs/qvit[/]    [cyan]qvit pack runs/qvit --out deit-3bit.safetensors[/]
    """
    from qvit.deploy.file.summary import describe
    from qvit.runs.packed import write_packed

    artifact, file = write_packed(run, target, overwrite=overwrite)
    facts = describe(artifact, file.stat().st_size)
    if as_json:
        return print_json({"file": str(file.absolute()), **facts})
    _say_sizes(facts)
    say(f"packed: {file.absolute()}   (`qvit inspect {file}` shows every tensor)")


@command("inspect", order=8)
def inspect(
    file: Annotated[Path, typer.Argument(help="A packed model.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare every tensor with the timm model that the file names.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is in a packed model: widths and true bytes of every tensor, sizes in all, and where it comes from.

    The checksum of the whole file and everything that it says about itself are checked.

    Examples:  [cyan]qvit inspect runs/qvit/packed.safetensors[/]    [cyan]qvit inspect deit-3bit.safetensors --json[/]
    """
    from qvit.deploy.file.summary import describe_file

    facts = describe_file(file, verify=verify)
    if as_json:
        return print_json({"file": str(file.absolute()), **facts})
    print_table(
        ("site", "bits", "scales", "elements", "bytes", "bytes of scales"),
        [_cells(row) for row in facts["sites"]],
        title=f"{facts['model']}, plan {facts['plan']}",
        align="<<<>",
        whole=True,
    )
    _say_sizes(facts)
    for key, value in facts["provenance"].items():
        say(f"{key}: {_plain(value)}")


def _cells(row: dict[str, Any]) -> list[Any]:
    quantized = row["quantizer"] is not None
    kind = row["granularity"] if row["quantizer"] in (None, "lsq") else f"{row['granularity']}, {row['quantizer']}"
    stored = [row["numel"], row["bytes"]] if row["numel"] else ["", ""]
    width = bits(row["bit_width"], row.get("token_bit_width")) if quantized else "float"
    return [row["site"], width, kind or "", *stored, row["scale_bytes"] if quantized else ""]


def _say_sizes(facts: dict[str, Any]) -> None:
    say(
        f"{size(facts['file_bytes'])}: packed integers {size(facts['payload_bytes'])}, scales "
        f"{size(facts['scale_bytes'])}, float tensors {size(facts['float_bytes'])}, header "
        f"{size(facts['header_bytes'])}; {100 * facts['overhead']:.2f} % more than integers and float tensors alone"
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
