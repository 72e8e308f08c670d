#!/usr/bin/env bash
# Runs fuzz targets side by side, each on CPUs of its own, and prints what came of it.
#
#   [CPUS=0-23] [COLLECT=FOLDER] [TIMEOUT=30] run.sh SECONDS OUT [TARGET...]
#
# Needs only what lies beside it: bin/TARGET (built by `make fuzz-bundle`), corpus/TARGET, dictionaries/TARGET. CPUS says which CPUs to use, all that there are
# by default. With more CPUs than targets each gets as many workers as fit, which share what they find; with fewer, targets wait until others have had their
# time. An input may take TIMEOUT seconds by the clock: give more where the CPUs are not the fuzzers' alone. OUT gets
#   logs/TARGET.N.log    what libFuzzer printed
#   crashes/TARGET-*     inputs that crashed, ran out of time or of memory
#   corpus/TARGET/       what reaches something that corpus/TARGET beside this script does not; a later run with the same OUT goes on from it
#   table.txt, table.tsv the table, anew every minute: sums over a target's workers, the most of coverage and memory
# and COLLECT every minute the table and fuzz.tgz, all of that in one file. It may be ended at any time. Ends with 1 if anything crashed.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2; }
seconds=$1
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$2/logs" "$2/crashes" "$2/corpus" ${COLLECT:+"$COLLECT"}
out=$(cd "$2" && pwd)
shift 2
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=($(cd "$here/bin" && echo *))
list=${CPUS:-$(taskset -pc $$ | sed 's/.*: //')}
cpus=($(tr ',' '\n' <<<"$list" | awk -F- '{ for (cpu = $1; cpu <= ($2 == "" ? $1 : $2); cpu++) print cpu }'))
workers=$((${#cpus[@]} / ${#targets[@]}))
[ "$workers" -gt 0 ] || workers=1

one() { # TARGET WORKER CPU
	local target=$1 log=$out/logs/$1.$2 flags=()
	[ -f "$here/dictionaries/$target" ] && flags+=("-dict=$here/dictionaries/$target")
	# What leaks is what a panic leaves behind; the engines' own budgets are checked by the targets.
	(cd "$out" && ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 exec taskset -c "$3" "$here/bin/$target" "$out/corpus/$target" "$here/corpus/$target" \
		-max_total_time="$seconds" -max_len=4096 -timeout="${TIMEOUT:-30}" -rss_limit_mb=2048 -print_final_stats=1 -reload=10 \
		-artifact_prefix="$out/crashes/$target-" "${flags[@]}" >"$log.log" 2>&1)
	echo "$?" >"$log.status"
}

row() { # TARGET: tab-separated; 72 is libFuzzer's status when it is ended
	local crashes=0 failed file
	for file in "$out/crashes/$1"-*; do [ -e "$file" ] && crashes=$((crashes + 1)); done
	failed=$(cat "$out/logs/$1".*.status 2>/dev/null | grep -cvE '^(0|72)$')
	awk -v target="$1" -v workers="$workers" -v crashes="$crashes" -v failed="$failed" -v elapsed="$SECONDS" '
		FNR == 1 { if (NR > 1) add(); run = 0; took = elapsed < 1 ? 1 : elapsed }
		/^#[0-9]+.* cov: / { run = substr($1, 2); for (i = 1; i < NF; i++) {
			if ($i == "cov:" && $(i + 1) > cov) cov = $(i + 1)
			if ($i == "corp:" && $(i + 1) + 0 > corpus) corpus = $(i + 1) + 0
			if ($i == "rss:" && $(i + 1) + 0 > rss) rss = $(i + 1) + 0 } }
		/^Done [0-9]+ runs in / { run = $2; took = $5 }
		function add() { runs += run; sum += took }
		END { add(); printf "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\n",
			target, workers, sum, runs, runs / (sum ? sum : 1), cov, corpus, rss, crashes, failed }' "$out/logs/$1".*.log
}

table() {
	printf 'target\tworkers\tseconds\truns\truns_per_s\tcoverage\tcorpus\tpeak_mb\tcrashes\tfailed\n' >"$out/table.tsv"
	for target in "${targets[@]}"; do row "$target" >>"$out/table.tsv" 2>/dev/null; done
	awk -F '\t' '{ printf "%-10s %8s %8s %12s %11s %9s %7s %8s %8s %7s\n", $1, $2, $3, $4, $5, $6, $7, $8, $9, $10 }' "$out/table.tsv" >"$out/table.txt"
	[ -n "${COLLECT:-}" ] || return 0
	cp "$out/table.txt" "$COLLECT/fuzz.txt"
	tar czf "$COLLECT/fuzz.tmp" -C "$out" . 2>/dev/null
	mv "$COLLECT/fuzz.tmp" "$COLLECT/fuzz.tgz"
}

SECONDS=0
(while sleep 60; do table; done) &
watch=$!
pids=() at=0
# Whoever ends this ends what it started, and still gets the table.
trap 'kill $(pgrep -P "$(IFS=,; echo "${pids[*]}")") 2>/dev/null; wait "${pids[@]}"; kill "$watch" 2>/dev/null; table; exit 130' INT TERM
for target in "${targets[@]}"; do
	mkdir -p "$out/corpus/$target"
	rm -f "$out/logs/$target".*
	for worker in $(seq "$workers"); do
		one "$target" "$worker" "${cpus[at % ${#cpus[@]}]}" &
		pids+=($!) at=$((at + 1))
		[ $((at % ${#cpus[@]})) -ne 0 ] || wait "${pids[@]}"
	done
done
wait "${pids[@]}"
kill "$watch" 2>/dev/null
table
cat "$out/table.txt"
[ -z "$(ls -A "$out/crashes")" ] && ! awk -F '\t' 'NR > 1 && $10 != 0' "$out/table.tsv" | grep -q .
