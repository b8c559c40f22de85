"""The C++ ops, loaded with ctypes for the instruction set that torch found. Same signatures as `reference`.

`fits` says whether they can take a tensor; without a compiled library they never do.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt_kernels.paging import Rows

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
LONGEST_QUERY = 4  # more query tokens a request: matrix products over gathered pages are faster


def fits(x: Tensor) -> bool:
    """Whether the compiled ops can take `x`: on the CPU, float32 or bfloat16, and there is a library."""
    return x.device.type == "cpu" and x.dtype in SUFFIX and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The best compiled library for this CPU, or None: not compiled, or torch came without an OpenMP runtime."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    wanted = {"avx512": ("avx512", "avx2", "default"), "avx2": ("avx2", "default")}.get(capability, ("default",))
    folder = Path(__file__).parent
    for file in (folder / f"ops_{name}.so" for name in wanted):
        if file.is_file():
            return _load(file)
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _call("rms_norm", x, x, weight, out, x.numel() // width, width, ctypes.c_float(eps))
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`; works in place, so the heads of `x` may be a slice of a merged product."""
    x = _dense_rows(x)
    tokens, heads, dim = x.shape
    _call("rotary", x, x, cos.contiguous(), sin.contiguous(), tokens, heads, dim, x.stride(0))
    return x


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _call("silu_mul", gate_up, gate_up, out, out.numel() // width, width)
    return out


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `reference.store_kv`."""
    for new, cache_ in ((key, k_cache), (value, v_cache)):
        rows = _dense_rows(new)
        width = cache_.shape[1] * cache_.shape[2]
        _call("store_rows", rows, rows, cache_, slots, rows.shape[0], width, rows.stride(0))


def attend_rows(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, group: Rows, scale: float, window: int | None
) -> None:
    """Paged attention of one group of rows, into its rows of `out` (T, H, Dv)."""
    query = _dense_rows(query)
    heads, dim = query.shape[1:]
    kv_heads, value_dim = v_cache.shape[1:]
    requests, count = group.rows.shape
    shape = (count, heads, kv_heads, dim, value_dim, group.block_size, group.tables.shape[1], query.stride(0))
    sizes = (ctypes.c_int64 * 9)(*shape, window or 0)
    starts = group.rows[:, 0].contiguous()
    _call(
        "paged_attention", query, query, k_cache, v_cache, out, starts, group.tables, group.lengths, requests, sizes,
        ctypes.c_float(scale),
    )  # fmt: skip


def takes(group: Rows) -> bool:
    """Whether `attend_rows` is the fast way for this group."""
    return group.rows.shape[1] <= LONGEST_QUERY


def _dense_rows(x: Tensor) -> Tensor:
    """x (T, H, D), each token's H * D values side by side; tokens may lie apart, as in slices of a merged product."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _call(op: str, like: Tensor, *arguments: Any) -> None:
    """Call the op for the dtype of `like`; tensors go as pointers, integers as int64."""
    function = getattr(library(), f"llmopt_{op}_{SUFFIX[like.dtype]}")
    function(*(_argument(argument) for argument in arguments))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _load(file: Path) -> ctypes.CDLL | None:
    """Load `file` against the OpenMP runtime that torch has in the process; None if there is none to be found."""
    try:
        runtime = _openmp_runtime()
        if runtime is not None:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(file))
    except OSError:
        return None


def _openmp_runtime() -> str | None:
    """The path of the OpenMP library that is mapped into this process."""
    try:
        mapped = Path("/proc/self/maps").read_text().split()
    except OSError:
        return None
    names = ("libgomp", "libiomp5", "libomp")
    return next((path for path in mapped if path.startswith("/") and Path(path).name.startswith(names)), None)
