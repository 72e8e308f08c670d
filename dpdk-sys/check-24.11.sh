#!/bin/sh
# Builds and tests dpdk-sys and dpdk with DPDK 24.11, in a Debian 13 (trixie) root made with debootstrap.
#
#   sudo dpdk-sys/check-24.11.sh [COMMAND...]     default: cargo test -p dpdk-sys -p dpdk
#
# The Rust toolchain and the crates are this machine's own. Needs root (chroot, mount) and debootstrap; about 1 GB.
#   ROOT=/var/tmp/trixie-dpdk   where the root is made, kept for the next time
#   MIRROR=http://deb.debian.org/debian
set -eu

ROOT=${ROOT:-/var/tmp/trixie-dpdk}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
PACKAGES=libdpdk-dev,libclang-dev,gcc,libc6-dev,pkg-config

repository=$(cd "$(dirname "$0")/.." && pwd)
cargo_home=${CARGO_HOME:-$HOME/.cargo}
rustup_home=${RUSTUP_HOME:-$HOME/.rustup}

fail() { echo "check-24.11: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "needs root, for chroot and mount"
command -v debootstrap >/dev/null || fail "needs debootstrap: apt-get install debootstrap"
[ -d "$rustup_home" ] || fail "no Rust toolchain at $rustup_home: set RUSTUP_HOME and CARGO_HOME"

[ -e "$ROOT/usr/include/dpdk/rte_eal.h" ] || debootstrap --variant=minbase --include="$PACKAGES" trixie "$ROOT" "$MIRROR"
mkdir -p "$ROOT/repository" "$ROOT/cargo" "$ROOT/rustup" "$ROOT/target"
(cd "$repository" && "$cargo_home/bin/cargo" fetch --quiet)

[ $# -gt 0 ] || set -- cargo test -p dpdk-sys -p dpdk
# The mounts live in a namespace of their own and go with it.
export ROOT repository cargo_home rustup_home
exec unshare --mount sh -eu -c '
    mount --bind "$repository" "$ROOT/repository"
    mount --bind "$cargo_home" "$ROOT/cargo"
    mount --bind "$rustup_home" "$ROOT/rustup"
    mount --rbind /dev "$ROOT/dev"
    mount -t proc proc "$ROOT/proc"
    mount --rbind /sys "$ROOT/sys"
    exec chroot "$ROOT" /usr/bin/env -i PATH=/cargo/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root CARGO_HOME=/cargo RUSTUP_HOME=/rustup \
        CARGO_TARGET_DIR=/target CARGO_NET_OFFLINE=true CARGO_BUILD_JOBS='"${CARGO_BUILD_JOBS:-}"' \
        sh -c "cd /repository && pkg-config --modversion libdpdk && exec \"\$@\"" sh "$@"
' sh "$@"
