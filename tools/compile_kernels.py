"""Compile every Triton kernel ahead of time, for GPUs that need not be there, and say what the compilers made of it.

    python tools/compile_kernels.py [--plain | --all] [--target sm_80 --target sm_90 --target gfx942]

One line a kernel, shape and target. The exit status is 1 when a kernel spills registers, loads its cache in pieces of
less than 16 bytes, computes 16-bit products without tensor cores, or needs more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton_cache import copy_words, store_slots
from kernels.triton_decode import decode_parts, join_parts
from kernels.triton_prefill import prefill
from kernels.triton_tiling import Dims, Target, Tiling, decode_tiling, padded, prefill_tiling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GPU_TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program may use.
SHARED_BYTES: Final = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
WIDE_LOAD_BYTES: Final = 16
_ELEMENT_BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2}
KERNELS: Final[dict[str, Any]] = {
    found.__name__: found for found in (decode_parts, join_parts, prefill, store_slots, copy_words)
}
_CUOBJDUMP: Final = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one layer, as a kernel is compiled for it."""

    dtype: str = "bf16"  # of queries
    k_dim: int = 128
    v_dim: int = 128
    group: int = 4
    block_size: int = 16
    has_cap: bool = False
    is_fp8: bool = False

    def __str__(self) -> str:
        heads = f"{self.k_dim}" if self.k_dim == self.v_dim else f"{self.k_dim}/{self.v_dim}"
        extras = f"{' cap' if self.has_cap else ''}{' fp8' if self.is_fp8 else ''}"
        return f"{self.dtype} {heads} group {self.group} block {self.block_size}{extras}"


