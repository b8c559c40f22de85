"""Would trees of drafts beat chains: `python -m llmopt_cli.bench.trees --heads FOLDER --text stories=FILE`.

Heads of `llmopt train-heads` rank what the model says, behind every token that it wrote itself. Of every size and depth
the tree that would have held most of it on that very text (Medusa's, arXiv 2401.10774, by joint frequencies) is put
beside chains. Its cost is bounded from below: the engine verifies as many tokens in a row, as many of them right as the
tree would have held, and the heads draft a chain as long as the tree is deep.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from llmopt_cli.bench.record import RESULTS, ResultsOpt, keep
from llmopt_cli.bench.speculation import ANSWER, PROMPT, REPETITIVE, pieces, read_text
from llmopt_cli.errors import UsageError
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.output import Output, Report, error_boundary
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.speculative.build import make_proposer, open_drafter
from llmopt_cli.runtime.speculative.heads import MAP, Heads
from llmopt_cli.runtime.speculative.proposer import Draft, Watching
from llmopt_cli.runtime.speculative.train import Pupil, hidden_states, ranks, walked
from llmopt_cli.runtime.speculative.train_job import Lesson, pupil_for, written
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Speculation
from llmopt_cli.spec.result import check_writable

DEPTH = 5  # of the longest chain, and of trees
WIDTH = 10  # candidates of a head that a tree may hold
SIZES = (4, 8, 16, 32)
Tree = frozenset[tuple[int, ...]]  # paths of ranks from the root, each with all that lead to it: (0, 2) is a third one
QUIET: Report = lambda done, total: None


def chain(length: int) -> Tree:
    """The likeliest candidate of each place."""
    return frozenset((0,) * depth for depth in range(1, length + 1))


def best_tree(table: Iterable[Sequence[int]], size: int) -> Tree:
    """At most `size` paths that hold most of a `table` of ranks, one row a draft; none counts more than its parents."""
    counts = Counter(tuple(row[:end]) for row in table for end in range(1, len(row) + 1) if max(row[:end]) < WIDTH)
    return frozenset(sorted(counts, key=lambda path: (-counts[path], len(path), path))[:size])


def held(row: Sequence[int], tree: Tree) -> int:
    """How many tokens of a row of ranks a tree holds."""
    return next((depth for depth in range(len(row)) if tuple(row[: depth + 1]) not in tree), len(row))


@dataclass
class Foretold:
    """Lets heads draft a chain, then proposes as many tokens as a tree has, as many of them right as it holds.

    The `shapes` take turns step by step: a drift of the machine hits all. `answer` are all tokens of prompt and answer,
    `stood` how many each shape holds, behind the answer's first token and those after it.
    """

    shapes: Mapping[str, Tree]
    heads: Watching
    draw: Random = field(default_factory=lambda: Random(0))
    left: list[str] = field(default_factory=list)  # to come before all come again
    answer: list[int] = field(default_factory=list)
    stood: Mapping[str, list[int]] = field(default_factory=dict)
    step: tuple[str, float] | None = None  # its shape and seconds of proposing, if it is as all of its shape

    in_turn = False

    @property
    def unseen(self) -> int:
        """As its heads."""
        return self.heads.unseen

    def see(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Its heads do."""
        self.heads.see(chunks, hidden)

    def forget(self, request_id: str) -> None:
        """Its heads do."""
        self.heads.forget(request_id)

    def close(self) -> None:
        """Its heads do."""
        self.heads.close()

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """For one request."""
        self.left = self.left or self.draw.sample(list(self.shapes), len(self.shapes))
        known, shape = requests[0].num_tokens, self.left.pop()
        tree, right = self.shapes[shape], (self.stood[shape][known - PROMPT - 1 :] or [0])[0]
        depth = max(map(len, tree), default=0)
        begun = time.perf_counter()
        self.heads.propose(requests, [min(depth, length) for length in lengths])
        seconds = time.perf_counter() - begun
        following = self.answer[known : known + right + 1]
        # At first heads catch up with the prompt, and in the end less is left to verify.
        self.step = (shape, seconds) if known > PROMPT + 1 and len(tree) <= lengths[0] else None
        return [Draft((*following[:right], *[int(following[-1] == 0)] * (len(tree) - right))[: lengths[0]])]


