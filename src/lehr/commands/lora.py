"""``lehr lora``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lehr.commands._output import bundle_argument, emit, json_option


@click.command("lora")
@bundle_argument
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The adapter to write: NAME.lora.safetensors.",
)
@json_option
def command(bundle: Path, file: Path, output: Path, as_json: bool) -> None:
    """Convert a LoRA for a bundle, so that lehr run --lora can put it into an engine.

    FILE is a published LoRA (.safetensors) in any of the namings that lehr export --lora reads. The adapter names the
    bundle's own weights, so a device needs neither PyTorch nor ONNX to use it. The bundle stays as it is.

    \b
    Examples:
      lehr lora sd.lehr pixel-art.safetensors -o pixel-art.lora.safetensors
      lehr lora d.lehr style.safetensors -o style.lora.safetensors --json
      lehr run sd.lehr --lora pixel-art.lora.safetensors:0.8 --prompt "a red fox" -o fox.png
    """
    from lehr.runtime.bundle import Bundle
    from lehr.runtime.errors import InvalidInput, MissingExtra
    from lehr.runtime.lora import SUFFIX

    if not output.name.endswith(SUFFIX):
        raise InvalidInput(f"a converted adapter's name ends in {SUFFIX}, got {output.name!r}.")
    if sys.version_info < (3, 11):
        raise InvalidInput("lehr lora needs Python 3.11 or newer; convert on another machine and copy the adapter.")
    try:
        from lehr.export.checkpoints.lora_targets import bundle_targets, read_lora, write_adapter
    except ModuleNotFoundError as e:
        raise MissingExtra(e.name or "torch", "export") from e
    adapter, absent = read_lora(file, bundle_targets(Bundle.open(bundle)))
    write_adapter(adapter, output)
    changed = {component: len(changes) for component, changes in adapter.changes.items()}
    data = {"output": str(output), "changed": changed, "left_out": list(absent), "bytes": output.stat().st_size}
    weights = ", ".join(f"{count} weights of the {component}" for component, count in changed.items())
    also = f"Left out, since the bundle has them not: {', '.join(absent)}\n" if absent else ""
    emit(
        as_json,
        data,
        f"{output}: {weights}, {data['bytes']:,} bytes\n{also}Next: lehr run {bundle} --lora {output}:1",
    )
