"""What KV policies cost: `python -m llmopt_cli.bench.kv_policies [--results DIR]` adds a line.

Streaming: the perplexity of one text far longer than the context, stretch by stretch, beside what each stretch has
alone, and the blocks in use. SnapKV and PyramidKV at a share of the cache: how far next tokens are from those of the
full cache (KL), and how much of what was read long ago is found again, by a model that does nothing else (`induction`).
Beside them the full cache, and its last part of the same size.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from llmopt_cli.bench.induction import BOS, VOCAB, write_induction
from llmopt_cli.bench.prompts import read_source
from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.output import error_boundary
from llmopt_cli.runtime import Engine, RequestOutput, SamplingParams
from llmopt_cli.runtime.grammar import Constraint
from llmopt_cli.spec.kv_policy import KvPolicy, Selecting, Streaming
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.result import check_writable

STRETCH = 2048  # tokens of which one perplexity is told
STREAMING = Streaming(sinks=4, window=1020)
PROMPT, FOLLOWING = 1024, 64  # tokens of a text, and of what comes behind it
WINDOW = 32
ASKED = 3  # tokens that followed the one at a prompt's end when it came first; the first of them sees the full cache
BATCHING = Batching(max_num_seqs=1, enable_prefix_caching=False)


@dataclass(frozen=True, slots=True)
class Dictated(Constraint):
    """Lets nothing come but the tokens of `matcher`, and keeps what the model would have said: rows of logits."""

    rows: list[Tensor] = field(default_factory=list)

    def mask(self, row: Tensor) -> str | None:
        """As of a grammar."""
        self.rows.append(row.clone())
        wanted = row[self.matcher[len(self.rows) - 1]].clone()
        row.fill_(float("-inf"))
        row[self.matcher[len(self.rows) - 1]] = wanted
        return None

    def accept(self, token: int) -> bool:
        """As of a grammar: the last token completes it."""
        return len(self.rows) == len(self.matcher)


def kv_policies(
    results: ResultsOpt = RESULTS,
    model: Annotated[str, typer.Option("--model", help="Whose cache.")] = "demo",
    tokens: Annotated[int, typer.Option("--tokens", min=STRETCH, help="Of the long text.")] = 32_768,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Texts, and rare strings.")] = 24,
    share: Annotated[float, typer.Option("--share", help="Of the cache that is kept.")] = 0.25,
) -> None:
    """Measure streaming over a long text, then what selecting policies lose at a share of the cache."""
    check_writable(results, "kv_policies")
    engine = Engine.from_pretrained(model, dtype="float32", batching=BATCHING)
    source = read_source(engine.tokenizer.encode)
    long = (source * math.ceil(tokens / len(source)))[:tokens]
    kept = math.ceil(share * PROMPT)
    policies: dict[str, KvPolicy | None] = {
        "full": None,
        "snapkv": Selecting(kept, WINDOW),
        "pyramidkv": Selecting(kept, WINDOW, pyramid=True),
        "last": Selecting(kept, kept),
    }
    said = {
        name: [_behind(engine, policy, source, index) for index in range(texts)] for name, policy in policies.items()
    }
    streamed = _streaming(engine, long)
    engine.close()
    with tempfile.TemporaryDirectory() as folder:
        finder = Engine.from_pretrained(write_induction(Path(folder)), batching=BATCHING)
    recall = {
        name: statistics.fmean(_recalled(finder, policy, index) for index in range(texts))
        for name, policy in policies.items()
    }
    finder.close()
    selected = {
        "kl": {name: _divergence(said["full"], found) for name, found in said.items()},
        "recall": recall,
        "kept": kept,
        "prompt": PROMPT,
        "window": WINDOW,
        "texts": texts,
    }
    metrics = {"streamed": streamed, "selected": selected}
    keep("kv_policies", "engine", metrics, results, recipe={"model": model, "dtype": "float32"})


def _streaming(engine: Engine, text: Sequence[int]) -> dict[str, Any]:
    """The perplexity of every stretch of a text, and the most blocks in use in each sixteenth of its steps."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, kv_policy=STREAMING)
    name, used, output = engine.add_request(text, params), [], None
    while output is None:
        output = next((one for one in engine.step() if one.request_id == name), None)
        used.append(round(engine.stats().kv_cache_usage * engine.cache_size.num_blocks))
    places = range(0, len(text) - STRETCH + 1, STRETCH)
    scored = replace(params, kv_policy=None)
    alone = [_perplexity(engine.generate([text[at : at + STRETCH - 1]], scored)[0]) for at in places]
    perplexities = [_perplexity(output, at, at + STRETCH - 2) for at in places]
    del used[-1]  # it had ended, and its blocks were free again
    part = math.ceil(len(used) / 16)
    return {
        "policy": str(STREAMING),
        "tokens": len(text),
        "stretch": STRETCH,
        "blocks": max(used),
        "first": perplexities[0],
        "last": perplexities[-1],
        "perplexities": perplexities,
        "perplexities_alone": alone,
        "to_alone": statistics.geometric_mean(perplexities) / statistics.geometric_mean(alone),
        "blocks_by_sixteenth": [max(used[start : start + part]) for start in range(0, len(used), part)],
    }


def _perplexity(output: RequestOutput, start: int = 0, end: int | None = None) -> float:
    """Of the prompt's tokens behind its first, from `start` to `end`."""
    scores = [one.logprob for one in output.prompt_logprobs or ()]
    return math.exp(-statistics.fmean(scores[start:end]))


def _behind(engine: Engine, policy: KvPolicy | None, source: Sequence[int], index: int) -> Tensor:
    """The logits (N, V) of what follows one of the texts, under a policy."""
    start = Random(index).randrange(len(source) - PROMPT - FOLLOWING)
    text = source[start : start + PROMPT + FOLLOWING]
    return _dictate(engine, policy, text[:PROMPT], text[PROMPT:])


def _recalled(engine: Engine, policy: KvPolicy | None, index: int) -> float:
    """The share of the tokens said again that followed a prompt's last one when it came first, in the first half."""
    draw = Random(index)
    prompt = [BOS, *draw.sample(range(BOS + 1, VOCAB), PROMPT - 1)]  # no two alike
    at = draw.randrange(PROMPT // 8, PROMPT // 2)
    prompt[-1], wanted = prompt[at], prompt[at + 1 : at + 1 + ASKED]
    found = _dictate(engine, policy, prompt, wanted).argmax(-1).tolist()
    return statistics.fmean(one == other for one, other in zip(found, wanted[1:], strict=True))


def _dictate(engine: Engine, policy: KvPolicy | None, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The logits (N - 1, V) of the N tokens of an answer but the first, which never sees a compressed cache."""
    dictated = Dictated(list(answer))
    params = SamplingParams(max_tokens=len(answer), ignore_eos=True, kv_policy=policy)
    engine.add_request(prompt, params, constraint=dictated)
    while engine.has_work():
        engine.step()
    return torch.stack(dictated.rows[1:])


def _divergence(full: Sequence[Tensor], kept: Sequence[Tensor]) -> float:
    """The mean KL divergence of next tokens from those of the full cache, in nats."""
    each = [
        (one.log_softmax(-1).exp() * (one.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
        for one, other in zip(full, kept, strict=True)
    ]
    return float(torch.cat(each).mean())


if __name__ == "__main__":
    with error_boundary():
        typer.run(kv_policies)
