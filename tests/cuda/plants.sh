#!/bin/bash
# plants.sh - gates must be able to fail: builds the engine with each planted bug (MS_PLANT_n in cuda/) and requires
# that a test catches it on ptxsim, with every seed that is tried.
#
#   tests/cuda/plants.sh [NUMBER...]    needs nvcc; SIMULATOR=DIR if ptxsim is not in tests/ptxsim/build; JOBS at a time
#
# "Plant 0" is no bug: it must pass, or what the others fail by may be something else.
#
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "$0")/../.."
export dir=build/plants simulator=${SIMULATOR:-tests/ptxsim/build}
jobs=${JOBS:-$(nproc)}
rm -rf $dir
mkdir -p $dir
top=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
export include=$(realpath "$top/bin/../include")
export common="-std=c++17 -O3 -lineinfo -cudart shared" # ptxsim runs PTX
export sm80="-gencode arch=compute_80,code=compute_80" sm90="-gencode arch=compute_90a,code=compute_90a -DMS_CUDA_SM90"

compile() { # source, object, flags
  case $1 in
  *_sm90.cu) nvcc $common $sm90 ${3-} -c "$1" -o "$2" ;;
  *.cu) nvcc $common $sm80 ${3-} -c "$1" -o "$2" ;;
  *) gcc -std=gnu11 -O2 ${3-} -I"$include" -c "$1" -o "$2" ;;
  esac
}
object_of() { echo "$dir/${1//\//_}.o"; }

# One planted bug: number, source, test, cases, seeds. Prints a line for each seed; fails if one passes.
plant() {
  local number=$1 source=$2 test=$3 cases=$4 seeds=$5 planted=$dir/planted_$1_$3.o program=$dir/plant_$1_$3 seed said sm=80
  compile "$source" "$planted" "-DMS_PLANT_$number"
  local others=()
  case $test in # what a test links beside the planted file
  test_ffn_sm90) sm=90 others=("$dir/csrc_base_error.c.o") ;;
  *) for object in "$dir"/cuda_*.o "$dir"/csrc_*.o; do [ "$object" = "$(object_of "$source")" ] || others+=("$object"); done ;;
  esac
  nvcc $common -o "$program" "$planted" "$dir/tests_cuda_$test.cu.o" "${others[@]}" -lm -lpthread -ldl
  for seed in $seeds; do
    said=0
    LD_LIBRARY_PATH=$simulator PTXSIM_SM=$sm PTXSIM_SEED=$seed timeout 100 "$program" ${cases:+"$cases"} \
      >"$program.log" 2>&1 || said=$?
    if [ "$number" = 0 ] && [ $said != 0 ]; then
      echo "WRONG: without a bug, $test fails: $(grep -m1 -e ERROR -e FAIL "$program.log")"
      return 1
    elif [ "$number" != 0 ] && [ $said = 0 ]; then
      echo "MISSED: plant $number in $source, seed $seed"
      return 1
    fi
  done
  [ "$number" = 0 ] && echo "passes: $test without a bug" && return
  echo "caught: plant $number in $source, seeds $seeds: $(grep -m1 -e ERROR -e FAIL "$program.log" | cut -c1-90)"
}
export -f compile object_of plant

ls cuda/step[235]*.cu cuda/step4_ffn.cu cuda/experts_convert.cu cuda/*.c csrc/base/error.c csrc/base/memory.c \
  csrc/exchange/exchange.c csrc/layout.c csrc/plan/plan.c csrc/reference.c csrc/step2_gather.c tests/cuda/test_{steps,engine,ffn,ffn_sm90}.cu |
  xargs -P "$jobs" -I{} bash -c 'compile {} "$(object_of {})"'

# number, source, test, cases that show it soonest, seeds
only=" $* "
while read -r line; do
  if [[ $only == "  " || $only == *" ${line%% *} "* ]]; then printf '%s\0' "$line"; fi
done <<'LIST' |
0 cuda/step3_group.cu test_steps "" "1"
0 cuda/engine.c test_engine R=3 "1"
0 cuda/step4_ffn.cu test_ffn "" "1"
0 cuda/step4_ffn_sm90.cu test_ffn_sm90 "" "1"
1 cuda/step4_ffn_sm90.cu test_ffn_sm90 "one tile" "1 2"
2 cuda/step4_ffn_sm90.cu test_ffn_sm90 "one tile" "1 2"
3 cuda/step4_ffn_sm90.cu test_ffn_sm90 "many steps" "1 2"
4 cuda/step4_ffn_sm90.cu test_ffn_sm90 "one tile" "1 2"
11 cuda/step3_group.cu test_steps "" "1 2 3"
12 cuda/step3_group.cu test_steps "" "1 2 3"
13 cuda/step3_group.cu test_steps "" "1 2 3"
14 cuda/step5_combine.cu test_steps "" "1 2 3"
15 cuda/engine.c test_engine R=3 "1 2 3"
16 cuda/engine.c test_engine R=3 "1 2 3"
17 cuda/engine.c test_engine R=3 "1 2 3"
18 cuda/step2_gather.cu test_steps "" "1 2 3"
19 cuda/step2_gather.cu test_steps "" "1"
20 cuda/step3_group.cu test_steps "" "1"
30 cuda/step3_group.cu test_steps "R=1 T=9000" "1 2 3"
31 cuda/step3_group.cu test_steps "R=1 T=9000" "1 2 3"
32 cuda/step3_group.cu test_steps "R=1 T=9000" "1 2 3"
33 cuda/step3_group.cu test_steps "R=1 T=9000" "1 2 3"
34 cuda/step3_group.cu test_steps "R=1 T=9000" "1 2 3"
21 cuda/step4_ffn.cu test_ffn "many steps" "1 2"
22 cuda/step4_ffn.cu test_ffn "many steps" "1 2"
23 cuda/step4_ffn.cu test_ffn "odd" "1 2"
24 cuda/step4_ffn.cu test_ffn "a full tile" "1"
25 cuda/step4_ffn.cu test_ffn "a full tile" "1"
26 cuda/step4_ffn.cu test_ffn "a full tile" "1"
27 cuda/step4_ffn.cu test_ffn "16 rows, many steps" "1 2"
28 cuda/step4_ffn.cu test_ffn "fma" "1 2"
29 cuda/step4_ffn.cu test_engine infinite "1"
40 cuda/step3_group.cu test_steps copied "1"
40 cuda/step3_group.cu test_engine "R=3 chunks=1 copied" "1"
41 cuda/step3_group.cu test_steps copied "1"
42 cuda/step3_group.cu test_steps copied "1"
42 cuda/step3_group.cu test_engine "R=3 chunks=1 copied" "1"
LIST
  xargs -0 -P "$jobs" -I{} bash -c 'plant {}'
