"""The launcher, with real processes that fail in every way a rank can."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from programs import Program, parts

from halovae.app import launch
from halovae.base.errors import InputError

RANK = """
import ctypes, json, os, signal, sys, time
from pathlib import Path
from halovae.app import watch
from halovae.base import files
from halovae.base.errors import InputError, RankFailedError

folder, behaviour = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])

def lock_twice(library):
    # No signal gets a thread out of this.
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def stuck():
    # Inside of a library that keeps Python's lock: no other thread runs.
    lock_twice(ctypes.PyDLL(None))

def waiting():
    # Inside of a library that releases it, as a wait for a neighbour is.
    lock_twice(ctypes.CDLL(None))

def body():
    if behaviour == "place":
        names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
        (folder / f"{rank}.json").write_text(json.dumps({name: os.environ[name] for name in names}))
    elif behaviour == "same input error":
        raise InputError("the axis is gone")
    elif behaviour == "one input error":
        if rank == 1:
            raise InputError("this rank lacks the file")
        waiting()
    elif behaviour == "bug":
        if rank == 1:
            raise KeyError("bug")
        time.sleep(0.5)
        raise RankFailedError(1, "KeyError: bug")
    elif behaviour == "killed":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        raise RuntimeError("connection closed by peer")
    elif behaviour == "exits":
        if rank == 1:
            print("last words", file=sys.stderr, flush=True)
            os._exit(7)
        waiting()
    elif behaviour == "forks":
        watch.GRACE = 0.2
        for kind in ("is ended", "fails", "lives on"):
            if os.fork() == 0:
                if kind == "is ended":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif kind == "fails":
                    os._exit(int(watch.report(watch.failure_of(ValueError("a worker's")))))
                os.closerange(0, 3)
                parent = os.getppid()
                while os.getppid() == parent:
                    time.sleep(0.1)
                os._exit(0)
            if kind != "lives on":
                assert os.wait()[1] == (signal.SIGTERM if kind == "is ended" else 0)
        time.sleep(0.5)
    elif behaviour == "verbose":
        for _ in range(5000):
            print("x" * 100, file=sys.stderr)
        if rank == 1:
            raise ValueError("y" * 300_000)
    else:
        with files.atomic(folder / "out.mp4") as draft:
            draft.write_text("half")
            (folder / f"{rank}.pid").write_text(str(os.getpid()))
            {"works": lambda: time.sleep(60), "waits": waiting, "stuck": stuck}[behaviour]()

try:
    with watch.guarded():
        body()
except watch.Interrupted as error:
    os._exit(error.exit_code)
except Exception as error:
    failure = watch.failure_of(error)
    watch.report(failure)
    os._exit(failure.exit_code)
