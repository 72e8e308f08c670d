#!/usr/bin/env bash
# Reserves hugepages and mounts hugetlbfs; gives back what it reserved. `setup.sh help` prints the manual below.
set -euo pipefail

usage() {
    cat <<'MANUAL'
Usage: [VARIABLE=value ...] hugepages/setup.sh COMMAND

Commands
  config   Makes sure that each chosen NUMA node has at least HUGEMEM_MIB of hugepages, free or in use, and that
           hugetlbfs is mounted. Never takes away pages, so it can be run again, and with other sizes. Needs root.
  status   Prints the hugepages of each node, what config added, and the mounts. Needs no rights.
  reset    Gives back the pages that config added and that are free, and unmounts what config mounted. Pages that were
           there before, or that somebody else added, stay. Needs root.
  help     Prints this.

Variables
  HUGEMEM_MIB=1024      MiB of hugepages that each chosen node should have in all; rounded up to whole pages.
  HUGEPGSZ_KIB=2048     Size of a page in KiB: 2048 or, where the CPU has them, 1048576 (1 GiB).
  NUMA_NODE=all         The nodes: all (that have memory), or numbers separated by commas, as in 0,1.
  HUGEMNT=auto          Where to mount hugetlbfs for this page size. auto: nowhere if it is mounted already, else
                        /dev/hugepages (2048) or /dev/hugepages-1048576kB. none: do not mount; processes that use
                        memfds or DPDK's --in-memory, as shadowserve does, need no mount.

Exit status
  0  done
  1  not done, or not all of it; the message says what and why
  2  the command line or a variable is wrong

What config added is remembered in /run/shadowserve-hugepages until reset. Both end with a reboot.
For 1 GiB pages, rather reserve them at boot: default_hugepagesz=1G hugepagesz=1G hugepages=N on the kernel's command line.
See docs/HUGEPAGES.md.
MANUAL
}

# Where the kernel's files are; a test puts its own in their place.
sys=${SHADOWSERVE_SYS:-/sys}
proc=${SHADOWSERVE_PROC:-/proc}
state=${SHADOWSERVE_HUGEPAGES_STATE:-/run/shadowserve-hugepages}

fail() {
    echo "setup.sh: $*" >&2
    exit 1
}

misused() {
    echo "setup.sh: $*" >&2
    exit 2
}

say() { echo "setup.sh: $1"; }

# ---- what the machine has ------------------------------------------------------------------------------------------

