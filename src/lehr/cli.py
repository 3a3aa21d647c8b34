"""The ``lehr`` command: a click group that imports a verb only when it is called."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence

import click

from lehr import __version__
from lehr.runtime.errors import LehrError

VERBS = (
    "demo",
    "list",
    "export",
    "lora",
    "build",
    "run",
    "verify",
    "gate",
    "bench",
    "evidence",
    "audit",
    "calibrate",
    "inspect",
    "pack",
    "unpack",
    "doctor",
)
_SUMMARIES = {  # here, so that --help imports no verb; a test holds them against the verbs' own first lines
    "demo": "Do the main job on the shipped models: export, build, run, verify, a picture and a report.",
    "list": "List backbones, presets, samplers, targets or recipes.",
    "export": "Export a denoiser from PyTorch into a new bundle, with the rest of its pipeline where SOURCE has it.",
    "lora": "Convert a LoRA for a bundle, so that lehr run --lora can put it into an engine.",
    "build": "Build engines for a target into a bundle: of the denoiser, and of every stage beside it.",
    "run": "Draw samples with an engine.",
    "verify": "Hold engines against eager PyTorch's recorded results; exit 1 if one differs.",
    "gate": "Hold an engine against a release policy; exit 1 if it must not be released.",
    "bench": "Measure engines in turn: a step, a loop, start-up, memory, size and the output's error.",
    "evidence": "Record what an engine does on this machine's hardware; exit 1 if it does not pass the policy.",
    "audit": "Measure activations over the timesteps, and say which layers do not fit fp16, bf16 or fp8.",
    "calibrate": "Find the scales of a quantised recipe, and keep its graph in the bundle.",
    "inspect": "Show what a bundle holds.",
    "pack": "Write one archive with what a device needs: engines, tables, tokenizers, and golden data if asked for.",
    "unpack": "Make a bundle of an archive that lehr pack wrote, after checking every file in it.",
    "doctor": "Show what this machine can do, and what must be installed for the rest.",
}
INTERRUPTED = 130


class Verbs(click.Group):
    """A group whose commands live in ``lehr.commands``, one file each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"lehr.commands.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            from lehr.runtime.errors import UnknownName

            raise click.UsageError(str(UnknownName("command", args[0], VERBS)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_SUMMARIES.items()))


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lehr")
def lehr() -> None:
    """Turn a diffusion denoiser in PyTorch into a verified engine.

    \b
    Examples:
      lehr demo
      lehr export digits-dit -o d.lehr && lehr build d.lehr --target cpu && lehr verify d.lehr

    \b
    Exit codes: 0 done, 1 the answer is no, 2 wrong usage or input, 3 export failed, 4 build failed,
    5 bundle damaged or incompatible, 6 something must be installed, 7 failed while running, 130 interrupted.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; every expected failure is one message and its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = lehr.main(args=arguments, prog_name="lehr", standalone_mode=False)
    except click.ClickException as e:
        e.show()
        _fail(arguments, type(e).__name__, e.format_message(), 2)
    except LehrError as e:
        click.echo(f"lehr: {e}", err=True)
        _fail(arguments, type(e).__name__, str(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("lehr: interrupted.", err=True)
        with contextlib.suppress(SystemExit):
            _fail(arguments, "Interrupted", "interrupted", INTERRUPTED)
        sys.stdout.flush()
        # Python kills itself with the signal at exit once an interrupt has passed through exec(), which torch.fx uses.
        os._exit(INTERRUPTED)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        message = f"{where}{e.strerror or e}. Check the path, its permissions and the space left."
        click.echo(f"lehr: {message}", err=True)
        _fail(arguments, "OSError", message, 2 if e.filename else 7)
    sys.exit(code if isinstance(code, int) else 0)  # click returns the code of its own Exit here


def _fail(arguments: list[str], kind: str, message: str, code: int) -> None:
    if "--json" in arguments:
        click.echo(json.dumps({"error": kind, "message": message, "exit_code": code}))
    sys.exit(code)
