"""GGUF files of llmopt in llama.cpp, beside those that llama.cpp's own quantizer makes of the same float16 file.

    python tests/interop/gguf_in_llamacpp.py PEER_PYTHON TEXT [MIX ...]

PEER_PYTHON has llama-cpp-python. Both sides quantize the demo model with the same importance matrix; the perplexity of
each mix is taken by llama.cpp on the token ids of TEXT. Prints one JSON line; fails if ours is worse by over 0.2 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from llmopt_cli.model.codes import GgmlCodes
from llmopt_cli.quant.ggml import encode
from llmopt_cli.quant.ggml_write import block_types, write_checkpoint
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import ASSETS, BUNDLED, Checkpoint
from llmopt_cli.spec.gguf import MIXES
from llmopt_cli.spec.gguf_model import architecture_of
from llmopt_cli.spec.gguf_names import place_of

PEER = Path(__file__).with_name("llamacpp_perplexity.py")
WINDOW, WINDOWS, WORSE = 512, 16, 1.002


def windows(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """WINDOWS windows of token ids, spread over the text."""
    ids = tokenizer.encode(text)
    whole = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    return whole[:: max(1, len(whole) // WINDOWS)][:WINDOWS]


def importance(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Mean square of every linear's inputs on the calibration text, by the stored name of its weight."""
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
    lines = (ASSETS / "bookworm-text" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    found = windows(tokenizer, "\n".join(json.loads(line)["text"] for line in lines))
    with torch.inference_mode():
        for ids in found:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    return {name: total / len(found) for name, total in sums.items()}


def peer(python: str, *args: str) -> str:
    """What the peer's Python prints."""
    done = subprocess.run([python, str(PEER), *args], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.decode()


def main(python: str, text: str, *mixes: str) -> None:
    """Make all files, measure them, and compare."""
    demo = Checkpoint.open("demo")
    tokenizer = Tokenizer(demo)
    given = importance(tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ids.json").write_text(json.dumps(windows(tokenizer, Path(text).read_text(encoding="utf-8"))))
        architecture = architecture_of(demo.config)
        arrays = {place_of(architecture, weight).name: mean.numpy() for weight, mean in given.items()}
        np.savez(folder / "importance.npz", **arrays)
        write_checkpoint(folder / "f16.gguf", demo, "f16", lambda _: None)
        for mix in mixes:
            write_ours(folder / f"ours-{mix}.gguf", demo, mix, given)
            target, kind = str(folder / f"theirs-{mix}.gguf"), str(MIXES[mix].file_type)
            peer(python, "quantize", str(folder / "f16.gguf"), target, kind, str(folder / "importance.npz"))
        files = sorted(str(file) for file in folder.glob("*.gguf"))
        found = json.loads(peer(python, "perplexity", str(folder / "ids.json"), *files))
    result = {Path(file).stem: round(value, 4) for file, value in found.items()}
    print(json.dumps(result))  # noqa: T201
    assert all(result[f"ours-{mix}"] <= WORSE * result[f"theirs-{mix}"] for mix in mixes)


def write_ours(file: Path, checkpoint: Checkpoint, mix: str, given: dict[str, Tensor]) -> None:
    """The demo in the types of `mix`, every linear of its blocks with its importance."""
    from llmopt_cli.model.stream import Store

    types = block_types(checkpoint, mix)
    with Store(checkpoint) as store:

        def made(name: str) -> GgmlCodes | None:
            return encode(store.get(name), types[name], given[name]) if name in given else None

        write_checkpoint(file, checkpoint, mix, made)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(sys.argv[3:] or MIXES))
