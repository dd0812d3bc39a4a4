"""The members of a synchronised layer: processes of torch.distributed or threads of nn.DataParallel."""

import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of a group (None: all), each with this layer of ``channels`` channels."""

    def __init__(self, channels: int, group: dist.ProcessGroup | None = None) -> None:
        self.channels, self.group = channels, group
        self._agreed = False

    @property
    def size(self) -> int:
        """The number of processes: 1 without torch.distributed, and for a process outside the group."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return max(1, dist.get_world_size(self.group))

    def gather(self, vector: Tensor) -> Tensor:
        """The vectors (N,) of all processes, stacked (P,N) by rank.

        Raises:
            ValueError: on every process, if their layers differ in channels.
        """
        # Vectors of unequal length would break the collective: compare once per layer. A compiler that traces
        # would gather the constant for real, as often as it traces, which depends on each process's caches.
        if not self._agreed and not torch.compiler.is_compiling():
            self.compare_channels(vector.device)
        return self._all_gather(vector)

    def compare_channels(self, device: torch.device) -> None:
        """Raise ValueError on every process, if their layers differ in channels."""
        counts = self._all_gather(torch.tensor([self.channels], device=device)).flatten().tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"InPlaceABNSync needs the same channels on all processes; this one has {self.channels}, "
                f"ranks 0 to {len(counts) - 1} of the group have {', '.join(map(str, counts))}"
            )
        self._agreed = True

    def _all_gather(self, vector: Tensor) -> Tensor:
        result = vector.new_empty(self.size, len(vector))
        group = own_group() if self.group is None else self.group
        # Later versions of PyTorch have renamed it.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(result.view(-1), vector, group=group)
        return result

    def __deepcopy__(self, memo: object) -> "Processes":
        return Processes(self.channels, self.group)  # a group cannot be copied, and its copy would be another


_own_groups: "weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = weakref.WeakKeyDictionary()


def own_group() -> dist.ProcessGroup:
    """A group of all processes for synchronised layers alone, made by the first exchange.

    In the default group a layer's few numbers would queue behind buckets of gradients. It serves all the same
    where a compiler traces the first exchange, for that cannot make a group (see ``prepare_to_compile``).
    """
    default = dist.group.WORLD
    assert default is not None  # there are several processes
    if default not in _own_groups:
        if torch.compiler.is_compiling():
            return default
        _own_groups[default] = dist.new_group()
    return _own_groups[default]


@dataclass(frozen=True)
class Replica:
    """One replica of a layer among those that a call of torch's ``replicate`` makes, for one pass or many."""

    rendezvous: "Rendezvous"
    layer: int  # the same for all replicas of a layer
    index: int  # by order of creation, which is that of the devices

    @property
    def size(self) -> int:
        """How many replicas the layer has."""
        return self.rendezvous.sizes[self.layer]

    def gather(self, vector: Tensor) -> Tensor:
        """The vectors (N,) of all replicas, stacked (P,N) by index, on this one's device."""
        return self.rendezvous.gather(self, vector)


