"""The blocks of a model, one after the other: read, quantized on what the quantized ones before put out, committed.

Three streams of hidden states go along on disk: the calibration text through the quantized model, and the evaluation
text through both models, so that quality is measured without a second model. A fourth, the calibration text through
the base, goes along only for a correction that needs it, and a fifth, the calibration text through the base once more,
in a pass before all others that weighs what bits are worth. Knows neither methods nor formats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.output import Report
from llmopt_cli.quant.allocate import Claim, allot, claims
from llmopt_cli.quant.awq import CALL_TOKENS
from llmopt_cli.quant.blocks import Made, ModuleReport, Settings, digest, quantize_block
from llmopt_cli.quant.ends import Ends
from llmopt_cli.quant.kv_scales import kv_scales, watched
from llmopt_cli.quant.outside import embedding_and_head
from llmopt_cli.quant.passes import Passes, let_through
from llmopt_cli.quant.quality import Quality, compare_pairs
from llmopt_cli.quant.rotate import changed_vectors, rotate_block
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.streams import Stream
from llmopt_cli.quant.structure import Group, find_groups, find_stages
from llmopt_cli.quant.walk import Seen, Walk, at_once, observe, places
from llmopt_cli.quant.work import Work
from llmopt_cli.spec.scheme import Scheme

TRIAL_TOKENS = 32  # of the first window, on which claims about a block's structure are tried out
FITTED, TRUE, BASE, OURS, WEIGHED = "fitted", "true", "base", "ours", "weighed"  # the streams


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A run on token ids `fitted` and `judged`, each int64 [N, L], kept in `work`.

    `seconds` are those that went by in this process, for quantizing and for judging what came of it.
    """

    walk: Walk
    work: Work
    fitted: Tensor
    judged: Tensor
    settings: Settings
    seconds: dict[str, float] = field(default_factory=lambda: {"quantizing": 0.0, "judging": 0.0})

    @property
    def skeleton(self) -> Skeleton:
        """The model."""
        return self.walk.skeleton

    @property
    def ends(self) -> Ends:
        """What is other than the base's outside the blocks."""
        return Ends(self.walk, self.work, self.settings, self._trial_ids())

    @property
    def blocks(self) -> int:
        """How many there are; the output head may be a step behind them."""
        return len(self.skeleton.blocks)

    def begin(self) -> None:
        """Learn how the model is walked, and make what does not depend on statistics."""
        self.walk.learn(self.fitted, self.judged, self._trial_ids())
        self.ends.make()

    def run(self, report: Report) -> None:
        """Quantize all blocks that are not done yet, and the output head if that is wanted."""
        begun = self.work.done
        if begun == 0:
            self._enter()
        for index in range(begun, self.work.total):
            report(index, self.work.total)
            if index < self.blocks:
                self._step(index)
            else:
                self._finish(index)
        report(self.work.total, self.work.total)

    def allotted(self, schemes: Mapping[int, Scheme], target: float, report: Report) -> Pipeline:
        """The run in which every linear has the one of `schemes`, by their bits, that a budget of bits gives to it.

        A first pass through the unquantized model weighs them, block by block; what it found is kept.
        """
        total = self.work.total
        weighed = next(level for level in range(total + 1) if self.work.noted(WEIGHED, level) is None)
        if weighed == 0:
            with self.skeleton.outside(), self.skeleton.holding(self.ends.weights()):
                self._begin(WEIGHED)
        for index in range(weighed, total):
            report(index, total)
            found = self._weigh(index, schemes) if index < self.blocks else self._weigh_head(schemes)
            self.work.note(WEIGHED, index, [claim.note() for claim in found])
        report(total, total)
        notes = (note for index in range(total) for note in self.work.noted(WEIGHED, index))
        usual, exceptions = allot([Claim.read(note) for note in notes], target, schemes)
        return replace(self, settings=replace(self.settings, scheme=usual, exceptions=exceptions))

    def reports(self) -> list[ModuleReport]:
        """What was done to every linear of the blocks done."""
        facts = [self.work.facts(index) for index in range(self.work.done)]
        return [ModuleReport(**module) for block in facts for module in block["modules"]]

    def digests(self) -> dict[str, str]:
        """Stored name -> hash of the numbers with which the model was judged, of all that the run changed."""
        facts = [self.work.facts(index) for index in range(self.work.done)]
        ends = {self.skeleton.place(name): digest(weight) for name, weight in self.ends.weights().items()}
        return ends | {name: value for block in facts for name, value in block["digests"].items()}

    def quality(self, report: Report) -> Quality:
        """Both streams of the evaluation text, out of the last block, through the head, and compared."""
        with self._timed("judging"):
            return self._compared(report)

    def _compared(self, report: Report) -> Quality:
        base, ours = (self._stream(name, self.blocks) for name in (BASE, OURS))
        ends = self.ends.weights()

        def both(ids: Tensor, one: Tensor, other: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
            if not ends:  # one product of twice the rows is faster than two
                found = self.walk.at(ids.expand(2, -1), torch.cat([one, other]), positions)
                return found[:1], found[1:]
            with self.skeleton.holding(ends):
                judged = self.walk.at(ids, other, positions)
            return self.walk.at(ids, one, positions), judged

        with self.skeleton.outside():
            batches = zip(torch.split(self.judged, 1), base.batches(1), ours.batches(1), strict=True)
            return compare_pairs(((partial(both, *batch), batch[0]) for batch in batches), len(self.judged), report)

    def _trial_ids(self) -> Tensor:
        return self.fitted[:1, :TRIAL_TOKENS]

    def _ids(self, name: str) -> Tensor:
        return self.judged if name in (BASE, OURS) else self.fitted

    def _stream(self, name: str, level: int) -> Stream:
        return Stream.open(self.work.stream(name, level), self._ids(name))

    def _enter(self) -> None:
        with self.skeleton.outside():
            apart = [TRUE] if self.settings.correct else []
            turned = self.settings.rotation is not None
            self._begin(BASE, *([] if turned else apart))
            with self.skeleton.holding(self.ends.weights()):
                self._begin(FITTED, OURS, *(apart if turned else []))

    def _begin(self, *names: str) -> None:
        """The streams before the first block, from the embedding that is held now."""
        for name in names:
            ids = self._ids(name)
            Stream.write(self.work.stream(name, 0), self.walk.enter(ids, at_once(ids)))

    def _step(self, index: int) -> None:
        """Take block `index` from reading to commit."""
        with self.skeleton.block(index) as block:
            with self._timed("judging"):
                self._advance(BASE, index)
            with self._timed("quantizing"):
                made = self._make(block, index)
            with self._timed("judging"):
                self._advance(OURS, index)
            tensors, facts = self._pack(made)
        self.work.commit(index, tensors, facts)

    def _make(self, block: nn.Module, index: int) -> Made:
        """Quantize block `index`, and hand the calibration text on."""
        groups, vectors = self._prepare(block, index, FITTED)
        passes = self._passes(FITTED, index, block)
        if self.settings.correct:
            passes.plain = self._plain(block, index, groups)
        made = quantize_block(block, self._name(index), groups, passes.watch, self.settings)
        made.vectors = vectors | made.vectors | self._fit(block, index, passes)
        return made

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begun

    def _name(self, index: int) -> str:
        return f"{self.skeleton.prefix}.{index}"

    def _prepare(self, block: nn.Module, index: int, name: str) -> tuple[list[Group], dict[str, Tensor]]:
        """Groups of a block, and vectors of it that are now others: with a rotation it is turned. `name`: its input."""
        where, rotation, run = self._name(index), self.settings.rotation, partial(self.walk.run, index)
        trial = next(self._stream(name, index).batches(1))[:, :TRIAL_TOKENS].clone().to(self.skeleton.device)
        if rotation is None:
            return find_groups(block, lambda: run(trial), where), {}
        trial = rotation.undone(trial)
        groups = find_groups(block, lambda: run(trial), where)
        dtypes = {key: self.settings.stored[f"{where}.{key}"] for key, _ in block.named_parameters()}
        turn = partial(rotate_block, block, where, groups, rotation, run, trial)
        return groups, {f"{where}.{key}": vector for key, vector in changed_vectors(block, turn, dtypes).items()}

    def _fit(self, block: nn.Module, index: int, passes: Passes) -> dict[str, Tensor]:
        """Let the calibration text through the block if something follows; the scales of its cache, if wanted."""
        if self.settings.kv_scales:
            with watched(block, self._name(index)) as ranges:
                self._advance(FITTED, index)
            return kv_scales(block, self._name(index), ranges)
        if index + 1 < self.work.total:
            passes.finish(self.work.stream(FITTED, index + 1))
        return {}

    def _finish(self, index: int) -> None:
        """Quantize the output head with the statistics of what reaches it."""
        with self._head(FITTED) as (group, watch):
            made = quantize_block(self.skeleton.model, "", [group], lambda _: watch(), self.settings)
            tensors, facts = self._pack(made)
        self.work.commit(index, tensors, facts, spent=False)

    @contextmanager
    def _head(self, name: str) -> Iterator[tuple[Group, Callable[[], list[Seen]]]]:
        """The output head, with its weight, and what it sees of the stream `name`."""
        _, head = embedding_and_head(self.skeleton.model)
        group = Group((head,), head)
        with self.skeleton.outside(), self.skeleton.holding(self.ends.turned()):
            batches = self._batches(name, self.blocks)
            yield group, lambda: observe(self.skeleton.model, [group], batches, self.walk.behind, 0)

    def _weigh(self, index: int, schemes: Mapping[int, Scheme]) -> list[Claim]:
        """What the linears of a block would lose at each width, all before it being as they were."""
        with self.skeleton.block(index) as block:
            groups, _ = self._prepare(block, index, WEIGHED)
            passes, stages = self._passes(WEIGHED, index, block), find_stages(block, groups)
            pairs = ((group, seen) for stage in stages for group, seen in zip(stage, passes.watch(stage), strict=True))
            found = claims(block, self._name(index), pairs, schemes)
            if index + 1 < self.work.total:
                self._advance(WEIGHED, index)
        return found

    def _weigh_head(self, schemes: Mapping[int, Scheme]) -> list[Claim]:
        """The same of the head. It reads the sum of two branches a block: its error counts as one in all of them."""
        with self._head(WEIGHED) as (group, watch):
            found = claims(self.skeleton.model, "", zip([group], watch(), strict=True), schemes)
        return [claim.times(2 * self.blocks) for claim in found]

    def _advance(self, name: str, index: int) -> None:
        path = self.work.stream(name, index + 1)
        self._stream(name, index).mapped(path, at_once(self._ids(name)), self._run(name, index))

    def _passes(self, name: str, index: int, block: nn.Module) -> Passes:
        """Those of the stream `name` through a block, with shortcuts if what is observed stays as it is."""
        stream, scaled = self._stream(name, index), self.settings.method.scaler is not None
        passes = Passes(block, stream, at_once(self._ids(name)), self._run(name, index), self.settings.products)
        passes.calls = CALL_TOKENS if scaled else 0
        if name == FITTED and not scaled:
            passes.place = lambda linear: self.work.stream(f"{name}.{linear}", index)
        return passes

    def _plain(self, block: nn.Module, index: int, groups: Sequence[Group]) -> dict[str, Stream]:
        """Let the calibration text through the unquantized block; what it has where errors will be looked for."""
        paths = {name: self.work.stream(f"{TRUE}.{name}", index) for name in places(block, groups).values()}
        paths[""] = self.work.stream(TRUE, index + 1)
        stream, together = self._stream(TRUE, index), at_once(self.fitted)
        return let_through(block, stream, together, self._run(TRUE, index), paths, self.settings.products)

    def _run(self, name: str, index: int) -> Callable[[Tensor], Tensor]:
        """A block's forward pass, exact for what is judged."""
        products = torch.float32 if name in (BASE, OURS) else self.settings.products
        return partial(self.walk.run, index, products=products)

    def _batches(self, name: str, index: int) -> Iterator[Tensor]:
        return self._stream(name, index).batches(at_once(self._ids(name)))

    def _pack(self, made: Made) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A step's tensors as they are stored; its reports, and hashes of what tensors mean by their stored names."""
        tensors: dict[str, Tensor] = {}
        place = self.skeleton.place
        judged = {f"{name}.weight": self.skeleton.model.get_parameter(f"{name}.weight") for name in made.linears}
        for name, codes in made.linears.items():
            linear = place(f"{name}.weight").removesuffix(".weight")
            parts = self.settings.format.pack(codes, self.settings.scheme_of(name))
            tensors |= {f"{linear}.{suffix}": part.cpu() for suffix, part in parts.items()}
        for name, vector in made.vectors.items():
            tensors[place(name)] = vector.to("cpu", self.settings.stored.get(name, vector.dtype))
        digests = {place(name): digest(weight) for name, weight in (judged | made.vectors).items()}
        return tensors, {"modules": [asdict(one) for one in made.reports], "digests": digests}
