"""The blocks of a model, one after the other: read, quantized on what the quantized ones before put out, committed.

Three streams of hidden states go along on disk: the calibration text through the quantized model, and the evaluation
text through both models, so that quality is measured without a second model. A fourth, the calibration text through
the base, goes along only for a correction that needs it. Knows neither methods nor formats.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmopt_cli.output import Report
from llmopt_cli.quant.awq import CALL_TOKENS
from llmopt_cli.quant.blocks import Made, ModuleReport, Settings, digest, quantize_block
from llmopt_cli.quant.quality import Quality, compare_pairs
from llmopt_cli.quant.skeleton import Skeleton, trim
from llmopt_cli.quant.streams import Stream
from llmopt_cli.quant.structure import Group, find_groups
from llmopt_cli.quant.walk import Seen, Walk, at_once, cross_moments, observe
from llmopt_cli.quant.work import Work

TRIAL_TOKENS = 32  # of the first window, on which claims about a block's structure are tried out
FITTED, TRUE, BASE, OURS = "fitted", "true", "base", "ours"  # the streams


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A run on token ids `fitted` and `judged`, each int64 [N, L], kept in `work`."""

    walk: Walk
    work: Work
    fitted: Tensor
    judged: Tensor
    settings: Settings

    @property
    def skeleton(self) -> Skeleton:
        """The model."""
        return self.walk.skeleton

    def run(self, report: Report) -> None:
        """Quantize all blocks that are not done yet."""
        begun = self.work.done
        self.walk.learn(self.fitted, self.judged, self._trial_ids())
        if begun == 0:
            self._enter()
        for index in range(begun, self.work.total):
            report(index, self.work.total)
            self._step(index)
        report(self.work.total, self.work.total)

    def reports(self) -> list[ModuleReport]:
        """What was done to every linear of the blocks done."""
        facts = [self.work.facts(index) for index in range(self.work.done)]
        return [ModuleReport(**module) for block in facts for module in block["modules"]]

    def digests(self) -> dict[str, str]:
        """Stored name -> hash of the numbers with which the model was judged, of all that the run changed."""
        facts = [self.work.facts(index) for index in range(self.work.done)]
        return {name: value for block in facts for name, value in block["digests"].items()}

    def quality(self, report: Report) -> Quality:
        """Both streams of the evaluation text, out of the last block, through the head, and compared."""
        base, ours = (self._stream(name, self.work.total) for name in (BASE, OURS))
        with self.skeleton.outside():
            pairs = (
                (self.walk.logits(ids, one), self.walk.logits(ids, other), ids)
                for ids, one, other in zip(torch.split(self.judged, 1), base.batches(1), ours.batches(1), strict=True)
            )
            return compare_pairs(pairs, len(self.judged), report)

    def _trial_ids(self) -> Tensor:
        return self.fitted[:1, :TRIAL_TOKENS]

    def _ids(self, name: str) -> Tensor:
        return self.fitted if name in (FITTED, TRUE) else self.judged

    def _stream(self, name: str, level: int) -> Stream:
        return Stream.open(self.work.stream(name, level), self._ids(name))

    def _enter(self) -> None:
        with self.skeleton.outside():
            for name in (FITTED, BASE, OURS, *([TRUE] if self.settings.correct else [])):
                ids = self._ids(name)
                Stream.write(self.work.stream(name, 0), self.walk.enter(ids, at_once(ids)))

    def _step(self, index: int) -> None:
        """Take block `index` from reading to commit."""
        with self.skeleton.block(index) as block:
            self._advance(BASE, index)
            twin = None
            if self.settings.correct:
                self._advance(TRUE, index)
                twin = copy.deepcopy(block)
            where = f"{self.skeleton.prefix}.{index}"
            trial = next(self._stream(FITTED, index).batches(1))[:, :TRIAL_TOKENS].clone()
            groups = find_groups(block, lambda: self.walk.run(index, trial), where)
            made = quantize_block(block, where, groups, partial(self._watch, index, block, twin), self.settings)
            if index + 1 < self.work.total:
                self._advance(FITTED, index)
            self._advance(OURS, index)
            tensors, digests = self._pack(made)
        self.work.commit(index, tensors, {"modules": [asdict(one) for one in made.reports], "digests": digests})

    def _advance(self, name: str, index: int) -> None:
        stream = self._stream(name, index)
        path = self.work.stream(name, index + 1)
        stream.mapped(path, at_once(self._ids(name)), partial(self.walk.run, index))

    def _watch(self, index: int, block: nn.Module, twin: nn.Module | None, groups: Sequence[Group]) -> list[Seen]:
        """What `groups` see on the calibration text; beside it, with a `twin`, what they would see in the base."""
        trim()
        ours = partial(self.walk.run, index)
        found = observe(block, groups, self._batches(FITTED, index), ours, CALL_TOKENS)
        if twin is not None:
            pairs = zip(self._batches(FITTED, index), self._batches(TRUE, index), strict=True)
            cross_moments(groups, ((block, ours), (twin, partial(ours, block=twin))), pairs, found)
        trim()
        return found

    def _batches(self, name: str, index: int) -> Iterator[Tensor]:
        return self._stream(name, index).batches(at_once(self._ids(name)))

    def _pack(self, made: Made) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The block's tensors as they are stored, and the hashes of what they mean, by their stored names."""
        tensors: dict[str, Tensor] = {}
        digests = {}
        judged = {f"{name}.weight": self.skeleton.model.get_parameter(f"{name}.weight") for name in made.linears}
        for name, codes in made.linears.items():
            linear = self.skeleton.stored[f"{name}.weight"].removesuffix(".weight")
            parts = self.settings.format.pack(codes, self.settings.scheme_of(name))
            tensors |= {f"{linear}.{suffix}": part.cpu() for suffix, part in parts.items()}
        for name, vector in made.vectors.items():
            tensors[self.skeleton.stored[name]] = vector.to("cpu", self.settings.stored[name])
        for name, weight in (judged | made.vectors).items():
            digests[self.skeleton.stored[name]] = digest(weight)
        return tensors, digests
