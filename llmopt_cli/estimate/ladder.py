"""What stacking the known techniques gives, one rung after the other, on the same GPUs and for the same requests.

Every figure comes from the step model; nothing here knows what a technique is said to gain but CLAIMS, which are
shown beside the prediction and never used for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmopt_cli.errors import CapacityError
from llmopt_cli.estimate.choices import remark, sensible
from llmopt_cli.estimate.compare import thinned
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.draft import Draft, model_draft
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import sequence_bytes, weight_bytes
from llmopt_cli.estimate.plan import answer, weigh
from llmopt_cli.estimate.question import Question
from llmopt_cli.estimate.splits import shares
from llmopt_cli.estimate.work import work
from llmopt_cli.spec.catalog import models
from llmopt_cli.spec.recipe import Speculation
from llmopt_cli.spec.scheme import BF16, find_scheme
from llmopt_cli.spec.workload import Size, Workload

CACHED_SHARE = 0.5  # of a prompt that others begin with too, where the load names none: 40-60 % is what is claimed
DRAFT_SHARE = 1 / 5  # of the target's size: what a draft is at most


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of what is commonly quoted for a 70B chat model: no prediction of ours, and unmeasured here."""

    name: str
    tokens_per_s: float
    memory_gb: float
    relative_cost: float


CLAIMS = (
    Claim("BF16, nothing", 800, 140, 1.0),
    Claim("INT8 + continuous batching", 1800, 70, 0.45),
    Claim("FP8 + speculative decoding", 3200, 70, 0.25),
    Claim("the same + prefix cache", 4500, 70, 0.18),
)


