#!/usr/bin/env bash
# The dispatch benchmark of two revisions in turn on one machine: what a change costs on the host.
#
#   scripts/compare_dispatch.sh CARRY OUT       before gpu_visit.sh, whose editable install would hide the other revision
#
# CARRY holds before.tar.xz (git archive of the other revision), bundle/ or bundle.tar.xz that both load, and, optionally, bundle-before/ for
# the other revision and vllm_C.so.xz. OUT receives dispatch-{before,after}-{1,2,3}.json; a table of medians is printed.
# DISPATCH is more arguments of `hdispatch bench dispatch`.
set -euo pipefail
carry=$(realpath "$1") out=$(realpath "$2")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
export HDISPATCH_REVISION="${HDISPATCH_REVISION:-$(cat "$carry/revision" 2>/dev/null)}"  # of "after"
mkdir "$work/tree"
tar xJf "$carry/before.tar.xz" -C "$work/tree"
python3 -m pip install -q --no-build-isolation --no-deps --target "$work/before" "$work/tree" > "$out/before.log" 2>&1 &
python3 -m pip install -q --no-build-isolation --no-deps --target "$work/after" . > "$out/after.log" 2>&1
wait $!
bundles="$carry"
[ -f "$carry/bundle.tar.xz" ] && { tar xJf "$carry/bundle.tar.xz" -C "$work"; bundles="$work"; }
vllm=()
if [ -f "$carry/vllm_C.so.xz" ]; then
  xz -dc "$carry/vllm_C.so.xz" > "$work/vllm_C.so"
  vllm=(--vllm-ops "$work/vllm_C.so")
fi
for round in 1 2 3; do
  for which in before after; do
    bundle="$bundles/bundle"
    [ "$which" = before ] && [ -d "$carry/bundle-before" ] && bundle="$carry/bundle-before"
    (cd "$work" && PYTHONPATH="$work/$which" python3 -m hdispatch bench dispatch --bundle "$bundle" "${vllm[@]}" \
      --json "$out/dispatch-$which-$round.json" ${DISPATCH:-}) > "$out/dispatch-$which-$round.txt" 2>&1
  done
done
python3 - "$out" <<'PY'
import json, statistics, sys
from pathlib import Path

found = {}
for which in ("before", "after"):
    for file in sorted(Path(sys.argv[1]).glob(f"dispatch-{which}-*.json")):
        for row in json.loads(file.read_text())["rows"]:
            found.setdefault((row["path"], row["m"]), {}).setdefault(which, []).append(row["median_ns"])
print(f"{'path':34} {'M':10} {'before, ns':>11} {'after, ns':>11} {'difference':>11}")
for (path, m), times in found.items():
    if len(times) == 2:
        before, after = (statistics.median(times[which]) for which in ("before", "after"))
        print(f"{path:34} {m:10} {before:11.0f} {after:11.0f} {after - before:+11.0f}")
PY
