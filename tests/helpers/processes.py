"""Process groups for tests: forks of one server process that has imported torch and the library already.

Forks of the test's own process could not run a backward pass after it has.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "dalle.hub.registry",
        "pytest",
        "tests.helpers.distributed_work",
        "tests.helpers.powersgd_worker",
        "torch._dynamo",  # optimizers and FSDP import it when they are first used
    ]
)


def run_processes(world: int, function: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """What function(rank, *args) returns in each of `world` processes, under the variables of torchrun.

    Args:
        world: number of processes.
        function: a module's; in the process group, if it starts one.
        args: picklable.
        seconds: longest wait for a result.

    Raises:
        AssertionError: with the tracebacks of the processes that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORKSERVER.Pipe(duplex=False) for _ in range(world)]
    processes = [
        FORKSERVER.Process(target=_work, args=(rank, world, port, sender, function, args))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = [
        pickle.loads(receiver.recv_bytes()) if receiver.poll(seconds) else (f"no result in {seconds} s", None)
        for receiver, _ in pipes
    ]
    for process in processes:
        process.kill()
        process.join()
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(results) if error]
    assert not errors, "\n".join(errors)
    return [result for _, result in results]


def _work(rank: int, world: int, port: int, sender: Connection, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    try:
        answer = pickle.dumps((None, function(rank, *args)))
    except BaseException:
        answer = pickle.dumps((traceback.format_exc(), None))
    sender.send_bytes(answer)  # pickled by value: the sender ends before the receiver reads


def run_group(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`run_processes` in a gloo group."""
    return run_processes(world, _in_group, function, args)


def _in_group(rank: int, function: Callable[..., Any], args: tuple) -> Any:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return function(rank, *args)


def traceback_of(function: Callable[..., Any], *args: Any) -> str:
    """The traceback of a call that fails, else nothing."""
    try:
        function(*args)
    except Exception:
        return traceback.format_exc()
    return ""
