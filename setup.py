# SPDX-License-Identifier: Apache-2.0
"""Builds moeshard._core (the C core, its kernels once per instruction set, the binding) and moeshard._cuda (with nvcc).

Environment:
  MOESHARD_CUDA=auto|0|1       build _cuda: if there is an nvcc (default), never, or stop when there is none
  MOESHARD_NVCC=PATH           which nvcc; else the one on PATH, else that of pip's cuda-toolkit
  MOESHARD_CUDA_ARCHS=LIST     what to compile for: "90a" machine code, "80+PTX" also PTX, for later devices
  MOESHARD_WERROR=1            all warnings, as errors
  MOESHARD_DEBUG=1             -O0 -g
  MOESHARD_SANITIZE=NAMES      address,undefined or thread
Changing one of them rebuilds nothing by itself: `python setup.py build_ext --inplace --force` does.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

if not sys.platform.startswith("linux"):
    sys.exit(f"moeshard needs Linux (futexes, /dev/shm), this is {sys.platform}")

VERSION = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
KERNELS = "csrc/kernels/kernels.c"
SOURCES = sorted(
    set(glob("csrc/*.c") + glob("csrc/*/*.c")) - {KERNELS, "csrc/reference.c"}  # reference.c is for the C tests
)
HEADERS = sorted(glob("csrc/*.h") + glob("csrc/*/*.h"))

ISAS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = [
        *ISAS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]

# The stable ABI of CPython 3.11 serves every later one, except free-threaded builds, which have none before 3.15.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")

COMPILE = ["-std=gnu11", "-fvisibility=hidden", "-pthread"]
LINK = ["-pthread"]
if os.environ.get("MOESHARD_DEBUG") == "1":
    COMPILE += ["-O0", "-g"]
else:
    COMPILE += ["-O3"]
    LINK += ["-Wl,--strip-debug"]  # Python's own flags may ask for -g: 1.5 MB instead of 0.2
if os.environ.get("MOESHARD_WERROR") == "1":
    COMPILE += ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
if sanitizers := os.environ.get("MOESHARD_SANITIZE"):
    flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"]
    COMPILE += flags
    LINK += flags


# ---- CUDA ---------------------------------------------------------------------------------------

CUDA_CHOICE = os.environ.get("MOESHARD_CUDA", "auto")
CUDA_RUNTIME = "libcudart.so.13"
CUDA_ARCHS = os.environ.get("MOESHARD_CUDA_ARCHS", "80+PTX;90a;100a").split(";")
# _cuda links these files of _core, so that tensors, errors and the check of headers are the same in both.
CUDA_SOURCES = [
    *(f"csrc/{name}.c" for name in ("base/error", "base/memory", "plan/plan", "layout")),
    *(f"csrc/{name}.c" for name in ("exchange/exchange", "step2_gather")),
    *(f"csrc/python/{name}.c" for name in ("arrays", "error", "experts_args", "routing_args", "state", "tensor")),
    "csrc/python/tensor_view.c",
    *sorted(glob("cuda/*.c") + glob("cuda/exchange/*.c") + glob("cuda/python/*.c")),
]
CUDA_KERNELS = sorted(glob("cuda/*.cu"))
CUDA_HEADERS = sorted(glob("cuda/*.h") + glob("cuda/*.cuh") + glob("cuda/*/*.h"))
HAS_SM90 = any(arch.startswith("90a") for arch in CUDA_ARCHS)
CUDA_MACROS = [("MS_CUDA_SM90", "1")] if HAS_SM90 else []


def find_nvcc():
    """The nvcc to use, or None."""
    if named := os.environ.get("MOESHARD_NVCC"):
        return named
    if on_path := shutil.which("nvcc"):
        return on_path
    package = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    wheels = [Path(folder, "bin/nvcc") for folder in package.submodule_search_locations] if package else []
    return next((str(path) for path in wheels if path.exists()), None)


def find_toolkit(nvcc):
    """The folder nvcc calls its own: the file may be a script that calls the real one elsewhere."""
    try:
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"MOESHARD_NVCC={nvcc}: {error.strerror}")
    top = re.search(r"^#\$ TOP=(.*)$", said.stderr, re.MULTILINE)
    if not top:
        sys.exit(f"{nvcc} does not say where its toolkit is:\n{said.stderr}")
    return Path(top[1])


def gencodes(source):
    """nvcc's -gencode options for a file of kernels; those of *_sm90.cu run on compute capability 9.0 only."""
    flags = []
    for arch in CUDA_ARCHS:
        parts = re.fullmatch(r"(\d+a?)(\+PTX)?", arch)
        if not parts:
            sys.exit(f"MOESHARD_CUDA_ARCHS: got '{arch}', expected entries such as 80+PTX;90a;100a")
        number, ptx = parts.groups()
        if source.endswith("_sm90.cu") and number != "90a":
            continue
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"] if ptx else []
    return flags


