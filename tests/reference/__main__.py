"""Command line: checks the package against recorded cases and prints one line a case."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from .compare import Comparison, Declined, NotInThePackageYet
from .io import find_cases
from .topics import UnknownKind, check_case

DESCRIPTION = """\
Checks the package against recorded numbers of the original implementation.

A case is a folder with case.json (settings, tolerance, `kind`) and weights, inputs and outputs in safetensors files
under their native names, or a plain JSON file of a known structure. Each case is built from its own settings; every
recorded output and gradient is compared at the case's tolerance, |ours - recorded| <= atol + rtol |recorded|.
"""

EPILOG = """\
One line a case: a verdict, the largest error, the error as a multiple of the tolerance, and the tensor that has it.

  ok                      every recorded tensor is within the tolerance, or is left out for a reason that is printed
  MISS                    a tensor is outside its tolerance, was not compared, or the case could not be run
  unknown kind            the case is of no kind that this program knows: a miss
  declined                an option that the package leaves out on purpose: no miss
  not in the package yet  a part that is still to come: a miss when PATH names this very case, else (the case was
                          found inside a folder that PATH names) no miss

Exit status: 0 without a miss, 1 with at least one, 2 when PATH holds no case.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.reference",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a case, or a folder that contains cases")
    parser.add_argument(
        "--round_trip",
        action="store_true",
        help="convert the weights of every backbone to a folder of the Hub and back, through files, and check those",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a case that could not be run")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the cases are tiny
    num_cases = num_misses = 0
    for path in options.paths:
        try:
            cases = list(find_cases(path))
        except FileNotFoundError as error:
            parser.error(str(error))
        if not cases:
            parser.error(f"{path} holds no case: neither case.json nor another JSON file.")
        for case in cases:
            num_cases += 1
            num_misses += _report(case, options.round_trip, is_named=case == path, debug=options.debug)
    _print(f"{num_cases} cases, {num_misses} misses")
    return 1 if num_misses else 0


def _report(path: Path, round_trip: bool, is_named: bool, debug: bool) -> bool:
    """Checks one case, prints its line, and says whether it is a miss."""
    name = "/".join(path.parts[-2:])
    try:
        compare = check_case(path, round_trip)
    except Declined as error:
        _print(f"{name}: declined: {error}")
        return False
    except NotInThePackageYet as error:
        _print(f"{name}: {'MISS: ' if is_named else ''}not in the package yet: {error}")
        return is_named
    except UnknownKind as error:
        _print(f"{name}: MISS: unknown kind: {error}")
        return True
    except Exception as error:  # one broken case must not hide the others
        what = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        _print(f"{name}: MISS: {type(error).__name__}: {what}")
        if debug:
            traceback.print_exc()
        return True
    _print(f"{name}: {_summary(compare)}")
    for line in compare.misses:
        _print(f"    {line}")
    for note in compare.notes:
        _print(f"    {note}")
    return bool(compare.misses)


def _summary(compare: Comparison) -> str:
    verdict = "MISS" if compare.misses else "ok"
    worst = compare.worst
    if worst is None:
        return f"{verdict}, nothing compared"
    return (
        f"{verdict}, {len(compare.errors)} tensors, largest error {worst.absolute:.2g} = {worst.relative:.2g} x "
        f"tolerance in {worst.name}"
    )


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
