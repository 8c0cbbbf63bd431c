"""Trials: fork, run a command on a copy of a scene's store, kill it, and see in another process what is left."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any
from unittest.mock import patch

from knowstore._loaded import LoadedModels
from knowstore.store import KnowledgeStore
from tests.faults.checks import EMPTY, PARTS, State, disagreements, holders, leftovers, state
from tests.faults.places import Place, copied
from tests.faults.scenes import COMMANDS, Command, Scene, open_store
from tests.faults.steps import Steps, forget, said

_PATIENCE_S = 120.0  # a process that takes longer hangs
_ENDED = "(it had ended)"


@dataclass
class Untroubled:
    """How a command goes on a scene when nobody interrupts it."""

    before: State
    after: State
    steps: list[str]
    seconds: float
    n_calls: int


@dataclass
class Outcome:
    """One trial: in which steps its processes were killed (or which error met it, where), and what was then wrong."""

    command: str
    steps: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    at: str = ""

    @property
    def n_kills(self) -> int:
        return 0 if self.at else sum(step != _ENDED for step in self.steps)

    def __str__(self) -> str:
        where = ", then ".join(self.steps) + (f" at {self.at}" if self.at else "")
        return f"{self.command}, {where}: {'; '.join(self.problems) or 'nothing wrong'}"


class Bench:
    """Scenes and the untroubled course of each command on them; one process makes trials with it, one after another.

    Args:
        folder: where stores are copied to.
        models: the stand-ins.
        n_scenes, seed: how many pasts, and which.
        server: URL of the PostgreSQL server where catalogs are; in the stores' folders when None.
    """

    def __init__(self, folder: Path, models: LoadedModels, n_scenes: int, seed: int, server: str | None = None) -> None:
        folder.mkdir()
        self._folder, self._models, self._server = folder, models, server
        self._note = mmap(-1, 4096)
        programs = ctypes.CDLL(None)
        self._preloaded = programs if hasattr(programs, "faults_arm") else None
        self.scenes = [
            Scene.unpacked(
                self._in_child(lambda n=n: Scene.make(folder / f"scene{n}", seed + n, models, server).packed)
            )
            for n in range(n_scenes)
        ]
        self._untroubled: dict[tuple[int, str], Untroubled] = {}

    def untroubled(self, scene: Scene, name: str) -> Untroubled:
        key = (self.scenes.index(scene), name)
        if key not in self._untroubled:
            with self._copy(scene, COMMANDS[name]) as store:
                self._untroubled[key] = Untroubled(**self._in_child(lambda: self._course(store, scene, COMMANDS[name])))
        return self._untroubled[key]

    def at_step(self, scene: Scene, name: str, step: int) -> Outcome:
        """Kill a command before its step number `step`."""
        outcome = Outcome(name)
        with self._copy(scene, COMMANDS[name]) as store:
            self._kill(outcome, store, scene, kill_at=step)
            self._inspect(outcome, store, scene)
        return outcome

    def at_call(self, scene: Scene, name: str, call: int) -> Outcome:
        """Kill a command half-way through the call number `call` that changes a file."""
        outcome = Outcome(name)
        with self._copy(scene, COMMANDS[name]) as store:
            self._kill(outcome, store, scene, at_call=call)
            self._inspect(outcome, store, scene)
        return outcome

    def at_random(self, scene: Scene, name: str, draw: random.Random) -> Outcome:
        """Kill a command at a random moment or half-way through a random call that changes a file; three in ten times
        kill the same command again while it is taken up, and so on."""
        outcome = Outcome(name)
        course = self.untroubled(scene, name)
        with self._copy(scene, COMMANDS[name]) as store:
            while True:
                if self._preloaded is not None and draw.random() < 0.5:
                    self._kill(outcome, store, scene, at_call=draw.randrange(max(course.n_calls, 1)))
                else:
                    self._kill(outcome, store, scene, after_s=draw.uniform(0, course.seconds * 1.1))
                if draw.random() < 0.7:
                    break
            self._inspect(outcome, store, scene)
        return outcome

    def failing(self, scene: Scene, name: str, at_call: int, error: int, *, once: bool) -> Outcome:
        """Let the call number `at_call` that changes a file fail (and all later ones, unless `once`)."""
        outcome = Outcome(name, [errno.errorcode[error]], at=f"call {at_call}")
        with self._copy(scene, COMMANDS[name]) as store:
            unexplained = self._in_child(lambda: self._failed(store, scene, COMMANDS[name], at_call, error, once))
            outcome.problems += unexplained
            self._inspect(outcome, store, scene)
        return outcome

    # in the processes

    def _course(self, place: Place, scene: Scene, command: Command) -> dict[str, Any]:
        before: State = EMPTY
        if command.store is not None:
            with self._open(place) as store:
                before = state(store)
        steps = Steps(self._note)
        steps.watch()
        self._arm(place, -1, -1, 0)
        started = time.perf_counter()
        with command.surroundings(scene), self._open(place) as store:
            command.run(store, scene)
            seconds = time.perf_counter() - started
            n_calls = 0 if self._preloaded is None else int(self._preloaded.faults_counted())
            return {"before": before, "after": state(store), "steps": steps.names, "seconds": seconds,
                    "n_calls": n_calls}  # fmt: skip

    def _run(self, place: Place, scene: Scene, command: Command, kill_at: int | None, at_call: int | None) -> None:
        steps = Steps(self._note, kill_at)
        steps.watch()
        if at_call is not None:
            self._arm(place, at_call, at_call, 0)
        with command.surroundings(scene), self._open(place) as store:
            with suppress(command.already):
                command.run(store, scene)
            steps.end()

    def _failed(self, place: Place, scene: Scene, command: Command, at_call: int, error: int, once: bool) -> list[str]:
        from knowstore.errors import KnowledgeStoreError

        self._arm(place, at_call, at_call if once else 1 << 40, error)
        try:
            with command.surroundings(scene), self._open(place) as store:
                command.run(store, scene)
        except KnowledgeStoreError:
            return []
        except Exception:
            return ["not explained: " + traceback.format_exc()[-700:]]
        return []

    def _look(self, place: Place, scene: Scene, command: Command, course: Untroubled) -> list[str]:
        """What is wrong after the interruption, after running the command again, and with that itself."""
        found: list[str] = []
        few = patch("knowstore.passages.table._PROBED_ROWS", 3)  # a third of the time went into trying the index
        with command.surroundings(scene), few, self._open(place) as store:
            now = state(store)
            if now not in (course.before, course.after):
                found.append(f"half batch: neither before nor after: {_difference(now, course)}")
            found += disagreements(store)
            found += [f"not clean: {one.kind}, {one.detail}" for one in store.verify().problems
                      if one.kind != "unfinished purge"]  # fmt: skip
            try:
                command.run(store, scene)
            except command.already as error:
                if now != course.after:
                    found.append(f"cannot be run again: {error}")
            except Exception:
                return [*found, "cannot be run again: " + traceback.format_exc()[-900:]]
            now = state(store)
            if now != course.after:
                found.append(f"run again, it did something else: {_difference(now, course)}")
            found += disagreements(store) + leftovers(store)
            found += [f"not clean: {one.kind}, {one.detail}" for one in store.verify().problems]
            if command.is_purge:
                found += holders(place.folder, scene.needles)
        return found

    def _open(self, place: Place) -> KnowledgeStore:
        return open_store(place.folder, self._models, place.catalog_url)

    def _arm(self, place: Place, first: int, last: int, error: int) -> None:
        if self._preloaded is not None:
            arguments = (ctypes.c_long(first), ctypes.c_long(last), ctypes.c_int(error))
            self._preloaded.faults_arm(str(place.folder).encode(), *arguments)

    # around the processes

    def _copy(self, scene: Scene, command: Command) -> AbstractContextManager[Place]:
        like = None if command.store is None else scene.place(command.store)
        return copied(Place(self._folder / "work", self._server), like)

    def _kill(
        self,
        outcome: Outcome,
        place: Place,
        scene: Scene,
        *,
        kill_at: int | None = None,
        at_call: int | None = None,
        after_s: float | None = None,
    ) -> None:
        forget(self._note)
        child = fork(lambda: self._run(place, scene, COMMANDS[outcome.command], kill_at, at_call))
        if after_s is not None:
            time.sleep(after_s)
            os.kill(child, signal.SIGKILL)
        status = _wait(child)
        if status is None:
            outcome.problems.append(f"hangs in {said(self._note)}")
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status):
            outcome.problems.append(f"fails in {said(self._note)}")
        where = said(self._note)
        outcome.steps.append(where if status is None or os.WIFSIGNALED(status) else _ENDED)
        place.settle()

    def _inspect(self, outcome: Outcome, place: Place, scene: Scene) -> None:
        command, course = COMMANDS[outcome.command], self.untroubled(scene, outcome.command)
        try:
            outcome.problems += self._in_child(lambda: self._look(place, scene, command, course))
        except ChildProcessError as error:
            outcome.problems.append(f"cannot be opened: {error}")

    def _in_child(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in a process of its own, as JSON.

        Raises:
            ChildProcessError: it failed, or hangs.
        """
        answer = self._folder / f"answer{os.getpid()}"
        answer.unlink(missing_ok=True)
        status = _wait(fork(lambda: _answer(answer, work)))
        said = json.loads(answer.read_text()) if answer.exists() else {"error": f"it hangs or died: {status}"}
        if "error" in said:
            raise ChildProcessError(said["error"])
        return said["result"]


def _answer(path: Path, work: Callable[[], Any]) -> None:
    try:
        said = {"result": work()}
    except Exception:
        said = {"error": traceback.format_exc()[-1500:]}
    path.write_text(json.dumps(said))


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _wait(child: int) -> int | None:
    """The exit status of a child; None when it had to be killed because it hangs."""
    deadline = time.monotonic() + _PATIENCE_S
    pause = 0.0005
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _difference(now: State, course: Untroubled) -> str:
    """In short, which parts are those of before or after, and what is live."""
    parts = [
        f"{name} as {'before' if one == before else 'after' if one == after else 'neither'}"
        for name, one, before, after in zip(PARTS, now, course.before, course.after, strict=True)
    ]
    live, before, after = ({row[0] for row in one[1]} for one in (now, course.before, course.after))
    return f"{', '.join(parts)}; {len(live)} live, {len(before)} before, {len(after)} after; {now[0][:3]}..."