# The nodes that have memory, one a line; "-" where the kernel does not tell nodes apart.
nodes() {
    local node path
    for path in "$sys"/devices/system/node/node[0-9]*; do
        node=${path##*/node}
        if [[ -d $path/hugepages ]] && grep -qE 'MemTotal: +[1-9]' "$path/meminfo" 2>/dev/null; then echo "$node"; fi
    done | sort -n | grep . || echo -
}

# The folder of a node's ($1) pool of a page size ($2, KiB), or nothing if only /proc/sys/vm has one.
pool_folder() {
    local folder=$sys/kernel/mm/hugepages
    [[ $1 == - ]] || folder=$sys/devices/system/node/node$1/hugepages
    folder=$folder/hugepages-$2kB
    [[ ! -d $folder ]] || echo "$folder"
}

default_page_kib() { awk '$1 == "Hugepagesize:" { print $2 }' "$proc/meminfo"; }

# The file that holds how many pages of a size ($2) a node ($1) has; nothing if it cannot have any.
pages_file() {
    local folder
    folder=$(pool_folder "$1" "$2")
    if [[ -n $folder ]]; then
        echo "$folder/nr_hugepages"
    elif [[ $1 == - && $2 == "$(default_page_kib)" && -e $proc/sys/vm/nr_hugepages ]]; then
        echo "$proc/sys/vm/nr_hugepages"
    fi
}

# Pages that a node ($1) has of a size ($2) and that can be given back: nobody uses them, and enough are left on all nodes
# together for those that the kernel has promised to somebody.
free_pages() {
    local folder=$sys/kernel/mm/hugepages/hugepages-$2kB here anywhere
    if [[ -d $folder ]]; then
        anywhere=$(($(<"$folder/free_hugepages") - $(<"$folder/resv_hugepages")))
        here=$(<"$(pool_folder "$1" "$2")/free_hugepages")
        echo $((here < anywhere ? here : anywhere))
    else
        awk '/^HugePages_Free:/ { free = $2 } /^HugePages_Rsvd:/ { free -= $2 } END { print free + 0 }' "$proc/meminfo"
    fi
}

# The page sizes that the kernel has, in KiB, one a line.
page_sizes() {
    local folder
    for folder in "$sys"/kernel/mm/hugepages/hugepages-*kB; do
        [[ -d $folder ]] || continue
        folder=${folder##*/hugepages-}
        echo "${folder%kB}"
    done | sort -n | grep . || default_page_kib
}

# KiB of memory on a node ($1) that are free or that the kernel would free when asked.
available_kib() {
    if [[ $1 == - ]]; then
        awk '$1 == "MemAvailable:" { print $2 }' "$proc/meminfo"
    else
        awk '$3 ~ /^(MemFree|Active\(file\)|Inactive\(file\)|SReclaimable):$/ { sum += $4 } END { print sum + 0 }' \
            "$sys/devices/system/node/node$1/meminfo"
    fi
}

# Where hugetlbfs is mounted with pages of $1 KiB, one a line.
mounts() {
    local mounted options size
    while read -r _ mounted type options _; do
        [[ $type == hugetlbfs ]] || continue
        size=$(grep -oE 'pagesize=[0-9]+[KMG]' <<<"$options" | cut -d= -f2 || true)
        case $size in
            *G) size=$((${size%G} * 1048576)) ;;
            *M) size=$((${size%M} * 1024)) ;;
            *K) size=${size%K} ;;
            *) size=$(default_page_kib) ;;
        esac
        [[ $size != "$1" ]] || echo "$mounted"
    done <"$proc/mounts"
}

# ---- what config added ---------------------------------------------------------------------------------------------
# Lines of the state file: "pages NODE KIB COUNT", "folder PATH", "mount PATH".

recall() { [[ ! -e $state ]] || cat "$state"; }

added_pages() { recall | awk -v node="$1" -v kib="$2" '$1 == "pages" && $2 == node && $3 == kib { print $4; exit }' | grep . || echo 0; }

# Replaces the state file by standard input, all or nothing; removes it when nothing is left.
remember() {
    cat >"$state.new"
    if [[ -s $state.new ]]; then mv "$state.new" "$state"; else rm -f "$state.new" "$state"; fi
}

# Sets what config added to a node's ($1) pool of a size ($2) to $3 pages.
remember_pages() {
    {
        recall | awk -v node="$1" -v kib="$2" '!($1 == "pages" && $2 == node && $3 == kib)'
        [[ $3 == 0 ]] || echo "pages $1 $2 $3"
    } | remember
}

remember_line() { { recall; echo "$1"; } | remember; }
forget_line() { recall | { grep -vxF "$1" || true; } | remember; }

# One config or reset at a time.
lock() {
    exec 9>"$state.lock" || fail "cannot write $state.lock: run this as root (sudo -E keeps the variables)"
    flock -w 60 9 || fail "another setup.sh has been running for a minute: see who holds $state.lock"
}

# ---- config --------------------------------------------------------------------------------------------------------

write_number() { echo "$2" >"$1"; }

# Asks for pages, lets the kernel make room where it fell short, and asks once more.
request_pages() {
    local file=$1 wanted=$2
    write_number "$file" "$wanted" 2>/dev/null || true
    if (($(<"$file") < wanted)); then
        if [[ -w $proc/sys/vm/compact_memory ]]; then write_number "$proc/sys/vm/compact_memory" 1 || true; fi
        write_number "$file" "$wanted" 2>/dev/null || true
    fi
}

