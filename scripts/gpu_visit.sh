#!/usr/bin/env bash
# One visit to a GPU machine without a network: build the extension, run the tests and the benchmarks, keep everything.
#
#   scripts/gpu_visit.sh CARRY OUT STEP…      steps: build, gpu-tests, cpu-tests, fuzz, tune, ops, deepgemm, attention, attention-dense,
#                                             dispatch, adopt, functional, first-call, busy, bits, pdl, serve, server, vllm-tests,
#                                             vllm-kernel-tests, load, sanitize, make, regress
#
# CARRY holds what was prepared elsewhere: bundle/ (hdispatch build --target h200 --out CARRY/bundle), or bundle.tar.xz with
# that folder, and, optionally, helion.tar.xz (a tree with helion), vllm_C.so.xz (the library behind torch.ops._C),
# candidates*.tar.xz (hdispatch tune candidates --archive) and timings*.jsonl (of a tune that was cut short), revision (git's,
# for the results), deep_gemm.tar.xz (scripts/fetch_deep_gemm.py; for deepgemm, and ops where it is there); vllm_moe_C.so.xz
# (the one behind torch.ops._moe_C) beside it; for serve, server and the vllm-… steps vllm.tar.xz and vllm_deps.tar.xz, vLLM and the
# packages it imports, vllm_more.tar.xz, files of vLLM's package that the first left out, as the one that sleep mode takes,
# vllm_server.tar.xz, packages that its server needs, and, for vllm-kernel-tests, vllm_tests.tar.xz, vLLM's own tests, made by
# scripts/vllm_kernel_tests.py pack. SERVE holds the arguments of the runs of `bench serve`, separated by
# semicolons; SERVER those of benchmarks/serve_server.py; VLLM_TESTS those of pytest; VLLM_KERNEL_TESTS more of
# scripts/vllm_kernel_tests.py run.
# FUZZ is the seconds and more arguments of scripts/fuzz.py; TUNE, OPS, DEEPGEMM, PDL, BITS and DISPATCH are more arguments of
# `hdispatch tune measure`, of benchmarks/bit_equality.py and of the benchmarks, TESTS of pytest, BUILD of `hdispatch build`; for
# sanitize see scripts/sanitize.sh. LIMIT is the seconds that vllm-tests may take: what failed by then is shown.
# regress compares what the visit measured by then with the newest committed results of the same card; REGRESS holds more arguments
# of benchmarks/regress.py, as --partial where OPS measured a part, REGRESS_LIMIT the seconds for each file.
# INSTALLED=1: the extension is installed already, by a run before; several may then run beside each other, on GPUs of their own.
# OUT receives logs and results; the end of each log is printed.
set -uo pipefail
carry=$(realpath "$1") out=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
site=$(mktemp -d)
export HDISPATCH_REVISION="${HDISPATCH_REVISION:-$(cat "$carry/revision" 2>/dev/null)}"
bundle="$carry/bundle"
[ -f "$carry/bundle.tar.xz" ] && { tar xJf "$carry/bundle.tar.xz" -C "$site" || exit 1; bundle="$site/bundle"; }
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HDISPATCH_BUNDLE="$bundle"
[ -f "$carry/helion.tar.xz" ] && tar xJf "$carry/helion.tar.xz" -C "$site" &
vllm=()
if [ ! -f "$carry/vllm_C.so.xz" ] && [ -f "$carry/vllm.tar.xz" ]; then  # the same library
  tar xJOf "$carry/vllm.tar.xz" vllm/_C_stable_libtorch.abi3.so > "$site/vllm_C.so" &
  vllm=(--vllm-ops "$site/vllm_C.so"); export HDISPATCH_VLLM_OPS="$site/vllm_C.so"
