"""The `halovae` program: its commands, its errors and its exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

from halovae import __version__
from halovae.app import launch
from halovae.app.watch import Interrupted, end_on_ctrl_c, failure_of, interruption, report
from halovae.cli import commands
from halovae.cli.flags import USAGE_ERROR, Command, CommandGroup, one_line

app = typer.Typer(
    name="halovae",
    cls=CommandGroup,
    help="Encode and decode videos with any diffusers VAE, on several devices, exactly as on one.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"halovae {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options before a command."""


COMMANDS: dict[str, dict[Callable[..., int], str]] = {
    "Whole pipelines": {
        commands.image_to_video: 'halovae image-to-video --model demo --image media/coffee.png --prompt "" \\\n'
        "  --height 128 --width 192 --num-frames 17 --num-inference-steps 4 --ranks 2",
        commands.text_to_video: 'halovae text-to-video --model demo-t2v --prompt "a cup of coffee" \\\n'
        "  --height 128 --width 192 --num-frames 17 --num-inference-steps 8 --ranks 2",
        commands.image_to_image: "halovae image-to-image --model demo-i2i --image media/coffee.png "
        '--prompt "a cup of coffee" \\\n'
        "  --strength 0.3 --height 256 --width 384 --num-inference-steps 8 --ranks 2",
        commands.serve: "halovae serve --model demo --ranks 2",
        commands.make_demo_model: "halovae make-demo-model demo-t2v --kind text-to-video",
    },
    "The VAE alone": {
        commands.roundtrip: "halovae roundtrip clip.mp4 -o out.mp4 --ranks 2 --compare",
        commands.encode: "halovae encode clip.mp4 -o latents.safetensors --frames 0:17 --ranks 2",
        commands.decode: "halovae decode latents.safetensors -o out.mp4 --ranks 2",
        commands.encode_dataset: "halovae encode-dataset clips -o latents --bucket 480x832x81 --fps 16",
        commands.warm_up: "halovae warm-up --height 480 --width 832 --num-frames 81 --ranks 2",
    },
    "Look and compare": {
        commands.compare: "halovae compare clip.mp4 out.mp4 --min-ssim 0.7 --report report",
        commands.plan: "halovae plan --height 480 --width 832 --num-frames 81 --ranks 1,2,4,8 --link nvlink",
        commands.doctor: "halovae doctor --ranks 2",
    },
}
"""By group, the functions of the commands, each with an example."""
for group, members in COMMANDS.items():
    for function, example in members.items():
        app.command(cls=Command, rich_help_panel=group, epilog=example)(function)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of this process by default.

    Returns:
        The exit code: 0; 1 a failure; 2 bad input; 128 + the signal's number after a signal.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        # By itself, as `main` of some versions of typer makes an exit code of an interruption, without a word.
        group = typer.main.get_command(app)
        with group.make_context("halovae", list(words), obj=words) as context:
            result = group.invoke(context)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except USAGE_ERROR as error:
        return _complain(one_line(error), error.exit_code)
    except KeyboardInterrupt as error:
        known = error if isinstance(error, Interrupted) else None
        sys.stderr.write(interruption(known.then if known else ""))
        return known.exit_code if known else 130
    except BrokenPipeError:  # The reader of our output (head, less) has gone.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  Python flushes it once more at the end.
        return 1
    except Exception as error:
        failure = failure_of(error)
        if report(failure):
            return failure.exit_code
        if not failure.expected:
            sys.stderr.write(failure.details)
        return _complain(failure.message, failure.exit_code)


def entry() -> NoReturn:
    """Run the command line and end the process."""
    end_on_ctrl_c()
    code = main()
    here = launch.place()
    if code > 128 or (code and here is not None and here.world_size > 1):
        # A communication library may wait for the other ranks in its destructors: they would wait too. Who has had
        # enough waits for no library.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    sys.stderr.write("".join(f"halovae: error: {line}\n" for line in message.splitlines() or [""]))
    return code
