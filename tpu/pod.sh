#!/usr/bin/env bash
# A Cloud TPU slice from your own machine: create, set up, run on every host, watch, fetch, delete. README.md walks through it.
#
#   export POD_NAME=rlhf POD_ZONE=us-west4-a POD_TOPOLOGY=v5e:4x4      # the topology as `pe-rlhf plan` names it
#   tpu/pod.sh create [--queued] [--spot]   at once or not at all; --queued waits in line; --spot is cheap, and may be taken away
#   tpu/pod.sh wait                         until the slice is there
#   tpu/pod.sh setup                        this clone's files (those that git knows) and POD_FILES to every host, and install
#   tpu/pod.sh run ARGUMENTS                `pe-rlhf ARGUMENTS` on every host, in the background
#   tpu/pod.sh status | watch               the slice and its hosts; the first host's log
#   tpu/pod.sh keep [--queued] [--spot] -- ARGUMENTS    all of these until the run is done, on new slices where one is taken away
#   tpu/pod.sh stop                         SIGTERM on every host: the run saves and ends; the slice stays, and costs
#   tpu/pod.sh fetch FOLDER [TO]            a folder of the first host, or one of gs://, copied here
#   tpu/pod.sh delete                       the slice; what only its disks hold is gone
#
# Before the command: --dry-run prints what would be called, --yes answers the question that `delete` and `keep` ask.
# Also: POD_FILES (files and folders to copy, such as "data"), POD_EXTRAS (of the package, to install: tpu,gcs,quickstart otherwise; add
# datasets for `hf:` sources, wandb for its logs), POD_PROJECT (gcloud's default otherwise), POD_RUNTIME (the VM's image), POD_POLL
# (seconds between looks, 30), HF_TOKEN and WANDB_API_KEY (`setup` takes them along, in a file that only the VMs' user reads).
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REMOTE=pe_rlhf_jax
POLL=${POD_POLL:-30}
TRIES=4
LOOKS=10 # in a row that reach no host, before keep gives up; each is TRIES tries
DRY=false
YES=false

fail() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "$(date +%H:%M:%S) $*" >&2; }