# The shapes that a run without --all compiles: each differs from the first in what the compiler may trip over.
FEW_SHAPES: Final = (
    Shape(),
    Shape(k_dim=64, v_dim=64, group=7),
    Shape(k_dim=256, v_dim=256, group=2, has_cap=True),
    Shape(k_dim=192, v_dim=128, group=1, block_size=64),
    Shape("fp32", k_dim=128, v_dim=128),
    Shape(is_fp8=True),
)
MORE_SHAPES: Final = (
    Shape("fp16"),
    Shape("fp16", is_fp8=True),
    Shape("fp32", k_dim=256, v_dim=256, group=2),
    Shape("fp32", k_dim=64, v_dim=64, group=8),
    Shape(k_dim=80, v_dim=80, group=1),
    Shape(k_dim=96, v_dim=96, group=3, block_size=32),
    Shape(k_dim=64, v_dim=64, group=8, block_size=128),
    Shape(group=8, block_size=32),
    Shape(group=16, block_size=128),
    Shape(k_dim=256, v_dim=256, group=4),
    Shape(k_dim=256, v_dim=256, group=8, is_fp8=True),
    Shape(group=5, has_cap=True),
    # One kv head for all.
    Shape(k_dim=64, v_dim=64, group=71),
    Shape(group=48),
    Shape("fp32", group=48),
    Shape(k_dim=256, v_dim=256, group=32),
    Shape(k_dim=192, v_dim=128, group=128),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with everything that it is compiled with."""

    kernel: str  # key of KERNELS
    shape: Shape
    pointers: dict[str, str]  # element types of pointer arguments
    constants: dict[str, int | bool]
    options: dict[str, int]

    @property
    def reads_cache(self) -> bool:
        """Whether it is attention, whose loads and products are looked at."""
        return self.kernel in {"decode_parts", "prefill"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compiler made of a variant."""

    variant: Variant
    target: Target
    num_registers: int
    spilled_bytes: int  # scratch memory of a thread
    shared_bytes: int
    load_bytes: int  # widest load from global memory
    tensor_instructions: tuple[str, ...]

    def complaints(self) -> Iterator[str]:
        """What must not be, in words."""
        if self.spilled_bytes:
            yield f"spills {self.spilled_bytes} bytes a thread"
        if self.shared_bytes > SHARED_BYTES[self.target]:
            yield f"needs {self.shared_bytes >> 10} KiB of shared memory"
        if not self.variant.reads_cache:
            return
        if self.load_bytes < WIDE_LOAD_BYTES:
            yield f"loads {self.load_bytes} bytes at once"
        if self.variant.shape.dtype != "fp32" and not self.tensor_instructions:
            yield "uses no tensor cores"


def variants(target: Target, shapes: tuple[Shape, ...]) -> Iterator[Variant]:
    """Every kernel in every shape that concerns it."""
    for shape in shapes:
        for kernel, tiling_of in (("decode_parts", decode_tiling), ("prefill", prefill_tiling)):
            yield _attention(target, shape, kernel, tiling_of)
    plain = shapes[0]
    for is_fp8 in (False, True):
        yield _store(Shape(is_fp8=is_fp8))
    yield Variant(
        "copy_words",
        plain,
        dict.fromkeys(("bases", "block_words", "copies"), "i64"),
        {"TILE_WORDS": 1024},
        {},
    )
    yield Variant(
        "join_parts",
        plain,
        {"parts": "fp32", "part_logs": "fp32", "out": plain.dtype},
        {"V_DIM": plain.v_dim, "V_PAD": padded(plain.v_dim), "TILE_PARTS": 16},
        {},
    )


def _attention(
    target: Target, shape: Shape, kernel: str, tiling_of: Callable[[Target, Dims], Tiling]
) -> Variant:
    element = _ELEMENT_BYTES[shape.dtype]
    dims = Dims(shape.k_dim, shape.v_dim, shape.group, element, 1 if shape.is_fp8 else element)
    tiling = tiling_of(target, dims)
    fp8 = "fp8e4nv" if target == "sm_90" else "u8"
    cache = fp8 if shape.is_fp8 else shape.dtype
    pointers = {
        "query": shape.dtype,
        "key_cache": cache,
        "value_cache": cache,
        **dict.fromkeys(("block_tables", "query_start", "context_lens"), "i32"),
        **dict.fromkeys(("sinks", "key_scales", "value_scales", "parts", "part_logs"), "fp32"),
        "out": shape.dtype,
    }
    constants: dict[str, int | bool] = {
        "GROUP": shape.group,
        **_dims(shape),
        "BLOCK_SIZE": shape.block_size,
        "TILE_ROWS": tiling.tile_rows,
        "TILE_KEYS": tiling.tile_keys,
        "HAS_CAP": shape.has_cap,
        "HAS_SCALES": shape.is_fp8,
    }
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return Variant(kernel, shape, pointers, constants, options)


def _store(shape: Shape) -> Variant:
    cache = "u8" if shape.is_fp8 else shape.dtype
    pointers = dict.fromkeys(("key", "value"), shape.dtype)
    pointers |= dict.fromkeys(("key_cache", "value_cache"), cache)
    pointers |= dict.fromkeys(("key_scales", "value_scales"), "fp32") | {"slot_mapping": "i64"}
    constants = {**_dims(shape), "TILE_HEADS": 8, "HAS_SCALES": shape.is_fp8}
    return Variant("store_slots", shape, pointers, constants, {})


def _dims(shape: Shape) -> dict[str, int | bool]:
    return {
        "K_DIM": shape.k_dim,
        "V_DIM": shape.v_dim,
        "K_PAD": padded(shape.k_dim),
        "V_PAD": padded(shape.v_dim),
    }


def compile_variant(variant: Variant, target: Target) -> Outcome:
    """Compile as a launch would: pointers and strides are multiples of 16, other numbers are anything."""
    kernel = KERNELS[variant.kernel]
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        pointed = variant.pointers.get(name)
        signature[name] = f"*{pointed}" if pointed else _scalar_type(name)
        if (pointed or name.endswith("_stride")) and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, variant.constants, attributes)
    options = {**variant.options, "enable_fp_fusion": True}
    compiled: Any = triton.compile(source, target=GPU_TARGETS[target], options=options)
    read = _read_amd if target == "gfx942" else _read_nvidia
    return read(partial(Outcome, variant, target), compiled.asm, compiled.metadata.shared)


