"""The hosts of `hosts` as machines one logs in to: sshd, a home and processes of their own."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.processes import Service

_NEEDED = ("sshd", "ssh", "ssh-keygen", "rsync", "unshare")

_SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""

_VENV = """\
set -eu
{python} -m venv --without-pip ~/venv
site=$(~/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
printf '%s\\n' ~/cp2image {packages} > "$site/installed.pth"
cat > ~/venv/bin/ray <<END
#!$HOME/venv/bin/python
from ray.scripts.scripts import main
main()
END
chmod +x ~/venv/bin/ray
"""
"""What `pip install` would put there, without a network."""


def why_no_ssh() -> str:
    """Return what this machine lacks for hosts with ssh, or nothing."""
    absent = [name for name in _NEEDED if not shutil.which(name, path=_PATH)]
    return why_not() or (f"not installed: {', '.join(absent)}" if absent else "")


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"


class SshHosts:
    """Hosts that `ray up` may log in to as this user.

    Each has its own network, processes, home and ``/tmp/ray``; the rest of the disk is shared.

    Parameters
    ----------
    folder
        Homes, keys and logs.
    count
        Number of hosts.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self.hosts = Hosts(folder / "unused", count, {})
        self._servers: list[Service] = []

    @property
    def key(self) -> Path:
        """The private key that opens every host."""
        return self._folder / "key"

    @property
    def install(self) -> Path:
        """A script that makes ``~/venv`` on a host."""
        return self._folder / "make_venv.sh"

    def start(self) -> None:
        """Make the hosts and wait until each lets us in."""
        self._folder.mkdir(parents=True, exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / name]
            subprocess.run(command, check=True, timeout=60)
        shutil.copy(self._folder / "key.pub", self._folder / "authorized_keys")
        packages = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        self.install.write_text(_VENV.format(python=python, packages=packages))
        self.hosts.create()
        for host in range(self.hosts.count):
            self._start(host)
        for host in range(self.hosts.count):
            self._wait(host)

    def run(self, host: int, command: str, timeout: float = 60) -> str:
        """Log in and run something; return its output, raise if it fails."""
        words = ["ssh", "-i", self.key, "-o", "StrictHostKeyChecking=no"]
        words += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        words += ["-o", "ConnectTimeout=5", f"root@{self.hosts.address(host)}", command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{command!r} on host {host}: {done.stdout}{done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """End the hosts and everything on them."""
        for server in self._servers:
            server.stop()
        self.hosts.destroy()

    def _start(self, host: int) -> None:
        folder, home = self._folder / f"h{host}", self._folder / f"h{host}" / "home"
        home.mkdir(parents=True)
        (folder / "ray").mkdir()
        config = folder / "sshd_config"
        config.write_text(_SSHD.format(address=self.hosts.address(host), folder=self._folder))
        users = folder / "passwd"  # ssh takes ~ from there, not from HOME
        users.write_text(_with_home(Path("/etc/passwd").read_text(), home))
        begin = (
            f"mount --bind {folder}/ray /tmp/ray && mount --bind {users} /etc/passwd && "
            f"exec $(command -v sshd) -D -e -f {config}"
        )
        command = ["ip", "netns", "exec", self.hosts.space(host)]
        command += ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        command += ["sh", "-c", begin]
        self._servers.append(Service(command, folder / "sshd.log", {"PATH": _PATH}))

    def _wait(self, host: int) -> None:
        for left in reversed(range(60)):
            try:
                self.run(host, "true")
                return
            except (RuntimeError, subprocess.TimeoutExpired):
                if not left:
                    raise
                time.sleep(0.5)


def _with_home(passwd: str, home: Path) -> str:
    """Give root another home."""
    lines = [line.split(":") for line in passwd.splitlines()]
    for fields in lines:
        if fields[0] == "root":
            fields[5] = str(home)
    return "\n".join(map(":".join, lines)) + "\n"
