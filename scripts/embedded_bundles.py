"""Build the bundles that a wheel has inside, one for each of these cards, and pack them into one archive.

    python scripts/embedded_bundles.py h200 h100 --out build/embedded

makes build/embedded/h200, build/embedded/h100 and build/embedded/sm_90a-h200-h100.tar.xz, for HDISPATCH_EMBED_BUNDLE
(cmake/module.cmake) and for `scripts/wheels.py --bundle`. The cards are of one architecture; the first one's bundle serves its
cards that are not among them. Other options are those of `hdispatch build`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hdispatch import archive, embedded
from hdispatch.cli import main as command_line
from hdispatch.compile.target import resolve
from hdispatch.errors import HdispatchError


def main() -> int:
    """Build each, then pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", metavar="CARD", help="targets of `hdispatch build`")
    parser.add_argument("--out", type=Path, default=Path("build/embedded"), help="their folder (default: build/embedded)")
    options, others = parser.parse_known_args()
    try:
        archs = {resolve(card).arch for card in options.cards}
    except HdispatchError as error:
        parser.error(str(error))
    if len(archs) > 1:
        parser.error(f"{' '.join(options.cards)} are cards of {', '.join(sorted(archs))}; give cards of one architecture")
    if len(set(options.cards)) < len(options.cards):
        parser.error(f"{' '.join(options.cards)}: a card is named twice; give each once")
    options.out.mkdir(parents=True, exist_ok=True)
    for card in options.cards:
        if status := command_line.main(["build", *others, "--target", card, "--out", str(options.out / card)]):
            return status
    file: Path = options.out / embedded.file_name(archs.pop(), options.cards)
    archive.pack_together({card: options.out / card for card in options.cards}, file)
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
