"""``seal merge``, ``verify``, ``export``, ``combine`` and ``settings``, or ``python -m axolotl_plugins.seal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from axolotl_plugins.common.console import run as run_app

app = typer.Typer(add_completion=False, no_args_is_help=True)
TrustRemoteCode = Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")]


@app.callback()
def main() -> None:
    """Merge, verify and export SEAL adapters, and list the settings of a recipe."""


@app.command(epilog="Example: seal merge outputs/smollm2_line_sealc outputs/smollm2_line_sealc_merged")
def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="Model folder to write.")],
    into: Annotated[
        Literal["auto", "o_proj", "v_proj"],
        typer.Option(help="o_proj: any model; v_proj: some without grouped queries; auto: v_proj if equivalent."),
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fold an adapter's scales into its base model's weights, so that inference costs nothing."""
    from .merge import merge as write_merged

    write_merged(adapter, out, into, trust_remote_code=trust_remote_code)


@app.command(epilog="Example: seal verify outputs/smollm2_line_sealc_merged")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `merge` wrote.")],
    adapter: Annotated[Path | None, typer.Option(help="New path of the adapter, if it was moved.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Verify a merged folder: files unchanged, only scaled tensors differ from the base model, and logits agree."""
    from .merge import verify as verify_merge

    verify_merge(folder, adapter, trust_remote_code=trust_remote_code)


@app.command(epilog="Example: seal export outputs/smollm2_line_sealc outputs/smollm2_ia3")
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    out: Annotated[Path, typer.Argument(help="Adapter folder to write.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the scales as a stock PEFT IA3 adapter, for programs without this package."""
    from .export import export_ia3

    export_ia3(adapter, out, trust_remote_code=trust_remote_code)
    print(out)


@app.command(epilog="Example: seal combine outputs/smollm2_vt_sealc --weights 0.5 --out outputs/smollm2_vt_sealc_half")
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders of one base model and granularity.")],
    weights: Annotated[str, typer.Option(help="A number for each adapter, as 0.5 or 0.5,0.5.")],
    out: Annotated[Path, typer.Option(help="Adapter folder to write.")],
) -> None:
    """Write a weighted combination of adapters; 0.5 of one trades accuracy for less change of other text."""
    from .combine import combine as write_combined

    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        raise ValueError(f"weights: found {weights!r}, expected numbers with commas between") from None
    write_combined(adapters, numbers, out)
    print(out)


@app.command(epilog="Example: seal settings")
def settings() -> None:
    """List the settings of the `seal:` block of a recipe."""
    from .args import DataArgs, SealBlock

    for prefix, block in (("seal", SealBlock), ("seal.data", DataArgs)):
        for name, field in block.model_fields.items():
            print(f"{prefix}.{name}: {field.description}")


if __name__ == "__main__":
    run_app(app, "python -m axolotl_plugins.seal")