config_node() {
    local node=$1 kib=$2 wanted=$3 file before after missing_kib available where="node $1"
    [[ $node != - ]] || where="this machine"
    file=$(pages_file "$node" "$kib")
    before=$(<"$file")
    if ((before >= wanted)); then
        say "$where has $before pages of $kib KiB, at least the $wanted asked for"
        return 0
    fi
    missing_kib=$(((wanted - before) * kib))
    available=$(available_kib "$node")
    ((missing_kib <= available)) ||
        fail "$where has $((available / 1024)) MiB of free memory, and $((missing_kib / 1024)) MiB more of hugepages are asked" \
            "for: ask for less (HUGEMEM_MIB) or stop what uses the memory. Nothing was changed on this node"
    request_pages "$file" "$wanted"
    after=$(<"$file")
    if ((after > before)); then remember_pages "$node" "$kib" $(($(added_pages "$node" "$kib") + after - before)); fi
    say "$where has $after pages of $kib KiB ($((after * kib / 1024)) MiB), $((after - before)) of them new"
    ((after >= wanted)) && return 0
    echo "setup.sh: $where: not enough contiguous memory: got $after of $wanted pages of $kib KiB, and keeps those. Run this" \
        "soon after boot, or reserve at boot: hugepagesz=${kib}K hugepages=$wanted on the kernel's command line" >&2
    return 1
}

config_mount() {
    local kib=$1 path=$2 found
    [[ $path != none ]] || return 0
    found=$(mounts "$kib")
    if [[ $path == auto ]]; then
        if [[ -n $found ]]; then
            say "hugetlbfs with $kib KiB pages is mounted at ${found//$'\n'/, }"
            return 0
        fi
        path=/dev/hugepages
        [[ $kib == 2048 ]] || path=/dev/hugepages-${kib}kB
    elif grep -qxF "$path" <<<"$found"; then
        say "hugetlbfs with $kib KiB pages is mounted at $path"
        return 0
    fi
    if awk -v path="$path" '$2 == path { found = 1 } END { exit !found }' "$proc/mounts"; then
        fail "something else is mounted at $path: name another place (HUGEMNT) or none"
    fi
    if [[ ! -d $path ]]; then
        mkdir "$path" || fail "cannot make $path: name another place (HUGEMNT) or none"
        remember_line "folder $path"
    fi
    mount -t hugetlbfs -o "pagesize=${kib}K" hugetlbfs "$path" ||
        fail "cannot mount hugetlbfs at $path (a container needs CAP_SYS_ADMIN for this): HUGEMNT=none does without"
    remember_line "mount $path"
    say "mounted hugetlbfs with $kib KiB pages at $path"
}

is_number() { [[ $1 =~ ^[1-9][0-9]{0,9}$ ]]; }

