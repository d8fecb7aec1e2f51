#!/usr/bin/env bash
# Run a command on two hosts at the same time: two network namespaces of this machine, joined by a virtual cable, each with
# a host name (host-a, host-b) and a /dev/shm of its own. The first host's output is shown, the second's if it fails.
# Needs root, ip and unshare. Nothing is left behind.
#   two_hosts.sh COMMAND [WORD...]
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

folder=$(mktemp -d)
id=$$
finish() {
  local status=$?
  trap - EXIT INT TERM
  for host in a b; do
    ip netns pids "ms$id$host" 2>/dev/null | xargs -r kill 2>/dev/null || true
    ip netns delete "ms$id$host" 2>/dev/null || true
  done
  rm -rf "$folder"
  exit $status
}
trap finish EXIT INT TERM

printf '127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n' >"$folder/hosts"
ip netns add "ms${id}a"
ip netns add "ms${id}b"
ip link add eth0 netns "ms${id}a" type veth peer name eth0 netns "ms${id}b"
address=1
for host in a b; do
  ip -n "ms$id$host" address add "10.77.0.$address/24" dev eth0
  ip -n "ms$id$host" link set eth0 up
  ip -n "ms$id$host" link set lo up
  address=2
done

on_host() { # LETTER COMMAND [WORD...]
  local host=$1
  shift
  ip netns exec "ms$id$host" unshare --uts --mount bash -euc '
    hostname "$0"
    mount -t tmpfs tmpfs /dev/shm
    mount --bind "$1" /etc/hosts
    shift
    exec "$@"' "host-$host" "$folder/hosts" "$@"
}

on_host a "$@" &
on_host b "$@" >"$folder/b.txt" 2>&1 &
status=0
for _ in a b; do # one that fails leaves the other waiting for it: that is ended by `finish`
  wait -n || { status=$?; break; }
done
[ $status = 0 ] || cat "$folder/b.txt"
exit $status
