#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# run_tests.sh - builds the stand-in libraries and all test programs, runs them, and checks that planted bugs are
# caught. Needs nvcc and g++. PYTHON names a Python with numpy (torch is used when present), CUDA the toolkit.
cd "$(dirname "$0")" || exit 1
PYTHON=${PYTHON:-python3}
CUDA=${CUDA:-$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')}
export CUDA PYTHON LIBS=$PWD/build
bin=tests/bin log=tests/bin/log failed=0 start=$SECONDS
mkdir -p $bin

report() { printf "%-52s %s\n" "$1" "$2"; }
pass() { # name command...
  local name=$1
  shift
  if "$@" >$log 2>&1; then
    report "$name" ok
  else
    report "$name" FAILED
    tail -5 $log
    failed=1
  fi
}
caught() { # name text command...: must fail, and say the text
  local name=$1 text=$2
  shift 2
  if ! "$@" >$log 2>&1 && grep -q "$text" $log; then
    report "planted: $name" caught
  else
    report "planted: $name" MISSED
    tail -5 $log
    failed=1
  fi
}
caught_by_some_seed() { # name command...
  local name=$1 n=0
  shift
  for seed in 1 2 3 4 5 6; do PTXSIM_SEED=$seed "$@" >$log 2>&1 || n=$((n + 1)); done
  report "planted: $name" "caught by $n of 6 seeds"
  [ $n -gt 0 ] || failed=1
}
compile() { # program.cu output options...
  nvcc -O2 -std=c++17 -cudart none -w "tests/$1" -o "$bin/$2" "${@:3}" -Xlinker "$LIBS/libcudart.so.13" || exit 1
}

make -s -j2 || exit 1
sm80="-gencode arch=compute_80,code=compute_80" cubin="-gencode arch=compute_80,code=sm_80"
sm90="-gencode arch=compute_90a,code=compute_90a"
compile basic.cu basic $sm80 $cubin
compile kernels.cu kernels $sm80 $cubin
compile hopper.cu hopper $sm90
compile hopper_async.cu hopper_async $sm90
compile races.cu races $sm80 -lineinfo
compile cooperative.cu cooperative $sm80 -lineinfo
compile misc.cu misc $sm80 -Xlinker "$LIBS/libnccl.so.2"
[ $bin/cubtest -nt tests/cubtest.cu ] || compile cubtest.cu cubtest $sm80
compile pyext.cu pyext.so $sm80 $cubin -Xcompiler -fPIC -shared \
  -I"$($PYTHON -c "import sysconfig; print(sysconfig.get_paths()['include'])")"
for p in nccl_test nccl_more ipc; do
  g++ -O1 -std=c++17 -w -I"$CUDA/include" tests/$p.cpp -o $bin/$p "$LIBS/libnccl.so.2" "$LIBS/libcudart.so.13" || exit 1
done
export LD_LIBRARY_PATH=$LIBS

pass "basic: opcodes, calls, graphs" $bin/basic
for seed in 1 2; do
  for k in fp32 moe hist tf32 s8 mask exit align host streams; do
    pass "kernels $k, seed $seed" env PTXSIM_SEED=$seed $bin/kernels $k
  done
done
for m in ampere hopper; do pass "moe, $m arithmetic" env PTXSIM_MMA=$m $bin/kernels moe; done
pass "hopper: mbarrier, bulk copy, wgmma" env PTXSIM_SM=90 $bin/hopper
for t in register-a bulk-store stmatrix; do pass "hopper_async $t" env PTXSIM_SM=90 $bin/hopper_async $t; done
pass "cooperative groups, threads as NCCL ranks" env PTXSIM_DEVICES=3 $bin/misc
pass "CUB sort, scan, reduce, histogram" $bin/cubtest
pass "CPython extension with DLPack" env PYTHONDONTWRITEBYTECODE=1 $PYTHON tests/drive_pyext.py
pass "IPC memory handles between two processes" $bin/ipc

# Races on global memory and between streams; eager launching makes missing stream order harmless by luck
for t in rows read-other exchange ticket ticket-acq-rel grid-sync streams copy-out graph; do
  pass "races $t" $bin/races $t
  caught "races $t" "race" env PTXSIM_LAUNCH=eager $bin/races $t-bug
done
# Blocks that wait for each other
for seed in 1 2; do for t in meet graph flag limits; do
  pass "cooperative $t, seed $seed" env PTXSIM_SEED=$seed PTXSIM_RESIDENT=4 $bin/cooperative $t
done; done
caught "cooperative, one block does not wait" "global-memory race" $bin/cooperative no-meeting
caught "cooperative, one block never comes" "deadlock" $bin/cooperative missing
caught "blocks that meet in a launch that is not cooperative" "only those of a cooperative launch" $bin/cooperative plain
pass "races bytes of one word, same value" eval "$bin/races bytes && $bin/races same-value"
caught "races same-value, strict" "global-memory race" env PTXSIM_GLOBAL_RACE=2 $bin/races same-value
export PTXSIM_SM=90
caught "wgmma without any fence" "no wgmma.fence" $bin/hopper_async no-fence
caught "wgmma fence before operands are written" "since the last wgmma.fence" $bin/hopper_async late-fence
caught "wgmma result read without wait" "not been waited for" $bin/hopper_async no-wait
caught "wgmma operand overwritten before wait" "which a wgmma" $bin/hopper_async overwrite
caught "wgmma without fence.proxy.async" "fence.proxy.async" $bin/hopper_async wgmma-no-proxy-fence
caught "bulk store without fence.proxy.async" "fence.proxy.async" $bin/hopper_async bulk-no-proxy-fence
unset PTXSIM_SM

# Counters and coverage
rm -f $bin/c.json $bin/cov.json
PTXSIM_COUNTERS=$bin/c.json BIG=1 $bin/kernels moe >/dev/null
pass "counters: no bank conflicts with swizzle" grep -q \
  '"shared_req":6144,"shared_wavefronts":24576,"shared_ideal":24576' $bin/c.json
compile kernels.cu k_8 $sm80 -DBUG=8
rm -f $bin/c.json
PTXSIM_COUNTERS=$bin/c.json BIG=1 $bin/k_8 moe >/dev/null
pass "counters: conflicts without swizzle" grep -qE \
  '"shared_wavefronts":[4-9][0-9]{4},"shared_ideal":24576' $bin/c.json
for t in rows ticket; do PTXSIM_COVERAGE=$bin/cov.json $bin/races $t >/dev/null; done
PTXSIM_COVERAGE=$bin/cov.json $bin/cooperative meet >/dev/null
$PYTHON coverage.py $bin/cov.json >$bin/cov.txt
row=$(grep -n 'out\[row' tests/races.cu | cut -d: -f1) same=$(grep -n 'out\[threadIdx.x\] = 7' tests/races.cu | cut -d: -f1)
call=$(grep -n '  meet(word);' tests/cooperative.cu | cut -d: -f1)
pass "coverage: lines executed and not, a call of an inlined function" $PYTHON - $bin/cov.json "$row" "$same" "$call" <<'PY'
import sys
sys.path.insert(0, ".")
sys.dont_write_bytecode = True
import coverage
files = coverage.merge(sys.argv[1])
races, cooperative = (next(v for k, v in files.items() if k.endswith(name)) for name in ("races.cu", "cooperative.cu"))
row, same, call = map(int, sys.argv[2:])
assert races[row] > 0 and races[same] == 0 and cooperative[call] > 0 and 0 not in cooperative
PY

# NCCL
export PTXSIM_NCCL_TIMEOUT=10
for n in 1 2 4; do pass "nccl, $n processes" tests/nccl_run.sh $n ok; done
for m in nonblocking abort; do pass "nccl_more $m, 3 processes" tests/nccl_run.sh 3 $m nccl_more; done
if $PYTHON -c "import torch.distributed.run" 2>/dev/null; then
  id=$(mktemp -u)
  pass "nccl_more under torchrun" env PTXSIM_DEVICES=2 $PYTHON -m torch.distributed.run --standalone \
    --nproc-per-node 2 --no-python $bin/nccl_more $id nonblocking
  rm -f $id
fi
for m in count order die early; do caught_by_some_seed "nccl $m" tests/nccl_run.sh 2 $m; done
SEEDS=2 tests/bugs.sh || failed=1

echo "$((SECONDS - start)) s; $([ $failed = 0 ] && echo ALL OK || echo FAILURES)"
exit $failed
