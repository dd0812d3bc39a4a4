"""What the compiler made of the attention's CUDA kernels: a count of machine code, which needs no GPU.

    python benchmarks/sass.py --architectures 80,90 --markdown

Each kernel has its registers, spilled bytes and shared memory. A loop is the code between a backward branch
and its target, without loops inside it. Of the loops with tensor-core instructions (HMMA) the table has their
number and the instructions for 16 HMMA, in the best loop and in the worst: they differ by how many squares of
a tile a warp has, and by what must be rounded or transposed. "per 64 bytes" counts the basic blocks that copy
to shared memory asynchronously (LDGSTS), whole, by copies of 16 bytes. On CUDA cores the loops with the most
FFMA count.
These are static counts: nothing is run.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "cc_attention" / "csrc" / "cuda"
ENGINES = {
    "bf16": ("TensorCore<BFloat16>", "BFloat16"),
    "fp16": ("TensorCore<Half>", "Half"),
    "tf32": ("TensorCore<float>", "float"),
    "fp32": ("Portable<float>", "float"),
    "fp64": ("Portable<double>", "double"),
    "bf16 on CUDA cores": ("Portable<float>", "BFloat16"),
}
HEADERS = ("backward.cuh", "forward.cuh", "portable.cuh", "tensor_core.cuh")


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers: LDGSTS.E.BYPASS.128
    target: int | None  # of a branch


class Loop(NamedTuple):
    instructions: int
    hmma: int
    ffma: int  # also of fp64
    shared_loads: int


class Kernel(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loops: list[Loop]
    copies: int  # of 16 bytes, asynchronous
    copying: int  # instructions of their basic blocks


def tools() -> tuple[str, str]:
    """nvcc and cuobjdump; OSError where one is missing."""
    found = shutil.which("nvcc"), os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    for name, path in zip(("nvcc", "cuobjdump"), found, strict=True):
        if path is None:
            raise OSError(f"{name} is not on the path")
    return str(found[0]), str(found[1])


def parse(sass: str) -> list[Instruction]:
    """The instructions of one function as cuobjdump prints them."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    found = []
    for address, name, operands in line.findall(sass):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith(("BRA", "BSSY")) else None
        found.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    return found