fi
[ -f "$carry/vllm_C.so.xz" ] && { xz -dc "$carry/vllm_C.so.xz" > "$site/vllm_C.so" & vllm=(--vllm-ops "$site/vllm_C.so"); export HDISPATCH_VLLM_OPS="$site/vllm_C.so"; }
[ -f "$carry/vllm_moe_C.so.xz" ] && xz -dc "$carry/vllm_moe_C.so.xz" > "$site/_moe_C.so" &
deep_gemm=()
if [ -f "$carry/deep_gemm.tar.xz" ]; then
  tar xJf "$carry/deep_gemm.tar.xz" -C "$site" &
  deep_gemm=(--deep-gemm "$site/deep_gemm")
fi
[ -n "${INSTALLED:-}" ] || python3 -m pip install -q --no-build-isolation --no-deps -e . > "$out/build.log" 2>&1 ||
  { cat "$out/build.log"; exit 1; }
wait

# vLLM and what it imports, for steps that need it.
with_vllm() {
  local archive
  for archive in vllm vllm_deps vllm_server; do
    [ -d "$site/$archive" ] || [ ! -f "$carry/$archive.tar.xz" ] && continue
    mkdir "$site/$archive" && tar xJf "$carry/$archive.tar.xz" -C "$site/$archive" || return 1
    [ $archive = vllm ] && [ -f "$carry/vllm_more.tar.xz" ] && { tar xJf "$carry/vllm_more.tar.xz" -C "$site/vllm" || return 1; }
  done
  PYTHONPATH="$site/vllm:$site/vllm_deps:$site/vllm_server:$PYTHONPATH" VLLM_USE_DEEP_GEMM=0 "$@"
}

# One result for each run in SERVE: serve-1.json, serve-2.json, …; what the engines said is in serve-logs.tar.xz.
serve() {
  local number=0 bad=0 arguments
  while IFS= read -r -d ';' arguments; do
    number=$((number + 1))
    with_vllm python3 -m hdispatch bench serve --bundle "$bundle" --json "$out/serve-$number.json" \
      --logs "$site/logs/$number" $arguments || bad=1
  done <<< "${SERVE:-};"
  tar cJf "$out/serve-logs.tar.xz" -C "$site/logs" .
  return $bad
}

# vLLM's own tests of the ops, with and without the override; what each run said is in vllm-kernel-tests-logs.tar.xz.
vllm_kernel_tests() {
  local bad
  mkdir -p "$site/vllm_tests" && tar xJf "$carry/vllm_tests.tar.xz" -C "$site/vllm_tests" || return 1
  with_vllm python3 scripts/vllm_kernel_tests.py run "$bundle" "$site/vllm_tests" --json "$out/vllm-kernel-tests.json" \
    --logs "$site/logs/kernel-tests" ${VLLM_KERNEL_TESTS:-}
  bad=$?
  tar cJf "$out/vllm-kernel-tests-logs.tar.xz" -C "$site/logs/kernel-tests" .
  return $bad
}

# Measures every candidates*.tar.xz. Resumes interrupted timings.
tune() {
  local archive name
  for archive in "$carry"/candidates*.tar.xz; do
    name=$(basename "${archive%.tar.xz}")
    mkdir -p "$site/$name" && tar xJf "$archive" -C "$site/$name" --strip-components=1 || return 1
    cp "$carry/timings${name#candidates}.jsonl" "$out/" 2>/dev/null
    python3 -m hdispatch tune measure "$site/$name" --out "$out/timings${name#candidates}.jsonl" ${TUNE:-} || return 1
  done
}

# Every result of this visit against the newest one of the same card that is committed.
regress() {
  local result wide bad=0 found=0
  for result in "$out"/{ops,deepgemm,attention,attention_dense,dispatch,functional,server}.json "$out"/serve-*.json; do
    [ -f "$result" ] || continue
    found=1 wide=
    # Engines have no quartiles, and two runs of one revision differ by up to 23 %.
    [[ $result == */serve* ]] && wide="--percent 25"
    timeout "${REGRESS_LIMIT:-120}" python3 benchmarks/regress.py --newest benchmarks/results "$result" $wide ${REGRESS:-} || bad=1
  done
  [ $found = 1 ] || echo "skipped: this visit has no result yet; name regress after the steps that measure"
  return $bad
}

