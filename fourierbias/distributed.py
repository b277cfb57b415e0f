"""Several processes that work as one: who this one is, and what it tells the others.

A launcher such as ``torchrun`` describes the processes in the environment (RANK, LOCAL_RANK, WORLD_SIZE);
within `session` they can talk. With one process everything here is a matter of course and costs nothing.
torch is imported when there is somebody to talk to.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import FourierBiasError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # torch's "env://"
PATIENCE = timedelta(hours=2)  # how long a process waits for another, as for the first while it writes
_alone = False


def _initialised() -> bool:
    """Whether there is a process group; a program that has not imported torch has none."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0.

    >>> rank()
    0
    """
    return 0 if _alone or not _initialised() else sys.modules["torch.distributed"].get_rank()


def world_size() -> int:
    """Return the number of processes.

    >>> world_size()
    1
    """
    return 1 if _alone or not _initialised() else sys.modules["torch.distributed"].get_world_size()


def is_first() -> bool:
    """Return whether this is the process that prints and writes: rank 0."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within this context the process counts as the only one and waits for nobody.

    It is for what the first process does by itself while the others wait.

    >>> with alone():
    ...     gather("here")
    ['here']
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextmanager
def session() -> Iterator[None]:
    """Connect the processes that the environment speaks of, for as long as the context lasts.

    Does nothing for one process, and where they are connected already. Of an exception on several processes
    the first is raised on; the others end with status 2 and say nothing, so that the reason is printed once.
    Raises FourierBiasError where another process has vanished.
    """
    if not _has_company() or _initialised():
        yield
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = local < torch.cuda.device_count()
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    ended_well = False
    try:
        with _one_reason():
            yield
        ended_well = True
    finally:
        if ended_well or not on_gpu:  # NCCL would wait for the others, who may be waiting for this one
            gc.collect()  # the group's threads end when nothing refers to it, and must before the interpreter
            dist.destroy_process_group()


def _has_company() -> bool:
    """Whether a launcher has started several processes: all it tells them must be there."""
    return os.environ.keys() >= VARIABLES and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def _one_reason() -> Iterator[None]:
    """Of exceptions on several processes let the first pass; see `session`."""
    try:
        yield
    except KeyboardInterrupt:  # which all of them have had
        if is_first():
            raise
        raise SystemExit(130) from None
    except Exception as error:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one has ended
        traceback.clear_frames(error.__traceback__)  # they may refer to the process group
        if not _is_first_to_fail():
            raise SystemExit(2) from None
        if _is_lost_connection(error):
            raise FourierBiasError("another process of this run has ended, so this one ends too") from None
        raise


def _is_first_to_fail() -> bool:
    """Whether no other process has failed before; if that cannot be found out, one has."""
    import torch.distributed as dist

    try:
        return dist.distributed_c10d._get_default_store().add("fourierbias/failures", 1) == 1
    except RuntimeError:  # the store was the first process's, which has ended
        return False


def _is_lost_connection(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device that is named; FourierBiasError if nothing can be computed on it.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    import torch

    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FourierBiasError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def local_device() -> torch.device:
    """Return the device of this process: its GPU, by LOCAL_RANK, where there are any, else the CPU.

    Raises FourierBiasError if a machine has more processes than GPUs.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world_size() == 1:
        return torch.device("cuda")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise FourierBiasError(
            f"this machine has {count} GPUs, too few for a process each: "
            f"start at most {count} processes here, or give --device cpu"
        )
    return torch.device("cuda", local)


def gather(obj: T) -> list[T] | None:
    """Return the objects of all processes, in the order of ranks, on the first; None on the others.

    >>> gather(3)
    [3]
    """
    if world_size() == 1:
        return [obj]
    import torch.distributed as dist

    found = [None] * world_size() if is_first() else None
    dist.gather_object(obj, found, dst=0)
    return found


def broadcast(obj: T) -> T:
    """Return the first process's object, on all of them.

    >>> broadcast("same")
    'same'
    """
    if world_size() == 1:
        return obj
    import torch.distributed as dist

    told = [obj]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def spread(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors of all processes by the first one's."""
    if world_size() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        sent = tensor.detach().contiguous()
        dist.broadcast(sent, src=0)
        tensor.detach().copy_(sent)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Add up the tensors of all processes, in place; without gradient."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def anyone(flag: bool) -> bool:
    """Return whether the flag is up on any process.

    >>> anyone(False)
    False
    """
    if world_size() == 1:
        return flag
    import torch

    return total(torch.tensor(int(flag))).item() > 0


def agree(error: Exception | None = None) -> None:
    """Raise on all processes if any has an error: its own where it has one, else FourierBiasError saying it.

    All processes call it after what may go wrong on some of them, so that none waits for one that has failed.
    """
    if world_size() == 1:
        if error is not None:
            raise error
        return
    import torch.distributed as dist

    errors: list[str | None] = [None] * world_size()
    dist.all_gather_object(errors, None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    found = next((message for message in errors if message is not None), None)
    if found is not None:
        raise FourierBiasError(found)


def together(what: Callable[[], T]) -> T:
    """Return what() of this process once it has gone well on all; raises as `agree` does.

    >>> together(lambda: 2)
    2
    """
    if world_size() == 1:
        return what()
    result: Any = None
    failure: Exception | None = None
    try:
        result = what()
    except Exception as error:
        failure = error
    agree(failure)
    return result


def by_first(what: Callable[[], T]) -> T:
    """Return what() of the first process on all; the others wait, and do not do it. Raises as `agree` does.

    >>> by_first(lambda: 2)
    2
    """

    def act() -> Any:
        if not is_first():
            return None
        with alone():
            return what()

    return broadcast(together(act))


class Tally:
    """A count that all processes share and none waits for; they make theirs in the same order.

    >>> tally = Tally()
    >>> tally.add(2), tally.add(3)
    (2, 5)
    """

    _made = 0

    def __init__(self) -> None:
        self.count = 0
        self.name = f"fourierbias/tally/{Tally._made}"
        Tally._made += 1

    def add(self, amount: int) -> int:
        """Add to the count, and return it as it stands."""
        if world_size() > 1:
            import torch.distributed as dist

            return dist.distributed_c10d._get_default_store().add(self.name, amount)
        self.count += amount
        return self.count