def cuda_extension(nvcc):
    """moeshard._cuda, linked to the shared CUDA runtime: torch's copy, if torch is imported first."""
    toolkit = find_toolkit(nvcc)
    runtime = [path for lib in ("lib64", "lib") for path in sorted(toolkit.glob(f"{lib}/{CUDA_RUNTIME}"))]
    if not runtime:
        sys.exit(f"{nvcc}: no {CUDA_RUNTIME} in {toolkit}: moeshard needs CUDA 13 (MOESHARD_CUDA=0 builds without)")
    extension = Extension(
        "moeshard._cuda",
        CUDA_SOURCES,
        include_dirs=[numpy.get_include(), str(toolkit / "include")],
        define_macros=[("MS_VERSION", f'"{VERSION}"'), *CUDA_MACROS],
        extra_compile_args=[*COMPILE, "-ffp-contract=off"],
        extra_objects=[str(runtime[0])],
        # In an installed package the runtime of pip's wheels lies beside this one.
        extra_link_args=[*LINK, "-Wl,--enable-new-dtags,-rpath,$ORIGIN/../nvidia/cu13/lib"],
        libraries=["dl", "rt"],
        depends=[*HEADERS, *CUDA_HEADERS, *CUDA_KERNELS, "setup.py", "pyproject.toml"],
        py_limited_api=ABI3,
    )
    extension.nvcc = nvcc
    return extension


if CUDA_CHOICE not in ("0", "1", "auto"):
    sys.exit(f"MOESHARD_CUDA={CUDA_CHOICE}: expected 0, 1 or auto")
NVCC = None if CUDA_CHOICE == "0" else find_nvcc()
if CUDA_CHOICE == "1" and not NVCC:
    sys.exit(
        "MOESHARD_CUDA=1 but no nvcc: set MOESHARD_NVCC, put nvcc on PATH, or "
        "pip install 'cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*'"
    )

# ---- both ---------------------------------------------------------------------------------------


class BuildExt(build_ext):
    """Adds to the C files of an extension what distutils cannot compile: kernels per instruction set, .cu files."""

    def build_extension(self, ext):
        if self.force or newer_group([*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name)):
            ext.extra_objects += self.cuda_objects(ext) if ext.name == "moeshard._cuda" else self.isa_objects()
        super().build_extension(ext)

    def isa_objects(self):
        """The CPU's kernels, once per instruction set; each build names its own table, so a mix-up cannot link."""
        objects = []
        for isa, flags in ISAS.items():
            objects += self.compiler.compile(
                [KERNELS],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("MS_ISA", isa)],
                extra_postargs=[*COMPILE, "-ffp-contract=fast", *flags],
            )
        return objects

    def cuda_objects(self, ext):
        """The .cu files, several at a time; those that did not change since are kept."""
        folder = Path(self.build_temp, "cuda", "_".join(CUDA_ARCHS))
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-lineinfo", "--threads=0", *(f"-D{name}={value}" for name, value in CUDA_MACROS)]
        flags += ["--compress-mode=size"]  # an eighth of the bytes, as fast to build
        # Linked by the C compiler, without libstdc++: any of these features would ask for it, at import.
        host = "-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics"
        if os.environ.get("MOESHARD_WERROR") == "1":
            flags += ["-Werror", "all-warnings"]
            host += ",-Wall,-Wextra"

        def compile_kernels(source):
            target = folder / Path(source).with_suffix(".o").name
            known = target.with_suffix(".d")  # what it includes: a line "target : source header ...", by nvcc
            inputs = known.read_text().replace("\\\n", " ").partition(" : ")[2].split() if known.exists() else []
            if self.force or not inputs or newer_group([*inputs, "setup.py"], str(target), missing="newer"):
                options = [*flags, "-Xcompiler", host, *gencodes(source), "-MMD", "-MF", str(known)]
                self.spawn([ext.nvcc, *options, "-c", source, "-o", str(target)])
            return str(target)

        kernels = [source for source in CUDA_KERNELS if gencodes(source)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(compile_kernels, kernels))


setup(
    ext_modules=[
        Extension(
            "moeshard._core",
            SOURCES,
            include_dirs=[numpy.get_include()],
            define_macros=[
                ("MS_VERSION", f'"{VERSION}"'),
                *([] if "avx2" in ISAS else [("MS_ONLY_GENERIC", None)]),
            ],
            extra_compile_args=[*COMPILE, "-ffp-contract=off"],
            extra_link_args=LINK,
            libraries=["m", "rt"],
            depends=[*HEADERS, KERNELS, "setup.py", "pyproject.toml"],
            py_limited_api=ABI3,
        ),
        *([cuda_extension(NVCC)] if NVCC else []),
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