"""

LAUNCHER = """
import sys
from halovae.app import launch
sys.exit(launch.run_ranks(sys.argv[1:], 2, program=[sys.executable, "-c", {rank!r}]))
"""


def start(folder: Path, behaviour: str) -> subprocess.Popen[str]:
    """A launcher of two ranks, in a process of its own."""
    command = [sys.executable, "-c", LAUNCHER.format(rank=RANK), str(folder), behaviour]
    start_by: Any = Program if parts() else subprocess.Popen
    return start_by(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, behaviour: str) -> tuple[int, str, float]:
    """Exit code, standard error and seconds."""
    started = time.monotonic()
    process = start(folder, behaviour)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors, time.monotonic() - started


def pids_of(folder: Path) -> list[int]:
    """The ranks' process ids, once both are in the middle of their work."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in folder.glob("*.pid")]
        if len(texts) == 2 and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def wait_until_gone(pids: list[int], seconds: float) -> None:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], seconds)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_ranks_know_their_place(tmp_path: Path) -> None:
    code, errors, _ = run(tmp_path, "place")
    assert (code, errors) == (0, "")
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0].pop("LOCAL_RANK") == "0"
    assert said[1].pop("LOCAL_RANK") == "1"
    assert said[0] == said[1]
    port = said[0].pop("MASTER_PORT")
    assert 0 < int(port) < 65536
    threads = str(max(1, launch.cores() // 2))
    assert said[0] == {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads
    }  # fmt: skip


def test_an_error_of_all_ranks_is_shown_once(tmp_path: Path) -> None:
    code, errors, _ = run(tmp_path, "same input error")
    assert (code, errors) == (2, "halovae: error: the axis is gone\n")


def test_an_error_of_one_rank_ends_the_others(tmp_path: Path) -> None:
    code, errors, seconds = run(tmp_path, "one input error")
    assert (code, errors) == (2, "halovae: error: this rank lacks the file\n")
    assert seconds < 9


def test_a_bug_shows_the_traceback_of_the_rank_that_has_it(tmp_path: Path) -> None:
    code, errors, _ = run(tmp_path, "bug")
    assert code == 1
    assert errors.startswith("Traceback")
    assert errors.endswith("halovae: error: KeyError: 'bug'\n")
    assert "RankFailedError" not in errors


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    code, errors, seconds = run(tmp_path, "killed")
    assert code == 1
    assert errors.startswith("halovae: error: rank 1 was killed by SIGKILL")
    assert errors.count("\n") == 1
    assert seconds < 6


def test_a_rank_that_exits_without_a_word_is_named(tmp_path: Path) -> None:
    code, errors, _ = run(tmp_path, "exits")
    assert (code, errors) == (1, "last words\nhalovae: error: rank 1 ended with exit code 7\n")


def test_forked_children_neither_speak_for_a_rank_nor_keep_it(tmp_path: Path) -> None:
    code, errors, seconds = run(tmp_path, "forks")
    assert (code, errors) == (0, "")
    assert seconds < 9


def test_ranks_that_say_much_do_not_block(tmp_path: Path) -> None:
    code, errors, _ = run(tmp_path, "verbose")
    assert code == 1
    assert errors.endswith("y\n")


STUCK = """
import ctypes
import threading
from halovae.app import watch
watch.GRACE = 0.1
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with watch.guarded("the same command goes on"):
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()  # When the other thread is in there already.
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
"""


def test_who_has_no_time_to_unwind_tells_of_the_interruption_too() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "halovae: interrupted; the same command goes on\n")


SWALLOWED = """
import signal
from halovae.app import watch
signal.signal(signal.SIGINT, signal.default_int_handler)  # Tests that were started in the background have it ignored.
watch.end_on_ctrl_c()
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
print("went on")
"""


def test_who_swallows_an_interruption_does_not_go_on() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "halovae: interrupted\n")


@pytest.mark.parametrize("behaviour", ["works", "waits", "stuck"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_within_5_seconds(tmp_path: Path, behaviour: str, signum: signal.Signals) -> None:
    process = start(tmp_path, behaviour)
    pids = pids_of(tmp_path)
    started = time.monotonic()
    process.send_signal(signum)
    if behaviour == "works":
        process.send_signal(signum)  # Once more, as impatient people do.
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert (process.returncode, errors) == (128 + signum, "halovae: interrupted\n")
    wait_until_gone(pids, 0)
    if behaviour != "stuck":  # Killed from outside, with no chance to clean up.
        assert {path.suffix for path in tmp_path.iterdir()} == {".pid"}


def test_a_stopped_rank_is_ended_too(tmp_path: Path) -> None:
    process = start(tmp_path, "works")
    pids = pids_of(tmp_path)
    os.kill(pids[0], signal.SIGSTOP)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert time.monotonic() - started < 10  # It has no chance to end by itself: it is killed after some seconds.
    wait_until_gone(pids, 0)


@pytest.mark.parametrize("behaviour", ["works", "waits"])
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path, behaviour: str) -> None:
    process = start(tmp_path, behaviour)
    pids = pids_of(tmp_path)
    process.kill()
    process.communicate(timeout=20)
    wait_until_gone(pids, 5)
    assert {path.suffix for path in tmp_path.iterdir()} == {".pid"}


class TestRanks:
    @pytest.mark.parametrize("ranks", [0, -1])
    def test_too_few(self, ranks: int) -> None:
        with pytest.raises(InputError, match=f"--ranks {ranks}: give 1 or more"):
            launch.check_ranks(ranks)

    def test_too_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "cores", lambda: 3)
        launch.check_ranks(6)
        with pytest.raises(InputError, match="--ranks 7: 6 at most, 2 for each core"):
            launch.check_ranks(7)

    def test_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK", raising=False)
        assert launch.place() is None

    def test_under_torchrun(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
            monkeypatch.setenv(name, str(value))
        assert launch.place() == launch.Place(5, 8, 1, 4)
        monkeypatch.setenv("LOCAL_RANK", "one")
        with pytest.raises(InputError, match="LOCAL_RANK=one"):
            launch.place()
