#!/usr/bin/env bash
# Tests hugepages/setup.sh: first on an imitation of /sys and /proc, then, as root, on this machine's pages, which it
# leaves as they were. Exit status 0: passed; 1: failed; 125: the imitation passed, the rest was skipped, and why.
# shellcheck disable=SC2317 # functions that setup.sh calls
set -euo pipefail

script=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/setup.sh
work=$(mktemp -d)
undo() { :; }
trap 'undo; rm -rf "$work"' EXIT

# ---- the imitation -------------------------------------------------------------------------------------------------

export SHADOWSERVE_SYS=$work/sys SHADOWSERVE_PROC=$work/proc SHADOWSERVE_HUGEPAGES_STATE=$work/state

pool() { # FOLDER TOTAL FREE MOST
    mkdir -p "$1"
    echo "$2" >"$1/nr_hugepages"
    echo "$3" >"$1/free_hugepages"
    echo "$4" >"$1/most"
}

node_pool() { echo "$work/sys/devices/system/node/node$1/hugepages/hugepages-2048kB"; }

machine_pool=$work/sys/kernel/mm/hugepages/hugepages-2048kB

# Keeps the pool of the machine the sum of those of its nodes.
add_up() {
    local count
    [[ -d $(node_pool 0) ]] || return 0
    for count in nr_hugepages free_hugepages; do
        cat "$work"/sys/devices/system/node/node*/hugepages/*/$count | awk '{ sum += $1 } END { print sum }' >"$machine_pool/$count"
    done
}

set_pages() { # NODE TOTAL FREE
    echo "$2" >"$(node_pool "$1")/nr_hugepages"
    echo "$3" >"$(node_pool "$1")/free_hugepages"
    add_up
}

imitate() { # two nodes of 1 GiB; node 1 cannot find more than 40 pages in a row; node 2 has no memory
    rm -rf "$work/sys" "$work/proc" "$work"/state*
    local node
    for node in 0 1; do
        mkdir -p "$work/sys/devices/system/node/node$node"
        printf 'Node %s MemTotal: 1048576 kB\nNode %s MemFree: 524288 kB\nNode %s Active(file): 524288 kB\n' \
            $node $node $node >"$work/sys/devices/system/node/node$node/meminfo"
    done
    pool "$(node_pool 0)" 10 4 500
    pool "$(node_pool 1)" 0 0 40
    pool "$(node_pool 2)" 0 0 0
    echo 'Node 2 MemTotal: 0 kB' >"$work/sys/devices/system/node/node2/meminfo"
    pool "$machine_pool" 10 4 500
    echo 1 >"$machine_pool/resv_hugepages"
    mkdir -p "$work/proc/sys/vm"
    printf 'MemAvailable: 1048576 kB\nHugePages_Total: 10\nHugePages_Free: 4\nHugePages_Rsvd: 1\nHugepagesize: 2048 kB\n' \
        >"$work/proc/meminfo"
    echo 10 >"$work/proc/sys/vm/nr_hugepages"
    : >"$work/proc/mounts"
}

# Runs setup.sh with the kernel's part played by functions. Leaves its output in $output and its status in $code.
setup() {
    code=0
    output=$(
        exec 2>&1
        # shellcheck source=hugepages/setup.sh
        source "$script"
        write_number() {
            local folder most before
            folder=$(dirname "$1")
            before=$(<"$1")
            most=$2
            if [[ -e $folder/most ]]; then
                most=$(<"$folder/most")
                most=$(($2 < most ? $2 : most))
                echo $(($(<"$folder/free_hugepages") + most - before)) >"$folder/free_hugepages"
            fi
            echo "$most" >"$1"
            add_up
        }
        mount() { echo "hugetlbfs ${*: -1} hugetlbfs rw,relatime,pagesize=2M 0 0" >>"$work/proc/mounts"; }
        umount() {
            [[ ! -e $work/busy ]] || return 32
            sed -i "\\# $1 #d" "$work/proc/mounts"
        }
        main "$@"
    ) || code=$?
}

failed() {
    echo "FAILED: $1" >&2
    printf 'status %s, output:\n%s\nstate:\n%s\n' "${code-}" "${output-}" "$(cat "$SHADOWSERVE_HUGEPAGES_STATE" 2>&1)" >&2
    exit 1
}

expect() { # WHAT STATUS TEXT
    [[ $code == "$2" ]] || failed "$1: status $2 was expected"
    [[ $output == *"$3"* ]] || failed "$1: '$3' was expected in the output"
}

pages() { # WHAT NODE COUNT
    [[ $(<"$(node_pool "$2")/nr_hugepages") == "$3" ]] || failed "$1: node $2 should have $3 pages"
}

export HUGEMNT=none

imitate
export HUGEMEM_MIB=60 NUMA_NODE=all
setup config
expect 'config' 0 'node 0 has 30 pages of 2048 KiB (60 MiB), 20 of them new'
pages 'config' 0 30
pages 'config' 1 30
pages 'config' 2 0
state_before=$(<"$work/state")
setup config
expect 'config again' 0 'node 1 has 30 pages of 2048 KiB, at least the 30 asked for'
[[ $(<"$work/state") == "$state_before" ]] || failed 'config again: changed what is remembered'
HUGEMEM_MIB=10 setup config
expect 'config with less' 0 'at least the 5 asked for'
pages 'config with less' 0 30
HUGEMEM_MIB=69 NUMA_NODE=0 setup config
expect 'config with more, rounded up' 0 'node 0 has 35 pages'
pages 'config with more' 1 30
setup status
expect 'status' 0 '0              2048         35         29           70             25'
setup reset
expect 'reset' 0 'node 0: gave back 25 pages of 2048 KiB, 10 left'
pages 'reset' 0 10
pages 'reset' 1 0
[[ ! -e $work/state ]] || failed 'reset: still remembers something'
setup reset
expect 'reset again' 0 'nothing to give back'
pages 'reset again' 0 10

imitate
HUGEMEM_MIB=100 NUMA_NODE=0,1 setup config
expect 'fragmented' 1 'node 1: not enough contiguous memory: got 40 of 50 pages of 2048 KiB, and keeps those'
pages 'fragmented' 0 50
pages 'fragmented' 1 40
set_pages 0 50 6
setup reset
expect 'reset of pages in use' 1 'node 0: 34 pages that config added are in use'
pages 'reset of pages in use' 0 44
pages 'reset of pages in use' 1 1 # one is promised
set_pages 0 44 40
set_pages 1 7 7 # somebody else added 6
setup reset
expect 'reset when they are free' 0 'node 0: gave back 34'
pages 'reset when they are free' 0 10
pages "reset leaves somebody else's" 1 6

imitate
HUGEMEM_MIB=1100 NUMA_NODE=0 setup config
expect 'more than there is' 1 'node 0 has 1024 MiB of free memory, and 1080 MiB more'
pages 'more than there is' 0 10
[[ ! -e $work/state ]] || failed 'more than there is: remembers something'

imitate
for wrong in 'HUGEMEM_MIB=0' 'HUGEMEM_MIB=12x' 'HUGEMEM_MIB=99999999999' 'HUGEPGSZ_KIB=' 'NUMA_NODE=2' 'NUMA_NODE=7' \
    'NUMA_NODE=,' 'HUGEMNT=here' 'HUGEMNT=/with blank' 'HUGEPGSZ_KIB=1048576'; do
    code=0
    output=$(env "$wrong" bash "$script" config 2>&1) || code=$?
    # An empty variable counts as not set.
    if [[ $wrong == 'HUGEPGSZ_KIB=' ]]; then expect "$wrong" 0 'node 0'; else expect "$wrong" 2 "${wrong%%=*}"; fi
done
for wrong in '' 'confg' 'config now'; do
    # shellcheck disable=SC2086 # split on purpose
    setup $wrong
    expect "command '$wrong'" 2 'Usage:'
done
setup help
expect 'help' 0 'HUGEMEM_MIB=1024'

# A kernel that does not tell nodes apart; then one with /proc/sys/vm only.
imitate
rm -rf "$work/sys/devices"
HUGEMEM_MIB=60 setup config
expect 'no nodes' 0 'this machine has 30 pages'
[[ $(<"$machine_pool/nr_hugepages") == 30 ]] || failed 'no nodes: pages'
setup reset
expect 'no nodes, reset' 0 'this machine: gave back 20 pages of 2048 KiB, 10 left'
rm -rf "$work/sys"
HUGEMEM_MIB=60 setup config
expect 'only /proc' 0 'this machine has 30 pages'
[[ $(<"$work/proc/sys/vm/nr_hugepages") == 30 ]] || failed 'only /proc: pages'
setup status
expect 'only /proc, status' 0 '-              2048         30          3'
HUGEPGSZ_KIB=1048576 setup config
expect 'only /proc, other size' 2 'no pages of 1048576 KiB here; there are: 2048'

imitate
mkdir "$work/parent"
HUGEMEM_MIB=2 HUGEMNT=$work/parent/mnt/ setup config
expect 'mount' 0 "mounted hugetlbfs with 2048 KiB pages at $work/parent/mnt"
HUGEMEM_MIB=2 HUGEMNT=$work/parent/mnt setup config
expect 'mount again' 0 "is mounted at $work/parent/mnt"
HUGEMEM_MIB=2 HUGEMNT=auto setup config
expect 'mounted anywhere' 0 "is mounted at $work/parent/mnt"
[[ $(wc -l <"$work/proc/mounts") == 1 ]] || failed 'mount: more than once'
touch "$work/busy"
setup reset
expect 'reset of a mount in use' 1 "$work/parent/mnt is in use and stays mounted"
rm "$work/busy"
setup reset
expect 'reset of a mount' 0 "unmounted $work/parent/mnt"
[[ ! -s $work/proc/mounts && ! -d $work/parent/mnt && ! -e $work/state ]] || failed 'reset of a mount: left something'
echo "none $work/parent tmpfs rw 0 0" >"$work/proc/mounts"
HUGEMEM_MIB=2 HUGEMNT=$work/parent setup config
expect 'something else mounted' 1 "something else is mounted at $work/parent"
echo 'hugetlbfs /by/others hugetlbfs rw,relatime,pagesize=2M 0 0' >"$work/proc/mounts"
HUGEMEM_MIB=2 HUGEMNT=auto setup config
expect "somebody else's mount" 0 'is mounted at /by/others'
setup reset
[[ -s $work/proc/mounts ]] || failed "reset unmounted somebody else's mount"
echo 'setup.sh on an imitation: passed'

# ---- this machine --------------------------------------------------------------------------------------------------

unset SHADOWSERVE_SYS SHADOWSERVE_PROC
rm -f "$work/state"
skip() {
    echo "setup.sh on this machine: skipped: $1"
    exit 125
}

[[ $(id -u) == 0 ]] || skip 'not root'
real=/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages
[[ -w $real ]] || skip "$real cannot be written"
before=$(<"$real")
undo() {
    if mountpoint -q "$work/mnt"; then umount "$work/mnt"; fi
    # Only what the test added: another process may have added some meanwhile.
    local added
    added=$(awk '$1 == "pages" { print $4 }' "$SHADOWSERVE_HUGEPAGES_STATE" 2>/dev/null || true)
    [[ -z $added ]] || echo $(($(<"$real") - added)) >"$real"
}
real_setup() {
    code=0
    output=$(NUMA_NODE=0 HUGEPGSZ_KIB=2048 HUGEMEM_MIB=$(((before + 2) * 2)) HUGEMNT=$work/mnt bash "$script" "$1" 2>&1) ||
        code=$?
}
real_setup config
[[ $output != *'cannot mount'* ]] || skip 'mounting is not allowed here'
[[ $output != *'not enough contiguous memory'* ]] || skip 'this machine has no 2 free pages'
expect 'config' 0 "node 0 has $((before + 2)) pages of 2048 KiB"
mountpoint -q "$work/mnt" || failed 'config: hugetlbfs is not mounted'
[[ $(<"$real") == $((before + 2)) ]] || failed 'config: number of pages'
real_setup config
expect 'config again' 0 'at least'
[[ $(<"$real") == $((before + 2)) ]] || failed 'config again: number of pages'
truncate -s 2M "$work/mnt/file"
exec 8<"$work/mnt/file"
real_setup reset
expect 'reset of a mount in use' 1 'stays mounted'
exec 8<&-
real_setup reset
expect 'reset' 0 'unmounted'
[[ $(<"$real") == "$before" ]] || failed 'reset: number of pages'
[[ ! -e $work/mnt && ! -e $work/state ]] || failed 'reset: left something'
echo 'setup.sh on this machine: passed'
