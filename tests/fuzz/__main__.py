"""Run one or more targets with many inputs, outside the test suite:

python -m tests.fuzz --examples 100000 jsonl csv
python -m tests.fuzz --examples 100000 all
"""

from __future__ import annotations

import argparse
import time

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import TARGETS, Target

_ROUND = 2_000  # hypothesis keeps what it has seen in memory


def run(target: Target, n_examples: int, first_seed: int) -> int:
    """Check that many inputs; raises what the first failing one raised. Returns how many were checked."""
    n_checked = 0
    for start in range(0, n_examples, _ROUND):

        @seed(first_seed + start)
        @settings(
            max_examples=min(_ROUND, n_examples - start),
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def check(value: object) -> None:
            nonlocal n_checked
            n_checked += 1
            target.check(value)

        check()
    return n_checked


def main() -> None:
    """Parse the arguments, run the targets and print how many inputs each took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"])
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in TARGETS if "all" in options.targets else options.targets:
        started = time.perf_counter()
        n_checked = run(TARGETS[name], options.examples, options.seed)
        print(f"{name}\t{n_checked}\t{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
