"""Where the runs of a study take place: processes of this machine, or a cluster that the user has."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from privfed.errors import ConfigError, PrivfedError

T = TypeVar("T")
R = TypeVar("R")


def ended(
    backend: str, address: str | None, jobs: int, work: Callable[[T], R], tasks: Sequence[T]
) -> Iterator[tuple[int, R | Exception]]:
    """Each task's number and what ``work`` gave, as they end; the exception where a cluster lost its worker.

    Args:
        backend: "loky" (processes of this machine), "sequential", "ray" or "dask".
        address: of the cluster, for the last two; default one on this machine, for as long as this lasts.
        jobs: tasks at a time. A cluster of the user's own goes by its own processors.
        work: what a worker can import; it returns its errors.

    Raises:
        ConfigError: there is no such backend, its package is missing, or no cluster answers.
        PrivfedError: a process of this machine was killed.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"--backend {backend}: it must be one of {', '.join(BACKENDS)}")
    try:
        yield from BACKENDS[backend](address, jobs, work, tasks)
    except ImportError as error:
        raise ConfigError(
            f"--backend {backend} needs its package: pip install -c constraints.txt '.[{backend}]' ({error})"
        ) from None
    except (OSError, ValueError) as error:
        if address is None:
            raise
        raise ConfigError(f"--backend {backend}: no cluster answers at {address} ({error})") from None


def _sequential(
    address: str | None, jobs: int, work: Callable[[T], R], tasks: Sequence[T]
) -> Iterator[tuple[int, R | Exception]]:
    for number, task in enumerate(tasks):
        yield number, work(task)


def _loky(
    address: str | None, jobs: int, work: Callable[[T], R], tasks: Sequence[T]
) -> Iterator[tuple[int, R | Exception]]:
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    parallel = joblib.Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered", batch_size=1)
    try:
        yield from parallel(joblib.delayed(_numbered)(work, number, task) for number, task in enumerate(tasks))
    except TerminatedWorkerError:
        raise PrivfedError(
            "a worker of the study was killed; perhaps its runs together need more memory than there is. Start it "
            "again, with fewer --jobs: what has ended stays, and the rest goes on"
        ) from None


def _numbered(work: Callable[[T], R], number: int, task: T) -> tuple[int, R]:
    return number, work(task)


def _ray(
    address: str | None, jobs: int, work: Callable[[T], R], tasks: Sequence[T]
) -> Iterator[tuple[int, R | Exception]]:
    import ray

    own = {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
    with ray.init(address=address or "local", log_to_driver=False, **own):
        remote = ray.remote(max_retries=0)(work)
        numbers: Mapping[object, int] = {remote.remote(task): number for number, task in enumerate(tasks)}
        waiting = list(numbers)
        while waiting:
            (first,), waiting = ray.wait(waiting)
            try:
                yield numbers[first], ray.get(first)
            except ray.exceptions.RayError as error:  # its worker or node is gone
                yield numbers[first], error


def _dask(
    address: str | None, jobs: int, work: Callable[[T], R], tasks: Sequence[T]
) -> Iterator[tuple[int, R | Exception]]:
    from dask.distributed import Client, as_completed

    own = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None} if address is None else {}
    with Client(address, **own) as client:
        numbers = {client.submit(work, task, pure=False): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            lost = future.exception()
            yield numbers[future], future.result() if lost is None else lost


BACKENDS = {"loky": _loky, "sequential": _sequential, "ray": _ray, "dask": _dask}
