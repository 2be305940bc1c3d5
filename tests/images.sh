#!/usr/bin/env bash
# Builds the images of deploy/ as their Dockerfiles say, and runs them, where there is neither a container engine nor a
# registry: buildah reads the Dockerfiles and runs their steps in a chroot.
#
#   apt-get install buildah debootstrap
#   tests/images.sh [--quick] [Dockerfile Dockerfile.cuda]
#
# --quick compiles without optimization: it is about the steps. Needs root, and downloads what the Dockerfiles do. The base
# images are made here: Debian by debootstrap, and Rust's with the packages that it has and the toolchain of this machine,
# whose version must be the Dockerfiles'. Images are kept in target/images, the builds' caches in /var/tmp/buildah-cache.
# Each image must then serve the tests' model as a user that is not root: its health check succeeds, a completion has
# tokens, and SIGTERM ends it with status 0.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in buildah debootstrap unshare ip python3; do
    command -v "$tool" >/dev/null || { echo "error: $tool is needed" >&2; exit 1; }
done
work=$PWD/target/images
mkdir -p "$work"
export BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }
say() { echo "== $*"; }

# commit CONTAINER IMAGE
commit() { buildah commit --quiet --rm "$1" "$2" >/dev/null; }

debian=docker.io/library/debian:bookworm-slim
rust=docker.io/library/$(sed -n 's/^FROM \(rust:[^ ]*\).*/\1/p' deploy/Dockerfile)

if ! buildah inspect --type image "$debian" >/dev/null 2>&1; then
    say "base image: Debian"
    [ -d "$work/debian" ] || { debootstrap --variant=minbase bookworm "$work/debian.part" >"$work/debootstrap.log" &&
        mv "$work/debian.part" "$work/debian"; }
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/debian" / >/dev/null
    buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd bash "$container"
    commit "$container" "$debian"
fi

if ! buildah inspect --type image "$rust" >/dev/null 2>&1; then
    say "base image: Rust"
    version=$(rustc --version | cut -d' ' -f2)
    [[ $rust == */rust:${version%.*}-* ]] || { echo "error: $rust, and this machine has Rust $version" >&2; exit 1; }
    container=$(buildah from "$debian")
    buildah run "$container" -- sh -c 'apt-get update -q && apt-get install -qy --no-install-recommends \
        ca-certificates gcc libc6-dev && rm -rf /var/lib/apt/lists/*' >"$work/rust.log" 2>&1
    sysroot=$(rustc --print sysroot)
    for part in bin lib; do
        buildah copy --quiet "$container" "$sysroot/$part" "/usr/local/$part" >/dev/null
    done
    # Downloads are checked against the authorities that this machine trusts.
    buildah copy --quiet "$container" /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt >/dev/null
    buildah config --env CARGO_HOME=/usr/local/cargo "$container"
    commit "$container" "$rust"
fi

quick=
if [ "${1:-}" = --quick ]; then
    shift
    quick=localhost/rust:quick
    container=$(buildah from "$rust")
    buildah config --env CARGO_PROFILE_RELEASE_OPT_LEVEL=0 --env CARGO_PROFILE_RELEASE_DEBUG=0 "$container"
    commit "$container" "$quick"
fi

# serve IMAGE: in a network of its own, where port 8000 is free.
serve() {
    local container config entrypoint healthcheck server status
    ip link set lo up
    # The entry point and the health check's command. The user must not be root.
    mapfile -t config < <(buildah inspect --type image "$1" | python3 -c '
import json, sys
image = json.load(sys.stdin)["Docker"]["config"]
kind, *health = image["Healthcheck"]["Test"]
assert kind == "CMD" and image["User"] not in ("", "0", "root") and "8000/tcp" in image["ExposedPorts"], image
[entrypoint] = image["Entrypoint"]
print(entrypoint, *health, sep="\n")')
    entrypoint=${config[0]} healthcheck=("${config[@]:1}")
    container=$(buildah from "$1")
    in_container() { buildah run --volume "$PWD/tests/models/rustdoc-6m:/model:ro" "$container" -- "$@"; }
    in_container mxconvert --version
    in_container "$entrypoint" /model --device cpu --log-level warn >"$work/serve.log" &
    server=$!
    for _ in $(seq 300); do
        in_container "${healthcheck[@]}" >/dev/null 2>&1 && break
        kill -0 "$server" || { cat "$work/serve.log" >&2; return 1; }
        sleep 0.2
    done
    in_container "${healthcheck[@]}"
    in_container sh -c 'test "$(id -u)" != 0 && ! touch /usr/local/bin/x 2>/dev/null'
    in_container curl -sf http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
        -d '{"prompt": "/// Returns", "max_tokens": 8, "ignore_eos": true}' |
        python3 -c 'import json, sys; assert json.load(sys.stdin)["usage"]["completion_tokens"] == 8'
    # The only mxserve in this network: buildah run passes signals on to nobody.
    pkill_in_network mxserve
    status=0; wait "$server" || status=$?
    buildah rm "$container" >/dev/null
    [ "$status" = 0 ] || { echo "error: the server ended with $status" >&2; return 1; }
}

# SIGTERM for processes of this name in this network namespace.
pkill_in_network() {
    local here process
    here=$(readlink /proc/self/ns/net)
    for process in /proc/[0-9]*; do
        if [ "$(readlink "$process/ns/net" 2>/dev/null)" = "$here" ] && [ "$(cat "$process/comm")" = "$1" ]; then
            kill -TERM "${process#/proc/}"
        fi
    done
}

if [ "${1:-}" = --serve ]; then
    serve "$2"
    exit
fi

[ $# -gt 0 ] || set -- Dockerfile Dockerfile.cuda
for file in "$@"; do
    image=localhost/mxserve:$(tr A-Z a-z <<<"${file#Dockerfile}" | tr -d .)
    image=${image%:}
    say "$file: build"
    buildah bud --quiet --pull-never --format docker --layers ${quick:+--from "$quick"} --ignorefile "deploy/$file.dockerignore" \
        --file "deploy/$file" --tag "$image" . >"$work/$file.log" 2>&1 || { tail -30 "$work/$file.log" >&2; exit 1; }
    say "$file: run"
    unshare --net -- "$0" --serve "$image"
    size=$(buildah images --json "$image" | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["size"])')
    say "$file: serves; the image has $size"
done
