"""Compiled kernels without a GPU, and that the machine which runs them tells what is wrong with one."""

import shutil

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fpdarts.kernels.triton.launch import VERSION

from benchmarks import estimate
from benchmarks.emulate import emulate
from benchmarks.emulator.driver import emulating
from benchmarks.emulator.program import Program, UnknownInstruction
from fpdarts.check_cases import SHAPES

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler (c++)")


def test_compiled_kernels_are_right():
    """Of shared memory filled ahead, and both kinds of matrix instructions. More takes minutes of compiling."""
    found = emulate(90, "bfloat16", "stage sep_conv_3x3, stride [12]$", shapes=SHAPES[1:2])
    unknown = [row["worst"] for row in found["rows"] if UnknownInstruction.__name__ in row["worst"]]
    if unknown and VERSION > (3, 8):
        pytest.skip(f"this Triton compiles to what the emulator, made for 3.6 to 3.8, does not know: {unknown[0]}")
    assert found["passed"], found
    assert {row["operation"] for row in found["rows"]} == {f"stage sep_conv_3x3, stride {stride}" for stride in (1, 2)}
    assert found["programs"] > 5 and found["instructions"] > 10_000


@pytest.fixture(scope="module")
def gpu():
    with emulating(90) as emulated:
        yield emulated


THREADS = 64
COPY = "cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x4, 0x4;\ncp.async.commit_group ;"
STORE = "ld.global.b32 { %r4 }, [ %rd3 + 0 ];\nst.shared.b32 [%r2], %r4;"
BARRIER, WAIT, LOAD = "bar.sync 0;", "cp.async.wait_group 0;", "ld.shared.b32 %r5, [%r3];"


def kernel(*body, other_warp=True, offset=0):
    """Each thread brings a number of x to shared memory, and stores what another brought."""
    return f"""
.visible .entry exchange(
	.param .u64 .ptr .global .align 1 exchange_param_0,
	.param .u64 .ptr .global .align 1 exchange_param_1
)
.reqntid {THREADS}
{{
	.reg .b32 %r<8>;
	.reg .b64 %rd<8>;
	ld.param.b64 %rd1, [exchange_param_0];
	ld.param.b64 %rd2, [exchange_param_1];
	mov.u32 %r1, %tid.x; // 0 to 63
	shl.b32 %r2, %r1, 2;
	xor.b32 %r3, %r2, {4 * THREADS // 2 if other_warp else 0};
	mad.wide.u32 %rd3, %r1, 4, %rd1;
	add.s64 %rd3, %rd3, {offset};
	mad.wide.u32 %rd4, %r1, 4, %rd2;
	{" ".join(body)}
	st.global.b32 [%rd4], %r5;
	ret;
}}
"""


def run(gpu, ptx):
    """(what was stored, faults)"""
    x, out = torch.arange(THREADS, dtype=torch.float32), torch.full((THREADS,), -1.0)
    gpu.faults.clear()
    gpu.run(Program(gpu.machine, ptx), 4 * THREADS, (1, 1, 1), ("*fp32", "*fp32"), (x, out))
    return out, "".join(gpu.faults)


