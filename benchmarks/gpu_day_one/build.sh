#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that gpu_day_one runs, for sm_90a, into one folder: bash benchmarks/gpu_day_one/build.sh DIR
#
# Needs nvcc 13 and gcc; python3 with setuptools and numpy for the extension modules. A program that does not build is
# left out and named at the end: the others run without it.
#
#   DIR/fragments, DIR/test_*            the programs of tests/cuda (all with --repeat and --time)
#   DIR/plant_N                          test_ffn_sm90 with planted bug N of the kernels: must fail
#   DIR/lib/moeshard/_core, _cuda        the extensions, beside the Python files
set -u
cd "$(dirname "$0")/../.."
dir=$1
mkdir -p "$dir/objects" "$dir/lib"
dir=$(cd "$dir" && pwd)
sm90="-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90a,code=compute_90a"
cuda="-std=c++17 -O3 -cudart shared -lineinfo --compress-mode=size -DMS_CUDA_SM90 $sm90
      -Xcompiler -Wall,-Wextra,-fPIC,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics"
jobs=$(nproc)
failed=()

# The launchers and what of the C core they need.
compile() {
  local object="$dir/objects/$(echo "$1" | tr / _).o"
  case $1 in
  *.cu) nvcc $cuda -c "$1" -o "$object" ;;
  *) gcc -std=gnu11 -O2 -fPIC -DMS_CUDA_SM90 -I"$(dirname "$(realpath "$(nvcc --dryrun -x cu /dev/null 2>&1 |
    sed -n 's/^#\$ TOP=//p')/bin")")/include" -c "$1" -o "$object" ;;
  esac || echo "did not compile: $1"
}
export -f compile
export dir cuda
rm -f "$dir"/objects/*
ls cuda/*.cu cuda/*.c cuda/exchange/*.c csrc/base/*.c csrc/plan/*.c csrc/exchange/*.c csrc/reference.c csrc/layout.c csrc/step2_gather.c 2>/dev/null |
  xargs -P "$jobs" -I{} bash -c 'compile {}' 2>&1 | tee "$dir/objects/log"
rm -f "$dir/libmoeshard.a"
ar rcs "$dir/libmoeshard.a" "$dir"/objects/*.o

link() { # name, source, flags
  nvcc $cuda $3 -o "$dir/$1" "$2" "$dir/libmoeshard.a" -ldl -lrt -lpthread || failed+=("$1")
}
nvcc $cuda -o "$dir/fragments" benchmarks/gpu_day_one/fragments.cu || failed+=(fragments)
for source in tests/cuda/test_*.cu; do
  case $source in *counts.cu) more=tests/cuda/counted_calls.c ;; *) more= ;; esac
  link "$(basename "$source" .cu)" "$source" "$more"
done
for n in 1 2 3 4; do
  nvcc $cuda "-DMS_PLANT_$n" -o "$dir/plant_$n" tests/cuda/test_ffn_sm90.cu cuda/step4_ffn_sm90.cu \
    "$dir/objects/csrc_base_error.c.o" || failed+=("plant_$n")
done

if [ "${EXTENSION:-1}" = 1 ]; then
  python=${PYTHON:-python3}
  MOESHARD_CUDA=1 MOESHARD_CUDA_ARCHS="80;90a+PTX" "$python" benchmarks/gpu_day_one/setup_here.py -q build --build-lib "$dir/lib" \
    --build-temp "$dir/objects/python" >"$dir/objects/extension.log" 2>&1 ||
    { failed+=(extension); tail -5 "$dir/objects/extension.log"; }
fi
rm -rf "$dir/objects" "$dir/libmoeshard.a"
[ ${#failed[@]} = 0 ] || echo "did not build: ${failed[*]}"
