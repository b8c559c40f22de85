"""Limits: each answer holds, one more does not, and the published verdicts come out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.limits import fewest_gpus, find_limits, holds, largest_model, max_batch, max_context
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import budget, sequence_bytes
from llmopt_cli.spec.catalog import find_gpu, find_model, models
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.scheme import find_scheme

ONE = Load.fixed(1, 1024, 256)
SPECS = st.sampled_from([entry.item for entry in models()])


def deployment(model: str, gpu: str = "h100", scheme: str = "bf16", tp: int = 1) -> Deployment:
    return Deployment(find_model(model), find_gpu(gpu)[0], find_scheme(scheme), tp)


@settings(deadline=None)
@given(spec=SPECS, gpu=st.sampled_from(["h100", "a10g", "b200"]), requests=st.integers(1, 500))
def test_the_largest_context_fits_and_a_block_more_does_not(spec: ModelSpec, gpu: str, requests: int) -> None:
    on = Deployment(spec, find_gpu(gpu)[0], find_scheme("awq"))
    found = max_context(on, requests)
    free, block = budget(on).free, on.batching.block_size
    assert 0 <= found <= spec.max_context
    if found:
        assert requests * sequence_bytes(on, found) <= free
    if found < spec.max_context:
        assert requests * sequence_bytes(on, found + block) > free


@settings(deadline=None)
@given(spec=SPECS, gpu=st.sampled_from(["h100", "a10g", "b200"]), length=st.integers(1, 20_000))
def test_the_largest_batch_fits_and_one_more_does_not(spec: ModelSpec, gpu: str, length: int) -> None:
    on = Deployment(spec, find_gpu(gpu)[0], find_scheme("awq"))
    found = max_batch(on, length)

    def fits(requests: int) -> bool:
        most = max(requests, on.batching.max_num_batched_tokens)
        batching = replace(on.batching, max_num_seqs=requests, max_num_batched_tokens=most)
        return budget(replace(on, batching=batching)).free >= requests * sequence_bytes(on, length)

    assert not fits(found + 1)
    assert not found or fits(found)


@pytest.mark.parametrize(
    ("model", "gpu", "scheme", "gpus"),
    [
        ("llama-2-7b", "a100-sxm4-40gb", "bf16", 1),
        ("llama-2-7b", "a10g", "bf16", 1),
        ("llama-2-70b", "a100", "bf16", 2),
        ("llama-2-70b", "a100", "awq", 1),
        ("llama-2-70b", "rtx 4090", "awq", 2),
        ("70b", "h100", "fp8", 1),
        ("llama-3.1-405b", "h100", "bf16", 16),
        ("deepseek-v3", "h100", "fp8_block", 16),
    ],
)
def test_fewest_gpus_of_the_usual_verdicts(model: str, gpu: str, scheme: str, gpus: int) -> None:
    found = fewest_gpus(deployment(model, gpu, scheme), ONE)
    assert found is not None
    assert found.gpus == gpus


@pytest.mark.parametrize(("gpu", "split"), [("l40s", (2, 8)), ("h100", (8, 2))])
def test_over_pcie_no_more_than_two_share_a_layer(gpu: str, split: tuple[int, int]) -> None:
    found = fewest_gpus(deployment("405b", gpu, "fp8" if gpu == "l40s" else "bf16"), ONE)
    assert found is not None
    assert (found.tp, found.pp) == split


def test_what_no_64_gpus_hold_is_said() -> None:
    assert fewest_gpus(deployment("deepseek-v3", "t4"), ONE) is None


def test_the_largest_model_fits_and_the_next_larger_does_not() -> None:
    on = deployment("8b")
    found = largest_model(on, ONE)
    assert found is not None
    assert holds(replace(on, spec=found), ONE)
    larger = [entry.item for entry in models() if entry.item.num_params > found.num_params]
    assert larger
    assert not any(holds(replace(on, spec=spec), ONE) for spec in larger)


def test_fewer_bits_never_need_more_gpus_nor_hold_a_smaller_model() -> None:
    limits = find_limits(deployment("70b", "a100"), Load.fixed(32, 1024, 256))
    assert [fewest.scheme.name for fewest in limits.fewest] == ["bf16", "fp8", "int8", "awq"]
    counts = [fewest.on.gpus for fewest in limits.fewest if fewest.on]
    sizes = [largest.spec.num_params for largest in limits.largest if largest.spec]
    assert counts == [4, 2, 2, 1]
    assert sizes == sorted(sizes)


def test_an_engine_left_to_itself_leaves_less_to_the_cache_of_a_large_gpu() -> None:
    limits = find_limits(deployment("8b"), ONE)
    assert (limits.own.max_num_seqs, limits.own.max_num_batched_tokens) == (1024, 8192)
    assert limits.own_budget.free < budget(limits.on).free - 3.5 * 1024**3
