"""
Processes on one machine or several, started by Detectron2's options or by torchrun, that begin with
the same code and config, and end together.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import logging
import multiprocessing.util
import os
import pickle
import queue
import re
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import detectron2
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine.launch import _distributed_worker
from detectron2.utils import comm
from torch.multiprocessing import start_processes

from ..utils.errors import (
    PeerError,
    RunError,
    UserError,
    error_of_traceback,
    is_peer_error,
    log_without_traceback,
    say,
)

TERMINATED = 128 + signal.SIGTERM  # the exit status of a run that was asked to end, and has
_GRACE = 5.0  # seconds that a process waits for the cause, when what it sees may be its effect
_PACKAGE = Path(__file__).parent.parent


def launch(main: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    """
    Run ``main(args)`` in every process: in this one, if torchrun has started it or there is only
    one, else in ``--num-gpus`` new ones, after all machines have come and agree.

    SIGTERM is forwarded to the new processes, and their exit status :data:`TERMINATED` is ours.

    Args:
        main: a function of a module.
        cfg: of :func:`get_config`, which :func:`check_setup` has checked.
        args: of :func:`argument_parser`.

    Returns:
        What `main` returns, if it runs in this process.

    Raises:
        UserError: if the machines do not find each other, or differ, or `main` raises one.
        RunError: if a process or a machine dies. All processes on this machine have then ended.
    """
    if cfg.MODEL.DEVICE == "cpu":
        # Without a GPU in sight Detectron2's launcher takes Gloo.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.num_gpus)))
    if dist.is_torchelastic_launched():
        if args.num_machines > 1:
            _choose_gloo_interface(os.environ["MASTER_ADDR"])
        return _worker(int(os.environ["LOCAL_RANK"]), main, cfg, args)
    if args.num_gpus * args.num_machines == 1:
        return main(args)

    host, port = ("127.0.0.1", 0) if args.dist_url == "auto" else parse_dist_url(args.dist_url)
    store = _join_store(host, port, cfg, args)
    try:
        if args.num_machines > 1:
            _meet(store, cfg, args)
            _choose_gloo_interface(host)
        # As torchrun does for the processes that it starts.
        os.environ.update(
            MASTER_ADDR=host, MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True"
        )
        # A store that ends, after its machine has said why, is a stack of C++ functions otherwise.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        _run_workers(main, cfg, args)
    except UserError as e:
        if args.num_machines > 1:
            _share_cause(e, store, args)
        raise


def set_torchrun_defaults(parser: argparse.ArgumentParser) -> None:
    """
    Make what torchrun says of the processes that it starts the defaults of Detectron2's options,
    and ``--resume``, when it has started them again.
    """
    parser.set_defaults(dist_url="auto")
    if dist.is_torchelastic_launched():
        resume = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
        parser.set_defaults(**torchrun_options(), **({"resume": True} if resume else {}))


def torchrun_options() -> dict[str, int]:
    """
    Returns:
        ``num_gpus``, ``num_machines`` and ``machine_rank``, if torchrun has started this process.
    """
    if not dist.is_torchelastic_launched():
        return {}
    names = {
        "num_gpus": "LOCAL_WORLD_SIZE",
        "num_machines": "GROUP_WORLD_SIZE",
        "machine_rank": "GROUP_RANK",
    }
    return {option: int(os.environ[name]) for option, name in names.items()}


def parse_dist_url(url: str) -> tuple[str, int]:
    """
    Returns:
        Host and port.

    Raises:
        UserError: if `url` is not ``tcp://HOST:PORT``.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port and not parts.path.strip("/"):
            return parts.hostname, parts.port
    except ValueError:  # of a port that is none
        pass
    raise UserError(f"--dist-url {url} is not of the form tcp://HOST:PORT.")


def _join_store(host: str, port: int, cfg: CfgNode, args: argparse.Namespace) -> dist.TCPStore:
    """The store on machine 0, for this process to open or to connect to."""
    limit = cfg.DISTRIBUTED.START_TIMEOUT

    def open_store() -> dist.TCPStore:
        return dist.TCPStore(
            host,
            port,
            is_master=args.machine_rank == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=limit),
        )

    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise UserError(
            f"--dist-url {args.dist_url}: the name {host} cannot be resolved on this machine "
            f"({e.strerror}): name machine 0 as the others know it, or give its IP address."
        ) from e
    if args.machine_rank > 0:
        _wait_for_server(host, port, cfg, args)
    try:
        return _within(limit, open_store)
    except RuntimeError as e:
        if "EADDRINUSE" in str(e):
            raise UserError(
                f"--dist-url {args.dist_url}: the port {port} of this machine is in use, by "
                "another run or another --machine-rank 0: choose another, or give each machine its "
                "own rank."
            ) from e
        raise UserError(
            f"--dist-url {args.dist_url}: what answers there is not machine 0 of this run: name "
            "machine 0 and a port of it that is free."
        ) from e


