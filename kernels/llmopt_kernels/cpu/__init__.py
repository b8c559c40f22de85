"""The C++ ops, loaded with ctypes for the instruction set that torch found. Same signatures as `reference`.

`fits` says whether they can take a tensor; without a compiled library they never do.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt_kernels import reference
from llmopt_kernels.paging import Pages, Rows, Rule

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
LIBRARIES = {"avx512": ("avx512", "avx2", "default"), "avx2": ("avx2", "default")}  # by capability, the best first
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES = {  # of ops.cpp: pointers, sizes, floats
    "rms_norm": "pppiif",
    "rotary": "pppiiii",
    "silu_mul": "ppii",
    "argmax": "ppii",
    "linear": "ppppiii",
    "linear_rows": "ppppiii",
    "store_rows": "pppiii",
    "store_int8": "ppppiiii",
    "int4_linear": "pppppiiiiii",
    "int4_unpack": "ppppiiiii",
    "nibbles": "ppiii",
    "decoder_layers": "ppi",
    **{f"paged_attention_{kind}": "pppppppppppipff" for kind in ("own", "int8", "fp8")},
}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what scales of packed weights may be
CACHED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8"}  # quantized caches that are read
LONGEST_QUERY = 4  # more query tokens a request and a longer past: matrix products over gathered pages are faster
LONGEST_PAST = 1024
MOST_PAIRED = 64  # more rows of x, or no such op on this machine: torch's product is faster
SOFTLY = 1  # OpenMP's omp_pause_soft
MOST_ROWS = 5  # more rows of x: unpacking the weights for a matrix product is faster
CHUNK = 128  # columns whose codes ops.cpp takes at a time; groups must be whole chunks
TILE = 2**20  # weights unpacked at a time: a copy of a whole layer would fall out of the cache, and cost page faults


def fits(x: Tensor, *others: Tensor) -> bool:
    """Whether the compiled ops can take these: on the CPU, all float32 or all bfloat16, and there is a library."""
    dtype = x.dtype
    for other in others:  # not `all(...)`: this is asked a hundred times a step
        if other.dtype != dtype:
            return False
    return x.is_cpu and dtype in SUFFIX and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The best compiled library for this CPU, or None: not compiled, or torch came without an OpenMP runtime."""
    wanted = LIBRARIES.get(torch.backends.cpu.get_cpu_capability().lower(), ("default",))
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
    op("rms_norm", x.dtype)(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`; works in place, so the heads of `x` may be a slice of a merged product."""
    x, cos, sin = _dense_rows(x), cos.contiguous(), sin.contiguous()
    tokens, heads, dim = x.shape
    op("rotary", x.dtype)(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, dim, x.stride(0))
    return x


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    op("silu_mul", out.dtype)(gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width)
    return out


def argmax(x: Tensor) -> Tensor:
    """See `reference.argmax`."""
    x = x.contiguous()
    rows, width = x.shape
    out = torch.empty(rows, dtype=torch.int64)
    op("argmax", x.dtype)(x.data_ptr(), out.data_ptr(), rows, width)
    return out


def multiplies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` has a compiled op for this product, and it is the fast way."""
    width = weight.shape[1]
    alike = fits(x, weight) if bias is None else fits(x, weight, bias)
    able = alike and x.dtype == torch.bfloat16 and pairs_bf16()
    return able and x.numel() <= MOST_PAIRED * width and width % 2 == 0 and weight.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,), all bfloat16 -> (..., N); sums in float32.

    A row's result does not depend on the other rows, only on whether they are few (FEW in products.h).
    """
    x = x.contiguous()
    rows, width = weight.shape
    out = x.new_empty(*x.shape[:-1], rows)
    bias_at = None if bias is None else bias.data_ptr()
    count = out.numel() // rows
    op("linear", x.dtype)(x.data_ptr(), weight.data_ptr(), bias_at, out.data_ptr(), count, rows, width)
    return out


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.linear_rows`."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, width = weight.shape
    out = x.new_empty(*x.shape[:-1], rows)
    bias_at = None if bias is None else bias.contiguous().data_ptr()
    count = out.numel() // rows
    op("linear_rows", x.dtype)(x.data_ptr(), weight.data_ptr(), bias_at, out.data_ptr(), count, rows, width)
    return out


def stores(new: Tensor, pages: Pages) -> bool:
    """Whether `store_kv` has a compiled op for what is new and this cache."""
    return pages.values.dtype in (new.dtype, torch.int8) and pages.fixed is None


def store_kv(key: Tensor, value: Tensor, k: Pages, v: Pages, slots: Tensor) -> None:
    """See `reference.store_kv`."""
    for new, pages in ((key, k), (value, v)):
        rows = _dense_rows(new)
        tokens, heads, dim = rows.shape
        if pages.scales is None:
            pointers = (rows.data_ptr(), pages.values.data_ptr(), slots.data_ptr())
            op("store_rows", new.dtype)(*pointers, tokens, heads * dim, rows.stride(0))
        else:
            tensors = (rows, pages.values, pages.scales, slots)
            op("store_int8", new.dtype)(*(tensor.data_ptr() for tensor in tensors), tokens, heads, dim, rows.stride(0))


def reads(query: Tensor, pages: Pages) -> bool:
    """Whether `attend_rows` has a compiled op for this cache."""
    return pages.values.dtype == query.dtype or pages.values.dtype in CACHED


def attend_rows(query: Tensor, k: Pages, v: Pages, out: Tensor, group: Rows, rule: Rule) -> None:
    """Paged attention of one group of rows, into its rows of `out` (T, H, Dv)."""
    query = _dense_rows(query)
    heads, dim = query.shape[1:]
    kv_heads, value_dim = v.values.shape[1:]
    requests = len(group.starts)
    shape = (group.count, heads, kv_heads, dim, value_dim, group.block_size, group.tables.shape[1], query.stride(0))
    sizes = (ctypes.c_int64 * 10)(*shape, rule.window or 0, rule.chunk or 0)
    kind = CACHED.get(k.values.dtype, "own")
    table = _float8_table(k.values.dtype) if kind == "fp8" else None
    paged = (k.values, v.values, k.scales, v.scales, table)
    tensors = (query, *paged, rule.sinks, out, group.starts, group.tables, group.lengths)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    op(f"paged_attention_{kind}", query.dtype)(*pointers, requests, sizes, rule.scale, rule.softcap or 0.0)


def int4_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """See `reference.int4_linear`; few rows of x read the packed weights, more of them a tile unpacked at a time."""
    rows, groups = scales.shape
    width = x.shape[-1]
    if width // groups % CHUNK:
        return reference.int4_linear(x, codes, scales, zeros)
    count = x.numel() // width
    if count > MOST_ROWS:
        ordered = _in_code_order(x)
        step = max(TILE // width, 1)
        tiles = (slice(start, start + step) for start in range(0, rows, step))
        one = len(zeros) == 1  # for all rows
        parts = [F.linear(ordered, _unpack(codes[t], scales[t], zeros if one else zeros[t], x.dtype)) for t in tiles]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    tensors = (x, codes, scales, zeros, out)
    sizes = (count, rows, width, groups, SCALES[scales.dtype], int(zeros.numel() > 1))
    op("int4_linear", x.dtype)(*(tensor.data_ptr() for tensor in tensors), *sizes)
    return out


def _in_code_order(x: Tensor) -> Tensor:
    """x (..., K) with the columns of every chunk in the order in which `_unpack` writes weights: nibble by nibble."""
    return x.view(*x.shape[:-1], -1, CHUNK // 8, 8).transpose(-1, -2).reshape(x.shape)


def _unpack(codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights (N, K) that the codes mean, columns as `_in_code_order` has them."""
    rows, groups = scales.shape
    out = torch.empty(rows, 2 * codes.shape[1], dtype=dtype)
    tensors = (codes, scales, zeros, out)
    sizes = (rows, out.shape[1], groups, SCALES[scales.dtype], int(zeros.numel() > 1))
    op("int4_unpack", out.dtype)(*(tensor.data_ptr() for tensor in tensors), *sizes)
    return out


def nibbles(packed: Tensor, bits: int) -> Tensor:
    """See `reference.nibbles`."""
    rows, width = packed.shape
    columns = width // bits * 8
    out = torch.empty(rows, columns // 2, dtype=torch.uint8)
    op("nibbles", None)(packed.data_ptr(), out.data_ptr(), rows, columns, bits)
    return out


def takes(group: Rows) -> bool:
    """Whether `attend_rows` is the fast way for this group."""
    return group.count <= LONGEST_QUERY or (group.longest <= LONGEST_PAST and _is_wide())


def _dense_rows(x: Tensor) -> Tensor:
    """x (T, H, D), each token's H * D values side by side; tokens may lie apart, as in slices of a merged product."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@cache
def _float8_table(dtype: torch.dtype) -> Tensor:
    """What each of the 256 codes of an 8-bit float means, float32."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


@cache
def _is_wide() -> bool:
    """Whether the library was compiled for vectors of eight or sixteen."""
    found = library()
    return found is not None and "default" not in Path(found._name).name


@cache
def pairs_bf16() -> bool:
    """Whether there is a library and this CPU multiplies pairs of bfloat16."""
    asks = getattr(library(), "llmopt_multiplies_bf16", None)
    return asks is not None and bool(asks())


@cache
def op(name: str, dtype: torch.dtype | None) -> Any:
    """The compiled op for a dtype, if it has any, with its argument types declared."""
    found = getattr(library(), f"llmopt_{name}" if dtype is None else f"llmopt_{name}_{SUFFIX[dtype]}")
    found.argtypes = [KINDS[kind] for kind in SIGNATURES[name]]
    found.restype = None
    return found


def release_threads() -> None:
    """End the OpenMP threads that work for the calling thread; its next parallel op starts others.

    Every thread that runs parallel ops keeps a team. libgomp no longer spins at a barrier but sleeps, as soon as all
    teams together have more threads than there are cores, and a step has hundreds of barriers: two idle threads of a
    team that nobody needs any more make everybody else's ops up to twice as slow.
    """
    runtime = _openmp_runtime()
    if runtime is not None:
        with suppress(AttributeError):  # before OpenMP 5
            ctypes.CDLL(runtime).omp_pause_resource_all(SOFTLY)


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
