"""GPTQ beside llm-compressor in one run: quality on held-out text, and the time for a model of 110M parameters.

Not part of the test suite: llm-compressor wants an environment of its own, whose Python is the first argument.

    python -m venv llmc && llmc/bin/pip install torch==2.13.0 && llmc/bin/pip install llmcompressor==0.14.0.1
    llmc/bin/pip uninstall -y torchvision torchaudio
    python tests/interop/gptq_beside_llmcompressor.py llmc/bin/python --text heldout-novel.txt --results results

Both calibrate on the same token ids and are judged on the same tokens by the same program. Adds a line to the results.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.quant.calibrate import CALIBRATION, Corpus, read_tokenizer, sample, windows
from llmopt_cli.spec.checkpoint import Checkpoint

PEER = Path(__file__).with_name("llmcompressor_gptq.py")
SAMPLES, LENGTH = 128, 512
# Llama-shaped, 110M parameters: 12 layers of 768 with a vocabulary of 32,000, its head tied.
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}


def main(
    python: Annotated[str, typer.Argument(help="Python of an environment with llm-compressor.")],
    text: Annotated[Path, typer.Option(help="Text to judge by.")],
    bits: Annotated[str, typer.Option(help="Widths to compare, with commas; `` for none.")] = "4,3",
    timed: Annotated[bool, typer.Option(help="Compare the time as well.")] = True,
    results: ResultsOpt = RESULTS,
) -> None:
    """Compare and keep the line."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as folder:
        if bits:
            found = _quality(python, text, [int(one) for one in bits.split(",")], Path(folder))
            keep("gptq_quality", "demo", found, results)
        if timed:
            keep("gptq_time", "llama-110m", _time(python, text, Path(folder)), results)


def _quality(python: str, text: Path, widths: list[int], folder: Path) -> dict[str, Any]:
    """Mean KL to the base of both at every width, and of rounding to nearest on the plain symmetric grid."""
    demo = Checkpoint.open("demo")
    ids = sample(windows(Corpus.read(CALIBRATION), read_tokenizer(demo), LENGTH), SAMPLES, 0)
    save_file({"ids": ids}, folder / "ids")
    found: dict[str, Any] = {"text": text.name, "calibration_tokens": ids.numel()}
    for width in widths:
        _peer(python, demo.path, folder / "ids", width, folder / f"peer{width}")
        peer = _llmopt("eval", "demo", folder / f"peer{width}", "--text", text)
        found[f"llm_compressor_gptq_{width}"] = peer["quality"]["kl_mean"]["value"]
        for method in ("rtn", "gptq"):
            out = folder / f"{method}{width}"
            ours = _llmopt("quantize", "demo", "--method", method, "--bits", width, "--sym", "-o", out, *_texts(text))
            found[f"{method}_{width}"] = ours["quality"]["kl_mean"]["value"]
    return found


def _texts(text: Path) -> list[Any]:
    return ["--samples", SAMPLES, "--seq-len", LENGTH, "--evaluation", text]


def _time(python: str, text: Path, folder: Path) -> dict[str, Any]:
    """Seconds for 12 layers: theirs without imports, loading and writing, ours of the whole command.

    Ours also judges what it made, which theirs does not: `ratio` leaves that out, `ratio_judged` does not.
    """
    model = _model(folder / "model")
    ids = torch.randint(5, SHAPE["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, folder / "ids")
    theirs = _peer(python, model, folder / "ids", 4, folder / "theirs")
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = _llmopt("quantize", model, "--method", "gptq", "-o", folder / "ours", *_texts(text))
    spent, now = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {
        "llm_compressor_s": theirs["seconds"],
        "llm_compressor_cpu_s": theirs["cpu_seconds"],
        "llmopt_s": spent,
        "llmopt_cpu_s": cpu,
        "llmopt_judging_s": ours["seconds"]["judging"],
        "ratio": (spent - ours["seconds"]["judging"]) / theirs["seconds"],
        "ratio_judged": spent / theirs["seconds"],
    }


def _model(folder: Path) -> Path:
    """A random model of SHAPE with the demo's tokenizer, whose tokens are among its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Checkpoint.open("demo").path / name).read_bytes())
    return folder


def _peer(python: str, model: Path, ids: Path, bits: int, out: Path) -> Any:
    return _run([python, PEER, model, ids, bits, out])


def _llmopt(*arguments: Any) -> Any:
    return _run([sys.executable, "-m", "llmopt_cli", *arguments, "--json"], lines=False)


def _run(command: list[Any], lines: bool = True) -> Any:
    """What a command prints as JSON, in its last line or as a whole."""
    words = [str(one) for one in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1] if lines else done.stdout)


if __name__ == "__main__":
    typer.run(main)