def loops(code: list[Instruction]) -> list[Loop]:
    """The innermost ones. A branch to itself, which fills the end of a function, is none."""
    branches = ((x.target, x.address) for x in code if x.name.startswith("BRA") and x.target is not None)
    spans = {(begin, end) for begin, end in branches if begin < end}
    inner = [
        (begin, end)
        for begin, end in sorted(spans)
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    result = []
    for begin, end in inner:
        names = [x.name.partition(".")[0] for x in code if begin <= x.address <= end]
        multiplied = names.count("FFMA") + names.count("DFMA")
        result.append(Loop(len(names), names.count("HMMA"), multiplied, names.count("LDS")))
    return result


def copying_blocks(code: list[Instruction]) -> tuple[int, int]:
    """How many LDGSTS, and how many instructions there are in the basic blocks that have some."""
    targets = {x.target for x in code if x.name.startswith("BRA")}
    copies = instructions = 0
    block: list[str] = []
    for x in [*code, Instruction(-1, "BRA", None)]:
        ends = x.name.startswith(("BRA", "EXIT", "BAR", "CALL", "RET"))
        if x.address in targets or ends:
            count = sum(name.startswith("LDGSTS") for name in block)
            copies, instructions = copies + count, instructions + (len(block) if count else 0)
            block = []
        if not ends:
            block.append(x.name)
    return copies, instructions


def shared_bytes(nvcc: str, folder: Path) -> dict[str, int]:
    """Of a launch with each engine: the compiler is made to name the constants in its message."""
    engines = sorted({engine for engine, _ in ENGINES.values()})
    lines = [f'#include "{header}"' for header in HEADERS] + ["template <int N> struct Bytes;"]
    lines += ["using namespace cc_attention::cuda;"]
    lines += [f"Bytes<Shared<{engine}>::BYTES> x{n};" for n, engine in enumerate(engines)]
    source = folder / "bytes.cu"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [nvcc, "-std=c++17", "-cuda", f"-I{KERNELS}", "-o", str(folder / "bytes.ii"), str(source)]
    message = subprocess.run(command, capture_output=True, text=True).stderr
    numbers = [int(x) for x in re.findall(r"Bytes<\(?(?:int\))?(\d+)>", message)]
    if len(numbers) != len(engines):
        raise RuntimeError(f"the sizes of shared memory are not in the compiler's message:\n{message}")
    return dict(zip(engines, numbers, strict=True))


def measure(dtype: str, architecture: int, sizes: dict[str, int], folder: Path) -> dict[str, Kernel]:
    """Forward and backward of one engine."""
    nvcc, cuobjdump = tools()
    engine, element = ENGINES[dtype]
    source, binary = folder / "kernels.cu", folder / "kernels.cubin"
    instances = [
        f"template __global__ void {x}_kernel<{engine}, {element}>({x.title()}Pass<{element}>);"
        for x in ("forward", "backward")
    ]
    lines = [f'#include "{header}"' for header in HEADERS]
    source.write_text(
        "\n".join([*lines, "namespace cc_attention::cuda {", *instances, "}"]) + "\n", encoding="utf-8"
    )
    command = [nvcc, "-std=c++17", "-cubin", f"-arch=sm_{architecture}", f"-I{KERNELS}", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-o", str(binary), str(source)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    listing = subprocess.run([cuobjdump, "-sass", str(binary)], check=True, capture_output=True, text=True)
    result = {}
    for name in ("forward", "backward"):
        printed = done.stderr.split("Compiling entry function")
        text = next(x for x in printed if f"{name}_kernel" in x.partition("\n")[0])
        spilled = re.findall(r"(\d+) bytes spill", text)
        functions = listing.stdout.split("Function : ")
        code = parse(next(x for x in functions if f"{name}_kernel" in x.partition("\n")[0]))
        copies, copying = copying_blocks(code)
        registers = re.search(r"Used (\d+) registers", text)
        assert registers is not None
        result[name] = Kernel(
            int(registers[1]), sum(map(int, spilled)), sizes[engine], loops(code), copies, copying
        )
    return result


HEADING = [
    "kernel",
    "registers",
    "spilled bytes",
    "shared bytes",
    "loops with HMMA",
    "for 16 HMMA, at least",
    "at most",
    "per 64 bytes of a tile",
    "shared loads for 256 FFMA",
]


def row(name: str, kernel: Kernel) -> list[str]:
    products = [x for x in kernel.loops if x.hmma]
    every = [16 * x.instructions / x.hmma for x in products]
    longest = max((x.ffma for x in kernel.loops if x.ffma >= 64), default=0)
    multiplied = [256 * x.shared_loads / x.ffma for x in kernel.loops if longest and x.ffma == longest]
    cells = [name, str(kernel.registers), str(kernel.spilled_bytes), str(kernel.shared_bytes)]
    cells += [str(len(products)) if products else "–"]
    cells += [f"{best(every):.0f}" if every else "–" for best in (min, max)]
    cells += [f"{4 * kernel.copying / kernel.copies:.0f}" if kernel.copies else "–"]
    return [*cells, f"{max(multiplied):.0f}" if multiplied else "–"]


def table(rows: list[list[str]], markdown: bool) -> str:
    if markdown:
        lines = [HEADING, ["---"] + ["---:"] * (len(HEADING) - 1), *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[n]) for line in [HEADING, *rows]) for n in range(len(HEADING))]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in [HEADING, *rows]
    )


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architectures", type=numbers, default="80,90", help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(ENGINES), help="default: all")
    parser.add_argument("--markdown", action="store_true", help="the table for a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every loop, as JSON")
    options = parser.parse_args()
    unknown = set(options.dtypes.split(",")) - set(ENGINES)
    if unknown:
        parser.error(f"unknown dtypes {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    try:
        nvcc, _ = tools()
    except OSError as error:
        print(f"nothing to count: {error}")
        sys.exit(0)
    rows, counted = [], {}
    with tempfile.TemporaryDirectory() as name:
        sizes = shared_bytes(nvcc, Path(name))
        for architecture in options.architectures:
            for dtype in options.dtypes.split(","):
                for direction, kernel in measure(dtype, architecture, sizes, Path(name)).items():
                    title = f"sm_{architecture} {dtype} {direction}"
                    rows.append(row(title, kernel))
                    counted[title] = kernel._asdict() | {"loops": [x._asdict() for x in kernel.loops]}
    print(table(rows, options.markdown))
    if options.json:
        options.json.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