# The shape in which Cloud TPU gives so many chips of a generation where nothing but their number is said; nothing if it does not. From 64
# chips on, those of three dimensions are cubes of 4x4x4, put together with the shortest sides. Source: cloud.google.com/tpu/docs/v4, v5e,
# v5p and v6e, and the list of accelerator types in apple/axlearn, with which this agrees.
own_shape() {
  local shape shapes="2x2x1 2x2x2 2x2x4 2x4x4" found="" a b c least=0
  case $1 in v5e | v6e) shapes="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" ;; esac
  for shape in $shapes; do
    if ((${shape//x/*} == $2)); then found=$shape; fi
  done
  case $1 in v4 | v5p)
    for ((a = 4; a * a * a <= $2; a += 4)); do
      for ((b = a; a * b * b <= $2; b += 4)); do
        c=$(($2 / (a * b)))
        if ((a * b * c == $2 && c % 4 == 0 && (least == 0 || a + b + c < least))); then
          least=$((a + b + c))
          found=${a}x${b}x$c
        fi
      done
    done
    ;;
  esac
  echo "$found"
}

# SLICE: gcloud's flags for POD_TOPOLOGY. An accelerator type counts cores on v4 and v5p, two a chip, and chips on the others; it says
# nothing of the shape. Another shape than Cloud TPU's own can be had of v4 alone: gcloud's --type knows no later generation (528).
name_slice() {
  local generation=${POD_TOPOLOGY%%:*} shape=${POD_TOPOLOGY##*:} chips own
  [[ $POD_TOPOLOGY =~ ^[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "POD_TOPOLOGY is '$POD_TOPOLOGY': expected one such as v5e:4x4"
  chips=$((${shape//x/*}))
  case $generation in
    v4 | v5p) SLICE=(--accelerator-type="$generation-$((2 * chips))") ;;
    v5e) SLICE=(--accelerator-type="v5litepod-$chips") ;;
    v6e) SLICE=(--accelerator-type="v6e-$chips") ;;
    *) fail "POD_TOPOLOGY is '$POD_TOPOLOGY': of v4, v5e, v5p and v6e, which Cloud TPU's own VMs have; for tpu7x see gke.yaml" ;;
  esac
  own=$(own_shape "$generation" "$chips")
  if [[ $shape == "$own" ]]; then
    return
  elif [[ $generation == v4 && $shape == *x*x* ]]; then
    SLICE=(--type=v4 --topology="$shape")
  elif [[ -n $own ]]; then
    fail "POD_TOPOLOGY is '$POD_TOPOLOGY': Cloud TPU's VMs come with $chips chips of $generation as $own only; plan for $generation:$own"
  else
    fail "POD_TOPOLOGY is '$POD_TOPOLOGY': Cloud TPU has no slice of $chips chips of $generation"
  fi
}

runtime() {
  case ${POD_TOPOLOGY%%:*} in
    v4) echo tpu-ubuntu2204-base ;;
    v5e) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

# gcloud compute tpus KIND VERB ..., in the zone.
tpus() {
  local call=(gcloud compute tpus "$@" --zone="$POD_ZONE")
  if [[ -n ${POD_PROJECT:-} ]]; then call+=(--project="$POD_PROJECT"); fi
  perform "${call[@]}"
}

perform() {
  if $DRY; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# Hosts of a new slice refuse ssh for a while; every command that is sent may be repeated.
again() {
  local try
  for ((try = 1; try <= TRIES; try++)); do
    if "$@"; then return 0; fi
    if ((try < TRIES)); then
      say "failed; try $((try + 1)) of $TRIES in $POLL s"
      sleep "$POLL"
    fi
  done
  return 1
}

on_hosts() {
  again tpus tpu-vm ssh "$POD_NAME" --worker="$1" --command="$2"
}

worker() {
  local words
  words=$(printf '%q ' "$@")
  echo "bash $REMOTE/tpu/worker.sh ${words% }"
}

# A field of a queued resource or VM; nothing if there is none of this name.
field() {
  local found errors
  errors=$(mktemp)
  if found=$(tpus "$1" describe "$POD_NAME" --format="value($2)" 2>"$errors"); then
    rm "$errors"
    echo "$found"
  elif grep -qi "NOT_FOUND\|was not found" "$errors"; then
    rm "$errors"
  else
    cat "$errors" >&2
    rm "$errors"
    return 1
  fi
}

# none, ready, or waiting / lost / failed and Google's word for it.
state() {
  local request node
  request=$(field queued-resources state.state) || return 1
  case $request in
    "" | ACTIVE) ;;
    FAILED) echo "failed $request" && return ;;
    SUSPENDED) echo "lost $request" && return ;;
    *) echo "waiting $request" && return ;;
  esac
  node=$(field tpu-vm state) || return 1
  case $node in
    "") if [[ -n $request ]]; then echo "lost $request"; else echo none; fi ;;
    READY) echo ready ;;
    PREEMPTED | TERMINATED | STOPPED | HIDDEN | HIDING) echo "lost $node" ;;
    *) echo "waiting $node" ;;
  esac
}

# A word of each host; new where nothing was set up.
each_state() {
  on_hosts all "$(worker status) 2>/dev/null || echo new"
}

# The hosts' states as one: one of them runs, or one is new, or failed, or was stopped, or all are done.
hosts_state() {
  local found word
  found=$(each_state) || return 1
  for word in running new 'done 2' 'done [^0].*' idle 'done 0'; do
    if grep -xqe "$word" <<<"$found"; then
      grep -xe "$word" <<<"$found" | sort -u | head -n 1
      return
    fi
  done
  fail "no host said how it is; they said: $found"
}

confirm() {
  local answer
  if $YES || $DRY; then return; fi
  echo "$1. Type its name to go on (--yes before the command answers too):" >&2
  read -r answer || true
  [[ $answer == "$POD_NAME" ]] || fail "'$answer' is not '$POD_NAME'; nothing was done"
}

