"""Prints what the CUDA compiler made of the kernels: registers, spills, occupancy, instructions. No GPU needed.

    python tools/kernel_report.py [--check]

For each architecture: the resources of every kernel; the loops of one that load 16 bytes a lane; and the hot loop of
every dtype and task, compiled alone. At the end a roofline for three cards, from bytes, bandwidth and launch
latency alone: it is *predicted*, not measured. --check fails on a spill, on local memory, and on more than 6 lane
instructions an element in a loop over bfloat16.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda" / "clip_kernels.cuh"
# Threads, 32-bit registers and bytes of shared memory of an SM (CUDA C++ programming guide, compute capabilities).
ARCHITECTURES = {"sm_80": (2048, 65536, 167936), "sm_90": (2048, 65536, 233472), "sm_100": (2048, 65536, 233472)}
# Bytes a second in the vendor's data sheets, and microseconds from launch to end of an empty cooperative kernel.
CARDS = {"A100 80 GB": (2.039e12, 6), "H100 SXM": (3.35e12, 6), "H200": (4.8e12, 6)}
ELEMENTS = {"BF16": 8, "F16": 8, "F32": 4, "F64": 2}
MOST_A_BF16_ELEMENT = 6


def source() -> str:
    """A file with all kernels of launch.cu, and each hot loop as a kernel of its own."""
    lines = [f'#include "{KERNELS}"', "namespace fastclip::cuda { namespace {"]
    for dtype in ELEMENTS:
        for norm in ("L1", "L2", "Inf"):
            lines.append(
                f"__global__ void __launch_bounds__(kThreads, 2) reduce_{norm}_{dtype}(Segment s, double* out) {{"
                f" {norm} norm; reduce<{dtype}>(s, threadIdx.x % kWarp, norm);"
                " if (double total = block_norm(norm)) *out = total; }"
            )
        for task in ("scale", "clamp"):
            lines.append(
                f"__global__ void __launch_bounds__(kThreads, 2) {task}_{dtype}(Segment s, double by) {{"
                f" {task}<{dtype}>(s, threadIdx.x % kWarp, by); }}"
            )
    lines.append("}")
    tables = ["InlineTable<kFewEntries>", "InlineTable<kManyEntries>", "RemoteTable"]
    probes = [f"&clip_kernel<{table}>" for table in tables]
    for dtype in ELEMENTS:
        probes += [f"&reduce_{norm}_{dtype}" for norm in ("L1", "L2", "Inf")]
        probes += [f"&scale_{dtype}", f"&clamp_{dtype}"]
    uses = ", ".join(f"reinterpret_cast<const void*>({probe})" for probe in probes)
    return "\n".join([*lines, f"const void* all[] = {{{uses}}};", "}"])


def find_tool(name: str) -> str:
    """A program of the CUDA toolkit: on the PATH, or in the triton package that comes with torch."""
    found = shutil.which(name)
    if not found and (spec := importlib.util.find_spec("triton")):
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.exists() else None
    if not found:
        raise SystemExit(f"expected {name} on the PATH or in the triton package, found neither")
    return found


def run(*command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def short(symbol: str) -> str:
    """The readable part of a mangled name."""
    if "clip_kernel" in symbol:
        table = re.search(r"InlineTableILi(\d+)E", symbol)
        return f"clip_kernel<{f'InlineTable<{table[1]}>' if table else 'RemoteTable'}>"
    return re.search(r"((?:reduce|scale|clamp)_\w*?(?:BF16|F16|F32|F64))", symbol)[1]


def resources(log: str) -> dict:
    """Of each kernel: registers, bytes spilled, bytes of stack, bytes of static shared memory, from ptxas -v."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[short(part.split("'")[0])] = (registers, stores + loads, stack, int(shared[1]) if shared else 0)
    return found


def instructions(sass: str) -> dict:
    """Of each kernel: [(address, text)]."""
    kernels = {}
    for part in sass.split("Function : ")[1:]:
        found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        kernels[short(part.split("\n")[0])] = [(int(address, 16), text) for address, text in found]
    return kernels


