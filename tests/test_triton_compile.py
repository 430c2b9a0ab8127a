"""The Triton kernels compile to lean machine code, on a machine without a GPU: no spills, 16-byte accesses.

A representative set for one architecture; ``make kernels`` compiles every configuration for all of them.
"""

from __future__ import annotations

import dataclasses
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("what is interpreted is not compiled", allow_module_level=True)

import triton
import triton.language as tl

from moekit.kernels.triton import KERNELS, _cases, offline

ARCH = "sm_90"
NAMES = [
    "glu concatenated bf16 silu, I=768",
    "glu float8 concatenated bf16 silu, I=768",
    "glu backward interleaved bf16 silu, I=768",
    "glu backward again concatenated fp32 silu, I=768",
    "glu backward with dbias concatenated bf16 clamp after bias, expert bias, I=768",
    "glu backward float8 ungated fp16 silu, I=768",
    "glu concatenated bf16 silu, I=37",
    "permute bf16 T=16384 K=8 H=2048",
    "unpermute weighted bf16 T=4096 K=8 H=7168",
    "unpermute backward bf16 T=16384 K=8 H=2048",
    "unpermute backward fp32 T=4096 K=1 H=2880",
    "route_indices T=16384 K=8 E=128",
    "rows_of_tokens T=16384 K=8 E=128",
    "pad_rows T=4096 K=8 E=512",
    "route_map T=16384 K=8 E=128",
    "topk softmax fp32 T=16384 E=128 K=8",
    "topk sigmoid fp32 T=16384 E=128 K=8 biased",
    "topk sqrtsoftplus fp32 T=4096 E=256 K=8 grouped biased",
    "topk backward sqrtsoftplus fp32 T=16384 E=128 K=8",
    "topk backward pre-softmax fp32 T=16384 E=128 K=8",
    "packed_rows_few nf4 bf16 R/E=1 768",
    "packed_rows_few mxfp4 fp16 R/E=4 2048",
    "unpack nf4 nested bf16",
    "grouped_add bf16 r=8",
    "grouped_rows bf16 R=131072 r=0",
    "packed_rows nf4 bf16 R/E=96 r=16",
]
# Products are cut by architecture: shared memory in KiB, the least of each; of sm_80's family it is 8.6's and 8.9's.
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
PRODUCTS = [
    ("sm_80", "packed_rows fp8 bf16 R/E=96 r=16 back"),
    ("sm_90", "grouped_rows bf16 R=131072 r=16 back"),
    ("sm_90", "packed_rows mxfp4 bf16 R/E=8 r=16"),
    ("sm_90", "packed_rows mxfp4 bf16 R/E=96 r=0"),
    ("sm_90", "packed_rows fp8 bf16 R/E=32 r=16"),
    ("sm_100", "grouped_rows bf16 R=4096 r=64"),
    ("sm_100", "grouped_rows fp32 R=4096 r=64 back"),
    ("sm_100", "gathered_outer bf16 1528x2048"),
    ("sm_90", "grouped_rows bf16 R=131072 short"),
    ("sm_90", "grouped_outer bf16 1536x2048"),
    ("sm_80", "grouped_outer bf16 1536x2048"),
    ("sm_80", "grouped_rows bf16 R=4096 r=64"),
    ("sm_90", "grouped_outer fp32 1536x2048"),
    ("sm_100", "grouped_outer fp16 2048x768"),
    ("sm_90", "gathered_outer bf16 2040x768"),
    ("sm_100", "grouped_rows fp16 R=131072 short"),
    ("sm_90", "gathered_glu bf16 R=131072 silu kept"),
    ("sm_90", "gathered_glu fp16 R=4096 back clamp after bias"),
    ("sm_100", "gathered_rows bf16 R=131072 back"),
    ("gfx942", "grouped_slice bf16 R=131072 r=16"),
]


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in _cases.cases()}


@pytest.mark.parametrize("name", NAMES)
def test_machine_code(cases, name):
    case = cases[name]
    reports = offline.compile_case(case, offline.TARGETS[ARCH])
    assert reports, "there is something to compile"
    for report in reports:
        assert not report.faults(case.aligned), f"{report}: {report.faults(case.aligned)}"


@pytest.mark.parametrize(("arch", "name"), PRODUCTS)
def test_machine_code_of_products(cases, arch, name):
    reports = offline.compile_case(cases[name], offline.TARGETS[arch])
    assert reports, "there is something to compile"
    for report in reports:
        assert not report.faults(aligned=False), str(report)
        assert report.shared <= SHARED[arch] * 1024, str(report)


def test_every_operator_is_compiled(cases):
    assert {case.op for case in cases.values()} == set(KERNELS)


def test_every_launch_says_whether_products_and_additions_are_fused(cases):
    """Releases of Triton differ in what they do unasked, and bits would with them."""
    with offline.catch_launches(offline.TARGETS[ARCH]) as launches:
        for case in cases.values():
            KERNELS[case.op](*case.args)
    silent = {launch.kernel.__name__ for launch in launches if "enable_fp_fusion" not in launch.options}
    assert len(launches) >= len(cases) and not silent


