#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Static budgets of the CUDA kernels: what the compiled code of each may cost, in a table that changes are reviewed in.

    python tests/cuda/budgets.py FILE            compare the kernels in FILE (_cuda*.so or .o) with budgets.json
    python tests/cuda/budgets.py FILE --write    make budgets.json anew

A cubin is an ELF file: section .text.<kernel> holds 16-byte instructions, opcode in the low 12 bits; .nv.info holds the
registers of each. The table holds, for each target and kernel, registers and counts of the instructions below; accesses
to global memory also by width; CALL is a slow path of a division or of a warp's collective. The table is exact for one
version of nvcc; with another one only the rules hold: no spill (LDL, STL), and what a kernel is known for (CLAIMS).
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
OPCODES = {
    0x23C: "HMMA", 0x9F0: "HGMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0x3BA: "UBLKCP", 0x981: "LDG", 0x986: "STG",
    0x984: "LDS", 0x988: "STS", 0x388: "STS", 0x983: "LDL", 0x387: "STL", 0x987: "STL", 0x223: "FFMA", 0x308: "MUFU",
    0xB1D: "BAR", 0x943: "CALL", 0x944: "CALL",
}  # fmt: skip
BY_WIDTH = {"LDG", "STG", "LDGSTS"}
WIDTHS = {4: 32, 5: 64, 6: 128}  # bits 73..75; others are narrower than 32 bits
FORBIDDEN = ("LDL", "STL")  # spills
CLAIMS = {"ms_ffn<": ("HMMA", "LDSM", "LDGSTS"), "ms_ffn_sm90<": ("HGMMA", "LDGSTS")}

Budget = dict[str, int]


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every section of an ELF64 file."""
    table, entry_size, count, names = *struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry_size) for i in range(count)]
    texts = headers[names][4]
    for name, _, _, _, offset, size, *_ in headers:
        start = texts + name
        yield elf[start : elf.index(b"\0", start)].decode(), elf[offset : offset + size]


def registers(info: bytes, symbols: bytes, names: bytes) -> dict[str, int]:
    """{mangled kernel: registers} from .nv.info: {u8 format, u8 attribute, u16 size or value}, content in format 4."""
    found, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if form == 4 and attribute == 0x2F:  # EIATTR_REGCOUNT: symbol, registers
            symbol, count = struct.unpack_from("<II", info, at + 4)
            (start,) = struct.unpack_from("<I", symbols, 24 * symbol)
            found[names[start : names.index(b"\0", start)].decode()] = count
        at += 4 + (size if form == 4 else 0)
    return found


def instructions(code: bytes, target: str) -> Budget:
    """How often a kernel has each instruction that is counted."""
    counts: Counter[str] = Counter()
    for low, high in struct.iter_unpack("<QQ", code):
        if name := OPCODES.get(low & 0xFFF):
            counts[name] += 1
            if name in BY_WIDTH and (name, target) != ("LDGSTS", "sm_100"):  # says it elsewhere
                counts[f"{name}.{WIDTHS.get(high >> 9 & 7, '<32')}"] += 1
    return dict(sorted(counts.items()))


def demangled(names: list[str]) -> list[str]:
    """C++ names without return types and parameters: ms_ffn_up<__nv_bfloat16, 128>."""
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void ", "", line).replace("(anonymous namespace)::", "") for line in text.splitlines()]


def cubins(binary: bytes) -> Iterator[tuple[str, bytes]]:
    """(target, cubin) of everything that nvcc has put into section .nv_fatbin of a shared object or object file.

    Fat binaries {u32 magic, u16 version, u16 header size, u64 size} hold entries {u16 kind (1 PTX, 2 cubin), u16, u32
    header size, u64 size, u32 compressed size, 8 bytes, u32 architecture, 24 bytes, u64 expanded size ...} in front of
    their content.
    """
    fat = dict(sections(binary))[".nv_fatbin"]
    at = 0
    while (at := fat.find(struct.pack("<I", 0xBA55ED50), at)) >= 0:
        header, size = struct.unpack_from("<HQ", fat, at + 6)
        entry, at = at + header, at + header + size
        while entry < at:
            kind, skip, length, packed, architecture, expanded = struct.unpack_from("<H2xIQI8xI24xQ", fat, entry)
            if kind == 2:
                cubin = fat[entry + skip : entry + skip + (packed or length)]
                yield f"sm_{architecture}", unzstd(cubin, expanded) if packed else cubin
            entry += skip + length


def unzstd(packed: bytes, size: int) -> bytes:
    """Expand a Zstandard frame: Python has no module for it before 3.14, the system has the library."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    out = ctypes.create_string_buffer(size)
    if library.ZSTD_decompress(out, size, packed, len(packed)) != size:
        raise SystemExit("a cubin is compressed in another way: build with nvcc -Xfatbin -compress=false")
    return out.raw