config() {
    local mib=${HUGEMEM_MIB:-1024} kib=${HUGEPGSZ_KIB:-2048} chosen=${NUMA_NODE:-all} path=${HUGEMNT:-auto} node file got_all=0
    is_number "$mib" || misused "HUGEMEM_MIB=$mib is not a number of MiB from 1"
    is_number "$kib" || misused "HUGEPGSZ_KIB=$kib is not a number of KiB: 2048 or 1048576"
    path=${path%/}
    [[ $path == auto || $path == none || $path =~ ^/[^[:space:]]+$ ]] ||
        misused "HUGEMNT=$path is neither auto, none nor an absolute path without blanks"
    if [[ $chosen == all ]]; then chosen=$(nodes); fi
    for node in ${chosen//,/ }; do
        nodes | grep -qxF -- "$node" ||
            misused "NUMA_NODE: there is no node $node with memory; there are: $(nodes | tr '\n' ' ')"
        file=$(pages_file "$node" "$kib")
        [[ -n $file ]] || misused "HUGEPGSZ_KIB: no pages of $kib KiB here; there are: $(page_sizes | tr '\n' ' ')"
        [[ -w $file ]] || fail "cannot write $file: run this as root (sudo -E keeps the variables); in a container, on the host"
    done
    [[ -n ${chosen//,/} ]] || misused "NUMA_NODE names no node"
    lock
    for node in ${chosen//,/ }; do
        config_node "$node" "$kib" $(((mib * 1024 + kib - 1) / kib)) || got_all=1
    done
    config_mount "$kib" "$path"
    return $got_all
}

# ---- reset ---------------------------------------------------------------------------------------------------------

reset_pages() {
    local node=$1 kib=$2 added=$3 file total free give where="node $1"
    [[ $node != - ]] || where="this machine"
    file=$(pages_file "$node" "$kib")
    [[ -n $file ]] || fail "$state speaks of pages of $kib KiB on $where, which do not exist: remove that line"
    [[ -w $file ]] || fail "cannot write $file: run this as root"
    total=$(<"$file")
    free=$(free_pages "$node" "$kib")
    give=$((added < free ? added : free))
    # Of the pages added, somebody may have given back some: never go below none.
    give=$((give < total ? give : total))
    if ((give > 0)); then write_number "$file" $((total - give)); fi
    say "$where: gave back $give pages of $kib KiB, $((total - give)) left"
    if ((total - give == 0 || give == added)); then
        remember_pages "$node" "$kib" 0
        return 0
    fi
    remember_pages "$node" "$kib" $((added - give))
    echo "setup.sh: $where: $((added - give)) pages that config added are in use: run reset again when their users have ended" >&2
    return 1
}

reset_mount() {
    if awk -v path="$1" '$2 == path && $3 == "hugetlbfs" { found = 1 } END { exit !found }' "$proc/mounts"; then
        umount "$1" || {
            echo "setup.sh: $1 is in use and stays mounted: run reset again when its users have ended" >&2
            return 1
        }
        say "unmounted $1"
    fi
    forget_line "mount $1"
}

reset_folder() {
    if [[ -d $1 ]]; then
        if grep -qF "hugetlbfs $1 " "$proc/mounts"; then return 1; fi # said so already
        rmdir "$1" || return 1
    fi
    forget_line "folder $1"
}

reset() {
    local complete=0 lines kind first kib count
    if [[ ! -e $state ]]; then
        say "nothing to give back: config added nothing since boot"
        return 0
    fi
    lock
    # Mounts first (their files hold pages), then the folders under them, then pages.
    lines=$(recall)
    for kind in mount folder; do
        while read -r first; do
            [[ -z $first ]] || "reset_$kind" "$first" || complete=1
        done < <(sed -n "s/^$kind //p" <<<"$lines")
    done
    while read -r first kib count; do
        [[ -z $first ]] || reset_pages "$first" "$kib" "$count" || complete=1
    done < <(sed -n 's/^pages //p' <<<"$lines")
    return $complete
}

# ---- status --------------------------------------------------------------------------------------------------------

status() {
    local node kib file total free
    printf '%-6s %12s %10s %10s %12s %14s\n' node page_kib pages free total_mib added_by_config
    for node in $(nodes); do
        for kib in $(page_sizes); do
            file=$(pages_file "$node" "$kib")
            [[ -n $file ]] || continue
            total=$(<"$file")
            free=$(free_pages "$node" "$kib")
            printf '%-6s %12d %10d %10d %12d %14d\n' \
                "$node" "$kib" "$total" "$free" $((total * kib / 1024)) "$(added_pages "$node" "$kib")"
        done
    done
    for kib in $(page_sizes); do
        echo "hugetlbfs with $kib KiB pages: $(mounts "$kib" | paste -sd ' ' | grep . || echo 'not mounted')"
    done
}

main() {
    (($# == 1)) || { usage >&2; exit 2; }
    case $1 in
        config | status | reset) "$1" ;;
        help | -h | --help) usage ;;
        *) echo "setup.sh: there is no command $1" >&2; usage >&2; exit 2 ;;
    esac
}

# A test reads this file for its functions.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
