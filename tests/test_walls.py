# SPDX-License-Identifier: Apache-2.0
"""The walls of the house (house rule 20): what must not be found on the wrong side of one."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
C_FILES = sorted(path for folder in ("csrc", "cuda", "tests") for path in ROOT.glob(f"{folder}/**/*.[ch]*"))
C_FILES += sorted(ROOT.glob("cuda/**/*.cu*"))
C_FILES = [path for path in C_FILES if "build" not in path.parts]  # of tests/ptxsim: generated
PYTHON_FILES = sorted(path for folder in ("moeshard", "tests", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py"))
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)


def code(path: Path) -> str:
    """The file without comments and strings, line numbers kept; the names of included files stay."""
    keep = re.compile(r"^\s*#\s*include[^\n]*", re.MULTILINE)
    text = path.read_text()
    included = {match.start(): match.group() for match in keep.finditer(text)}
    blank = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    for start, line in included.items():
        blank = blank[:start] + line + blank[start + len(line) :]
    return blank


def found(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line: text` of every match in the code of the files."""
    hits = []
    for path in paths:
        for number, line in enumerate(code(path).splitlines(), 1):
            if re.search(pattern, line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return hits


def outside(*folders: str) -> list[Path]:
    return [path for path in C_FILES if not any(path.is_relative_to(ROOT / folder) for folder in folders)]


def test_there_are_files_to_look_at() -> None:
    names = {path.name for path in C_FILES}
    assert {"moeshard.h", "step1_route.c", "step5_combine.c", "threads.c"} <= names
    assert "layer.py" in {path.name for path in PYTHON_FILES}


def test_only_the_binding_includes_python() -> None:
    assert not found(r"#\s*include.*(Python\.h|numpy/)", outside("csrc/python", "cuda/python", "tests/ptxsim"))


def test_only_cuda_includes_cuda_headers() -> None:
    assert not found(
        r"#\s*include.*(cuda\w*\.h|nccl\.h|cub/|cooperative_groups|cublas)",
        outside("cuda", "tests/cuda", "tests/ptxsim"),
    )


def test_assembler_is_only_in_ms_ptx() -> None:
    others = [path for path in outside("tests") if not re.fullmatch(r"ms_ptx\w*\.cuh", path.name)]
    assert not found(r"\b(asm|__asm__|__asm)\b", others)


def test_steps_allocate_only_through_buffers_that_grow() -> None:
    steps = sorted(ROOT.glob("csrc/step*.c"))
    assert len(steps) == 5
    assert not found(r"\b(malloc|calloc|realloc|aligned_alloc|posix_memalign|alloca|mmap|free)\s*\(", steps)


def test_the_core_does_not_print_exit_or_use_errno_as_a_channel() -> None:
    core = [path for path in outside("csrc/python", "tests") if path.is_relative_to(ROOT / "csrc")]
    assert not found(r"\b(printf|puts|perror|exit|abort|_exit)\s*\(|\bstderr\b|\bstdout\b", core)


def public_functions() -> Iterator[tuple[str, str, str]]:
    """(name, declaration, the comment right above it) of every function of moeshard.h."""
    comment: list[str] = []
    declaration = ""
    for line in (ROOT / "csrc/moeshard.h").read_text().splitlines():
        if line.startswith("//") and not declaration:
            comment.append(line)
        elif not line.strip() or line.startswith(("#", "}")):
            comment, declaration = [], ""
        else:
            declaration += " " + line.partition("//")[0].strip()
            if declaration.endswith(("{", ",")) and "(" not in declaration:
                comment, declaration = [], ""
            elif declaration.endswith(";"):
                function = re.match(r".*?\b(ms_\w+)\(", declaration)
                if function and not declaration.lstrip().startswith("typedef"):
                    yield function.group(1), declaration, "\n".join(comment)
                declaration = ""


def test_public_functions_are_found() -> None:
    assert {"ms_plan_shard", "ms_experts_pack", "ms_gather", "ms_combine_ranks"} <= {f[0] for f in public_functions()}


def test_every_public_function_that_can_fail_says_its_cost_and_errors() -> None:
    missing = [
        f"{name}: no {word}"
        for name, declaration, comment in public_functions()
        if "ms_error *err)" in declaration
        for word in ("Cost:", "Errors:")
        if word not in comment
    ]
    assert not missing, "\n".join(missing)


def test_every_source_file_names_its_licence() -> None:
    licence = "SPDX-License-Identifier: Apache-2.0"
    assert not [str(path) for path in (*C_FILES, *PYTHON_FILES) if licence not in path.read_text()[:4000]]


@pytest.mark.parametrize(
    "module",
    [
        "moeshard",
        "moeshard.bench",
        "moeshard.bench.encoder",
        "moeshard.cli",
        "moeshard.demo",
        "moeshard.doctor",
        "moeshard.planner",
        "moeshard.planner.calibration",
        "moeshard.planner.command",
        "moeshard.plans",
        "moeshard.profiles",
        "moeshard.speeds",
        "moeshard.text",
    ],
)
def test_importing_needs_no_torch(module: str) -> None:
    check = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_public_names_say_what_they_are() -> None:
    import moeshard

    bare = [name for name in moeshard.__all__ if not (getattr(moeshard, name).__doc__ or "").strip()]
    assert not bare
