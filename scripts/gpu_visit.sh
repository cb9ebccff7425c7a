#!/usr/bin/env bash
# One visit to a GPU machine without a network: build the extension, run the GPU tests and the benchmarks, keep everything.
#
#   scripts/gpu_visit.sh CARRY OUT [tests|bench|all]
#
# CARRY holds what was prepared elsewhere: bundle/ (hdispatch build --target h200 --out CARRY/bundle) and, optionally,
# helion.tar.xz (a tree with helion), vllm_C.so.xz (the library behind torch.ops._C). OUT receives logs and results.
set -uo pipefail
carry=$(realpath "$1") out=$(realpath "$2") what=${3:-all}
cd "$(dirname "$0")/.."
site=$(mktemp -d)
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HDISPATCH_BUNDLE="$carry/bundle"
[ -f "$carry/helion.tar.xz" ] && tar xJf "$carry/helion.tar.xz" -C "$site" &
vllm=()
[ -f "$carry/vllm_C.so.xz" ] && { xz -dc "$carry/vllm_C.so.xz" > "$site/vllm_C.so" & vllm=(--vllm-ops "$site/vllm_C.so"); }
python3 -m pip install -q --no-build-isolation --no-deps -e . > "$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
wait
status=0
if [ "$what" != bench ]; then
  python3 -m pytest tests/gpu --maxfail=10 -q --durations=8 > "$out/tests.log" 2>&1 || status=1
  tail -25 "$out/tests.log"
fi
if [ "$what" != tests ]; then
  python3 -m hdispatch doctor "$carry/bundle" > "$out/doctor.txt" 2>&1
  python3 -m hdispatch bench dispatch --bundle "$carry/bundle" "${vllm[@]}" --json "$out/dispatch.json" \
    --plot "$out/dispatch.png" > "$out/dispatch.txt" 2> "$out/dispatch.err" || { status=1; tail -30 "$out/dispatch.err"; }
  cat "$out/dispatch.txt"
fi
exit $status
