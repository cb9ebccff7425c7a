#!/usr/bin/env bash
# A benchmark of two revisions in turn on one machine: what a change costs.
#
#   scripts/compare_revisions.sh CARRY OUT dispatch|ops    before gpu_visit.sh, whose editable install would hide the other one
#
# CARRY holds before.tar.xz (git archive of the other revision), bundle/ or bundle.tar.xz that both load, and, optionally,
# bundle-before.tar.xz for the other revision and vllm_C.so.xz. OUT receives BENCH-{before,after}-{1,2,3}.json; a table of
# medians, and for dispatch of the fastest rounds, is printed. ROUNDS is how many of each (3); BENCH_ARGUMENTS is more arguments
# of `hdispatch bench`.
set -euo pipefail
carry=$(realpath "$1") out=$(realpath "$2") bench=$3
cd "$(dirname "$0")/.."
work=$(mktemp -d)
export HDISPATCH_REVISION="${HDISPATCH_REVISION:-$(cat "$carry/revision" 2>/dev/null)}"  # of "after"
mkdir "$work/tree" "$work/bundles" "$work/before-bundles"
tar xJf "$carry/before.tar.xz" -C "$work/tree"
python3 -m pip install -q --no-build-isolation --no-deps --target "$work/before" "$work/tree" > "$out/before.log" 2>&1 &
python3 -m pip install -q --no-build-isolation --no-deps --target "$work/after" . > "$out/after.log" 2>&1
wait $!
bundle_after="$carry/bundle"
[ -f "$carry/bundle.tar.xz" ] && { tar xJf "$carry/bundle.tar.xz" -C "$work/bundles"; bundle_after="$work/bundles/bundle"; }
bundle_before="$bundle_after"
[ -f "$carry/bundle-before.tar.xz" ] && {
  tar xJf "$carry/bundle-before.tar.xz" -C "$work/before-bundles"; bundle_before=$(echo "$work"/before-bundles/*); }
vllm=()
if [ -f "$carry/vllm_C.so.xz" ]; then
  xz -dc "$carry/vllm_C.so.xz" > "$work/vllm_C.so"
  vllm=(--vllm-ops "$work/vllm_C.so")
fi
for round in $(seq "${ROUNDS:-3}"); do
  for which in before after; do
    bundle=bundle_$which
    tree=$PWD; [ "$which" = before ] && tree="$work/tree"  # `bench ops` is there, not in what is installed
    (cd "$work" && PYTHONPATH="$work/$which:$tree" python3 -m hdispatch bench "$bench" --bundle "${!bundle}" "${vllm[@]}" \
      --json "$out/$bench-$which-$round.json" ${BENCH_ARGUMENTS:-}) > "$out/$bench-$which-$round.txt" 2>&1
  done
done
python3 - "$out" "$bench" <<'PY'
import json, math, statistics, sys
from pathlib import Path

out, bench = Path(sys.argv[1]), sys.argv[2]
found = {}
for which in ("before", "after"):
    for file in sorted(out.glob(f"{bench}-{which}-*.json")):
        content = json.loads(file.read_text())
        for row in content.get("rows", []):
            found.setdefault((row["path"], str(row["m"])), {}).setdefault(which, []).append(row["median_ns"])
        for row in content.get("timings", []):
            cell = (row["op"], row["K"], row["N"], row["m"], row["mode"], row["path"])
            found.setdefault(cell, {}).setdefault(which, []).append(1000 * row["median_us"])
found = {cell: times for cell, times in found.items() if len(times) == 2}
cells = {cell: [statistics.median(times[which]) for which in ("before", "after")] for cell, times in found.items()}
if bench == "dispatch":  # a busy machine's rounds differ by more than revisions do: the fastest of each says most then
    print(f"{'':45} medians, ns                        fastest rounds, ns")
    print(f"{'path':34} {'M':10} {'before':>11} {'after':>11} {'ratio':>7} {'before':>11} {'after':>11} {'ratio':>7}")
    for (path, m), (before, after) in cells.items():
        first, second = (min(found[path, m][which]) for which in ("before", "after"))
        print(f"{path:34} {m:10} {before:11.0f} {after:11.0f} {after / before:7.3f} {first:11.0f} {second:11.0f} {second / first:7.3f}")
else:
    print(f"{'op':44} {'path':12} cells  after / before: mean   worst (K, N, M)")
    for op, path in sorted({(cell[0], cell[5]) for cell in cells}):
        own = {cell: after / before for cell, (before, after) in cells.items() if (cell[0], cell[5]) == (op, path)}
        mean, worst = math.exp(statistics.fmean(map(math.log, own.values()))), max(own, key=own.get)
        print(f"{op:44} {path:12} {len(own):5}  {mean:20.3f}  {own[worst]:6.3f} {worst[1:5]}")
PY
