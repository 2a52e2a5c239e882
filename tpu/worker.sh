#!/usr/bin/env bash
# On every host of a slice: install, run in the background, say how it goes, stop. pod.sh calls it over ssh; it works by hand too.
#
#   bash tpu/worker.sh setup             .venv with a new enough Python, JAX for TPUs, this package; again: only what changed
#   bash tpu/worker.sh start ARGUMENTS   pe-rlhf ARGUMENTS in the background, output in run.log; nothing if it runs already
#   bash tpu/worker.sh status            one word: new, idle, running, or done and the exit code
#   bash tpu/worker.sh stop              SIGTERM to the run, and waits: it saves and ends with 75
#
# EXTRAS (default tpu,gcs,quickstart) are the package's extras to install; GRACE (default 600) is how many seconds `stop` waits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

EXTRAS=${EXTRAS:-tpu,gcs,quickstart}
GRACE=${GRACE:-600}

setup() {
  local uv=uv wanted
  wanted=$(cat pyproject.toml constraints.txt; echo "$EXTRAS")
  if [[ -e .venv/worker.installed && $(cat .venv/worker.installed) == "$wanted" ]]; then
    echo "already installed"
    return
  fi
  if alive; then
    echo "error: a run is going on in $PWD, and .venv would be replaced under it; stop it first: it saves" >&2
    return 2
  fi
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv
    uv=$(python3 -m site --user-base)/bin/uv
  fi
  "$uv" venv --quiet --clear --seed --python 3.12 .venv # models in packages need pip; a TPU VM's own Python may be older than 3.11
  "$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable ".[$EXTRAS]"
  printf '%s\n' "$wanted" >.venv/worker.installed # last: an interrupted install is done again
  echo "installed"
}

alive() {
  [[ -s run.pid ]] && kill -0 "$(cat run.pid)" 2>/dev/null
}

start() {
  if alive; then
    echo "already running"
    return
  fi
  if [[ ! -e .venv/worker.installed ]]; then
    echo "error: nothing is installed in $PWD; run setup first" >&2
    return 2
  fi
  rm -f run.pid run.exit
  if [[ -e worker.env ]]; then # tokens that pod.sh brought
    set -a
    # shellcheck disable=SC1091
    . ./worker.env
    set +a
  fi
  # Without a TPU this fails, rather than training on the host's CPU. The shell around it lives on only to note the exit code.
  # shellcheck disable=SC2016 # expanded by the inner shell
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} setsid nohup bash -c '
    .venv/bin/pe-rlhf "$@" & echo $! >run.pid
    code=0; wait $! || code=$?
    echo $code >run.exit' pe-rlhf "$@" >>run.log 2>&1 </dev/null &
  until [[ -s run.pid ]]; do sleep 0.1; done
  echo "started"
}

status() {
  if alive; then
    echo "running"
  elif [[ -s run.exit ]]; then
    echo "done $(cat run.exit)"
  elif [[ -s run.pid ]]; then
    echo "done 137" # ended without its shell: killed together with it
  elif [[ -e .venv/worker.installed ]]; then
    echo "idle"
  else
    echo "new"
  fi
}

stop() {
  local waited=0
  if alive; then
    kill -TERM "$(cat run.pid)"
    while alive; do
      if ((waited++ >= GRACE)); then
        echo "error: still running after $GRACE s; it goes on saving. Look at run.log" >&2
        return 1
      fi
      sleep 1
    done
  fi
  status
}

command=${1:-}
shift || true
case $command in
  setup | start | status | stop) "$command" "$@" ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
