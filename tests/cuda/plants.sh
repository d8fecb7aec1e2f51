#!/bin/bash
# plants.sh - gates must be able to fail: builds the steps and the engine with each planted bug (MS_PLANT_11 to 18) and
# requires that a test catches it on ptxsim, with several seeds. A minute; not part of `make test-gpu`.
#
#   tests/cuda/plants.sh      needs nvcc; SIMULATOR=DIR if ptxsim is not in tests/ptxsim/build
#
# "Plant 0" is no bug: it must pass, or what the others fail by may be something else.
#
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/../.."
dir=build/plants
simulator=${SIMULATOR:-tests/ptxsim/build}
mkdir -p $dir
top=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
cuda="-std=c++17 -O3 -lineinfo -cudart shared -gencode arch=compute_80,code=compute_80" # ptxsim runs PTX

compile() { # source, object, flags
  case $1 in
  *.cu) nvcc $cuda ${3-} -c "$1" -o "$2" ;;
  *) gcc -std=gnu11 -O2 ${3-} -I"$(realpath "$top/bin/../include")" -c "$1" -o "$2" ;;
  esac
}
for source in cuda/*.cu cuda/*.c csrc/base/error.c csrc/base/memory.c csrc/exchange/exchange.c csrc/reference.c \
  csrc/step2_gather.c tests/cuda/test_steps.cu tests/cuda/test_engine.cu; do
  case $source in *sm90*) continue ;; esac
  compile "$source" "$dir/${source//\//_}.o"
done

missed=0
plant() { # number, source, test, cases
  compile "$2" $dir/planted.o "-DMS_PLANT_$1"
  nvcc $cuda -o $dir/test $dir/planted.o "$dir/tests_cuda_$3.cu.o" \
    $(ls $dir/*_*.o | grep -v -e "${2//\//_}.o" -e tests_cuda) -lm -lpthread
  for seed in 1 2 3; do
    if LD_LIBRARY_PATH=$simulator PTXSIM_SEED=$seed timeout 100 $dir/test ${4-} >$dir/log 2>&1; then
      [ "$1" = 0 ] && continue
      echo "MISSED: plant $1 in $2, seed $seed"
      missed=1
    elif [ "$1" = 0 ]; then
      echo "without a bug, $3 fails: $(grep -m1 -e ERROR -e FAIL $dir/log)"
      exit 1
    else
      echo "caught: plant $1 in $2, seed $seed: $(grep -m1 -e ERROR -e FAIL $dir/log | cut -c1-90)"
    fi
  done
}
plant 0 cuda/step3_group.cu test_steps
plant 0 cuda/engine.c test_engine R=3
plant 11 cuda/step3_group.cu test_steps
plant 12 cuda/step3_group.cu test_steps
plant 13 cuda/step3_group.cu test_steps
plant 14 cuda/step5_combine.cu test_steps
plant 15 cuda/engine.c test_engine R=3
plant 16 cuda/engine.c test_engine R=3
plant 17 cuda/engine.c test_engine R=3
plant 18 cuda/step2_gather.cu test_steps
exit $missed
