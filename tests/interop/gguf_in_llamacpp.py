"""GGUF files of `llmopt quantize` in llama.cpp, beside those that llama.cpp's own quantizer makes of the same model.

    python tests/interop/gguf_in_llamacpp.py PEER_PYTHON TEXT [--results DIR] [MIX ...]

PEER_PYTHON has llama-cpp-python. Both sides quantize the demo model and calibrate on the same tokens: ours as a run of
`quantize` does, theirs with the mean squares of the float model's inputs. The perplexity of all files is taken by
llama.cpp on the same token ids of TEXT. A line of JSON for each mix; fails if ours is worse by over 0.2 %.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmopt_cli.bench.environment import fingerprint
from llmopt_cli.output import Report
from llmopt_cli.quant.calibrate import Corpus, read_tokenizer, sample, windows
from llmopt_cli.quant.ggml_write import write_checkpoint
from llmopt_cli.quant.job import Job
from llmopt_cli.quant.quantize import quantize, read_texts
from llmopt_cli.spec.checkpoint import BUNDLED, Checkpoint
from llmopt_cli.spec.gguf import MIXES
from llmopt_cli.spec.gguf_model import architecture_of
from llmopt_cli.spec.gguf_names import place_of
from llmopt_cli.spec.result import Result

PEER = Path(__file__).with_name("llamacpp_perplexity.py")
SAMPLES, WINDOW, WINDOWS, WORSE = 32, 512, 32, 1.002


def importance(fitted: Tensor) -> dict[str, Tensor]:
    """Mean square of every linear's inputs for token ids [N, L], by the stored name of its weight."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED["demo"], dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Linear) -> None:
        def add(_: nn.Module, args: tuple[Tensor]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].square().flatten(0, -2).mean(0)

        module.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            watch(f"{name}.weight", module)
    with torch.inference_mode():
        for ids in torch.split(fitted, 1):
            model(input_ids=ids, use_cache=False)
    return {name: total / len(fitted) for name, total in sums.items()}


def peer(python: str, *args: str) -> str:
    """What the peer's Python prints."""
    done = subprocess.run([python, str(PEER), *args], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode()


@contextmanager
def quietly(label: str) -> Iterator[Report]:
    """No progress."""
    yield lambda done, total: None


def make(folder: Path, python: str, mixes: list[str]) -> None:
    """The demo as it is, f16.gguf, and in every mix: ours-MIX.gguf and theirs-MIX.gguf."""
    demo = Checkpoint.open("demo")
    architecture = architecture_of(demo.config)
    given = importance(read_texts(Job("demo", samples=SAMPLES, seq_len=WINDOW), demo).fitted)
    arrays = {place_of(architecture, weight).name: mean.numpy() for weight, mean in given.items()}
    np.savez(folder / "importance.npz", **arrays)
    write_checkpoint(folder / "f16.gguf", demo, "f16", lambda _: None)
    for mix in mixes:
        job = Job("demo", method=mix, out=folder / mix, samples=SAMPLES, seq_len=WINDOW)
        quantize(job, quietly)
        [file] = job.folder.glob("*.gguf")
        file.rename(folder / f"ours-{mix}.gguf")
        target, kind = str(folder / f"theirs-{mix}.gguf"), str(MIXES[mix].file_type)
        peer(python, "quantize", str(folder / "f16.gguf"), target, kind, str(folder / "importance.npz"))


def main() -> None:
    """Make all files, measure them, and compare."""
    parser = ArgumentParser()
    parser.add_argument("python")
    parser.add_argument("text", type=Path)
    parser.add_argument("mixes", nargs="*", default=list(MIXES))
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    tokens = windows(Corpus.read(given.text), read_tokenizer(Checkpoint.open("demo")), WINDOW)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, given.python, given.mixes)
        (folder / "ids.json").write_text(json.dumps(sample(tokens, WINDOWS, 0).tolist()))
        files = sorted(folder.glob("*.gguf"))
        found = json.loads(peer(given.python, "perplexity", str(folder / "ids.json"), *map(str, files)))
        figures = {file.stem: {"perplexity": found[str(file)], "bytes": file.stat().st_size} for file in files}
    ratios = [told(mix, figures, found["llama_cpp"], given.text.name, given.results) for mix in given.mixes]
    assert max(ratios) <= WORSE


def told(mix: str, figures: dict[str, Any], peer_version: str, text: str, results: Path | None) -> float:
    """Perplexity of ours over theirs; all figures of `mix` are printed, and added to the folder `results`."""
    ours, theirs = figures[f"ours-{mix}"], figures[f"theirs-{mix}"]
    ratio: float = ours["perplexity"] / theirs["perplexity"]
    metrics = {f"ours_{key}": value for key, value in ours.items()} | {f"llamacpp_{key}": theirs[key] for key in theirs}
    metrics |= {"f16_perplexity": figures["f16"]["perplexity"], "perplexity_to_llamacpp": ratio}
    print(json.dumps({"mix": mix, **metrics}))  # noqa: T201
    environment = fingerprint()
    line = Result(
        verb="gguf",
        target="llama.cpp",
        command=f"python tests/interop/gguf_in_llamacpp.py PEER_PYTHON {text} {mix}",
        seed=0,
        environment=replace(environment, versions={**environment.versions, "llama-cpp-python": peer_version}),
        metrics=metrics,
        recipe={"model": f"demo-{mix}", "scheme": mix, "samples": SAMPLES},
        workload={"name": text, "tokens": WINDOWS * WINDOW},
    )
    if results is not None:
        line.save(results)
    return ratio


if __name__ == "__main__":
    main()
