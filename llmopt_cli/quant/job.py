"""`Job`: all that a user can want of `llmopt quantize`, and which of it goes together.

Knows methods and formats by their tables; no model, and nothing of how a job is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llmopt_cli.errors import UnknownNameError, UsageError
from llmopt_cli.model.formats.gguf import GGUF
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.quant.allocate import at_most, widths
from llmopt_cli.quant.calibrate import CALIBRATION, EVALUATION
from llmopt_cli.quant.files import Files, files_of
from llmopt_cli.quant.methods import METHODS, Method
from llmopt_cli.quant.wishes import Wishes
from llmopt_cli.spec.gguf import MIXES
from llmopt_cli.spec.scheme import Scheme

CORRECTIONS = {"qep": True, "none": False}
CORRECTION_STREAMS = 2.5  # that of the base, and for one block what the base has inside of it at three places, once
KEPT_STREAMS = 0.5  # for one block what its attention is about to put out, once


@dataclass(frozen=True, slots=True)
class Job:
    """What is wanted; None is the method's own. `samples` windows of `seq_len` tokens calibrate.

    Without `out` the job names the folder. `correct` lets weights make good the errors before them. `max_kld` is the
    mean divergence beyond which the result is no success, `strict` makes every fallback to another method a failure.
    `pre` is llama.cpp's name for how the tokenizer of a GGUF file splits words, where the tokenizer does not tell.

    `rotate` turns the model before it is quantized, `quantize_head` takes the output head along, `target_bpw` shares
    out so many bits a weight by what linears lose, `kv_scales` stores scales for a KV cache in 8-bit floats.
    """

    model: str
    method: str = "awq"
    format: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    out: Path | None = None
    overwrite: bool = False
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    calibration: str | Path = CALIBRATION
    evaluation: str | Path = EVALUATION
    device: str = "auto"
    correct: str | None = None
    strict: bool = False
    max_kld: float | None = None
    pre: str | None = None
    rotate: bool = False
    quantize_head: bool = False
    target_bpw: float | None = None
    kv_scales: bool = False

    @property
    def how(self) -> Method:
        """The method; UnknownNameError if there is none of this name."""
        if self.method not in METHODS:
            raise UnknownNameError("method", self.method, METHODS)
        return METHODS[self.method]

    @property
    def layout(self) -> Format:
        """The file format; UsageError if it is none or can't hold what the method makes."""
        name = self.format or self._usual_format()
        if name not in FORMATS:
            raise UnknownNameError("format", name, FORMATS)
        if name not in self.how.formats:
            raise UsageError(
                f"`{name}` files can't hold what {self.method} makes", f"it goes into: {', '.join(self.how.formats)}"
            )
        return FORMATS[name]

    def _usual_format(self) -> str:
        """The method's first one that holds the bits wanted, or just the first: it says what is wrong."""
        wanted = {self.scheme.weight_bits} if self.target_bpw is None else set(self.how.bits)
        fitting = (name for name in self.how.formats if wanted <= set(FORMATS[name].bits))
        return next(fitting, self.how.formats[0])

    @property
    def files(self) -> Files:
        """The kind of files; UsageError if `pre` is none of its business."""
        layout = self.layout
        if self.pre is not None and layout.name != GGUF.name:
            known = ", ".join(MIXES)
            raise UsageError("--pre names a part of GGUF files", f"leave it out, or take a --method of: {known}")
        return files_of(layout, self.method, self.pre)

    @property
    def scheme(self) -> Scheme:
        """The precision wanted; UsageError if the method has no such bits or the group size is none."""
        scheme = self.how.scheme
        if self.how.own_grid and (self.group_size, self.symmetric) != (None, None):
            raise UsageError(f"{self.method} has a grid of its own", "leave out --group-size, --sym and --asym")
        if self.bits is not None and self.bits != scheme.weight_bits:
            if self.bits not in self.how.bits:
                known = ", ".join(map(str, self.how.bits))
                raise UsageError(f"{self.method} makes no {self.bits}-bit weights", f"--bits can be: {known}")
            scheme = replace(scheme, weight_bits=self.bits, zero_bits=self.bits if scheme.zero_bits else 0)
        if self.group_size is not None:
            if self.group_size < 1 and self.group_size != -1:
                raise UsageError(f"the group size {self.group_size} is neither positive nor -1 (one group a row)")
            scheme = replace(scheme, group_size=max(self.group_size, 0))
        return scheme if self.symmetric is None else replace(scheme, symmetric=self.symmetric)

    @property
    def widths(self) -> dict[int, Scheme]:
        """The precisions among which a target chooses, by their bits: none without one. UsageError if it can't be."""
        if self.target_bpw is None:
            return {}
        if self.bits is not None:
            raise UsageError("--bits and --target-bpw both say how many bits a weight gets", "give one of them")
        return widths(self.how, self.layout, self.scheme, self.target_bpw)

    @property
    def typical(self) -> Scheme:
        """What a weight costs on average, at most."""
        return self.scheme if self.target_bpw is None else at_most(self.widths, self.target_bpw)

    @property
    def wishes(self) -> Wishes:
        """What is wanted beside the method; UsageError if method or format forbid it."""
        return Wishes(self.rotate, self.quantize_head, self.kv_scales).check(self.how, self.layout)

    @property
    def streams(self) -> float:
        """How many streams of the calibration text lie on the disk at once, at most; each before and behind a block."""
        return 1 + bool(self.widths) + KEPT_STREAMS + CORRECTION_STREAMS * self.corrected

    @property
    def corrected(self) -> bool:
        """Whether errors upstream are corrected; UnknownNameError if in no way that is known."""
        if self.correct is None:
            return self.how.corrected
        if self.correct not in CORRECTIONS:
            raise UnknownNameError("correction", self.correct, CORRECTIONS)
        return CORRECTIONS[self.correct]

    @property
    def folder(self) -> Path:
        """Where the model goes."""
        if self.out is not None:
            return self.out
        scheme = self.scheme
        bits = "" if self.layout is GGUF else f"-w{self.target_bpw or scheme.weight_bits:g}"
        group = f"g{scheme.group_size}" if scheme.group_size else ""
        return Path(f"{Path(self.model).resolve().name}-{self.method}{bits}{group}")
