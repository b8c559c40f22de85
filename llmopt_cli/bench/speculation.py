"""What speculation is worth: `python -m llmopt_cli.bench.speculation --text stories=FILE ... [--results DIR]`.

One loaded model goes on with pieces of texts, greedy, with and without drafts in turns, so that a drift of the machine
hits both. Fixed lengths tell what proposers are right about; under the controller nobody may become slower.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.errors import UsageError
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.output import error_boundary
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Speculation
from llmopt_cli.spec.result import check_writable

PROMPT, ANSWER = 96, 96  # tokens
REPETITIVE = "".join(
    f"    if name == 'field_{index}':\n        return self.fields['field_{index}'].read(buffer, offset)\n"
    for index in range(40)
)


@dataclass
class Bench:
    """A model, loaded once."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    tokenizer: Tokenizer

    def turn(self, prompts: Sequence[list[int]], asked: Speculation | None) -> tuple[float, Any]:
        """Output tokens a second while all `prompts` are answered together, and what was tallied."""
        limits = Batching(max_num_seqs=max(2, len(prompts)), enable_prefix_caching=False, max_model_len=512)
        engine = Engine(self.checkpoint, self.loaded, self.tokenizer, limits, speculation=asked)
        params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
        engine.generate(prompts[:1], SamplingParams(max_tokens=8, ignore_eos=True))
        started = time.perf_counter()
        outputs = engine.generate(list(prompts), params)
        seconds = time.perf_counter() - started
        tally = engine.stats().speculation
        engine.close()
        return sum(len(output.token_ids) for output in outputs) / seconds, tally

    def pieces(self, text: str) -> Iterator[list[int]]:
        """Prompts cut out of a text, from its beginning on, again and again."""
        ids = self.tokenizer.encode(text[:400_000])
        if len(ids) < PROMPT:
            raise UsageError(f"a text has {len(ids)} tokens, and {PROMPT} are needed")
        while True:
            for start in range(0, len(ids) - PROMPT + 1, PROMPT):
                yield ids[start : start + PROMPT]


def ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The geometric mean of with / without, and the lower end of its 95 % interval (Student's t, paired)."""
    logs = [math.log(other / plain) for plain, other in pairs]
    mean = statistics.fmean(logs)
    spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    quantile = 1.96 + 2.4 / max(1, len(logs) - 1)  # of Student's t, to a percent from ten pairs on
    return {"ratio": math.exp(mean), "low": math.exp(mean - quantile * spread), "pairs": len(logs)}


def speculation(
    text: Annotated[
        list[str] | None, typer.Option("--text", help="NAME=FILE, a text to go on with. Repeatable.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="METHOD or METHOD=MODEL. Repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Requests at once. Repeatable.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens of a draft.")] = 4,
    pairs: Annotated[int, typer.Option("--pairs", min=2, help="Turns with and without.")] = 20,
    adaptive: Annotated[bool, typer.Option(help="Let the controller decide.")] = True,
    model: Annotated[str, typer.Option("--model", help="What to run.")] = "demo",
    results: ResultsOpt = RESULTS,
) -> None:
    """Measure tokens a second with drafts against without, for every text, method and batch."""
    check_writable(results, "speculation")
    checkpoint = Checkpoint.open(model)
    bench = Bench(checkpoint, load_model(checkpoint), Tokenizer(checkpoint))
    texts = dict(one.split("=", 1) for one in text or ())
    sources = {"repetitive": REPETITIVE} | {name: _read(Path(path)) for name, path in texts.items()}
    found = [
        {"text": name, "method": how, "batch": count} | _compare(bench, source, how, count, tokens, pairs, adaptive)
        for name, source in sources.items()
        for how in method or ("ngram", "suffix")
        for count in batch or (1,)
    ]
    keep("speculation", "demo", {"adaptive": adaptive, "tokens": tokens, "found": found}, results)


def _compare(
    bench: Bench, source: str, how: str, count: int, tokens: int, pairs: int, adaptive: bool
) -> dict[str, Any]:
    name, _, model = how.partition("=")
    asked = Speculation(model, tokens, method=name, adaptive=adaptive)
    pieces = bench.pieces(source)
    speeds, tallies = [], []
    for turn in range(pairs):
        prompts = [next(pieces) for _ in range(count)]
        order = (None, asked) if turn % 2 else (asked, None)
        both = {one is not None: bench.turn(prompts, one) for one in order}
        speeds.append((both[False][0], both[True][0]))
        tallies.append(both[True][1])
    emitted, steps = sum(one.emitted for one in tallies), sum(one.steps for one in tallies)
    drafted, accepted = sum(one.tokens for one in tallies), sum(one.accepted for one in tallies)
    said = statistics.fmean(one.speedup for one in tallies)
    return ratio(speeds) | {
        "tokens_per_step": emitted / max(1, steps),
        "acceptance": accepted / max(1, drafted),
        "speedup_said": said,
        "tokens_per_s": statistics.median(speed for _, speed in speeds),
        "tokens_per_s_without": statistics.median(speed for speed, _ in speeds),
    }


def _read(path: Path) -> str:
    """A text file; of JSON lines the texts, questions or messages in them."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read `{path}`: {error.strerror}") from None
    if path.suffix != ".jsonl":
        return content
    rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    return "\n".join(str(row.get("text") or row.get("question") or row.get("messages") or row) for row in rows)


if __name__ == "__main__":
    with error_boundary():
        typer.run(speculation)
