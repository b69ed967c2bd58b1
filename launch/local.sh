#!/usr/bin/env bash
# Runs a command as several processes on this machine that are one run, and starts all of them again when one dies.
#
#   launch/local.sh 2 t5g2 train --config=configs/quickstart.py:adapted --workdir=runs/adapted
#   RETRIES=0 launch/local.sh 4 t5g2 evaluate --config=… --workdir=…
#
# For a machine whose GPUs want a process each (process i has GPU i; JAX_LOCAL_DEVICE_IDS=0,1,2,3 gives all to each), or
# to try on a laptop what a cluster will do (one device each: JAX_PLATFORMS=cpu). Exit status: 0 all have ended well; 2 the
# input is wrong, which is not tried again; 143 and 130 after SIGTERM and Ctrl-C, which all processes get; else that of a
# process that died more than RETRIES times (3).
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES COMMAND…, such as: launch/local.sh 2 t5g2 train --config=… --workdir=…" >&2
  exit 2
fi
processes=$1
shift
retries=${RETRIES:-3}
if ! [[ $retries =~ ^[0-9]+$ ]]; then
  echo "launch/local.sh: RETRIES=$retries; give a number from 0" >&2
  exit 2
fi
if ! type -P "$1" >/dev/null; then
  echo "launch/local.sh: $1 is no program here (not in PATH, or not executable); install it, or give its path" >&2
  exit 2
fi

pids=()
stopped=""
forward() {
  stopped=$1
  kill -s "$1" "${pids[@]}" 2>/dev/null || true
}
trap 'forward TERM' TERM
trap 'forward INT' INT

# Starts all processes, waits for them, and sets `status`: 2 if one has 2, else the first that is not 0.
run_once() {
  local port i pid own
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < processes; i++)); do
    # a signal may come before the first process, or between two
    if [ -n "$stopped" ]; then break; fi
    # a shell that is no terminal lets background processes ignore Ctrl-C, which they are to obey
    JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes JAX_PROCESS_ID=$i \
      JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS-$i} \
      python3 -c 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])' \
      "$@" &
    pids+=($!)
  done
  status=0
  if [ -n "$stopped" ]; then
    status=$((128 + $(kill -l "$stopped")))
    # one may have been started while the signal was passed on
    forward "$stopped"
  fi
  for pid in "${pids[@]}"; do
    # a signal ends `wait` too, while the process goes on to save
    while true; do
      own=0
      wait "$pid" || own=$?
      kill -0 "$pid" 2>/dev/null || break
    done
    if [ "$own" -eq 2 ] || [ "$status" -eq 0 ]; then status=$own; fi
  done
}

for ((attempt = 0; ; attempt++)); do
  run_once "$@"
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopped" ] || [ "$attempt" -ge "$retries" ]; then
    exit "$status"
  fi
  echo "launch/local.sh: a process ended with status $status; all $processes start again ($((attempt + 1)) of $retries)" >&2
done