def _wait_for_server(host: str, port: int, cfg: CfgNode, args: argparse.Namespace) -> None:
    limit = cfg.DISTRIBUTED.START_TIMEOUT
    started = time.monotonic()
    told = 0.0
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5, limit)).close()
            return
        except OSError as e:
            waited = time.monotonic() - started
            if waited > limit:
                raise UserError(
                    f"--dist-url {args.dist_url}: machine 0 did not answer in {limit} s "
                    f"(DISTRIBUTED.START_TIMEOUT; {e}): start it with --machine-rank 0, and check "
                    "the address, the port and the firewalls."
                ) from e
            if waited >= told:
                say(f"waiting for machine 0 at {args.dist_url} (at most {limit} s)")
                told += 30
        time.sleep(0.5)


def _meet(store: dist.Store, cfg: CfgNode, args: argparse.Namespace) -> None:
    """Wait for all machines, and check that they are as many as each expects, and all alike."""
    limit = cfg.DISTRIBUTED.START_TIMEOUT
    machines: list[tuple[int, str, dict[str, str]]] = []

    def update() -> None:
        for number in range(len(machines), store.add("come", 0)):
            machines.append(json.loads(store.get(f"machine/{number + 1}")))
        if store.check(["cause"]):
            raise UserError(store.get("cause").decode())

    number = store.add("come", 1)
    here = (args.machine_rank, socket.gethostname(), describe_job(cfg, args))
    store.set(f"machine/{number}", json.dumps(here))
    started = time.monotonic()
    told = 5.0
    while True:
        try:
            _within(limit, update)
        except RuntimeError as e:
            raise UserError(
                f"--dist-url {args.dist_url}: machine 0 does not answer any more; if it has ended, "
                "it says why."
            ) from e
        check_machines(machines)
        if len(machines) == args.num_machines:
            return
        waited = time.monotonic() - started
        missing = sorted(set(range(args.num_machines)) - {rank for rank, *_ in machines})
        status = (
            f"{len(machines)} of {args.num_machines} machines have come, "
            f"but not --machine-rank {', '.join(map(str, missing))}"
        )
        if waited > limit:
            raise UserError(
                f"After {limit} s (DISTRIBUTED.START_TIMEOUT) {status}: start them with --dist-url "
                f"{args.dist_url}, and check that they can reach it."
            )
        if waited >= told:
            say(f"{status}; waiting (at most {limit} s)")
            told += 30
        time.sleep(0.2)


def describe_job(cfg: CfgNode, args: argparse.Namespace) -> dict[str, str]:
    """
    Returns:
        What has to be the same on all machines, by name: options, versions and the config.
    """
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml", ".json"):
            digest.update(f"{path.relative_to(_PACKAGE)}\0".encode() + path.read_bytes())
    facts = {
        "--num-machines": args.num_machines,
        "--num-gpus": args.num_gpus,
        "--eval-only": args.eval_only,
        "the version of torch": torch.__version__,
        "the version of detectron2": detectron2.__version__,
        "the hash of gnws_d2's source files": digest.hexdigest()[:12],
    }
    if not dist.is_torchelastic_launched():  # which starts some machines again, and some anew
        facts["--resume"] = args.resume
    return {name: str(value) for name, value in [*facts.items(), *_flatten(cfg)]}


def _flatten(cfg: CfgNode, prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        items += _flatten(value, f"{name}.") if isinstance(value, CfgNode) else [(name, value)]
    return items


def check_machines(machines: list[tuple[int, str, dict[str, str]]]) -> None:
    """
    Args:
        machines: the rank, the host's name and :func:`describe_job` of each.

    Raises:
        UserError: if two are not alike, or have the same rank.
    """
    for i, (rank, host, facts) in enumerate(machines):
        first_rank, first_host, first = machines[0]
        names = [name for name in first | facts if first.get(name) != facts.get(name)]
        if names:
            values = [f"{name} ({first.get(name)} and {facts.get(name)})" for name in names]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"The machines {first_rank} ({first_host}) and {rank} ({host}) differ in "
                f"{', '.join(values[:5])}{more}: start all with the same code, options and config."
            )
        for other_rank, other_host, _ in machines[:i]:
            if rank == other_rank:
                raise UserError(
                    f"Two machines ({other_host} and {host}) have --machine-rank {rank}: give each "
                    "its own."
                )


