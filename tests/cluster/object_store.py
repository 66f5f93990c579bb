"""A real S3 server for tests: one-node OpenStack Swift with its S3 API, and real keys."""

import signal
import subprocess
from pathlib import Path

from tests.cluster.processes import Service, free_port, listens, wait_for

KEY, SECRET = "cp2:writer", "writer-secret-key"
_KINDS = ("account", "container", "object")
_SERVER = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = root
swift_dir = {folder}
devices = {devices}
mount_check = false
disable_fallocate = true
log_level = WARNING
log_address = {folder}/nolog
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """
[DEFAULT]
bind_ip = {host}
bind_port = {port}
workers = 1
user = root
swift_dir = {folder}
log_level = WARNING
log_address = {folder}/nolog
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats
  bulk s3api tempauth copy slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_cp2_writer = {secret} .admin
"""
_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "copy", "slo")


class ObjectStore:
    """Swift below one folder; what it stores outlives being killed.

    Parameters
    ----------
    folder
        Configuration, rings and data.
    programs
        ``bin`` folder of a virtual environment with Swift.
    host
        Address its S3 API listens on.
    """

    def __init__(self, folder: Path, programs: Path, host: str = "127.0.0.1") -> None:
        self._folder, self._programs, self.host = folder, programs, host
        self._ports = {kind: free_port() for kind in _KINDS}
        self.port = free_port(host)
        self._services: dict[str, Service] = {}
        (folder / "data" / "disk").mkdir(parents=True)
        self._configure()

    @property
    def endpoint(self) -> str:
        """URL of the S3 API."""
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Start all four servers, or those that were killed, and wait for them."""
        for kind in (*_KINDS, "proxy"):
            if kind in self._services and self._services[kind].alive():
                continue
            command = [self._programs / f"swift-{kind}-server", self._folder / f"{kind}.conf", "-v"]
            log = self._folder / f"{kind}.log"
            self._services[kind] = Service(command, log, {"PYTHONWARNINGS": "ignore"})
        for kind, service in self._services.items():
            place = (self.host, self.port) if kind == "proxy" else ("127.0.0.1", self._ports[kind])
            wait_for(f"Swift's {kind} server", lambda place=place: listens(*place), service)

    def kill(self) -> None:
        """SIGKILL all of it, as when its host loses power; `start` brings it back."""
        for service in self._services.values():
            service.stop(signal.SIGKILL)

    def stop(self) -> None:
        """End all servers."""
        for service in self._services.values():
            service.stop()

    def _configure(self) -> None:
        folder = self._folder
        (folder / "swift.conf").write_text(
            "[swift-hash]\nswift_hash_path_suffix = cp2image\nswift_hash_path_prefix = cp2image\n"
            "[storage-policy:0]\nname = p0\ndefault = yes\n"
        )
        for kind, port in self._ports.items():
            self._ring(kind, port)
            text = _SERVER.format(kind=kind, port=port, folder=folder, devices=folder / "data")
            (folder / f"{kind}.conf").write_text(text)
        proxy = _PROXY.format(host=self.host, port=self.port, folder=folder, secret=SECRET)
        proxy += "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _FILTERS)
        (folder / "proxy.conf").write_text(proxy)

    def _ring(self, kind: str, port: int) -> None:
        builder = self._folder / f"{kind}.builder"
        program = self._programs / "swift-ring-builder"
        for words in (
            ["create", "4", "1", "1"],
            ["add", f"r1z1-127.0.0.1:{port}/disk", "1"],
            ["rebalance"],
        ):
            subprocess.run([program, builder, *words], check=True, capture_output=True, timeout=60)
