"""`python -m tests.parity DIR...`: check every fixture found under each DIR, one line an expected output."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import parity


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m tests.parity DIR...   (a fixture folder, or a folder of them)")
        return 2
    failed = total = 0
    for argument in arguments:
        root = Path(argument).resolve()
        folders = parity.find_fixtures(root) if root.is_dir() else []
        if not folders:
            print(f"FAIL {argument}: no fixture found there")
            failed += 1
        for folder in folders:
            for check in parity.run(folder):
                total += 1
                failed += not check.passed
                verdict = "ok  " if check.passed else "FAIL"
                print(
                    f"{verdict} {folder.name} {check.case} {check.output}: "
                    f"difference {check.difference:.3g}, tolerance {check.tolerance:.3g}"
                )
    print(f"{total - failed if total else 0} of {total} expected outputs agree, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
