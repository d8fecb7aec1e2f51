#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# bugs.sh - builds every planted bug of kernels.cu and reports by how many of SEEDS seeds it is caught, and how.
cd "$(dirname "$0")" || exit 1
LIBS=${LIBS:-$PWD/../build}
export LD_LIBRARY_PATH=$LIBS
SEEDS=${SEEDS:-3} failed=0

run() { # number test description
  nvcc -O2 -std=c++17 -cudart none -w -gencode arch=compute_80,code=compute_80 -DBUG=$1 kernels.cu -o bin/k_$1 \
    -Xlinker "$LIBS/libcudart.so.13" || exit 9
  local n=0 how="" seed
  for ((seed = 1; seed <= SEEDS; seed++)); do
    PTXSIM_SEED=$seed PTXSIM_TIMEOUT=20 timeout 60 ./bin/k_$1 $2 >bin/out 2>bin/err || n=$((n + 1))
    [ -z "$how" ] && how=$(grep -m1 -h "ptxsim ERROR\|ptxsim:" bin/err | cut -c1-90)
  done
  printf "bug %-3s %-52s caught %d/%d  %s\n" $1 "$3" $n $SEEDS "${how:-(wrong result)}"
  [ $n -ge $SEEDS ] || failed=1
}
run 1 fp32 "barrier missing after smem fill"
run 2 fp32 "barrier missing before smem refill"
run 3 fp32 "missing bounds check on store"
run 4 moe "cp.async.wait_group off by one"
run 5 moe "barrier missing after wait_group"
run 6 moe "barrier missing before next cp.async, same stage"
run 7 moe "two registers swapped in the mma asm"
run 9 moe "> for >= on a row bound"
run 11 moe "too little dynamic shared memory"
run 20 hist "barrier missing after clearing counters"
run 21 hist "barrier missing after shared atomics"
run 22 hist "syncwarp missing before reading another lane's data"
run 30 tf32 "one lane missing from mma"
run 40 mask "full mask while half the warp has left"
run 42 exit "early return before a barrier"
run 43 align "16-byte load at a 4-byte offset"
run 44 host "host pointer passed to a kernel"
run 45 host "use after cudaFree"
run 46 streams "cudaStreamWaitEvent left out"
exit $failed