@dataclass(frozen=True)
class Bench:
    """A model, its heads, these as when they learnt, and seconds of steps and of proposing, by shape."""

    checkpoint: Checkpoint
    loaded: LoadedModel
    heads: Heads
    pupil: Pupil
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def shapes(self, text: str, count: int) -> dict[str, tuple[Tree, float]]:
        """All that are compared, with the tokens that a step brings on `count` pieces of a text."""
        prompts = torch.tensor(list(islice(pieces(text, Tokenizer(self.checkpoint)), count)))
        ids = written(self.checkpoint, self.loaded, prompts, PROMPT + ANSWER, QUIET)
        table = ranks(self.pupil, ids, hidden_states(self.loaded, ids, QUIET), PROMPT).tolist()
        longest = len(table[0][0])
        shapes = {f"chain of {length}": chain(length) for length in range(longest + 1)}
        for depth, size in product(range(2, longest + 1), SIZES):
            cut = (row[:depth] for window in table for row in window)
            shapes[f"tree of {size}, {depth} deep"] = best_tree(cut, size)
        stood = {name: [[held(row, tree) for row in window] for window in table] for name, tree in shapes.items()}
        self._run(shapes, ids.tolist(), stood)
        return {name: (tree, walked(torch.tensor(stood[name]))) for name, tree in shapes.items()}

    def _run(self, shapes: Mapping[str, Tree], answers: list[list[int]], stood: Mapping[str, list[list[int]]]) -> None:
        asked = Speculation(str(self.heads.checkpoint.path), max(SIZES), method=self.heads.kind)
        limits = Batching(max_num_seqs=1, enable_prefix_caching=False, max_model_len=PROMPT + ANSWER)
        engine = Engine(self.checkpoint, self.loaded, Tokenizer(self.checkpoint), limits)
        drafter = open_drafter(asked, self.checkpoint, self.loaded, limits)
        heads = make_proposer(asked, drafter, self.loaded, engine.cache_size, limits)
        assert isinstance(heads, Watching), "heads draft from hidden states"
        foretold = Foretold(shapes, heads)
        engine.draft_with(foretold, max(SIZES), adapt=False)
        for index, answer in enumerate(answers):
            foretold.answer = answer
            foretold.stood = {name: rows[index] for name, rows in stood.items()}
            engine.add_request(answer[:PROMPT], SamplingParams(max_tokens=ANSWER, ignore_eos=True))
            while engine.has_work():
                foretold.step, begun = None, time.perf_counter()
                engine.step()
                if foretold.step is not None:
                    name, proposing = foretold.step
                    self.seconds.setdefault(name, []).append((time.perf_counter() - begun, proposing))
        engine.close()


def figures(shapes: Mapping[str, tuple[Tree, float]], steps: Mapping[str, float]) -> dict[str, Any]:
    """Of a text, where steps take so many seconds: the best chain and the best tree."""
    speeds = {name: brought / steps[name] for name, (_, brought) in shapes.items()}
    best = {
        kind: max((name for name in speeds if kind in name), key=lambda name: speeds[name])
        for kind in ("chain", "tree")
    }
    return best | {
        "tree_to_chain": speeds[best["tree"]] / speeds[best["chain"]],
        "paths": sorted(map(list, shapes[best["tree"]][0])),
        "tokens_per_step": {name: brought for name, (_, brought) in shapes.items()},
        "tokens_per_s": speeds,
    }


def open_pupil(heads: Heads, checkpoint: Checkpoint, loaded: LoadedModel) -> Pupil:
    """Heads as they were when they learnt; UsageError if others made them."""
    stored = heads.tensors(torch.float32, loaded.device)
    tokens = stored.setdefault(MAP, torch.arange(checkpoint.spec.vocab_size))
    count = min(DEPTH, heads.checkpoint.config.get("medusa_num_heads", DEPTH))
    pupil = pupil_for(checkpoint, loaded, tokens, Lesson(heads.kind, count))[0]
    for name, own in pupil.tensors().items():
        read = stored.get(name, own.new_empty(0))
        if read.shape != own.shape or not (own.requires_grad or torch.equal(read, own)):
            raise UsageError(f"`{name}` is not as in heads of `llmopt train-heads`")
        own.data.copy_(read)
    return pupil


def trees(
    heads: Annotated[Path, typer.Option("--heads", help="A folder that `llmopt train-heads` wrote.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="NAME=FILE, a text. Repeatable.")] = None,
    count: Annotated[int, typer.Option("--pieces", min=1, help="Of each text.")] = 32,
    model: Annotated[str, typer.Option("--model", help="What to run.")] = "demo",
    results: ResultsOpt = RESULTS,
) -> None:
    """Measure tokens a second of chains, and at most of trees, for every text."""
    check_writable(results, "trees")
    texts = {name: read_text(Path(path)) for name, path in (one.split("=", 1) for one in text or ())}
    checkpoint = Checkpoint.open(model)
    opened, loaded = Heads.open(heads, checkpoint), load_model(checkpoint)
    bench = Bench(checkpoint, loaded, opened, open_pupil(opened, checkpoint, loaded))
    shapes = {name: bench.shapes(source, count) for name, source in {"repetitive": REPETITIVE, **texts}.items()}
    step, propose = (
        {name: statistics.median(one[part] for one in seconds) for name, seconds in bench.seconds.items()}
        for part in (0, 1)
    )
    found = {name: figures(one, step) for name, one in shapes.items()}
    for name, one in found.items():
        Output().note(f"{name}: {one['tree']} at most {one['tree_to_chain']:.3f} times the tokens/s of {one['chain']}")
    gain = statistics.geometric_mean(one["tree_to_chain"] for one in found.values())
    ms = {name: {"step": 1e3 * step[name], "propose": 1e3 * propose[name]} for name in step}
    keep("trees", model, {"heads": opened.kind, "tree_to_chain": gain, "ms": ms, "found": found}, results)


if __name__ == "__main__":
    with error_boundary():
        typer.run(trees)