def test_fused_products_and_additions_are_in_the_code(cases, monkeypatch):
    """The option reaches the compiler, whatever the environment says that the default is."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    with offline.catch_launches(offline.TARGETS[ARCH]) as launches:
        KERNELS["glu_backward"](*cases["glu backward concatenated bf16 silu, I=768"].args)
    for fused in (True, False):
        options = launches[0].options | {"enable_fp_fusion": fused}
        source = offline.source_of(launches[0])
        compiled = offline.triton.compile(source, target=offline.TARGETS[ARCH], options=options)
        assert ("fma.rn.f32" in compiled.asm["ptx"]) == fused
    assert launches[0].options["enable_fp_fusion"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_launch_that_begins_early_waits_for_what_it_reads(cases, arch):
    """Nothing of the first launch is read, and nothing written, before it has ended; weights may be."""
    with offline.catch_launches(offline.TARGETS[arch]) as launches:
        KERNELS["experts_by_slot"](*cases["experts_by_slot bf16 clamp after bias"].args)
    first, second = (
        offline.triton.compile(offline.source_of(launch), target=offline.TARGETS[arch], options=launch.options).asm["ptx"]
        for launch in launches
    )
    early = arch != "sm_80"
    assert [launch.options.get("launch_pdl", False) for launch in launches] == [False, early]
    assert ("griddepcontrol.launch_dependents" in first) == early and "griddepcontrol.launch_dependents" not in second
    assert ("griddepcontrol.wait" in second) == early and "griddepcontrol.wait" not in first
    if early:
        ahead, behind = second.split("griddepcontrol.wait", 1)
        activation = re.search(r"ld\.param\.b64 \s*(%rd\d+), \[_slot_down_kernel_param_0\];", second)
        assert activation and "st.global" in behind
        assert "st.global" not in ahead and not _reads(ahead, activation[1])


def _reads(ptx: str, pointer: str) -> bool:
    """Whether something is loaded from addresses made of ``pointer``."""
    made = {pointer}
    for line in ptx.splitlines():
        registers = re.findall(r"%\w+", line)
        if "ld.global" in line and any(register in made for register in registers):
            return True
        if registers and any(register in made for register in registers[1:]):
            made.add(registers[0])
    return False


def test_the_table_has_what_each_architecture_has():
    def report(kernel, registers):
        return offline.Report("case", kernel, registers, 0, 0, {16: 1}, {4: 2})

    both, one, again = report("ours", 30), report("theirs", 40), report("ours", 31)
    text = offline.table({"sm_80": [both], "sm_90": [one, both, again]})
    assert [line.split(" | ")[:3] for line in text.splitlines()[2:]] == [
        ["| case, `ours`", "sm_80", "30"],
        ["| ", "sm_90", "30"],
        ["| case, `theirs`", "sm_90", "40"],
        ["| case, `ours`", "sm_90", "31"],
    ]


def test_a_fault_is_seen():
    report = offline.Report("case", "kernel", registers=255, spills=8, shared=0, loads={4: 2}, stores={16: 1})
    assert len(report.faults(aligned=True)) == 2
    assert len(report.faults(aligned=False)) == 1
    assert len(dataclasses.replace(report, racing=True).faults(aligned=False)) == 2


def _product(instruction, pending):
    return f"\t{instruction}\n\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned {pending};\n"


def test_a_race_is_seen():
    """What takes an operand from registers is to be waited for before they are written; from shared memory it may run on."""
    form = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, "
    registers, memory = form + "{%r1,%r2,%r3,%r4}, %rd1, %p1, 1, 1, 0;", form + "%rd2, %rd1, %p1, 1, 1, 0, 0;"
    assert offline._races(_product(registers, 3)) and offline._races(_product(memory, 0) + _product(registers, 1))
    assert not offline._races(_product(registers, 0)) and not offline._races(_product(memory, 1))


@triton.jit
def _sum_of_products(codes, rows, out, depth, BLOCK: tl.constexpr):
    """One tile by codes that become values on their way into the product, as its operand from registers."""
    a, b, k = tl.arange(0, 128), tl.arange(0, 64), tl.arange(0, BLOCK)
    total = tl.zeros([128, 64], tl.float32)
    for start in range(0, depth, BLOCK):
        code = tl.load(codes + a[:, None] * depth + start + k[None, :])
        x = tl.load(rows + b[:, None] * depth + start + k[None, :])
        total = tl.dot((code.to(tl.float32) * 0.5).to(tl.bfloat16), tl.trans(x), total)
    tl.store(out + a[:, None] * 64 + b[None, :], total)


def test_the_race_that_products_keep_clear_of():
    """Triton's pipeline has it where the operand from registers is made in the loop: the reason why weights are not it."""
    arguments = {"codes": torch.int8, "rows": torch.bfloat16, "out": torch.float32}
    tensors = [torch.empty(128 * 2048, dtype=dtype, device="meta") for dtype in arguments.values()]
    launch = offline.Launch(_sum_of_products, (*tensors, 2048), {"BLOCK": 64}, {"num_warps": 4, "num_stages": 3})
    assert offline._compile(launch, "", offline.TARGETS["sm_90"]).racing


@pytest.mark.parametrize(("offset", "width"), [(1, 768), (0, 37)])
def test_unaligned_rows_are_read_in_narrow_pieces(cases, offset, width):
    y = torch.empty(64 * 2 * width + offset, dtype=torch.bfloat16, device="meta")[offset:].view(64, 2 * width)
    case = cases["glu concatenated bf16 silu, I=768"]
    case = case._replace(args=(y, *case.args[1:]))
    (report,) = offline.compile_case(case, offline.TARGETS[ARCH])
    assert max(report.loads) < 16
