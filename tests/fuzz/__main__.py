"""Run one or more targets with many inputs, outside the test suite:

python -m tests.fuzz --examples 100000 jsonl csv
python -m tests.fuzz --examples 100000 --minutes 15 all
python -m tests.fuzz --examples 100000 --mutations 20 json gz

Where inputs are bytes, --mutations damages each that hypothesis draws so many times more: drawing one takes several
times as long as reading it.

Prints for each target how many inputs it took; the first input that breaks one is shown at its end, the others go on,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS, Target, mutations

_ROUND = 500  # hypothesis keeps what it has seen in memory


def run(target: Target, n_examples: int, first_seed: int, seconds: float = math.inf, n_mutations: int = 0) -> int:
    """Check that many inputs, or begin no further round of them after the time; raises what the first failing one
    raised. Returns how many were checked."""
    n_checked = 0
    until = time.monotonic() + seconds
    for start in itertools.count(0, _ROUND):
        if n_checked >= n_examples or time.monotonic() >= until:
            break

        @seed(first_seed + start)
        @settings(
            max_examples=min(_ROUND, n_examples - n_checked),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def check(value: object) -> None:
            nonlocal n_checked
            for one in mutations(value, n_mutations) if isinstance(value, bytes) else [value]:
                n_checked += 1
                target.check(one)

        check()
    return n_checked


def main() -> None:
    """Parse the arguments, run the targets and print how many inputs each took; exits 1 when one was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--mutations", type=int, default=0, help="of each input of bytes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="shared by the targets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = list(TARGETS) if "all" in options.targets else options.targets
    broken = [name for name in names if not _holds(name, options, options.minutes * 60 / len(names))]
    sys.exit(f"broken: {', '.join(broken)}" if broken else 0)


def _holds(name: str, options: argparse.Namespace, seconds: float) -> bool:
    started = time.perf_counter()
    try:
        n_checked = run(TARGETS[name], options.examples, options.seed, seconds, options.mutations)
    except Exception:
        traceback.print_exc()
        return False
    print(f"{name}\t{n_checked}\t{time.perf_counter() - started:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    main()