create() {
  local queued=false options=()
  while (($#)); do
    case $1 in
      --queued) queued=true ;;
      --spot) options+=(--spot) ;;
      *) fail "create: expected --queued or --spot, found $1" ;;
    esac
    shift
  done
  local image=${POD_RUNTIME:-$(runtime)}
  if $queued; then
    tpus queued-resources create "$POD_NAME" --node-id="$POD_NAME" "${SLICE[@]}" --runtime-version="$image" \
      ${options[@]+"${options[@]}"}
  elif ! tpus tpu-vm create "$POD_NAME" "${SLICE[@]}" --version="$image" ${options[@]+"${options[@]}"}; then
    fail "no ${SLICE[*]#--*=} in $POD_ZONE now, or no quota for it: see above. create --queued waits in line; another zone may have some"
  fi
}

wait_ready() {
  local now before=""
  if $DRY; then
    tpus queued-resources describe "$POD_NAME" --format="value(state.state)"
    tpus tpu-vm describe "$POD_NAME" --format="value(state)"
    return
  fi
  while true; do
    now=$(again state) || fail "gcloud cannot say how $POD_NAME is: see above"
    [[ $now == "$before" ]] || say "$POD_NAME: $now"
    before=$now
    case $now in
      ready) return ;;
      none) fail "$POD_NAME does not exist in $POD_ZONE; create it first" ;;
      failed*) fail "$POD_NAME was not granted ($now); delete it and create it again, perhaps in another zone" ;;
      lost*) fail "$POD_NAME was taken away ($now); delete it and create it again, or let keep do so" ;;
    esac
    sleep "$POLL"
  done
}

setup() {
  local archive changed hosts
  hosts=$(each_state) || fail "the hosts cannot be reached: see above"
  if $DRY; then echo "$hosts"; fi
  if grep -qx running <<<"$hosts"; then
    fail "setup: a run is going on there, and its package and .venv would be replaced under it; tpu/pod.sh stop first: it saves"
  fi
  archive=$(mktemp -d)/pe_rlhf_jax.tar.gz
  changed=$(git -C "$HERE" stash create) # a commit of what differs from the last one; nothing is put away
  git -C "$HERE" archive --format=tar.gz --output="$archive" "${changed:-HEAD}"
  again tpus tpu-vm scp "$archive" "$POD_NAME:" --worker=all
  rm -r "$(dirname "$archive")"
  on_hosts all "mkdir -p $REMOTE && tar -xzf pe_rlhf_jax.tar.gz -C $REMOTE"
  if [[ -n ${POD_FILES:-} ]]; then
    # shellcheck disable=SC2086 # several, by blanks
    again tpus tpu-vm scp $POD_FILES "$POD_NAME:$REMOTE/" --recurse --worker=all
  fi
  secrets
  on_hosts all "${POD_EXTRAS:+EXTRAS=$(printf %q "$POD_EXTRAS") }$(worker setup)"
}

secrets() {
  local folder name
  folder=$(mktemp -d)
  (
    umask 077
    for name in HF_TOKEN WANDB_API_KEY; do
      if [[ -n ${!name:-} ]]; then printf '%s=%q\n' "$name" "${!name}"; fi
    done >"$folder/worker.env"
  )
  if [[ -s $folder/worker.env ]]; then again tpus tpu-vm scp "$folder/worker.env" "$POD_NAME:$REMOTE/" --worker=all; fi
  rm -r "$folder"
}

run() {
  [[ -n ${1:-} ]] || fail "run: expected pe-rlhf's arguments, such as --config configs/llama3_8b.yaml"
  on_hosts all "$(worker start "$@")"
}

remove() {
  local kind=tpu-vm options=(--quiet) request=""
  if ! $DRY; then request=$(field queued-resources state.state) || return 1; fi
  if [[ -n $request ]]; then
    kind="queued-resources"
    options+=(--force) # its VMs too
  fi
  tpus "$kind" delete "$POD_NAME" "${options[@]}"
}

# What may fail because the slice goes away just then; three times in a row it is something else.
trouble() {
  ((++troubles <= 3)) || fail "$1, three times in a row: see above"
  say "$1; looking again"
  sleep "$POLL"
}

