"""`llmopt env`: the fingerprint that every result carries."""

from __future__ import annotations

from dataclasses import asdict

from llmopt_cli.options import JsonOpt
from llmopt_cli.output import Output, lines


def env(as_json: JsonOpt = False) -> None:
    """Show the machine and software as they are recorded with every result."""
    from llmopt_cli.bench.environment import fingerprint

    data = asdict(fingerprint())
    rows = {key: value for key, value in data.items() if key != "versions"} | data["versions"]
    rows["memory"] = f"{data['memory'] / 2**30:.1f} GiB"
    Output(as_json=as_json).result(data, lambda: lines([(key, str(value)) for key, value in rows.items()]))
