#!/usr/bin/env bash
# A short version of the race tests of mixed backends under compute-sanitizer: memcheck, then racecheck. Needs a GPU.
#
#   HDISPATCH_BUNDLE=DIR scripts/sanitize.sh
#
# SANITIZE_SECONDS is the limit of each tool (default 240), SANITIZE_REPEATS how often memcheck runs each chain (default 3),
# SANITIZE_TESTS and SANITIZE_RACES pytest's -k for the two. racecheck sees shared memory only (races in global memory are what
# the tests look for), which the order of launches has no part in, and takes ten times as long: it runs each chain once.
# Its warnings, which are about threads of one warp, are counted and shown, and are no errors: it gives them for a block's first
# thread, which makes an mbarrier and arrives at it (Split.expect), as the machine code makes it for the warp.
# Exit code: 0 no errors; 1 errors, failed tests or time up; 2 no compute-sanitizer or no bundle.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${SANITIZE_SECONDS:-240} found=86 status=0
declare -A tests=([memcheck]=${SANITIZE_TESTS:-not fresh and not race_shows} [racecheck]=${SANITIZE_RACES:-nothing and eager})
declare -A repeats=([memcheck]=${SANITIZE_REPEATS:-3} [racecheck]=1)

sanitizer=$(command -v compute-sanitizer ||
  ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2> /dev/null | head -n 1)
[ -x "$sanitizer" ] || { echo "sanitize: no compute-sanitizer here; it comes with the CUDA toolkit" >&2; exit 2; }
[ -f "${HDISPATCH_BUNDLE:-}/manifest.json" ] || { echo "sanitize: HDISPATCH_BUNDLE is no bundle" >&2; exit 2; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 scripts/race_bundle.py "$HDISPATCH_BUNDLE" "$scratch/bundle" || exit 1
export HDISPATCH_BUNDLE="$scratch/bundle"

for tool in memcheck racecheck; do
  began=$SECONDS
  # The summary counts what was printed: the limit is out of reach.
  HDISPATCH_RACE_REPEATS=${repeats[$tool]} timeout --kill-after=10 "$limit" "$sanitizer" --tool "$tool" \
    --report-api-errors no --error-exitcode $found --print-limit 10000 --log-file "$scratch/$tool.log" \
    python3 -m pytest -q -x -p no:cacheprovider tests/gpu/test_mixed_backends.py -k "${tests[$tool]}" > "$scratch/$tool.out" 2>&1
  code=$?
  said=$(grep -aE 'passed|failed|error|no tests ran' "$scratch/$tool.out" | tail -n 1)
  summary=$(grep -aE 'SUMMARY' "$scratch/$tool.log" 2> /dev/null)
  case $code/$summary in $found/*'(0 errors, '*) code=0 ;; esac  # warnings
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
  grep -aA1 'Warning: Race' "$scratch/$tool.log" 2> /dev/null | sed -E 's/ \[[0-9]+ hazards\]//' | grep -a ' access at ' |
    sort | uniq -c | head -n 12
  if [ "$verdict" != clean ]; then
    status=1
    echo "-- the sanitizer's log"; head -n 60 "$scratch/$tool.log" 2> /dev/null
    echo "-- the end of the tests' output"; tail -n 30 "$scratch/$tool.out"
  fi
done
exit $status
