"""Two gloo ranks that run one scenario after another: what raises, dies or hangs takes no other scenario with it."""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import wait

LIMIT = 600  # seconds for a scenario, to end a hang; the busiest machine needs a small part of it
GRACE = 60  # seconds for the other rank to say what it sees, once one has failed

_spawn = multiprocessing.get_context('spawn')


class Failed(AssertionError):
    """A scenario failed on at least one rank; says what each rank saw."""


class Rank:
    """One process, and what it printed during the last scenario."""

    def __init__(self, rank, folder):
        self.log = folder / f'{rank}.log'
        self.connection, theirs = _spawn.Pipe()
        self.process = _spawn.Process(target=serve, args=(rank, folder, theirs), daemon=True)
        self.process.start()
        theirs.close()  # its end is then the process's alone, and closes with it

    def ask(self, request):
        if self.log.exists():
            os.truncate(self.log, 0)
        with contextlib.suppress(OSError):  # it died while nobody asked: `answer` says so
            self.connection.send(request)

    def answer(self):
        """Did it succeed, and its result or what went wrong."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return False, f'died with exit code {self.process.exitcode}'

    def said(self):
        return self.log.read_text(errors='replace') if self.log.exists() else ''

    def stop(self):
        self.process.terminate()  # if it hangs it says where, see `serve`
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pair:
    """Two ranks of one process group, started when they are needed, and anew after a failure.

    Args:
        folder: For their stores and logs.
        limit: Seconds for each scenario, in which it may have to start the processes.
        grace: Seconds for the other rank, once one has failed.
    """

    def __init__(self, folder, limit=LIMIT, grace=GRACE):
        self.folder, self.limit, self.grace = folder, limit, grace
        self.ranks = []
        self.started = 0

    def run(self, scenario, *args, **kwargs):
        """What `scenario(*args, **kwargs)`, a function of some module, returns on rank 0 and on rank 1.

        Raises:
            Failed: It raised, died or took longer than the limit on one of them.
        """
        try:
            if not self.ranks:
                self._start()
            answers = self._ask((scenario, args, kwargs))
        except BaseException:  # pytest's own time-out, for one
            self.stop()
            raise
        if not all(ok for ok, _ in answers):
            self.stop()
            raise Failed(
                '\n'.join(f'rank {rank}: {"succeeded" if ok else said}' for rank, (ok, said) in enumerate(answers))
            )
        return [result for _, result in answers]

    def said(self):
        """What both ranks printed during the last scenario, if it succeeded."""
        return ''.join(rank.said() for rank in self.ranks)

    def stop(self):
        for rank in self.ranks:
            rank.stop()
        self.ranks = []

    def _start(self):
        self.started += 1
        folder = self.folder / f'pair{self.started}'
        folder.mkdir()
        for rank in range(2):
            self.ranks.append(Rank(rank, folder))

    def _ask(self, request):
        deadline = time.monotonic() + self.limit
        for rank in self.ranks:
            rank.ask(request)
        answers = {}
        while waiting := {rank.connection: rank for rank in self.ranks if rank not in answers}:
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            for rank in map(waiting.get, ready):
                ok, result = rank.answer()
                answers[rank] = ok, result if ok else f'{result}\n{rank.said()}'
                if not ok:
                    deadline = min(deadline, time.monotonic() + self.grace)
            if not ready:
                for rank in waiting.values():
                    rank.stop()
                    answers[rank] = False, f'hung until it was ended\n{rank.said()}'
        return [answers[rank] for rank in self.ranks]


def serve(rank, folder, requests):
    """A rank's life."""
    log = os.open(folder / f'{rank}.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGTERM, chain=True)

    import torch

    torch.set_num_threads(1)
    join(folder / 'store', rank)
    while True:
        try:
            scenario, args, kwargs = requests.recv()
        except EOFError:  # the tests are over
            return
        torch._dynamo.reset()
        try:
            answer = True, scenario(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        requests.send(answer)


def join(store, rank):
    """The process group of two that meets at the file `store`; whoever waits for ever in it is ended from outside."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=2 * LIMIT)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2, timeout=timeout)
