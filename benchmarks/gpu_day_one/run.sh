#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The first day on a real GPU (compute capability 9.0): is everything that ptxsim says true, and how fast is it.
#
#   bash benchmarks/gpu_day_one/run.sh OUTDIR            about 8 minutes; QUICK=1: about 4
#   PREBUILT=DIR bash ... run.sh OUTDIR                  with what build.sh DIR made on another machine
#   OLD=DIR bash ... run.sh OUTDIR                       times beside those of an older build
#
# Needs nvcc 13 (or PREBUILT) and python3 with torch for CUDA; no network; changes nothing outside OUTDIR.
# Every stage has its own time limit and log; what fails is said and the next stage runs. Last comes a summary table.
#   OUTDIR/summary.txt   one line a stage          OUTDIR/facts.json   the device and its ceilings
#   OUTDIR/day_one.log   the logs of all stages    OUTDIR/layers.json  whole layers against rivals
#   OUTDIR/model.json    a whole model
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$1
mkdir -p "$out"
out=$(cd "$out" && pwd)
quick=${QUICK:-0}
python=${PYTHON:-python3}
bin=${PREBUILT:-$out/build}
bin=$(mkdir -p "$bin" && cd "$bin" && pwd)
logs=$(mktemp -d)
begin=$SECONDS
cd "$root"
export PYTHONUNBUFFERED=1

# stage NAME LIMIT COMMAND...: run it, keep its log, say how it went.
stage() {
  local name=$1 limit=$2 start=$SECONDS code said
  shift 2
  timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in 0) said=ok ;; 124 | 137) said="out of time" ;; *) said="FAILED ($code)" ;; esac
  printf '%-28s %-12s %4d s   %s\n' "$name" "$said" $((SECONDS - start)) \
    "$(grep -v '^ *$' "$logs/$name.log" | tail -1 | cut -c1-150)" | tee -a "$logs/summary"
  { printf '\n==== %s: %s\n' "$name" "$said"; cat "$logs/$name.log"; } >>"$out/day_one.log"
  return $code
}
: >"$out/day_one.log"

runtime() { # the CUDA runtime that programs and extensions load: torch's own, so that one process has one
  "$python" - <<'PY'
import glob, importlib.util, os
spec = importlib.util.find_spec("nvidia.cu13")
print(*[os.path.join(p, "lib") for p in (spec.submodule_search_locations if spec else [])], sep=":")
PY
}
if ! ldconfig -p | grep -q libcudart.so.13; then
  LD_LIBRARY_PATH="$(runtime):/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}"
  export LD_LIBRARY_PATH
fi

fragments() {
  "$bin/fragments" maps >"$logs/maps.txt" || return 1
  diff "$here/expected/maps.txt" "$logs/maps.txt" | head -20
  "$bin/fragments" sums >"$logs/sums.txt" || return 1
  for kind in mma wgmma; do
    for mode in exact ampere hopper; do
      echo "$kind: $(diff <(grep "^$kind " "$here/expected/sums_$mode.txt") <(grep "^$kind " "$logs/sums.txt") |
        grep -c '^>') of $(grep -c "^$kind " "$logs/sums.txt") threads differ from ptxsim's PTXSIM_MMA=$mode"
    done
  done
  cmp "$here/expected/maps.txt" "$logs/maps.txt" && echo "maps: the same as ptxsim's"
}

tests_python() { # from elsewhere: here lies the source tree, which has no extensions
  cd "$logs" && PYTHONPATH="$bin/lib" "$python" -P -m pytest -q -rs -p no:cacheprovider -c "$root/pyproject.toml" \
    --rootdir "$root" "$root/tests/cuda" --ignore "$root/tests/cuda/test_budgets.py" \
    --ignore "$root/tests/cuda/test_counters.py" # those two are for all targets and for ptxsim
}

plants() { # each planted bug must show: by results, or in a tool
  local caught=0 n
  for n in 1 2 3 4; do
    [ -x "$bin/plant_$n" ] || continue
    if timeout 20 "$bin/plant_$n" >"$logs/plant" 2>&1; then
      echo "plant $n: passes here"
    else
      echo "plant $n: $(grep -c FAIL "$logs/plant") cases fail" && caught=$((caught + 1))
    fi
  done
  echo "$caught planted bugs show by results (missing fences may not: only ptxsim sees them surely)"
}

export -f fragments tests_python plants
export here root bin logs python

[ -n "${PREBUILT:-}" ] || stage build 200 bash "$here/build.sh" "$bin"
stage facts 60 "$python" "$here/facts.py" "$out/facts.json"
stage fragments 30 bash -c fragments
for program in "$bin"/test_*; do stage "$(basename "$program")" 60 "$program"; done
for program in "$bin"/test_[!c]*; do # all but test_counts
  stage "$(basename "$program")-time" 60 "$program" --time
  # The same by an older build, OLD=DIR, on the same card.
  [ -x "${OLD:-}/$(basename "$program")" ] && stage "$(basename "$program")-time-old" 60 "$OLD/$(basename "$program")" --time
done
QUICK=$quick PYTHONPATH="$bin/lib" stage layers $((quick ? 80 : 150)) "$python" "$here/layers.py" \
  "$out/facts.json" "$out/layers.json"
PYTHONPATH="$bin/lib" stage model 90 "$python" "$here/model.py" "$out/model.json"
stage pytest 120 bash -c tests_python
for program in "$bin"/test_[!c]*; do
  stage "$(basename "$program")-repeat" 30 "$program" --repeat $((quick ? 200 : 1000))
done
stage plants 60 bash -c plants
tools="memcheck racecheck"
[ "$quick" = 0 ] && tools="$tools initcheck synccheck"
for tool in $tools; do
  for program in "$bin"/test_[!c]*; do
    case $tool-$program in # racecheck is slow: the layers of one token, then
    racecheck-*test_engine) few="T=1 " ;;
    *) few= ;;
    esac
    stage "$tool-$(basename "$program")" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 "$program" ${few:+"$few"}
  done
done

{
  echo "stage                        result       time   last line"
  cat "$logs/summary"
  echo "all: $((SECONDS - begin)) s"
} >"$out/summary.txt"
echo
grep -h "TFLOP/s\|^maps\|^mma:\|^wgmma:" "$logs"/*.log | cut -c1-170
[ -f "$logs/layers.log" ] && cat "$logs/layers.log"
cat "$out/summary.txt"
rm -rf "$logs"
