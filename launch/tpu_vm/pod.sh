#!/usr/bin/env bash
# A slice of TPU VMs, step by step. The run goes on when this machine is switched off.
#
#   export ZONE=us-east5-a TYPE=v5p-16 VERSION=v2-alpha-tpuv5      # and PROJECT, SPOT=1
#   launch/tpu_vm/pod.sh create my-slice                           # returns when there is one, which may take days
#   launch/tpu_vm/pod.sh install my-slice                          # this folder, to ~/t5g2 of all hosts
#   launch/tpu_vm/pod.sh run my-slice train --config=configs/… --workdir=/shared/runs/a
#   launch/tpu_vm/pod.sh tail my-slice                             # what host 0 says (HOST=3: another)
#   launch/tpu_vm/pod.sh stop my-slice                             # saves, and ends
#   launch/tpu_vm/pod.sh collect my-slice /shared/runs/a runs/     # from host 0
#   launch/tpu_vm/pod.sh delete my-slice                           # ends the bill
#
# To fill in: the zone and type (gcloud compute tpus accelerator-types list), and, in SETUP, what mounts a file system for
# the workdir on every host, such as SETUP='sudo mount 10.0.0.2:/share /shared'. Without one a slice of several hosts
# cannot save, and one of a single host loses its checkpoints when it is preempted or deleted.
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
[ $# -ge 2 ] || usage
action=$1
slice=$2
shift 2
if ! [[ $slice =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]]; then
  echo "launch/tpu_vm/pod.sh: the slice is called '$slice'; give a name of small letters, digits and hyphens, such as my-slice" >&2
  exit 2
fi
if [ -z "${ZONE:-}" ]; then
  echo "launch/tpu_vm/pod.sh: ZONE is not set; say where the slice is, such as ZONE=us-east5-a" >&2
  exit 2
fi
place=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || place+=(--project="$PROJECT")

queued() { gcloud compute tpus queued-resources "$@" "${place[@]}"; }
on() { gcloud compute tpus tpu-vm ssh "$slice" "${place[@]}" --worker="$1" --command="$2"; }
copy() { gcloud compute tpus tpu-vm scp --recurse "$1" "$2" "${place[@]}" --worker="$3"; }

case $action in
  create)
    if [ -z "${TYPE:-}" ] || [ -z "${VERSION:-}" ]; then
      echo "launch/tpu_vm/pod.sh: give TYPE, such as v5p-16, and VERSION, the software of the hosts" >&2
      exit 2
    fi
    if [ "${SPOT:-1}" != 1 ]; then
      echo "launch/tpu_vm/pod.sh: SPOT=$SPOT; give 1 for Spot VMs, or unset it for others" >&2
      exit 2
    fi
    queued create "$slice" --node-id="$slice" --accelerator-type="$TYPE" --runtime-version="$VERSION" ${SPOT:+--spot}
    while true; do
      state=$(queued describe "$slice" --format='value(state.state)')
      echo "$slice: $state"
      case $state in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDED) exit 1 ;;
      esac
      sleep 30
    done
    ;;
  install)
    if [ ! -f pyproject.toml ] || [ ! -f constraints/py312.txt ]; then
      echo "launch/tpu_vm/pod.sh: $PWD is not the folder of t5g2's source, with pyproject.toml and constraints/; call it there" >&2
      exit 2
    fi
    source=$(mktemp --suffix=.tgz)
    trap 'rm -f "$source"' EXIT
    tar --create --gzip --file="$source" --exclude=./.git --exclude='./.venv*' --exclude=./runs .
    copy "$source" "$slice:t5g2.tgz" all
    on all "${SETUP:-true} && mkdir -p t5g2 && tar --extract --file=t5g2.tgz --directory=t5g2 && cd t5g2 &&
      python3 -m pip install --quiet uv && python3 -m uv venv --allow-existing --python 3.12 ~/venv &&
      python3 -m uv pip install --python ~/venv/bin/python --constraint constraints/py312.txt '.[tpu]'"
    ;;
  run)
    [ $# -ge 1 ] || usage
    if ! [[ ${RETRIES:-3} =~ ^[0-9]+$ ]]; then
      echo "launch/tpu_vm/pod.sh: RETRIES=$RETRIES; give a number from 0" >&2
      exit 2
    fi
    printf -v arguments ' %q' "$@"
    # host.sh is the process whose number is kept, not a shell around it
    on all "cd t5g2 || exit; RETRIES=${RETRIES:-3} nohup launch/tpu_vm/host.sh ~/venv/bin/t5g2$arguments \
      >>~/t5g2.log 2>&1 </dev/null & echo \$! >~/t5g2.pid"
    ;;
  tail) on "${HOST:-0}" 'tail --lines=50 --follow t5g2.log' ;;
  stop) on all "kill -TERM \$(cat t5g2.pid)" ;;
  collect)
    [ $# -eq 2 ] || usage
    copy "$slice:$1" "$2" 0
    ;;
  delete) queued delete "$slice" --force --quiet ;;
  *) usage ;;
esac
