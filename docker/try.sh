#!/usr/bin/env bash
# Build images and start them for real, without a GPU: what a first user of each would do, as other users, with
# a read-only root, 64 MB of shared memory and limits on memory and CPU.
#
#   docker/try.sh [cpu|gpu|nvidia ...]        default: cpu gpu
#
#   ENGINE       docker, podman or buildah; default: the first of them that works
#   BASE_cpu, BASE_gpu, BASE_nvidia           base images; nvidia has no default and is left out without one
#   BUILD_FLAGS, RUN_FLAGS                    more flags of `build` and `run`
#   WORK         folder for volumes and logs; default: a temporary one, removed at the end
#   MOST_MB_cpu  size above which an image fails; default 2500
# Exit code 0: everything held; 1: something did not; 77: there is no engine, nothing was tried.
set -euo pipefail
cd "$(dirname "$0")/.."

engine="${ENGINE:-}"
for name in docker podman buildah; do  # docker may be a client without its daemon
    if [ -z "$engine" ] && command -v "$name" > /dev/null && "$name" info > /dev/null 2>&1; then engine=$name; fi
done
if [ -z "$engine" ]; then echo "skipped: neither docker, podman nor buildah is installed and works"; exit 77; fi

work="${WORK:-$(mktemp -d)}"
mkdir -p "$work"
if [ -z "${WORK:-}" ]; then trap 'rm -rf "$work"' EXIT; fi
failed=0
read -ra build_flags <<< "${BUILD_FLAGS:-}"
read -ra run_flags <<< "${RUN_FLAGS:-}"

say() { printf '%s\n' "$*"; }
now() { date +%s; }

# step NAME EXPECTED-EXIT-CODE COMMAND...: run it, time it, keep its log, compare its exit code.
step() {
    local name=$1 expected=$2 code=0 start; shift 2
    start=$(now)
    "$@" > "$work/$image.$name.log" 2>&1 || code=$?
    if [ "$code" = "$expected" ]; then say "| $image | $name | exit $code | $(($(now) - start)) s |"; else
        say "| $image | $name | **exit $code, expected $expected** | $(($(now) - start)) s |"
        tail -n 15 "$work/$image.$name.log" | sed 's/^/    /'
        failed=1
    fi
}

build() {
    local base_name="BASE_$image" flags=()
    if [ -n "${!base_name:-}" ]; then flags+=(--build-arg "BASE=${!base_name}"); fi
    local command=("$engine" build)
    if [ "$engine" = buildah ]; then command=(buildah bud); fi
    if [ "$engine" != docker ]; then flags+=(--format docker); fi
    "${command[@]}" "${build_flags[@]}" "${flags[@]}" -f docker/Dockerfile --build-arg "IMAGE=$image" \
        --build-arg "REVISION=$(git rev-parse --short HEAD 2> /dev/null || echo unknown)" \
        -t "localhost/cmae-$image" .
}

size_mb() {
    case "$engine" in
        buildah) buildah images --json "localhost/cmae-$image" | python3 -c 'import json, sys
unit = {"KB": .001, "MB": 1, "GB": 1000}; number, name = json.load(sys.stdin)[0]["size"].split(); print(round(float(number) * unit[name]))' ;;
        *) echo $(($("$engine" image inspect --format '{{.Size}}' "localhost/cmae-$image") / 1000000)) ;;
    esac
}

fits() { [ "$(size_mb)" -le "$1" ]; }

# inside UID [FLAG...] -- ARGUMENT...: the image's program on the volumes, hardened.
inside() {
    local uid=$1 flags=(); shift
    while [ "$1" != -- ]; do flags+=("$1"); shift; done; shift
    if [ "$engine" = buildah ]; then  # it starts neither a read-only root nor limits
        local box code=0 program=cmae-entrypoint; box=$(buildah from "localhost/cmae-$image")
        if [ "${flags[0]:-}" = --entrypoint ]; then program=${flags[1]}; fi
        buildah run --user "$uid:$uid" --volume "$work/$image:/runs" "$box" -- "$program" "$@" || code=$?
        buildah rm "$box" > /dev/null
        return "$code"
    fi
    "$engine" run --rm "${run_flags[@]}" --user "$uid:$uid" --read-only --tmpfs /tmp --tmpfs /cache:mode=1777 \
        --shm-size 64m --memory 4g --cpus 2 --security-opt no-new-privileges --cap-drop ALL \
        --volume "$work/$image:/runs" "${flags[@]}" "localhost/cmae-$image" "$@"
}

