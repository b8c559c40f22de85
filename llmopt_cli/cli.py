"""The face: one Typer app, one error boundary. Commands import their core when they run, so help stays light."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from llmopt_cli import __version__
from llmopt_cli.commands import bench, demo, env, estimate, generate, gpus, models, quantize, serve
from llmopt_cli.errors import LlmoptError

app = typer.Typer(
    name="llmopt",
    help="Size, quantize, benchmark and serve language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (estimate, quantize, bench, serve, generate, models, gpus, env, demo):
    name = command.__name__.rpartition(".")[2]
    app.command(name)(getattr(command, name))


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
    """Run the app; a known error becomes one sentence, a hint and its exit code (`LLMOPT_DEBUG=1`: traceback)."""
    # OpenMP threads that spin for milliseconds at the end of every operation cost a tenfold when anything else wants
    # the cores; a microsecond of spinning keeps nearly all of the speed on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except LlmoptError as error:
        if os.environ.get("LLMOPT_DEBUG"):
            raise
        _complain(error.message, error.hint)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our stdout went away (`llmopt ... | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _complain(message: str, hint: str | None) -> None:
    typer.secho(f"error: {message}", fg="red", err=True)
    if hint:
        typer.secho(f"\nhint: {hint}", err=True)
