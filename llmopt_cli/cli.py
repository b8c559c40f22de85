"""The face: one Typer app, one error boundary. Commands import their core when they run, so help stays light."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from llmopt_cli import __version__
from llmopt_cli.commands import (
    bench,
    convert,
    demo,
    env,
    estimate,
    generate,
    gpus,
    models,
    quantize,
    replay,
    serve,
    train_heads,
)
from llmopt_cli.commands import eval as evaluation
from llmopt_cli.output import error_boundary

app = typer.Typer(
    name="llmopt",
    help="Size, quantize, benchmark and serve language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    estimate,
    quantize,
    convert,
    evaluation,
    bench,
    serve,
    generate,
    train_heads,
    models,
    gpus,
    env,
    replay,
    demo,
)
for command in COMMANDS:
    name = command.__name__.rpartition(".")[2]
    app.command(name.replace("_", "-"))(getattr(command, name))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmopt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the app behind the error boundary."""
    # OpenMP threads that spin for milliseconds at the end of every operation cost a tenfold when anything else wants
    # the cores; a microsecond of spinning keeps nearly all of the speed on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with error_boundary():
        app()