class Rendezvous:
    """Where the replicas of a network, each running in a thread of its own, exchange vectors.

    All layers of the network share it: a replica that fails after one layer is missed in the next. Nothing
    depends on which thread runs a replica, except that threads which have died are not waited for. Backward
    on CUDA runs in threads of autograd, which outlive an error: there ``timeout`` ends the waiting.

    Attributes:
        timeout: seconds to wait for a replica whose thread is alive, or not known yet.
        sizes: how many replicas each layer has.
    """

    timeout = 300.0

    def __init__(self) -> None:
        self.sizes: Counter[int] = Counter()
        self._stand_in: weakref.ref[Tensor] | None = None
        self._changed = threading.Condition()
        self._place: tuple[int, int] | None = None  # layer and vector's length of the gather under way
        self._arrived: dict[int, _Shared] = {}
        # Of the last gather. The next one replaces it when all have come there, so when all have read it.
        self._stack: _Shared | None = None
        self._gathers = 0
        self._threads: dict[int, threading.Thread] = {}
        self._failure: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether the call of torch's ``replicate`` that made the newest replica is still under way.

        ``replicate`` copies every module of a network before it fills the first buffer of a copy: so it is as
        long as the newest copy has its stand-in. That tells calls apart whether the replicas of earlier ones
        have run or not, have failed, or are still kept.
        """
        return self._stand_in is not None and self._stand_in() is not None and not self._threads

    def add(self, layer: int, stand_in: Tensor) -> Replica:
        """One more replica of a layer, which holds ``stand_in`` until its buffers are filled."""
        self._stand_in = weakref.ref(stand_in)
        self.sizes[layer] += 1
        return Replica(self, layer, self.sizes[layer] - 1)

    def abort(self, error: BaseException) -> None:
        """Stop all replicas, those that wait now and those that come later, because of ``error`` in one."""
        # The text only: the error itself would keep its frames, and with them the activations, alive.
        self._fail(f"{type(error).__name__}: {error}")

    def gather(self, replica: Replica, vector: Tensor) -> Tensor:
        """What ``Replica.gather`` returns.

        Raises:
            RuntimeError: another replica failed, did not come in time, or is at another layer.
        """
        with self._changed:
            self._arrive(replica, vector)
            if len(self._arrived) < replica.size:
                self._wait(replica)
            else:
                self._complete(vector.device)
            assert self._stack is not None
            return self._stack.on(vector.device)

    def _arrive(self, replica: Replica, vector: Tensor) -> None:
        place = (replica.layer, len(vector))
        if self._place not in (None, place) or replica.index in self._arrived:
            self._fail(
                "the replicas are not at the same layer; all must run the same layers in the same order (in "
                "backward they do if each replica ends in one loss)"
            )
        self._raise_failure()
        thread = threading.current_thread()
        if self._threads.get(replica.index, thread) is not thread:
            self._threads.clear()  # another pass, where nobody's thread is known yet
        self._threads[replica.index] = thread
        self._place, self._arrived[replica.index] = place, _Shared(vector)

    def _complete(self, device: torch.device) -> None:
        try:
            parts = [self._arrived[index].on(device) for index in sorted(self._arrived)]
            self._stack = _Shared(torch.stack(parts))
        except Exception as error:  # no memory, for one: the others wait for this replica
            self.abort(error)
            raise
        self._arrived, self._place = {}, None
        self._gathers += 1
        self._changed.notify_all()

    def _wait(self, replica: Replica) -> None:
        number, deadline = self._gathers, time.monotonic() + self.timeout
        while self._gathers == number:
            self._raise_failure()
            missing = [index for index in range(replica.size) if index not in self._arrived]
            dead = [i for i in missing if i in self._threads and not self._threads[i].is_alive()]
            if dead:
                self._fail(f"replica {dead[0]} ended before it came to this layer; see its own error")
            elif time.monotonic() > deadline:
                self._fail(f"replica {missing[0]} did not come to this layer within {self.timeout:g} s")
            else:
                self._changed.wait(timeout=0.1)  # a thread that dies notifies nobody

    def _fail(self, failure: str) -> None:
        with self._changed:
            self._failure = self._failure or failure  # the first is the cause of the others
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"another replica of InPlaceABNSync failed: {self._failure}")


class _Shared:
    """A tensor for threads with streams of their own; on CUDA an event says when it has been computed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.ready = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def on(self, device: torch.device) -> Tensor:
        """The tensor on ``device``, ready for the current stream of this thread."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.ready)
            self.tensor.record_stream(stream)  # nobody gets its memory before this stream has read it
        return self.tensor.to(device, non_blocking=device.type == "cuda")


_newest = threading.local()  # in each thread a weak reference to its newest rendezvous


def join(layer: int, stand_in: Tensor) -> Replica:
    """One more replica of a layer; its buffer is ``stand_in`` until torch's ``replicate`` fills it."""
    reference = getattr(_newest, "rendezvous", None)
    rendezvous: Rendezvous | None = reference and reference()
    if rendezvous is None or not rendezvous.is_open:
        rendezvous = Rendezvous()
        _newest.rendezvous = weakref.ref(rendezvous)
    return rendezvous.add(layer, stand_in)
