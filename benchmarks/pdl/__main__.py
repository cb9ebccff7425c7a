"""`python -m benchmarks.pdl`: the same as `hdispatch bench pdl`."""

import sys

from hdispatch.cli.main import main

sys.exit(main(["bench", "pdl", *sys.argv[1:]]))