def _choose_gloo_interface(host: str) -> None:
    """
    Gloo takes the address of this machine's name, which on many is a loopback one that no other
    machine can reach. Take the interface that leads to machine 0, or, on machine 0, anywhere.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux":
        return
    import fcntl

    for target in (host, "192.0.2.1"):  # reserved for documentation: nothing is sent to it
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                address = probe.getsockname()[0]
                if address.startswith("127."):
                    continue
                for _, name in socket.if_nameindex():
                    request = struct.pack("256s", name.encode()[:15])
                    try:
                        reply = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                    except OSError:  # an interface without an IPv4 address
                        continue
                    if socket.inet_ntoa(reply[20:24]) == address:
                        os.environ["GLOO_SOCKET_IFNAME"] = name
                        return
        except OSError:
            continue


def _run_workers(main: Callable, cfg: CfgNode, args: argparse.Namespace) -> None:
    def forward(*_: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()

    default = signal.signal(signal.SIGTERM, forward)
    context = start_processes(_worker, (main, cfg, args), nprocs=args.num_gpus, join=False)
    workers = context.processes
    try:
        # Those that were asked to end are left the time to write a checkpoint.
        while True:
            # Before their errors are read, as one may end in between.
            running = [p.sentinel for p in workers if p.exitcode is None]
            if (errors := _read_errors(context, args)) or not running:
                break
            # A process that has failed may hang where it destroys its process groups.
            connection.wait(running, timeout=1)
    finally:
        for process in workers:
            process.kill()
            process.join()
        signal.signal(signal.SIGTERM, default)
    if errors:
        raise next((e for e in errors if not isinstance(e, PeerError)), errors[0])
    if any(p.exitcode == TERMINATED for p in workers):
        sys.exit(TERMINATED)


def _read_errors(context: Any, args: argparse.Namespace) -> list[BaseException]:
    return [e for i in range(args.num_gpus) if (e := _read_error(context, i, args))]


def _read_error(context: Any, local_rank: int, args: argparse.Namespace) -> BaseException | None:
    status = context.processes[local_rank].exitcode
    who = f"process {local_rank} (rank {args.machine_rank * args.num_gpus + local_rank})"
    # Written before the process closes its connections, and ends.
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):  # not there, or in part
        with open(context.error_files[local_rank], "rb") as f:
            return error_of_traceback(pickle.load(f), who)
    if status in (None, 0, TERMINATED):
        return None
    if status == -signal.SIGTERM:  # before it could do more than end
        return SystemExit(TERMINATED)
    if status > 0:  # it has said why
        return SystemExit(status)
    kill = ", as by the system when memory runs out" if status == -signal.SIGKILL else ""
    return RunError(f"The {who} was ended by {signal.Signals(-status).name}{kill}.")


def _share_cause(error: UserError, store: dist.TCPStore, args: argparse.Namespace) -> None:
    """Tell the other machines what ended this one, or, if it was another, raise what did."""
    here = f"machine {args.machine_rank} ({socket.gethostname()})"

    def tell() -> None:
        store.compare_set("cause", "", f"On {here}: {error}")
        store.add("left", 1)
        while args.machine_rank == 0 and store.add("left", 0) < store.add("come", 0):
            time.sleep(0.1)  # the store ends with this process

    def ask() -> str | None:
        # What TCPStore prints without a server is no sentence.
        socket.create_connection((store.host, store.port), timeout=_GRACE).close()
        return store.get("cause").decode() if store.check(["cause"]) else None

    # The store may be gone, or behind a cut link.
    with contextlib.suppress(OSError, RuntimeError):
        if not isinstance(error, PeerError):
            _within(2 * _GRACE, tell)
        elif cause := _within(_GRACE, ask):
            raise RunError(cause) from error


def _within(seconds: float, work: Callable) -> Any:
    """What `work` returns or raises, or a RuntimeError: a store has no limit of its own."""
    done: queue.Queue = queue.Queue()

    def run() -> None:
        try:
            done.put((work(), None))
        except Exception as e:
            done.put((None, e))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError(f"no answer in {seconds} s") from None
    if error is not None:
        raise error
    return result


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[dist.Store, int, int]]:
    """
    That of ``env://``, but torchrun has one store for all its starts, in which the keys of the
    start before would be taken for those of this one.
    """
    query = dict(parse_qsl(urlsplit(url).query))
    rank, world_size = int(query["rank"]), int(query["world_size"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True",
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    start = _agree_on_start(store, rank, world_size, time.monotonic() + timeout.total_seconds())
    yield dist.PrefixStore(start, store), rank, world_size


def _agree_on_start(store: dist.Store, rank: int, world_size: int, deadline: float) -> str:
    """A name for this start: of rank 0, which answers each process by the name it gives itself."""
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", own)
    while time.monotonic() < deadline:
        if rank > 0:
            name, _, start = store.get(f"answer/{rank}").decode().partition(" ")
            if name == own:
                store.add(start, 1)
                return start
        elif store.add(own, 0) == world_size - 1:
            return own
        else:
            for other in range(1, world_size):
                if store.check([f"hello/{other}"]):
                    name = store.get(f"hello/{other}").decode()
                    store.set(f"answer/{other}", f"{name} {own}")
        time.sleep(0.1)
    raise dist.DistStoreError("not all processes have started")


_SCHEME = "gnws-d2"
dist.register_rendezvous_handler(_SCHEME, _rendezvous)


def _worker(local_rank: int, main: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    log_without_traceback()
    result = []
    try:
        _distributed_worker(
            local_rank,
            lambda: result.append(_run(local_rank, main, cfg, args)),
            args.num_gpus * args.num_machines,
            args.num_gpus,
            args.machine_rank,
            f"{_SCHEME}://",
            (),
            timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT),
        )
    except SystemExit as e:
        if isinstance(e.code, int):
            atexit.register(_leave, e.code)
        raise
    except Exception as e:
        if not is_peer_error(e):
            raise
        # By then the launcher has seen, and told, what happened to the other, if it was here.
        time.sleep(_GRACE)
        reason = re.sub(r"^\[.*?\] *|\. This is .*", "", " ".join(str(e).split()))
        raise PeerError(
            f"Rank {comm.get_rank()} has lost another, whose machine says why. ({reason}; "
            f"DISTRIBUTED.TIMEOUT is {cfg.DISTRIBUTED.TIMEOUT} s.)"
        ) from e
    return result[0]


def _run(local_rank: int, main: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    timeout = timedelta(seconds=cfg.DISTRIBUTED.TIMEOUT)
    # Detectron2 makes them with PyTorch's default.
    for group in (comm.get_local_process_group(), comm._get_global_gloo_group()):
        dist.set_timeout(timeout, group)
    if dist.is_torchelastic_launched():
        here = (args.machine_rank, socket.gethostname(), describe_job(cfg, args))
        check_machines(list({each[0]: each for each in comm.all_gather(here)}.values()))
        # A machine that did not fail itself is not told that the others have started again.
        args.resume = any(comm.all_gather(args.resume))
    run = comm.all_gather(time.time())[0]
    if args.num_machines == 1 or local_rank > 0:
        result = main(args)
    else:
        result = _watching_machines(f"run {run}", lambda: main(args), cfg, args)
    atexit.register(_leave, 0)
    return result


def _leave(status: int) -> None:
    """
    End this process without the destructors of C++: those of PyTorch's process groups abort it now
    and then ("terminate called without an active exception"), after all work is done.
    """
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # ends loader workers
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watching_machines(run: str, work: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    """
    Do `work`, while threads give signs of life to the other machines and watch for theirs: a
    machine without power, or behind a cut link, closes no connection.
    """
    limit = cfg.DISTRIBUTED.LOST_TIMEOUT
    store = dist.PrefixStore(
        run, dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    )
    store.set(f"host/{args.machine_rank}", socket.gethostname())
    others = [rank for rank in range(args.num_machines) if rank != args.machine_rank]
    hosts = {rank: store.get(f"host/{rank}").decode() for rank in others}
    signs = dict.fromkeys(others, 0)
    heard = dict.fromkeys(others, time.monotonic())
    interval = min(5.0, limit / 4)
    left = threading.Event()

    def give_signs() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: nothing is heard any more
            while True:
                store.add(f"signs/{args.machine_rank}", 1)
                for rank in others:
                    sign = store.add(f"signs/{rank}", 0)
                    if sign != signs[rank] or sign < 0:
                        signs[rank], heard[rank] = sign, time.monotonic()
                time.sleep(interval)

    def watch() -> None:
        # By itself, as a store behind a cut link answers nothing, not even with an error.
        while not left.wait(interval):
            for rank, since in heard.items():
                if time.monotonic() - since > limit:
                    say(
                        f"error: No sign of life from machine {rank} ({hosts[rank]}) in {limit} s "
                        "(DISTRIBUTED.LOST_TIMEOUT): it is down, or the network to it."
                    )
                    os._exit(1)  # the main thread waits for the machine

    for target in (give_signs, watch):
        threading.Thread(target=target, daemon=True).start()

    def leave() -> None:
        left.set()
        with contextlib.suppress(RuntimeError):  # machine 0 may have left, and the store with it
            store.add(f"signs/{args.machine_rank}", -(2**40))

    try:
        result = work()
    except SystemExit:  # asked to end; after an error silence ends the others, if nothing else does
        leave()
        raise
    leave()
    return result
