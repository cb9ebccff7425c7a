"""`python -m benchmarks.ops`: the same as `hdispatch bench ops`."""

import sys

from hdispatch.cli.main import main

sys.exit(main(["bench", "ops", *sys.argv[1:]]))
