"""`llmopt env`: the fingerprint that every result carries, and with `--probe` what the machine can do."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from llmopt_cli.options import JsonOpt
from llmopt_cli.output import Output, lines

ProbeOpt = Annotated[
    bool,
    typer.Option(
        "--probe", help="Measure memory bandwidth and arithmetic, and keep them for `llmopt estimate --gpu host`."
    ),
]


def env(probe: ProbeOpt = False, as_json: JsonOpt = False) -> None:
    """Show the machine and software as they are recorded with every result."""
    out = Output(as_json=as_json)
    if probe:
        _probe(out)
        return
    from llmopt_cli.bench.environment import fingerprint

    data = asdict(fingerprint())
    rows = {key: value for key, value in data.items() if key != "versions"} | data["versions"]
    rows["memory"] = f"{data['memory'] / 2**30:.1f} GiB"
    out.result(data, lambda: lines([(key, str(value)) for key, value in rows.items()]))


def _probe(out: Output) -> None:
    from llmopt_cli.bench.environment import fingerprint, spinning
    from llmopt_cli.bench.probe import probe
    from llmopt_cli.estimate import host
    from llmopt_cli.views import machine as view

    if warning := spinning(fingerprint()):
        out.warn(warning)
    with out.progress("measuring this machine"):
        machine = probe()
    file = host.keep(machine)
    out.result(view.data(machine), lambda: view.render(machine))
    out.note(f"kept in {file}")
