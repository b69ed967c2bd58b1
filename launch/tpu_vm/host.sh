#!/usr/bin/env bash
# Runs a command on one host of a slice, and starts it again when it fails. All hosts do, and find each other again: when a
# process dies, the others end too (docs/howto/hosts.md).
#
#   RETRIES=3 launch/tpu_vm/host.sh ~/venv/bin/t5g2 train --config=… --workdir=…
#
# Exit status: 0 it has ended well; 2 the input is wrong, which is not tried again; 143 after SIGTERM, which it gets; else
# that of the last of RETRIES (3) failures.
set -uo pipefail

if [ $# -eq 0 ]; then
  echo "usage: launch/tpu_vm/host.sh COMMAND…, such as: launch/tpu_vm/host.sh t5g2 train --config=… --workdir=…" >&2
  exit 2
fi
retries=${RETRIES:-3}
if ! [[ $retries =~ ^[0-9]+$ ]]; then
  echo "launch/tpu_vm/host.sh: RETRIES=$retries; give a number from 0" >&2
  exit 2
fi
if ! type -P "$1" >/dev/null; then
  echo "launch/tpu_vm/host.sh: $1 is no program here (not in PATH, or not executable); install it, or give its path" >&2
  exit 2
fi
pid=""
stopped=""
stop() {
  stopped=1
  [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null
}
trap stop TERM

for ((failed = 1; ; failed++)); do
  "$@" &
  pid=$!
  # a signal ends `wait` too, while the command goes on to save
  while true; do
    wait "$pid"
    status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ -n "$stopped" ] || [ "$failed" -gt "$retries" ]; then
    exit "$status"
  fi
  echo "launch/tpu_vm/host.sh: exit status $status; the command starts again ($failed of $retries)" >&2
done