@pytest.mark.parametrize("body", [(STORE, BARRIER, LOAD), (COPY, WAIT, BARRIER, LOAD)], ids=["stored", "copied"])
def test_what_is_right_passes(gpu, body):
    out, faults = run(gpu, kernel(*body))
    assert not faults and torch.equal(out, torch.arange(THREADS).roll(THREADS // 2).float())


@pytest.mark.parametrize("lines, conflicts, change", [
    (1, 1, ""), (32, 1, "mad.wide.u32 %rd3, %r1, 128, %rd1;"), (1, 8, "mov.u32 %r2, 0; mad.lo.s32 %r2, %r1, 32, %r2;"),
], ids=["side by side", "a line a thread", "few banks"])  # fmt: skip
def test_what_is_counted(gpu, lines, conflicts, change):
    """Of two warps, each a load, a store and what goes through shared memory."""
    x, out = torch.zeros(32 * THREADS), torch.zeros(THREADS)
    ptx = kernel(change, STORE, BARRIER, "ld.shared.b32 %r5, [%r2];")
    gpu.run(Program(gpu.machine, ptx), 32 * THREADS, (1, 1, 1), ("*fp32", "*fp32"), (x, out))
    name, counts = gpu.launches[-1]
    assert not gpu.faults and name == "exchange"
    executed = 14 + change.count(";")
    assert counts == {"instructions": 2 * executed, "global": 2 * (lines + 1), "shared": 4 * conflicts, "products": 0}


def test_an_address_of_one_of_two_parameters(gpu):
    choice = """
	setp.lt.u32 %p1, %r1, 32; mov.b64 %rd5, exchange_param_0; mov.b64 %rd6, exchange_param_1;
	selp.b64 %rd5, %rd5, %rd6, %p1; ld.param.b64 %rd7, [%rd5];
	mad.wide.u32 %rd7, %r1, 4, %rd7; ld.global.b32 %r5, [%rd7];"""
    out, faults = run(gpu, kernel(choice).replace(".reg .b32", ".reg .pred %p<2>; .reg .b32"))
    assert not faults and out.tolist() == [float(i) for i in range(32)] + [-1.0] * 32


@pytest.mark.parametrize(
    "body, other_warp, offset, told",
    [
        ((STORE, LOAD), True, 0, "race|read before it is written"),
        ((COPY, WAIT, LOAD), True, 0, "race|read before it is written"),
        ((COPY, BARRIER, LOAD, WAIT), True, 0, "race|read before it is written"),
        ((COPY, LOAD, WAIT), False, 0, "read before it is written"),
        ((COPY, BARRIER, STORE, BARRIER, LOAD), True, 0, "nobody waits for"),
        ((STORE, BARRIER, LOAD), True, 4, "load outside of the kernel's tensors"),
        ((STORE, BARRIER, LOAD), True, 2, "misaligned load"),
        ((STORE, BARRIER, "ld.shared.b32 %r5, [%r3+128];"), True, 0, "outside of shared memory"),
    ],
    ids=["no barrier", "copied, no barrier", "waited for too late", "not waited for", "nobody waits", "outside",
         "misaligned", "outside of shared memory"],
)  # fmt: skip
def test_what_is_wrong_is_told(gpu, body, other_warp, offset, told):
    out, faults = run(gpu, kernel(*body, other_warp=other_warp, offset=offset))
    assert any(part in faults for part in told.split("|")), faults


def test_what_is_estimated():
    """Of two launches of a kernel, one as long as its bytes take, one as its instructions and passes do."""
    few = {"instructions": 132, "global": 1320, "shared": 1320, "products": 0}
    many = {name: 1000 * count for name, count in few.items()}
    table = estimate.table([("a", few), ("a", many), ("b", few)], [2.9e6, 0, 0])
    one = (1 / 4 + 20) / 1.755e9
    assert list(table) == ["total", "a", "b"] and table["a"]["launches"] == 2 and table["total"]["bytes"] == 2.9e6
    assert table["b"]["seconds"] == pytest.approx(one)
    assert table["a"]["seconds"] == pytest.approx(1e-6 + 1000 * one)
    assert table["total"]["seconds"] == pytest.approx(1e-6 + 1001 * one)


def test_an_unknown_instruction_is_an_error(gpu):
    with pytest.raises(UnknownInstruction, match="lg2"):
        Program(gpu.machine, kernel("lg2.approx.f32 %r5, %r4;"))


@pytest.mark.parametrize(
    "pattern, told", [("(", "no regular expression"), ("no such operation", "no operation's name")]
)
def test_operations_that_cannot_be_chosen(pattern, told):
    with pytest.raises(ValueError, match=told):
        emulate(90, "float32", pattern)
