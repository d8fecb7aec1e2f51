# SPDX-License-Identifier: Apache-2.0
"""Builds moeshard._core: the C core, its kernels once per instruction set, and the binding.

Environment: MOESHARD_WERROR=1 (all warnings, as errors), MOESHARD_DEBUG=1 (-O0 -g), MOESHARD_SANITIZE=address,undefined
(or thread), MOESHARD_CUDA=0|auto|1 (this version has no CUDA engine: 1 stops). Changing one of them rebuilds nothing by
itself: `python setup.py build_ext --inplace --force` does.
"""

import os
import platform
import sys
import sysconfig
import tomllib
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

cuda = os.environ.get("MOESHARD_CUDA", "auto")
if cuda == "1":
    sys.exit("MOESHARD_CUDA=1, but this version of moeshard has no CUDA engine: unset it")
if cuda not in ("0", "auto"):
    sys.exit(f"MOESHARD_CUDA={cuda}: expected 0, 1 or auto")


class BuildExt(build_ext):
    """Compiles the kernels once per instruction set; each build names its own table, so a mix-up cannot link."""

    def build_extension(self, ext):
        if self.force or newer_group([*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name)):
            for isa, flags in ISAS.items():
                ext.extra_objects += self.compiler.compile(
                    [KERNELS],
                    output_dir=os.path.join(self.build_temp, isa),
                    macros=[("MS_ISA", isa)],
                    extra_postargs=[*COMPILE, "-ffp-contract=fast", *flags],
                )
        super().build_extension(ext)


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
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
)