def loops(code: list) -> list:
    """[(lane instructions, 16-byte loads, 16-byte stores)] of the loops that load, without the loops inside of them."""
    spans = []
    for address, text in code:
        target = re.search(r"\bBRA\S*\s.*?\b0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    found = []
    for begin, end in spans:
        inner = [s for s in spans if s != (begin, end) and begin <= s[0] and s[1] <= end]
        body = [t for a, t in code if begin <= a <= end and not any(s[0] <= a <= s[1] for s in inner)]
        loads = sum("LDG.E.128" in t or "LD.E.128" in t for t in body)
        stores = sum("STG.E.128" in t or "ST.E.128" in t for t in body)
        if loads:
            found.append((len(body), loads, stores))
    return found


def report(arch: str) -> list[str]:
    """Prints one architecture's part; returns what is wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        cu, cubin = Path(folder) / "report.cu", Path(folder) / "report.cubin"
        cu.write_text(source())
        log = run(find_tool("nvcc"), "-O3", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-o", cubin, cu)
        code = instructions(run(find_tool("cuobjdump"), "-sass", cubin))
    threads, registers, shared_memory = ARCHITECTURES[arch]
    print(f"\n{arch}: registers, spilled bytes, stack, shared memory, blocks of 512 threads an SM, instructions")
    used = resources(log)
    for name, (regs, spilled, stack, shared) in used.items():
        if not name.startswith("clip_kernel"):
            continue
        blocks = min(threads // 512, registers // (-(-regs // 8) * 8 * 512), shared_memory // max(shared + 1024, 1))
        print(f"  {name:<28}{regs:>5}{spilled:>6}{stack:>6}{shared:>7}{blocks:>4}{len(code[name]):>8}")
        if spilled or stack:
            wrong.append(f"{arch} {name}: {spilled} bytes spilled, {stack} bytes of stack")
    print(f"{arch}: hot loops, compiled alone: lane instructions an element, 16-byte loads and stores in flight")
    for name, body in sorted(code.items()):
        hot = max(loops(body), key=lambda loop: loop[1], default=None)
        if name.startswith("clip_kernel") or not hot:
            continue
        count, loads, stores = hot
        each = count / loads / ELEMENTS[name.rsplit("_")[-1]]
        print(f"  {name:<28}{each:>7.2f}{loads:>4}{stores:>4}   {used[name][0]} registers")
        if used[name][1]:
            wrong.append(f"{arch} {name}: spills")
        if name.endswith("_BF16") and each > MOST_A_BF16_ELEMENT:
            wrong.append(f"{arch} {name}: {each:.2f} lane instructions an element")
    name = next(n for n in code if n.startswith("clip_kernel"))
    whole = sorted(round(n / loads, 1) for n, loads, _ in loops(code[name]) if loads > 1)
    print(f"{arch}: {name}: lane instructions a 16-byte vector in each of its loops: {whole}")
    return wrong


def roofline() -> None:
    print("\npredicted (bytes over the data sheet's bandwidth, and launch latency; not measured): milliseconds")
    print(f"  {'case':<36}{'bytes':>9}" + "".join(f"{card:>14}" for card in CARDS))
    for case, elements in (("GPT-2 small, 124e6 bf16", 124e6), ("1.536e9 bf16", 1.536e9), ("2,000 x 64 bf16", 128e3)):
        for what, passes in (("unclipped", 1), ("clipped", 3)):
            size = 2 * elements * passes
            times = "".join(f"{size / rate * 1e3 + latency / 1e3:>14.3f}" for rate, latency in CARDS.values())
            print(f"  {f'{case}, {what}':<36}{size:>9.2e}{times}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the CUDA compiler made of the kernels.")
    parser.add_argument("--check", action="store_true", help="fail on spills and on too many instructions")
    args = parser.parse_args()
    wrong = [line for arch in ARCHITECTURES for line in report(arch)]
    roofline()
    if wrong:
        print("\n" + "\n".join(wrong))
    if wrong and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
