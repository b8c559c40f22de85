"""The one printer: data to stdout, talk to stderr, colour only on a terminal.

Commands never call `print`. It knows rich and nothing about models.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from llmopt_cli.errors import LlmoptError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Report = Callable[[int, int], None]  # (done, total): how long work tells its progress without knowing the printer


class Output:
    """Where a command puts its answer (`result`, stdout) and its remarks (`note`, `warn`, `hint`, stderr)."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def result(self, data: Any, render: Callable[[], RenderableType | Sequence[RenderableType]]) -> None:
        """Print `data` as one JSON document with `--json`, else what `render` builds for people."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            return
        parts = render()
        for part in parts if isinstance(parts, list | tuple) else [parts]:
            # Text is printed as it is: no markup, no colour, no folding.
            plain = isinstance(part, str)
            _console(stderr=False).print(part, markup=not plain, highlight=False, soft_wrap=plain)

    def note(self, text: str) -> None:
        """A remark on stderr; `--quiet` silences it."""
        if not self.quiet:
            _console(stderr=True).print(text, style="dim", markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """A warning on stderr, shown even with `--quiet`."""
        _console(stderr=True).print(f"warning: {text}", style="yellow", markup=False, highlight=False)

    @contextmanager
    def progress(self, label: str) -> Iterator[Report]:
        """A bar with the time left on a terminal; a plain line where stderr is a file or a pipe.

        Yields `report(done, total)`; call it as often as you like.
        """
        if self.quiet or not sys.stderr.isatty():
            self.note(f"{label} ...")
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=_console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def error_boundary() -> Iterator[None]:
    """A known error becomes one sentence, a hint and its exit code; `LLMOPT_DEBUG=1` lets the traceback through."""
    try:
        yield
    except LlmoptError as error:
        if os.environ.get("LLMOPT_DEBUG"):
            raise
        typer.secho(f"error: {error.message}", fg="red", err=True)
        if error.hint:
            typer.secho(f"\nhint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our stdout went away (`llmopt ... | head`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None
) -> RenderableType:
    """A table whose first column is text and whose other columns are numbers, aligned right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return grid


def lines(pairs: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines, names padded to one width."""
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in pairs)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width: without one, rich would fold tables at 80 columns inside a file.
    return Console(file=stream, width=None if stream.isatty() else 160, soft_wrap=stderr)
