"""How the machines of a run find each other, agree, and notice that one is gone."""

import argparse
import contextlib
import hashlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import detectron2
import torch
import torch.distributed as dist
from detectron2.config import CfgNode

from ..config import flatten_config
from ..utils.errors import PeerError, RunError, UserError, say

_PACKAGE = Path(__file__).parent.parent
_GRACE = 5.0  # seconds in which a machine that is there answers


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


def join_store(host: str, port: int, cfg: CfgNode, args: argparse.Namespace) -> dist.TCPStore:
    """
    Open the store of a run on machine 0, or connect to it, for at most
    ``DISTRIBUTED.START_TIMEOUT``.

    Args:
        host, port: of :func:`parse_dist_url`; port 0 for any that is free.
        cfg, args: as for :func:`launch`.

    Raises:
        UserError: if `host` cannot be resolved, does not answer, or is not machine 0, or if `port`
            is in use.
    """
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


def meet(store: dist.Store, cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Wait for all machines of a run, for at most ``DISTRIBUTED.START_TIMEOUT``, and check them.

    Args:
        store: of :func:`join_store`.
        cfg, args: as for :func:`launch`.

    Raises:
        UserError: if a machine does not come, is gone again, or differs (:func:`check_machines`).
    """
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
    return {name: str(value) for name, value in (facts | flatten_config(cfg)).items()}


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


def choose_gloo_interface(host: str) -> None:
    """
    Set ``GLOO_SOCKET_IFNAME``, if it is not set, to the interface that leads to machine 0, or, on
    machine 0, anywhere. Else Gloo takes the address of this machine's name, which on many is a
    loopback one that no other machine can reach.

    Args:
        host: of machine 0.
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


def share_cause(error: UserError, store: dist.TCPStore, args: argparse.Namespace) -> None:
    """
    Tell the other machines what ended this one.

    Args:
        error: what ended it.
        store: of :func:`join_store`.
        args: as for :func:`launch`.

    Raises:
        RunError: with what ended another machine, if `error` is but its effect.
    """
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


def watching_machines(run: str, work: Callable, cfg: CfgNode, args: argparse.Namespace) -> Any:
    """
    Do `work`, while threads give signs of life to the other machines and watch for theirs: a
    machine without power, or behind a cut link, closes no connection. After
    ``DISTRIBUTED.LOST_TIMEOUT`` without one this process ends with a line on stderr.

    Args:
        run: a name for this start of the run, the same on all machines.
        work: what to do.
        cfg, args: as for :func:`launch`. ``MASTER_ADDR`` and ``MASTER_PORT`` name the store.

    Returns:
        What `work` returns.
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