def _scalar_type(name: str) -> str:
    return "fp32" if name in {"scale", "soft_cap"} else "i32"


def _read_nvidia(outcome: partial[Outcome], asm: dict[str, Any], shared: int) -> Outcome:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(_CUOBJDUMP), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    ptx = asm["ptx"]
    widths = [16 for _ in re.findall(r"cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10", ptx)]
    for count, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bufs](\d+) ", ptx):
        widths.append(int(count or 1) * int(bits) // 8)
    tensor = re.findall(r"(wgmma\.mma_async|mma\.sync)\S*?\.(m\d+n\d+k\d+)", ptx)
    return outcome(
        num_registers=int(_found(r"REG:(\d+)", usage)),
        spilled_bytes=int(_found(r"STACK:(\d+)", usage)) + int(_found(r"LOCAL:(\d+)", usage)),
        shared_bytes=shared,
        load_bytes=max(widths, default=0),
        tensor_instructions=_unique(f"{name.split('.')[0]} {shape}" for name, shape in tensor),
    )


def _read_amd(outcome: partial[Outcome], asm: dict[str, Any], shared: int) -> Outcome:
    text = asm["amdgcn"]
    words = re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?\b", text)
    tensor = re.findall(r"(v_mfma_\w+?x\d+x\d+)", text)
    return outcome(
        num_registers=int(_found(r"\.vgpr_count: +(\d+)", text)),
        spilled_bytes=4 * int(_found(r"\.vgpr_spill_count: +(\d+)", text))
        + int(_found(r"\.private_segment_fixed_size: +(\d+)", text)),
        shared_bytes=shared,
        load_bytes=max((4 * int(count or 1) for count in words), default=0),
        tensor_instructions=_unique(tensor),
    )


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        message = f"the compiler's report has no {pattern}"
        raise RuntimeError(message)
    return match[1]


def _unique(names: Iterator[str] | list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(
        "kernel", "shape", "target", "registers", "spilled", "shared KiB", "load B", "tensor cores"
    )
    for found in outcomes:
        instructions = found.tensor_instructions
        table.add_row(
            found.variant.kernel,
            str(found.variant.shape),
            found.target,
            str(found.num_registers),
            str(found.spilled_bytes),
            f"{found.shared_bytes / 1024:.0f}",
            str(found.load_bytes),
            ", ".join(instructions) or "-",
        )
    return table


def main() -> int:
    """Compile, print the table; the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--all", action="store_true", help="compile every shape, not only a few")
    extent.add_argument("--plain", action="store_true", help="compile one shape, the commonest")
    parser.add_argument(
        "--target", action="append", choices=get_args(Target), help="default: all of them"
    )
    options = parser.parse_args()
    shapes: tuple[Shape, ...] = FEW_SHAPES[:1] if options.plain else FEW_SHAPES
    shapes += MORE_SHAPES if options.all else ()
    work = [
        (variant, target)
        for target in options.target or get_args(Target)
        for variant in variants(target, shapes)
    ]
    console = Console(width=None if sys.stdout.isatty() else 160)
    # Compilers run on one core each.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        compiled = pool.map(compile_variant, *zip(*work, strict=True))
        errors = Console(stderr=True)
        outcomes = list(
            track(compiled, "compiling", total=len(work), console=errors, transient=True)
        )
    console.print(_table(outcomes))
    console.print(f"triton {triton.__version__}, {len(outcomes)} compilations")
    complaints = [
        f"{found.variant.kernel} {found.variant.shape} on {found.target} {complaint}"
        for found in outcomes
        for complaint in found.complaints()
    ]
    print(*complaints, sep="\n", file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