settings=(--recipe demo --data.shards /runs/demo/shards/train --run.progress false --run.log_every 5
    --optim.total_steps 60 --optim.warmup_epochs 0.1)

# The container gets a SIGTERM once it has taken a step, and must end with 75: stopped, start me again.
stopped() {
    local name="cmae-try-$$" code=0
    inside 1000 --name "$name" -- pretrain "${settings[@]}" --run.out /runs/stopped &
    local pid=$!
    for _ in $(seq 600); do
        if [ -s "$work/$image/stopped/metrics.jsonl" ] || ! kill -0 "$pid" 2> /dev/null; then break; fi
        sleep 0.2
    done
    if [ "$engine" = buildah ]; then kill -TERM "$(pgrep -n -f 'run.out /runs/stopped' || echo "$pid")"
    else "$engine" kill --signal TERM "$name" > /dev/null; fi
    wait "$pid" || code=$?
    return "$code"
}

# Weights of the run that was stopped and went on in another container are those of the undisturbed one.
same_weights() {
    inside 1000 --entrypoint python -- -c '
import torch
one, other = (torch.load(f"/runs/{name}/checkpoints/step-00000060.pt", weights_only=True)["model"]
              for name in ("whole", "stopped"))
assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
print(len(one), "tensors are equal")'
}

pictures() {
    inside 1000 --entrypoint python -- -c '
import pathlib, numpy, PIL.Image
for number in range(40):
    path = pathlib.Path(f"/runs/pictures/class{number % 4}/{number}.jpg"); path.parent.mkdir(parents=True, exist_ok=True)
    pixels = numpy.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=numpy.uint8)
    PIL.Image.fromarray(pixels).save(path)'
}

try_image() {
    mkdir -p "$work/$image"; chmod 1777 "$work/$image"
    step build 0 build
    if [ "$failed" = 1 ]; then return; fi
    local most="MOST_MB_$image"; if [ "$image" = cpu ]; then most="${!most:-2500}"; else most="${!most:-9000}"; fi
    say "| $image | size | $(size_mb) MB of $most allowed | |"
    step size 0 fits "$most"
    step doctor 0 inside 1000 -- doctor
    step quick 0 inside 1000 -- doctor --quick
    step wrong-flag 2 inside 1000 -- pretrain --no.such flag
    step demo 0 inside 23456 -- demo --out /runs/demo
    step pictures 0 pictures
    step shards-write 0 inside 1000 -- shards write /runs/pictures /runs/shards
    step shards-index 0 inside 1000 -- shards index '/runs/shards/*.tar'
    step shards-verify 0 inside 1000 -- shards verify '/runs/shards/*.tar'
    step whole 0 inside 1000 -- pretrain "${settings[@]}" --run.out /runs/whole
    step sigterm 75 stopped
    step resume 0 inside 1000 -- pretrain "${settings[@]}" --run.out /runs/stopped
    step same-weights 0 same_weights
}

say "engine: $("$engine" --version | head -n 1)"
if [ "$engine" = buildah ]; then say "buildah starts neither a read-only root nor limits: those are not tried"; fi
say "| image | step | result | time |"
say "| --- | --- | --- | --- |"
if [ $# = 0 ]; then set -- cpu gpu; fi
for image in "$@"; do
    if [ "$image" = nvidia ] && [ -z "${BASE_nvidia:-}" ]; then
        say "| nvidia | | skipped: set BASE_nvidia to NVIDIA's PyTorch image | |"; continue
    fi
    try_image
done
exit "$failed"
