#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# nccl_run.sh RANKS MODE [PROGRAM]: starts the ranks as processes, returns the worst exit code.
bin=$(dirname "$0")/bin id=$(mktemp -u -t ptxsim-id.XXXXXX) worst=0 pids=()
for ((rank = 0; rank < $1; rank++)); do
  if [ -n "$3" ]; then
    RANK=$rank WORLD_SIZE=$1 PTXSIM_DEVICES=$1 "$bin/$3" $id $2 &
  else
    PTXSIM_DEVICES=$1 "$bin/nccl_test" $rank $1 $id $2 &
  fi
  pids+=($!)
done
for p in "${pids[@]}"; do
  wait $p
  code=$?
  [ $code -gt $worst ] && worst=$code
done
rm -f $id
exit $worst
