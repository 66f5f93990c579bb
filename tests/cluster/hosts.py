"""Several hosts on one machine: network namespaces on a bridge, a Ray node in each."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase

_PREFIX = "cp2"
_numbers = itertools.count()
"""Tells apart the groups of hosts of one process."""
RAY = Path(sys.executable).parent / "ray"
DASHBOARD = 8265
_NOTICES_LOSS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "5000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
"""The same settings as in cluster.yaml."""


def why_not() -> str:
    """Return why this machine cannot make hosts, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (the program ip)"
    name = f"cp2try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    """Hosts 0 … count − 1, of which 0 is Ray's head.

    Parameters
    ----------
    folder
        Ray's files; short, for Unix sockets lie in it.
    count
        Number of hosts.
    env
        Environment of every Ray node, looked at when it starts: credentials, endpoints, token.
    """

    def __init__(self, folder: Path, count: int, env: Mapping[str, str]) -> None:
        owner, number = os.getpid(), next(_numbers)
        self._name = f"{_PREFIX}{owner}{ascii_lowercase[number]}"
        self._net = f"10.{77 + owner % 100}.{(owner + number) % 250}"
        self._folder, self.count = folder, count
        self._env = env

    @property
    def gateway(self) -> str:
        """This machine's own address on the bridge, where hosts find its servers."""
        return f"{self._net}.1"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.address(0)}:{DASHBOARD}"

    def address(self, host: int) -> str:
        """Return a host's IP address."""
        return f"{self._net}.{10 + host}"

    def create(self) -> None:
        """Make bridge, namespaces and cables, after removing those of processes that are gone."""
        _remove_orphans()
        bridge = f"{self._name}b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in range(self.count):
            space, cable = self.space(host), self._cable(host)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", space, "link", "set", device, "up")
            _ip("-n", space, "route", "add", "default", "via", self.gateway)

    def start_head(self, cpus: int = 0) -> None:
        """Start Ray's head on host 0."""
        self._start(
            0,
            ["--head", "--port=6379", f"--num-cpus={cpus}"],
            [f"--dashboard-host={self.address(0)}", f"--dashboard-port={DASHBOARD}"],
        )

    def start_worker(self, host: int, cpus: int = 1) -> None:
        """Start a Ray node that joins the head; again if a busy machine makes it late."""
        for left in reversed(range(4)):
            try:
                self._start(host, [f"--address={self.address(0)}:6379", f"--num-cpus={cpus}"], [])
                return
            except RuntimeError as error:
                if not left or "timed out during startup" not in str(error):
                    raise
                self._clear(host)

    def _start(self, host: int, first: Sequence[str], more: Sequence[str]) -> None:
        folder = self._folder / f"h{host}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [RAY, "start", *first, f"--node-ip-address={self.address(host)}", *more]
        command += ["--object-store-memory=200000000", "--memory=3000000000"]
        command += [f"--temp-dir={folder}", "--disable-usage-stats"]
        self.run(host, command, timeout=120)

    def run(
        self, host: int, command: Sequence[str | Path], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run something on a host and wait for it; raises if it fails."""
        inside = ["ip", "netns", "exec", self.space(host), *map(str, command)]
        done = subprocess.run(
            inside,
            env={**os.environ, **_NOTICES_LOSS, **self._env},
            capture_output=True,
            text=True,
            timeout=timeout,
            start_new_session=True,
        )
        if done.returncode:
            raise RuntimeError(f"{command[:3]} on host {host}: {done.stdout}{done.stderr}"[-3000:])
        return done

    def pids(self, host: int) -> list[int]:
        """Return the processes of a host."""
        return _pids(self.space(host))

    def pids_of(self, host: int, words: str) -> list[int]:
        """Return the processes of a host with these words on their command line."""
        found = []
        for pid in self.pids(host):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                if words.encode() in line:
                    found.append(pid)
        return found

    def busy(self, host: int) -> list[int]:
        """Return the Ray workers of a host that are at work on a task or hold an actor."""
        return [
            pid
            for pid in self.pids_of(host, "ray::")
            if not {"IDLE", "Agent", "JobSupervisor"} & _words(pid)
        ]

    def works(self, host: int) -> bool:
        """Tell whether a host has a Ray node and its cable is plugged in."""
        cable = Path(f"/sys/class/net/{self._cable(host)}/operstate")
        return bool(self.pids_of(host, "raylet")) and cable.read_text().strip() == "up"

    def kill(self, host: int) -> None:
        """End a host as a power cut does: SIGKILL to all its processes."""
        _kill(self.space(host))

    def cut(self, host: int) -> None:
        """Unplug a host's cable."""
        _ip("link", "set", self._cable(host), "down")

    def mend(self, host: int) -> None:
        """Plug it in again."""
        _ip("link", "set", self._cable(host), "up")

    def restart(self, host: int) -> None:
        """Bring a killed or cut worker back as a fresh node."""
        self.mend(host)
        self._clear(host)
        self.start_worker(host)

    def _clear(self, host: int) -> None:
        self.kill(host)
        for _ in range(50):
            if not self.pids(host):
                break
            time.sleep(0.1)
        shutil.rmtree(self._folder / f"h{host}", ignore_errors=True)

    def destroy(self) -> None:
        """End all processes in the namespaces, then remove these."""
        _remove(self._name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def space(self, host: int) -> str:
        """Return the name of a host's network namespace."""
        return f"{self._name}h{host}"

    def _cable(self, host: int) -> str:
        return f"{self._name}v{host}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _words(pid: int) -> set[str]:
    with contextlib.suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return {word for word in ("IDLE", "Agent", "JobSupervisor") if word in title}
    return {"IDLE"}


def _pids(space: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def _kill(space: str) -> None:
    for pid in _pids(space):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _remove(name: str) -> None:
    """End what runs in the namespaces of that name; remove them and their bridge."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for space in re.findall(rf"^{name}h\d+", listed, re.MULTILINE):
        while _pids(space):
            _kill(space)
            time.sleep(0.1)
        subprocess.run(["ip", "netns", "del", space], capture_output=True)
    subprocess.run(["ip", "link", "del", f"{name}b"], capture_output=True)


def _remove_orphans() -> None:
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    for owner, letter in set(re.findall(rf" {_PREFIX}(\d+)([a-z])b:", listed)):
        if not Path(f"/proc/{owner}").exists():
            _remove(f"{_PREFIX}{owner}{letter}")