keep() {
  local options=() now hosts failures=0 started=0 troubles=0 silent=0 begun=false
  while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  [[ ${1:-} == -- && -n ${2:-} ]] || fail "keep: expected [--queued] [--spot] -- and pe-rlhf's arguments"
  shift
  if $DRY; then
    create ${options[@]+"${options[@]}"}
    wait_ready
    setup
    run "$@"
    return
  fi
  confirm "If $POD_NAME is taken away, it is deleted and created again; what only its disks hold is gone"
  while true; do
    now=$(again state) || fail "gcloud cannot say how $POD_NAME is: see above"
    [[ $now == ready ]] || silent=0
    case $now in
      none) create ${options[@]+"${options[@]}"} || fail "$POD_NAME was not created: see above" ;;
      failed*) fail "$POD_NAME was not granted ($now); delete it, and try another zone" ;;
      lost*)
        say "$POD_NAME was taken away ($now); deleting it and creating another"
        if remove; then troubles=0; else trouble "$POD_NAME was not deleted"; fi
        ;;
      waiting*) say "$POD_NAME: $now" && sleep "$POLL" ;;
      ready)
        if ! hosts=$(hosts_state); then
          # Perhaps being taken away, or restarted, which takes longer than what fails in setting up.
          ((++silent < LOOKS)) || fail "$POD_NAME is $now, and its hosts could not be reached $LOOKS times in a row: see above. Look at the" \
            "firewall, the SSH key and the VMs, then keep it again. The slice stays, and costs, until it is deleted"
          say "the hosts cannot be reached; looking again"
          sleep "$POLL"
          continue
        fi
        silent=0
        say "$POD_NAME: $now, $hosts"
        # How a run ended that this call has not seen begin says nothing about this one, which may have other files or arguments.
        if [[ $hosts == running ]]; then
          begun=true
          troubles=0
          sleep "$POLL"
          continue
        elif [[ $hosts == new ]] || ! $begun; then
          if ! bash "${BASH_SOURCE[0]}" setup; then
            trouble "the hosts could not be set up"
            continue
          fi
        else
          case $hosts in
            "done 0") return 0 ;;
            "done 2") fail "the run ended with an error: tpu/pod.sh watch shows it. The slice stays, and costs, until it is deleted" ;;
            idle | "done 75") ;;
            *)
              if ((SECONDS - started > 600)); then failures=0; fi # it went well for a while
              ((++failures <= 3)) || fail "the run ended three times without saving (${hosts#done }): tpu/pod.sh watch shows its log"
              ;;
          esac
        fi
        if run "$@"; then
          begun=true
          troubles=0
          started=$SECONDS
        else
          trouble "the run could not be started"
        fi
        ;;
    esac
  done
}

fetch() {
  local folder=${1:-} to=${2:-runs}
  [[ -n $folder ]] || fail "fetch: expected a folder, such as runs/llama3-8b or gs://BUCKET/runs/llama3-8b"
  mkdir -p "$to"
  if [[ $folder == gs://* ]]; then
    perform gcloud storage cp --recursive "$folder" "$to"
  else
    again tpus tpu-vm scp "$POD_NAME:$REMOTE/$folder" "$to" --recurse --worker=0
  fi
}

while [[ ${1:-} == --dry-run || ${1:-} == --yes ]]; do
  if [[ $1 == --dry-run ]]; then DRY=true; else YES=true; fi
  shift
done
command=${1:-}
shift || true
case $command in create | wait | setup | run | status | watch | keep | stop | fetch | delete) ;; *)
  sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
  ;;
esac
for name in POD_NAME POD_ZONE; do
  [[ -n ${!name:-} ]] || fail "$name is not set; for instance: export POD_NAME=rlhf POD_ZONE=us-west4-a POD_TOPOLOGY=v5e:4x4"
done
if [[ $command == create || $command == keep ]]; then
  [[ -n ${POD_TOPOLOGY:-} ]] || fail "POD_TOPOLOGY is not set; for instance: export POD_TOPOLOGY=v5e:4x4"
  name_slice
fi
command -v gcloud >/dev/null || $DRY || fail "gcloud is not here; install the Google Cloud CLI and run gcloud auth login"

case $command in
  wait) wait_ready ;;
  status)
    if $DRY; then wait_ready; else state; fi
    each_state
    ;;
  watch) tpus tpu-vm ssh "$POD_NAME" --worker=0 --command="tail -n 50 -F $REMOTE/run.log" ;;
  stop) on_hosts all "$(worker stop)" ;;
  delete)
    confirm "$POD_NAME in $POD_ZONE will be deleted; what only its disks hold is gone"
    remove
    ;;
  *) "$command" "$@" ;;
esac
