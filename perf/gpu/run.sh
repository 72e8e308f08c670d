#!/usr/bin/env bash
# Everything that needs a GPU, each part within its time, as JSON files in a folder:
#   perf/gpu/run.sh [FOLDER] [PART...]        parts: copies verify save survive kernels
#                                             end_to_end on_gpu interference
# As root, with PyTorch, our own Python module (`pip install ./python`), for the last two parts nvCOMP (on_gpu.py says how), at
# least 16 CPUs and 3 GiB for hugepages. FOLDER is perf/results/gpu unless given.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-$root/perf/results/gpu}
shift || true
parts=${*:-copies verify save survive kernels end_to_end on_gpu interference}
export SHADOWSERVE=${SHADOWSERVE:-$root/target/release/shadowserve} PYTHONUNBUFFERED=1
mkdir -p "$out"
HUGEMEM_MIB=${HUGEMEM_MIB:-3072} "$root/hugepages/setup.sh" config || echo "no hugepages: nothing here is to be measured so"
failed=0
part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 begun=$SECONDS code
    shift 2
    timeout "$seconds" "$@" >"$out/$name.json" 2>"$out/$name.log"
    code=$?
    echo "$name: exit $code after $((SECONDS - begun)) s"
    [ $code = 0 ] || { failed=1; tail -n 20 "$out/$name.log"; tail -c 1500 "$out/$name.json"; }
}
for name in $parts; do
    case $name in
    copies) part copies 60 "$SHADOWSERVE" bench gpu ;;
    verify) part verify 120 python3 "$here/verify.py" ;;
    save) part save 120 python3 "$here/save.py" ;;
    survive) part survive 120 python3 "$here/survive.py" ;;
    kernels) part kernels 90 python3 "$here/kernels.py" ;;
    end_to_end) part end_to_end 240 python3 "$here/end_to_end.py" ;;
    on_gpu) part on_gpu 60 python3 "$here/on_gpu.py" ;;
    interference) part interference 200 python3 "$here/interference.py" --plot "$out/interference.png" ;;
    *) echo "no part $name"; failed=1 ;;
    esac
done
tail -n 20 "$out"/end_to_end.log "$out"/interference.log 2>/dev/null
exit $failed