def kernels(binary: Path) -> dict[str, dict[str, Budget]]:
    """{target: {kernel: budget}} of a binary that nvcc has made."""
    found: dict[str, dict[str, Budget]] = {}
    for target, cubin in cubins(binary.read_bytes()):
        parts = dict(sections(cubin))
        used = registers(parts[".nv.info"], parts[".symtab"], parts[".strtab"])
        mangled = [name[6:] for name in parts if name.startswith(".text.")]
        for name, plain in zip(mangled, demangled(mangled), strict=True):
            budget = {"registers": used[name], **instructions(parts[f".text.{name}"], target)}
            found.setdefault(target, {})[plain] = budget
    return {target: dict(sorted(found[target].items())) for target in sorted(found)}


def compiler() -> str:
    """The version of nvcc: 13.0.88."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V([\d.]+)", said)
    return version[1] if version else said


def broken_rules(found: dict[str, dict[str, Budget]]) -> Iterator[str]:
    """What holds for every compiler."""
    for target, budgets in found.items():
        for kernel, budget in budgets.items():
            for name in FORBIDDEN:
                if budget.get(name, 0):
                    yield f"{target} {kernel}: {budget[name]} {name}, expected none"
            for name, needed in CLAIMS.items():
                missing = [instruction for instruction in needed if not budget.get(instruction)]
                if kernel.startswith(name) and missing:
                    yield f"{target} {kernel}: no {', '.join(missing)}"


def differences(found: dict[str, dict[str, Budget]], table: dict[str, dict[str, Budget]]) -> Iterator[str]:
    """Every number that is not the table's."""
    for target in sorted({*found, *table}):
        ours, theirs = found.get(target, {}), table.get(target, {})
        for kernel in sorted({*ours, *theirs}):
            one, other = ours.get(kernel), theirs.get(kernel)
            if one is None or other is None:
                yield f"{target} {kernel}: {'gone' if one is None else 'new, not in the table'}"
                continue
            for name in sorted({*one, *other}):
                if one.get(name, 0) != other.get(name, 0):
                    yield f"{target} {kernel}: {name} {one.get(name, 0)}, the table says {other.get(name, 0)}"


def excess(found: dict[str, dict[str, Budget]]) -> list[str]:
    """What is wrong with the kernels of a binary; nothing: all is as in the table."""
    table, wrong = json.loads(TABLE.read_text()), list(broken_rules(found))
    if table["nvcc"] == compiler():
        wrong += differences(found, {target: table["kernels"].get(target, {}) for target in found})
    return wrong


def as_text(found: dict[str, dict[str, Budget]]) -> str:
    """The table, a kernel a line, so that a change of one is a line of the diff."""
    targets = [
        f'  "{target}": {{\n'
        + ",\n".join(f"   {json.dumps(kernel)}: {json.dumps(budget)}" for kernel, budget in budgets.items())
        + "\n  }"
        for target, budgets in found.items()
    ]
    return f'{{\n "nvcc": "{compiler()}",\n "kernels": {{\n' + ",\n".join(targets) + "\n }\n}\n"


def main(arguments: list[str]) -> int:
    """The program."""
    write = "--write" in arguments
    names = [argument for argument in arguments if argument != "--write"]
    if len(names) != 1:
        print(__doc__)
        return 2
    found = kernels(Path(names[0]))
    if write:
        TABLE.write_text(as_text(found))
    wrong = excess(found)
    print("\n".join(wrong) or "all kernels within their budgets")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