status=0
for step in "$@"; do
  case $step in
    build) bundle="$site/built"; export HDISPATCH_BUNDLE="$bundle"
        python3 -m hdispatch build --target native --out "$bundle" ${BUILD:-} ;;  # for the steps after it
    attention) with_vllm python3 benchmarks/attention.py "$bundle" --vllm "$site/vllm:$site/vllm_deps" \
        --json "$out/attention.json" ${ATTENTION:-} ;;
    attention-dense) python3 benchmarks/attention_dense.py "$bundle" --json "$out/attention_dense.json" ${ATTENTION:-} ;;
    gpu-tests) with_vllm python3 -m pytest ${TESTS:-tests/gpu --maxfail=20} -q --durations=5 ;;
    cpu-tests) env -u HDISPATCH_BUNDLE python3 -m pytest tests/cpu tests/benchmarks --maxfail=10 -q --durations=5 -n 12 ;;
    fuzz) python3 scripts/fuzz.py ${FUZZ:-300} --bundle "$bundle" ;;
    dispatch) python3 -m hdispatch bench dispatch --bundle "$bundle" "${vllm[@]}" --json "$out/dispatch.json" \
        --plot "$out/dispatch.png" ${DISPATCH:-} 2> "$out/dispatch.err" ;;
    adopt) python3 benchmarks/adopt.py --json "$out/adopt.json" ;;
    functional) python3 benchmarks/functional_op.py --json "$out/functional.json" ;;
    first-call) python3 benchmarks/recorded_first_call.py --json "$out/first-call.json" ;;  # 9 processes: minutes
    tune) tune ;;
    ops) python3 -m hdispatch bench ops --bundle "$bundle" "${vllm[@]}" "${deep_gemm[@]}" --json "$out/ops.json" \
        --plot "$out/ops.png" ${OPS:-} 2> "$out/ops.err" ;;
    deepgemm) python3 -m hdispatch bench ops --bundle "$bundle" "${vllm[@]}" "${deep_gemm[@]}" --ops scaled_mm_blockwise \
        --ms 1,8,32,64,128,256,512,1024,4096,8192 --no-compile --no-eager --rounds 7 --compile-seconds 90 --seconds 190 \
        --json "$out/deepgemm.json" ${DEEPGEMM:-} 2> "$out/deepgemm.err" ;;
    busy) python3 benchmarks/busy_thread.py "$bundle" "${vllm[@]}" --json "$out/busy.json" ;;
    bits) python3 benchmarks/bit_equality.py "$bundle" --vllm "$site/vllm_C.so" --json "$out/bits.json" ${BITS:-} ;;
    pdl) python3 -m hdispatch bench pdl --bundle "$bundle" --json "$out/pdl.json" ${PDL:-} ;;
    serve) serve ;;
    server) with_vllm python3 benchmarks/serve_server.py "$bundle" --json "$out/server.json" --logs "$site/logs/server" \
        ${SERVER:-}; bad=$?; tar cJf "$out/server-logs.tar.xz" -C "$site/logs/server" .; (exit $bad) ;;
    vllm-tests) with_vllm timeout -s INT "${LIMIT:-600}" python3 -m pytest ${VLLM_TESTS:-tests/gpu/test_vllm_engine.py} \
        -q -n 6 --tb=short --durations=20 ;;  # an engine a test: each takes 40 s of one core, and 10 GB of the GPU
    vllm-kernel-tests) vllm_kernel_tests ;;
    sanitize) scripts/sanitize.sh ;;
    regress) regress ;;
    load) python3 benchmarks/load_rows.py "$bundle" --rows 1000 --json "$out/load_rows.json" ;;
    make) env -u HDISPATCH_BUNDLE make demo test VENV="$(python3 -c 'import sys; print(sys.prefix)')" DEMO_BUNDLE="$site/demo-bundle" ;;
    *) echo "no step $step" >&2; false ;;
  esac > "$out/$step.txt" 2>&1 || { status=1; echo "step $step FAILED"; }
  echo "== $step"; tail -n "${TAIL:-60}" "$out/$step.txt"
done
exit $status
