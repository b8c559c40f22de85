"""GPTQ by llm-compressor, in an environment of its own; `gptq_beside_llmcompressor.py` runs it.

    python llmcompressor_gptq.py MODEL IDS.safetensors BITS OUT

Calibrates on the token ids `ids` int64 [N, L] of the file, symmetric in groups of 128 as its W4A16 recipe, and writes
the weights that its codes mean, in float32, as a plain checkpoint. The last line is JSON: the seconds and CPU seconds
that quantizing took, without imports, loading and writing.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(model: str, tokens: str, bits: str, out: str) -> None:
    from datasets import Dataset

    ids = load_file(tokens)["ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = list(loaded.state_dict())
    grid = QuantizationArgs(num_bits=int(bits), type="int", symmetric=True, strategy="group", group_size=128)
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=grid)}, ignore=["lm_head"]
    )
    begun, cpu = time.perf_counter(), time.process_time()
    oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids))
    spent = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
    _save(loaded, names, Path(model), Path(out))
    sys.stdout.write(json.dumps(spent) + "\n")


def _save(loaded: torch.nn.Module, names: list[str], model: Path, out: Path) -> None:
    out.mkdir(parents=True)
    state = loaded.state_dict()
    tied = loaded.config.tie_word_embeddings
    kept = {name: state[name].float().contiguous() for name in names if not (tied and name == "lm_head.weight")}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    for file in model.glob("*.json"):
        shutil.copyfile(file, out / file.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
