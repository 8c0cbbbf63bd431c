"""The command line of the harness, and the tables it prints."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tests.faults.trials import Bench, Outcome

_PRELOADED = "KNOWSTORE_FAULTS_PRELOADED"


def main() -> None:
    """Run what the arguments ask for; exits 1 when a promise was broken."""
    asked = _arguments()
    if os.environ.pop(_PRELOADED, None) is None:
        _preload()
    else:  # it is loaded, and programs that are started from here do without
        shutil.rmtree(Path(os.environ.pop("LD_PRELOAD")).parent)
    warnings.simplefilter("ignore")  # of LanceDB about forks
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        sys.exit(_run(asked, Path(folder)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=sys.modules["tests.faults"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kills", type=int, default=0, help="so many trials with random kills")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no trial after that")
    parser.add_argument("--steps", type=int, default=0, help="kills at each step of each command")
    parser.add_argument("--calls", type=int, default=0, metavar="STRIDE", help="kills within every STRIDE-th call")
    parser.add_argument("--disk", type=int, default=0, metavar="STRIDE", help="let every STRIDE-th call fail")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of readers and writers at once")
    parser.add_argument("--postgresql", action="store_true", help="catalogs in a server of its own")
    parser.add_argument("--commands", nargs="*", help="all when not given")
    parser.add_argument("--scenes", type=int, default=4, help="how many pasts stores have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    return parser.parse_args()


def c_compiler() -> str | None:
    """What compiles failing_io.c; without it no disk fails, and nothing is killed within a call."""
    return shutil.which("cc") or shutil.which("gcc")


def _preload() -> None:
    """Start this program again with failing_io.c before the C library, where it can be compiled."""
    compiler = c_compiler()
    if compiler is None or "LD_PRELOAD" in os.environ:
        return
    library = Path(tempfile.mkdtemp()) / "failing_io.so"
    source = Path(__file__).with_name("failing_io.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    os.environ.update({_PRELOADED: "1", "LD_PRELOAD": str(library)})
    os.execv(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]])


def _run(asked: argparse.Namespace, folder: Path) -> int:
    """Exit status."""
    from tests.faults.models import make_models
    from tests.faults.scenes import COMMANDS
    from tests.faults.soak import soak
    from tests.postgresql import postgresql_server

    models, names = make_models(), asked.commands or list(COMMANDS)
    gc.freeze()  # or every child copies what it merely looks through
    asked.until = time.monotonic() + asked.minutes * 60
    kinds = {
        "kills": ("Random kills", _kills),
        "steps": ("Kills at every step", _at_steps),
        "calls": ("Kills within calls", _within_calls),
        "disk": ("A failing disk", _disk),
    }
    n_bad = 0
    with postgresql_server() if asked.postgresql else nullcontext() as url:
        for kind, (title, make) in kinds.items():
            if getattr(asked, kind):
                trials = partial(make, names=names, asked=asked)
                n_bad += report(title, _share(asked, folder / kind, models, url, trials))
        if asked.soak:
            n_bad += soak(folder / "soak", models, asked.soak, url, asked.seed)
    return min(n_bad, 1)


def _share(
    asked: argparse.Namespace,
    folder: Path,
    models: Any,
    url: str | None,
    make: Callable[[Bench, int], Iterator[Outcome]],
) -> list[Outcome]:
    """Outcomes of trials that `--jobs` processes make, each on scenes of its own."""
    from tests.faults.trials import Bench, Outcome, fork

    folder.mkdir()

    def work(job: int) -> None:
        bench = Bench(folder / str(job), models, asked.scenes, asked.seed + job * asked.scenes, url)
        with (folder / f"{job}.jsonl").open("w", buffering=1) as lines:
            for outcome in make(bench, job):
                if outcome.problems:
                    print(outcome, file=sys.stderr, flush=True)
                lines.write(json.dumps(asdict(outcome)) + "\n")

    children = [fork(lambda job=job: work(job)) for job in range(asked.jobs)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise ChildProcessError(f"a job failed: {statuses}")
    rows = [line for job in range(asked.jobs) for line in (folder / f"{job}.jsonl").read_text().splitlines()]
    return [Outcome(**json.loads(row)) for row in rows]


def _kills(bench: Bench, job: int, names: Sequence[str], asked: argparse.Namespace) -> Iterator[Outcome]:
    draw = random.Random(f"{asked.seed}/{job}")
    n_killed = 0
    while n_killed < asked.kills / asked.jobs and time.monotonic() < asked.until:
        outcome = bench.at_random(draw.choice(bench.scenes), draw.choice(names), draw)
        n_killed += outcome.n_kills
        yield outcome


def _at_steps(bench: Bench, job: int, names: Sequence[str], asked: argparse.Namespace) -> Iterator[Outcome]:
    """Every step of every command, again and again; the turns are dealt to the jobs."""
    for turn in range(job, asked.steps, asked.jobs):
        scene = bench.scenes[turn % len(bench.scenes)]
        for name in names:
            for step in range(len(bench.untroubled(scene, name).steps) + 1):
                if time.monotonic() < asked.until:
                    yield bench.at_step(scene, name, step)


def _within_calls(bench: Bench, job: int, names: Sequence[str], asked: argparse.Namespace) -> Iterator[Outcome]:
    scene = bench.scenes[0]
    calls = [(name, call) for name in names for call in range(0, bench.untroubled(scene, name).n_calls, asked.calls)]
    for name, call in calls[job :: asked.jobs]:
        if time.monotonic() < asked.until:
            yield bench.at_call(scene, name, call)


def _disk(bench: Bench, job: int, names: Sequence[str], asked: argparse.Namespace) -> Iterator[Outcome]:
    scene = bench.scenes[0]
    trials = [
        (name, call, error, once)
        for name in names
        for call in range(0, bench.untroubled(scene, name).n_calls, asked.disk)
        for error, once in ((errno.EIO, True), (errno.ENOSPC, False), (errno.EROFS, False))
    ]
    for name, call, error, once in trials[job :: asked.jobs]:
        if time.monotonic() < asked.until:
            yield bench.failing(scene, name, call, error, once=once)


def report(title: str, outcomes: Sequence[Outcome]) -> int:
    """Print how often each step of each command was hit, and what went wrong; returns how many trials were bad,
    which to have made none is as well."""
    if not outcomes:
        print(f"{title}: nothing was tried; the time was up, or failing_io.c could not be compiled and preloaded")
        return 1
    kinds = ("loss", "orphan", "half batch")
    table = Table("command", "step", "hits", *(f"{kind}" for kind in kinds), "other", title=title)
    hits: Counter[tuple[str, str]] = Counter()
    wrong: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        for step in outcome.steps:
            hits[outcome.command, step] += 1
        last = (outcome.command, outcome.steps[-1])
        for problem in outcome.problems:
            kind = problem.split(":")[0]
            wrong.setdefault(last, Counter())[kind if kind in kinds else "other"] += 1
    for key, n in sorted(hits.items()):
        found = wrong.get(key, Counter())
        table.add_row(*key, str(n), *(str(found[kind]) for kind in (*kinds, "other")))
    total = sum(wrong.values(), Counter())
    n_kills = sum(outcome.n_kills for outcome in outcomes)
    table.add_section()
    table.add_row(
        "all",
        f"{len(outcomes)} trials, {n_kills} kills",
        str(hits.total()),
        *(str(total[kind]) for kind in (*kinds, "other")),
    )
    Console(width=120).print(table)
    return sum(bool(outcome.problems) for outcome in outcomes)
