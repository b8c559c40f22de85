"""A model larger than memory quantizes: anonymous memory stays far below the model's float32 size.

Measured as RssAnon of /proc/self/status, sampled every 5 ms by a thread in the process that quantizes, less what it was
after torch and transformers had been imported and had run. Mapped files do not count: the system drops them at will.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmopt_cli.spec.checkpoint import BUNDLED

LAYERS, HIDDEN, INNER, VOCABULARY = 12, 768, 2048, 32000  # 110M parameters
MEASURE = """
import json, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from llmopt_cli.quant.quantize import Job, quantize

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

torch.nn.functional.scaled_dot_product_attention(*[torch.randn(1, 4, 256, 64)] * 3)
before = peak = anonymous()

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

@contextmanager
def quietly(label):
    yield lambda done, total: None

threading.Thread(target=watch, daemon=True).start()
model, text, out = sys.argv[1:]
job = Job(model, method="rtn", samples=4, seq_len=512, evaluation=text, out=Path(out))
summary = quantize(job, quietly).summary
print(json.dumps({"summary": summary, "peak": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux' /proc")
def test_peak_memory_is_below_half_of_the_model_in_float32(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    del model
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED["demo"] / file, tmp_path / "model")
    evaluation = (BUNDLED["demo"].parent / "bookworm-text" / "evaluation.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(evaluation[:4]))
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(tmp_path / "model"),
        str(tmp_path / "few.jsonl"),
        str(tmp_path / "out"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["summary"] == f"{7 * LAYERS}/{7 * LAYERS} RTN, 0 fallback"
    assert found["peak"] < size / 2, found
