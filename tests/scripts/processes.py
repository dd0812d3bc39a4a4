"""Scripts in processes of their own, started from a server that has imported what they need."""

import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
from functools import partial
from pathlib import Path

import torch

from networks import BACKBONES
from networks.resnet import DilatedResNet

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch.utils.tensorboard", "torch.distributed"),
        "torch._dynamo",  # 3 s, which the first optimiser would take in each process
        *(__name__, "networks", "dataset", "training.command"),
    ]
)


class ThinResNet(DilatedResNet):
    """For runs whose numbers do not matter: steps of milliseconds and checkpoints of 5 MB instead of 100."""

    planes = (8, 16, 32, 64)


BACKBONES["thin"] = partial(ThinResNet, "resnet18")


def run(script, arguments, environment, output):
    """The whole life of a process: ``python script arguments``, what it prints going to two files."""
    os.environ.update(environment)
    for number, suffix in ((1, "out"), (2, "error")):
        file = os.open(f"{output}.{suffix}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [script, *map(os.path.expandvars, arguments)]
    multiprocessing.set_start_method("fork", force=True)  # for the workers, as where python starts the script
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / script), run_name="__main__")


def free_port():
    """A port that nobody listens at, and none of those that connections are given by themselves."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Processes:
    """``count`` processes of a script as torchrun starts them; but nobody ends the others when one fails.

    Variables in the arguments are replaced by their values, which ``environments`` may hold for each process.
    """

    def __init__(self, folder, script, *arguments, count=1, environments=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        together = {
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "x",
        }
        self.processes = []
        for rank in range(count):
            environment = together | {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            environment |= environments[rank] if environments else {}
            process = CONTEXT.Process(
                target=run,
                args=(
                    script,
                    [str(x) for x in arguments],
                    {name: str(value) for name, value in environment.items()},
                    self.folder / f"process{rank}",
                ),
            )
            process.start()
            self.processes.append(process)

    def out(self, rank=0):
        return self._text(rank, "out")

    def error(self, rank=0):
        """What went to the standard error, without the progress bar."""
        lines = self._text(rank, "error").replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if line.strip() and "%|" not in line)

    def _text(self, rank, suffix):
        path = self.folder / f"process{rank}.{suffix}"
        return path.read_text() if path.exists() else ""

    def kill(self, signum, ranks=None):
        for rank in range(len(self.processes)) if ranks is None else ranks:
            os.kill(self.processes[rank].pid, signum)

    def until(self, condition, timeout=60):
        """Wait for something that the processes are about to do."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert any(process.is_alive() for process in self.processes), self.error()
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def succeed(self):
        """Wait until all have ended well."""
        statuses = self.wait()
        assert not any(statuses), [statuses, *map(self.error, range(len(statuses)))]

    def wait(self, timeout=60):
        """The exit statuses of all, none of which may hang."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, f"still running: {self.error(0)} {self.error(len(self.processes) - 1)}"
        return [process.exitcode for process in self.processes]
