"""Our CUDA kernels compiled ahead of time for an H100, and what the code says of itself; no GPU is needed."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from approxkmv.attention.blocks.cuda import clustering, fused, kernels
from approxkmv.attention.kernels import triton as triton_kernels

DISASSEMBLER = Path(knobs.nvidia.cuobjdump.path)
# The kernels of the fused form in the order of a call, and their modules
FUSED = {
    **dict.fromkeys(("sampled_kernel", "means_kernel", "nearest_kernel", "deal_kernel", "centres_kernel"), clustering),
    **dict.fromkeys(("keys_kernel", "sample_kernel", "threshold_kernel", "far_kernel", "lists_kernel"), kernels),
    **dict.fromkeys(("finish_kernel", "bases_kernel", "rows_kernel"), kernels),
}
# Types of the kernels' pointers where they are not float32, by kernel or for all; q, k and v are of the inputs' type.
TYPES = {
    **dict.fromkeys(("query_pointer", "cluster_pointer", "count_pointer", "near_pointer", "word_pointer"), "*i32"),
    "lost_pointer": "*i32",
    **dict.fromkeys(
        ("rank_pointer", "pair_pointer", "qh_pointer", "qm_pointer", "kh_pointer", "km_pointer"),
        "*bf16",
    ),
    **dict.fromkeys(("end_pointer", "start_pointer", "order_pointer", "first_pointer", "place_pointer"), "*i64"),
    "label_pointer": "*i16",
    "far_pointer": "*fp64",
    **dict.fromkeys(("scale", "margin", "reach", "off", "power", "factor", "least"), "fp32"),
}


def compiled(kernel, constants, types, loose=(), capability=90, **options):
    """A kernel compiled ahead of time, for an H100 or another; no GPU is needed. loose: not multiples of 16."""

    def of(argument):
        return {**TYPES, **types}.get(argument, "*fp32" if "pointer" in argument else "i32")

    signature = {argument: of(argument) for argument in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    exact = [i for i, argument in enumerate(kernel.arg_names) if argument not in {*constants, *loose}]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in exact})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def of_exact_or_listed(name, d, d_v, dtype, **others):
    """A kernel as `exact` or `listed` launch it, but for others."""
    kernel, listed = getattr(triton_kernels, name), name == "_listed_kernel"
    constants = {**triton_kernels._options(d, d_v, dtype), **triton_kernels._tiles(dtype, listed)}
    launch = {key: constants.pop(key) for key in ("num_stages", "num_warps") if key in constants}
    constants |= {"EXTRA": True} if listed else {}
    # Sizes of 1 are constants, and those that are multiples of 16 are known to be: what wide loads need.
    constants |= {"d_v": 1} if d_v == 1 else {}
    low = "*fp32" if dtype == torch.float32 else "*bf16"
    types = dict.fromkeys(("q_pointer", "k_pointer"), "*fp32" if listed else low) | {"v_pointer": low}
    return compiled(kernel, constants, types, ("scale", *(["d_v"] if d_v % 16 else ())), **launch | others)


def of_the_fused_form(name, d, d_v, summing=True, clusters=64):
    """A kernel as `fused.steps` launches it on bfloat16 inputs.

    summing: with FIRST, SUMS and OWN.
    """
    kernel = getattr(FUSED[name], name)
    room = 2 * clustering._SAMPLED if name == "sampled_kernel" else fused._SAMPLE
    sizes = {"OWN": summing, "ROOM": room, "FIRST": summing, "SUMS": summing}
    given = {key: value for key, value in sizes.items() if key in kernel.arg_names}
    given |= fused.launches(d, d_v, clusters)[name]
    constants = {key: value for key, value in given.items() if key in kernel.arg_names}
    launch = {key: value for key, value in given.items() if key not in constants}
    types = dict.fromkeys(("q_pointer", "k_pointer", "v_pointer", "out_pointer"), "*bf16")
    types |= {"centre_pointer": "*bf16", "centred_pointer": "*fp32" if d_v == 1 else "*bf16"}
    # These are multiples of 64, the others may be any numbers.
    whole = ("padded", "piece", "room")
    numbers = [argument for argument in kernel.arg_names if "pointer" not in argument and argument not in whole]
    return compiled(kernel, constants, types, numbers, **launch)


def _disassembled(made, option):
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(made.asm["cubin"])
        return subprocess.run([DISASSEMBLER, option, binary], capture_output=True, text=True, check=True).stdout


def resources(made):
    """Registers of a thread, and bytes of its stack, which only spills take."""
    return tuple(int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", _disassembled(made, "-res-usage")).groups())


def remarks(made):
    """What the assembler says of the code, such as that products wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(made.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def instructions_of_the_loop(made):
    """The instructions that a warp runs in one iteration of the longest loop that has none within."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _disassembled(made, "-sass"))
    code = [(int(address, 16), text) for address, text in lines]
    ends = [(int(back.group(1), 16), at) for at, text in code if (back := re.search(r"BRA.*?(0x[0-9a-f]+)", text))]
    loops = [(first, last) for first, last in ends if first < last]
    inner = [one for one in loops if not any(one != two and one[0] <= two[0] and two[1] <= one[1] for two in loops)]
    return max((sum(first <= at <= last for at, _ in code) for first, last in inner), default=0)