@dataclass(frozen=True, slots=True)
class Rung:
    """Output tokens a second with `batch` requests at once; bytes are those of all GPUs together.

    `factor` is what this rung makes of the one before it. `relative_cost` is that of a token, 1 for static batches:
    one by one is nobody's way to serve.
    """

    name: str
    batch: int
    tokens_per_s: float
    weight_bytes: float
    kv_bytes: float
    factor: float
    relative_cost: float
    reason: str


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs for one deployment in 16 bits, and what spread of lengths they were timed with."""

    on: Deployment
    load: Load
    lengths: str
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    """A rung before it is set in relation to others: `losing` is said where it is slower than the one before."""

    name: str
    on: Deployment
    batch: int
    tokens_per_s: float
    reason: str
    losing: str = ""


def ladder(question: Question) -> Ladder:
    """All rungs on the fewest GPUs that hold the model in 16 bits; raises CapacityError where none do."""
    base = replace(question.base, scheme=BF16, draft=None)
    plain = replace(question, base=base)
    recommended = answer(plain).recommended
    if recommended is None:
        most = max(tp * pp for tp, pp in question.splits)
        raise CapacityError(
            f"{base.spec.name} in 16 bits does not fit {most} x {base.hardware.name}",
            "the ladder begins there; give it more or larger GPUs, such as --gpu h200x8",
        )
    on = recommended.on
    load, lengths = spread(question.load, on.spec.max_context)
    steps = list(_steps(plain, on, load))
    return Ladder(on, load, lengths, tuple(_rung(steps, index, question.load.longest) for index in range(len(steps))))


def _rung(steps: list[_Step], index: int, longest: int) -> Rung:
    step, before, reference = steps[index], steps[max(0, index - 1)], steps[1]
    factor = step.tokens_per_s / before.tokens_per_s
    return Rung(
        name=step.name,
        batch=step.batch,
        tokens_per_s=step.tokens_per_s,
        weight_bytes=weight_bytes(step.on.spec, step.on.scheme) + step.on.draft_bytes,
        kv_bytes=step.on.gpus * step.batch * sequence_bytes(step.on, longest),
        factor=factor,
        relative_cost=reference.tokens_per_s / step.tokens_per_s,
        reason=f"loses: {step.losing}" if factor < 1 and step.losing else step.reason,
    )


def _steps(question: Question, on: Deployment, load: Load) -> Iterator[_Step]:
    """The rungs in order, each on the GPUs of `on`."""
    few, batch = thinned(replace(load, cached_share=0.0)), _batch(question, on)
    alone = work(StepModel(on), few.at(1)).tokens_per_s
    yield _Step("one by one", on, 1, alone, "every step reads all weights for one token")
    static, wait = static_tokens_per_s(StepModel(on), replace(load, cached_share=0.0), batch)
    yield _Step("static batch", on, batch, static, f"a batch waits for its longest answer, {wait:.1f} x the mean")
    yield _continuous("continuous batching", question, on, few, "a place that empties is filled at once")
    in8 = replace(on, scheme=find_scheme("int8"))
    losing = "products, not bytes, bind this batch, and weights must be unpacked for them"
    yield _continuous("INT8 weights", question, in8, few, "half the bytes of every step", losing)
    drafted = _fp8_drafted(question, on, few)
    yield drafted
    kept = replace(few, cached_share=load.cached_share or CACHED_SHARE)
    reason = f"{kept.cached_share:.0%} of every prompt is in the cache already"
    yield _continuous("the same + prefix cache", question, drafted.on, kept, reason)


def _continuous(name: str, question: Question, on: Deployment, load: Load, reason: str, losing: str = "") -> _Step:
    batch = _batch(question, on)
    return _Step(name, on, batch, work(StepModel(on), load.at(batch)).tokens_per_s, reason, losing)


def _fp8_drafted(question: Question, on: Deployment, load: Load) -> _Step:
    """FP8 where the accelerator has a use for it, and a draft where the catalogue has one."""
    fp8 = find_scheme("fp8")
    scheme = fp8 if sensible(fp8, on.hardware) else find_scheme("int8")
    quantized, draft = replace(on, scheme=scheme), question.base.draft or find_draft(on)
    known = remark(scheme, on.hardware)
    alone = _continuous(scheme.name.upper(), question, quantized, load, known)
    if draft is None:
        return replace(alone, reason="the catalogue has no draft with its vocabulary")
    both = _continuous(f"{alone.name} + speculation", question, replace(quantized, draft=draft), load, "")
    factor = both.tokens_per_s / alone.tokens_per_s
    drafts = f"{draft.tokens} tokens drafted by {draft.name}, {draft.acceptance:.0%} accepted: x {factor:.2f}"
    said = "; ".join(filter(None, (known, drafts + (", it loses at this batch" if factor < 1 else ""))))
    return replace(both, reason=said, losing=said)


def _batch(question: Question, on: Deployment) -> int:
    """Requests at once: those asked for, as far as memory holds them."""
    held = weigh(replace(question, base=on), (on.tp, on.pp)).max_requests
    return max(1, min(question.needed, held))


def static_tokens_per_s(step: StepModel, load: Load, batch: int) -> tuple[float, float]:
    """Tokens a second where a batch starts together and ends with its longest answer, prompts padded to the longest.

    And how many times the mean answer the longest is.
    """
    prompt = round(expected_longest([size.input_len for size in load.sizes], batch))
    longest = expected_longest([size.output_len for size in load.sizes], batch)
    prefill = step.step(0, 0, [(prompt, 0)] * batch)
    seconds = prefill + longest * step.decode(batch, prompt + longest / 2)
    return batch * load.output_len / seconds, longest / load.output_len


def expected_longest(lengths: list[int], draws: int) -> float:
    """Mean of the longest of `draws` lengths, each equally likely: sum of x_(i) ((i/n)^draws - ((i-1)/n)^draws)."""
    count = len(lengths)
    return sum(
        length * ((index / count) ** draws - ((index - 1) / count) ** draws)
        for index, length in enumerate(sorted(lengths), 1)
    )


def spread(load: Load, most: int) -> tuple[Load, str]:
    """A load whose lengths differ, and what they are: fixed ones are spread as in the bundled chat workload.

    Static batches are as slow as lengths differ, so with equal ones they would look better than they ever are.
    """
    if len(load.sizes) > 1:
        return load, "as given"
    ((input_len, output_len),) = load.sizes
    sizes = Load.of(Workload.read("chat")).sizes
    ins, outs = (sum(lengths) / len(sizes) for lengths in zip(*sizes, strict=True))
    scaled = [
        Size(max(1, round(one.input_len * input_len / ins)), max(1, round(one.output_len * output_len / outs)))
        for one in sizes
    ]
    fitting = tuple(size for size in scaled if sum(size) <= most)
    return replace(load, sizes=fitting or load.sizes), "means as given, spread as in the chat workload"


def find_draft(on: Deployment) -> Draft | None:
    """The smallest model of the catalogue with the same vocabulary, of the same architecture if there is one."""
    usual, spec = Speculation(method="ngram"), on.spec
    fitting = [
        entry.item
        for entry in models()
        if entry.item.vocab_size == spec.vocab_size
        and entry.item.num_params <= spec.num_params * DRAFT_SHARE
        and shares(entry.item, on.tp)
    ]
    best = min(fitting, key=lambda one: (one.architecture != spec.architecture, one.num_params), default=None)
    return model_draft(best, usual.num_speculative_tokens, usual.acceptance) if best else None
