"""Passes through a block that is being quantized: with shortcuts they show just what they would without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmopt_cli.quant.passes import Passes, let_through
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.streams import Stream, Writer
from llmopt_cli.quant.structure import find_groups, find_stages
from llmopt_cli.quant.walk import Seen, Walk, at_once
from llmopt_cli.spec.checkpoint import Checkpoint

Tiny = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "Gemma2": {"head_dim": 16},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
}
ATTENTION = {"self_attn.o_proj": "self_attn"}
WHOLES = {
    "Llama": ATTENTION | {"mlp.down_proj": "mlp"},
    "OPT": {"self_attn.out_proj": "self_attn"},
    "Gemma2": {"mlp.down_proj": "mlp"},  # its attention puts out the scores, too
    "GPTNeoX": {"attention.dense": "attention", "mlp.dense_4h_to_h": "mlp"},
    "Mixtral": ATTENTION,
}
FLOATS = (torch.float32, torch.bfloat16)


def through(folder: Path, work: Path, products: torch.dtype, shortcuts: bool) -> tuple[list[Seen], torch.Tensor]:
    """What the first block's groups see while its weights are rounded, one group after the other; what it puts out."""
    ids = torch.randint(7, 4000, (6, 40), generator=torch.Generator().manual_seed(1))
    work.mkdir()
    with Skeleton(Checkpoint.open(folder), torch.device("cpu")) as skeleton:
        walk, together = Walk(skeleton), at_once(ids)
        walk.learn(ids, ids[:1])
        with skeleton.outside():
            hidden = Stream.write(work / "hidden", walk.enter(ids, together))
        run = partial(walk.run, 0, products=products)
        place = work.joinpath if shortcuts else None
        with skeleton.block(0) as block, torch.inference_mode():
            groups = find_groups(block, lambda: walk.run(0, next(hidden.batches(1))), "0")
            passes = Passes(block, hidden, together, run, products, place=place)
            seen = []
            for stage in find_stages(block, groups):
                seen += passes.watch(stage)
                for linear in [name for group in stage for name in group.linears]:
                    weight: Any = block.get_submodule(linear).weight
                    weight.copy_((weight * 50).round() / 50)
            passes.finish(work / "out")
            return seen, torch.cat(list(Stream.open(work / "out", ids).batches(1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_finished_module_need_not_run_again(family: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny(family, **FAMILIES[family])
    short, long = (through(folder, tmp_path / str(short), torch.float32, short) for short in (True, False))
    assert torch.equal(short[1], long[1])
    for one, other in zip(short[0], long[0], strict=True):
        assert one.tokens == other.tokens
        assert torch.equal(one.gram, other.gram)
    kept = {path.name for path in (tmp_path / "True").iterdir()} - {"hidden", "out"}
    assert kept == ({next(iter(WHOLES[family]))} if family != "GPTNeoX" else set())  # which adds both at the end


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_found_that_put_out_what_their_last_linear_does(family: str, tiny: Tiny) -> None:
    ids = torch.arange(7, 39)[None]
    with Skeleton(Checkpoint.open(tiny(family, **FAMILIES[family])), torch.device("cpu")) as skeleton:
        walk = Walk(skeleton)
        walk.learn(ids)
        with skeleton.outside():
            hidden = next(walk.enter(ids, 1))
        with skeleton.block(0) as block:
            groups = find_groups(block, lambda: walk.run(0, hidden), "0")
    assert {group.linears[0]: group.whole.name for group in groups if group.whole is not None} == WHOLES[family]


def test_bfloat16_products_see_nearly_the_same_and_leave_the_states_float32(tiny: Tiny, tmp_path: Path) -> None:
    rough, exact = (
        through(tiny("Llama"), tmp_path / str(dtype), dtype, True) for dtype in (torch.bfloat16, torch.float32)
    )
    assert not torch.equal(rough[1], exact[1])
    assert float((rough[1] - exact[1]).norm()) < 0.01 * float(exact[1].norm())
    for one, other in zip(rough[0], exact[0], strict=True):
        assert one.gram.dtype == torch.float32
        assert float((one.gram - other.gram).norm()) < 0.01 * float(other.gram.norm())


@pytest.mark.parametrize("products", FLOATS)
def test_second_moments_are_whole_matrices_whatever_their_width(products: torch.dtype) -> None:
    x, missing = torch.randn(2, 300, 600, generator=torch.Generator().manual_seed(0))
    seen = Seen(torch.zeros(600, 600), torch.zeros(600), torch.zeros(600), products=products)
    for rows, owed in zip(torch.split(x, 100), torch.split(missing, 100), strict=True):
        seen.add(rows, owed)
    seen.close()
    assert seen.cross is not None
    for found, true in ((seen.gram, x.T @ x / 300), (seen.cross, missing.T @ x / 300)):
        assert float((found - true).norm()) < (1e-5 if products == torch.float32 else 0.01) * float(true.norm())
    assert torch.equal(seen.gram, seen.gram.T)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_stream_is_read_back_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    states = torch.randn(5, 7, 3).to(dtype)
    with Writer(tmp_path / "states") as writer:
        for batch in torch.split(states, 2):
            writer.add(batch)
    assert writer.stream.shape == (5, 7, 3)
    assert torch.equal(torch.cat(list(writer.stream.batches(3))), states)


def test_what_modules_read_is_kept_on_the_way_through(tiny: Tiny, tmp_path: Path) -> None:
    ids = torch.randint(7, 4000, (3, 40), generator=torch.Generator().manual_seed(1))
    with Skeleton(Checkpoint.open(tiny("Llama")), torch.device("cpu")) as skeleton:
        walk = Walk(skeleton)
        walk.learn(ids, ids[:1])
        with skeleton.outside():
            hidden = Stream.write(tmp_path / "hidden", walk.enter(ids, 1))
        names = {"mlp.down_proj": tmp_path / "down", "": tmp_path / "out"}
        with skeleton.block(0) as block:
            found = let_through(block, hidden, 1, partial(walk.run, 0), names, torch.bfloat16)
            down: Any = block.get_submodule("mlp.down_proj")
            reads: list[torch.Tensor] = []
            down.register_forward_pre_hook(lambda _, args: reads.append(args[0]))
            outputs = [walk.run(0, batch) for batch in hidden.batches(1)]
    assert torch.equal(torch.cat(list(found[""].batches(1))), torch.cat(outputs))
    assert torch.equal(torch.cat(list(found["mlp.down_proj"].batches(1))), torch.cat(reads).bfloat16())
