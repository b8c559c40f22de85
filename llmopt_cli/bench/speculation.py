"""What speculation is worth: `python -m llmopt_cli.bench.speculation --text stories=FILE ... [--results DIR]`.

Two engines go on with pieces of texts, greedy, one with drafts and one without, in turns, so that a drift of the
machine hits both. Fixed lengths tell what proposers are right about; under the controller nobody should become slower.
On a shared machine intervals are half as wide with one thread on a core of its own: `OMP_NUM_THREADS=1 taskset -c 0`.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.errors import UsageError
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.output import Output, error_boundary
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.stats import Tally
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Speculation
from llmopt_cli.spec.result import check_writable

PROMPT, ANSWER = 96, 160  # tokens
LEAST, ENOUGH = 6, 16  # requests of a pair: two for each place between these, or as many as there are places
OPENED = 10  # pairs after which the engines are opened anew
TURN = 0.01  # seconds of one engine before the other has its turn
Parts = tuple[Checkpoint, Tokenizer, LoadedModel, LoadedModel]
REPETITIVE = "".join(
    f"    if name == 'field_{index}':\n        return self.fields['field_{index}'].read(buffer, offset)\n"
    for index in range(2000)
)


def pieces(text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Prompts cut out of a text, from its beginning on, again and again."""
    ids = tokenizer.encode(text[:400_000])
    if len(ids) < PROMPT:
        raise UsageError(f"a text has {len(ids)} tokens, and {PROMPT} are needed")
    while True:
        for start in range(0, len(ids) - PROMPT + 1, PROMPT):
            yield ids[start : start + PROMPT]


def race(engines: Sequence[Engine], prompts: Sequence[list[int]]) -> list[float]:
    """Output tokens a second of each engine that answers all `prompts`, some milliseconds of each in turns."""
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    for engine, prompt in itertools.product(engines, prompts):
        engine.add_request(prompt, params)
    seconds, order = [0.0] * len(engines), list(enumerate(engines))
    while any(engine.has_work() for engine in engines):
        order = order[::-1]  # who follows whom tells, too
        for index, engine in order:
            started = now = time.perf_counter()
            while engine.has_work() and now < started + TURN:
                engine.step()
                now = time.perf_counter()
            seconds[index] += now - started
    return [len(prompts) * ANSWER / each for each in seconds]


def ratio(pairs: Sequence[Sequence[float]]) -> dict[str, float]:
    """The median of with / without, and both ends of its 95 % interval.

    By Wilcoxon's signed ranks (Hodges and Lehmann 1963): a pause of the machine in one pair does not move it.
    """
    logs = [math.log(other / plain) for plain, other in pairs]
    means = sorted((one + other) / 2 for one, other in itertools.combinations_with_replacement(logs, 2))
    count = len(logs)
    spread = 1.96 * math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
    lowest = max(0, math.floor(count * (count + 1) / 4 - spread))
    low, high = means[lowest], means[-1 - lowest]
    return {"ratio": math.exp(statistics.median(means)), "low": math.exp(low), "high": math.exp(high), "pairs": count}


def speculation(
    text: Annotated[
        list[str] | None, typer.Option("--text", help="NAME=FILE, a text to go on with. Repeatable.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="METHOD or METHOD=MODEL. Repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Requests at once. Repeatable.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most tokens of a draft.")] = 4,
    pairs: Annotated[int, typer.Option("--pairs", min=6, help="Turns with and without.")] = 20,
    adaptive: Annotated[bool, typer.Option(help="Let the controller decide.")] = True,
    model: Annotated[str, typer.Option("--model", help="What to run.")] = "demo",
    results: ResultsOpt = RESULTS,
) -> None:
    """Measure tokens a second with drafts against without, for every text, method and batch."""
    check_writable(results, "speculation")
    checkpoint = Checkpoint.open(model)
    parts = checkpoint, Tokenizer(checkpoint), load_model(checkpoint), load_model(checkpoint)
    texts = dict(one.split("=", 1) for one in text or ())
    sources = {"repetitive": REPETITIVE} | {name: read_text(Path(path)) for name, path in texts.items()}
    out = Output()
    for how in method or ("ngram", "suffix"):
        found = []
        name, _, drafts = how.partition("=")
        asked = Speculation(drafts, tokens, method=name, adaptive=adaptive)
        named = f"{name}={Path(drafts).name}" if drafts else name
        for source, count in itertools.product(sources, batch or (1,)):
            cell = _compare(parts, pieces(sources[source], parts[1]), asked, count, pairs)
            found.append({"text": source, "method": named, "batch": count} | cell)
            figures = "{ratio:.3f} ({low:.3f} to {high:.3f})".format_map(cell)
            out.note(f"{source}, {named}, batch {count}: x {figures}")
        keep("speculation", checkpoint.name, {"adaptive": adaptive, "tokens": tokens} | _summary(named, found), results)


def _summary(method: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All of a method's cells, and the worst and the best of them."""
    ratios = [cell["ratio"] for cell in found]
    lowest = min(cell["low"] for cell in found)
    return {"drafts": method, "slowest": min(ratios), "low": lowest, "fastest": max(ratios), "found": found}


def _compare(parts: Parts, prompts: Iterator[list[int]], asked: Speculation, count: int, pairs: int) -> dict[str, Any]:
    """Turns of `count` requests at once, with drafts as `asked` and without.

    Both are opened anew in between: where memory lies by chance makes one faster than the other as long as it lives.
    """
    checkpoint, tokenizer, *models = parts
    limits = Batching(max_num_seqs=count, enable_prefix_caching=False, max_model_len=512)
    each, tallies, speeds = max(count, min(max(2 * count, LEAST), ENOUGH)), [], []
    for start in range(0, pairs, OPENED):
        models = models[::-1]
        engines = [
            Engine(checkpoint, model, tokenizer, limits, speculation=one)
            for model, one in zip(models, (None, asked), strict=True)
        ]
        race(engines, [next(prompts)])
        speeds += [race(engines, [next(prompts) for _ in range(each)]) for _ in range(min(OPENED, pairs - start))]
        tallies += [tally for engine in engines if (tally := engine.stats().speculation)]
        for engine in engines:
            engine.close()
        del engine, engines  # a draft model's weights are not to be there twice
    return ratio(speeds) | {
        "tokens_per_step": _share(tallies, "emitted", "steps"),
        "acceptance": _share(tallies, "accepted", "tokens"),
        "speedup_said": _share(tallies, "alone", "seconds"),
        "tokens_per_s": statistics.median(drafted for _, drafted in speeds),
        "tokens_per_s_without": statistics.median(alone for alone, _ in speeds),
    }


def _share(tallies: Sequence[Tally], part: str, whole: str) -> float | None:
    """A total over another one."""
    over = sum(getattr(tally, whole) for tally in tallies)
    return sum(getattr(tally, part) for tally in tallies) / over if over else None


def read_text(path: Path) -> str:
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
