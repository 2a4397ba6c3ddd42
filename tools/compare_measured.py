"""Print what two measurements of the same samples say, side by side: before and after quantization, say.

    lccp measure CONFIG --checkpoint BEFORE --out A
    lccp measure CONFIG --checkpoint AFTER --out B
    python tools/compare_measured.py A B

In: two directories that `lccp measure` wrote with the same monitors. Out: answer and corpus perplexity, NIAH and
retrieval heads at the newest step that both hold. Needs neither torch nor Megatron.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_lccp.analysis.report.compare import as_text, compare
from megatron_lccp.files import error_text


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="compare_measured", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="A", help="directory of `lccp measure`")
    parser.add_argument("after", metavar="B", help="another")
    args = parser.parse_args(argv)
    try:
        print(as_text(compare(args.before, args.after)))
    except (ValueError, OSError) as error:
        print(f"compare_measured: {error_text(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
