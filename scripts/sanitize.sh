#!/usr/bin/env bash
# A short version of the race tests of mixed backends under compute-sanitizer: memcheck, then racecheck. Needs a GPU.
#
#   HDISPATCH_BUNDLE=DIR scripts/sanitize.sh
#
# SANITIZE_SECONDS is the limit of each tool (default 240), SANITIZE_REPEATS how often each chain runs (default 3),
# SANITIZE_TESTS pytest's -k. racecheck sees shared memory only; races in global memory are what the tests look for.
# Exit code: 0 both clean; 1 errors, failed tests or time up; 2 no compute-sanitizer or no bundle.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${SANITIZE_SECONDS:-240} found=86 status=0
tests=${SANITIZE_TESTS:-not fresh and not race_shows}

sanitizer=$(command -v compute-sanitizer ||
  ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2> /dev/null | head -n 1)
[ -x "$sanitizer" ] || { echo "sanitize: no compute-sanitizer here; it comes with the CUDA toolkit" >&2; exit 2; }
[ -f "${HDISPATCH_BUNDLE:-}/manifest.json" ] || { echo "sanitize: HDISPATCH_BUNDLE is no bundle" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 scripts/race_bundle.py "$HDISPATCH_BUNDLE" "$scratch/bundle" || exit 1
export HDISPATCH_BUNDLE="$scratch/bundle" HDISPATCH_RACE_REPEATS="${SANITIZE_REPEATS:-3}"

for tool in memcheck racecheck; do
  began=$SECONDS
  timeout --kill-after=10 "$limit" "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode $found --print-limit 20 \
    --log-file "$scratch/$tool.log" python3 -m pytest -q -x -p no:cacheprovider tests/gpu/test_mixed_backends.py \
    -k "$tests" > "$scratch/$tool.out" 2>&1
  code=$?
  said=$(grep -aE 'passed|failed|error|no tests ran' "$scratch/$tool.out" | tail -n 1)
  summary=$(grep -aE 'SUMMARY' "$scratch/$tool.log" 2> /dev/null)
  case $code in
    0) verdict=clean
      case $said in *passed*) ;; *) verdict="NOTHING RAN" ;; esac
      [ -n "$summary" ] || verdict="NOTHING SEEN: the sanitizer wrote no summary" ;;
    $found) verdict="ERRORS" ;;
    124 | 137) verdict="NOT FINISHED in $limit s" ;;
    *) verdict="FAILED, exit code $code" ;;
  esac
  echo "$tool: $verdict ($((SECONDS - began)) s); tests: ${said:-nothing}"
  [ -z "$summary" ] || echo "$summary"
  if [ "$verdict" != clean ]; then
    status=1
    echo "-- the sanitizer's log"; head -n 60 "$scratch/$tool.log" 2> /dev/null
    echo "-- the end of the tests' output"; tail -n 30 "$scratch/$tool.out"
  fi
done
exit $status
