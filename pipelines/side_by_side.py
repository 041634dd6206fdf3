"""Several runs of a program at one time, on one Ray: a process each, since Ray Train takes the signals of its own."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from vqvae_core.errors import InputError
from vqvae_core.train import StoppedError


def run_side_by_side(program: str, runs: Mapping[str, Sequence[str]], limit: int, ray_address: str) -> None:
    """Run `program` with the arguments of each run, at most `limit` at one time; their lines come with their names.

    ray_address: of the Ray that they share, so that it tells each its CPUs and GPUs. Raises `InputError` where one
    fails, `StoppedError` on SIGTERM, after the others were asked to stop and did: what they trained is kept.
    """

    def stop(*_: object) -> None:
        raise StoppedError("asked to stop; all trainings do so after a checkpoint")

    group = _Group()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        _run_all(group, program, runs, limit, ray_address)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(group: "_Group", program: str, runs: Mapping[str, Sequence[str]], limit: int, ray_address: str) -> None:
    with ThreadPoolExecutor(limit) as pool:
        futures = {pool.submit(group.run, name, [sys.executable, program, *arguments], ray_address): name
                   for name, arguments in runs.items()}  # fmt: skip
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:  # an interrupt too
            group.stop()


class _Group:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._stopped = False

    def run(self, name: str, command: Sequence[str], ray_address: str) -> None:
        with self._lock:
            if self._stopped:
                return
            process = subprocess.Popen(
                command,
                env={**os.environ, "RAY_ADDRESS": ray_address},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self._processes.append(process)
        last = ""
        assert process.stdout is not None
        for line in process.stdout:
            print(f"[{name}] {line}", end="", flush=True)
            last = line.strip() or last
        if process.wait() and not self._stopped:
            raise InputError(f"expected {name} to end well, it ended with exit code {process.returncode}: {last}")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    process.terminate()
