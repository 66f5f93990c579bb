"""A whole cluster for tests: S3 behind a fault proxy, MLflow, hosts with Ray, and its jobs."""

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow_fs
import pyarrow.parquet as pq
import yaml

from tests.cluster.fault_proxy import FaultProxy, Faults
from tests.cluster.hosts import RAY, Hosts
from tests.cluster.mlflow_server import PASSWORD, USER, MlflowServer
from tests.cluster.object_store import KEY, SECRET, ObjectStore
from tests.cluster.processes import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICES = REPOSITORY / ".services" / "bin"
BUCKET = "screens"
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def why_no_services() -> str:
    """Return what is missing for the servers of the laboratory, or nothing."""
    import shutil

    if not (SERVICES / "swift-proxy-server").exists():
        return "Swift is not installed; `make test-cluster` does it"
    absent = [name for name in ("postgres", "initdb", "psql", "pg_dump") if not shutil.which(name)]
    return f"PostgreSQL is not installed ({', '.join(absent)})" if absent else ""


@dataclass(frozen=True)
class Ended:
    """How a job ended: its driver's exit code (None: it never ended by itself) and its output."""

    status: str
    exit_code: int | None
    logs: str
    seconds: float


class Laboratory:
    """Servers and hosts; `start` brings everything up, `stop` ends it.

    Parameters
    ----------
    folder
        Data and logs of the servers.
    ray_folder
        Ray's files; a short path.
    workers
        Ray nodes beside the head.
    """

    def __init__(self, folder: Path, ray_folder: Path, workers: int = 3) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        self._environment: dict[str, str] = {}
        self.hosts = Hosts(ray_folder, workers + 1, self._environment)
        self.faults = Faults()
        self._configs = folder / "configs"

    def start(self) -> None:
        """Start servers, proxy and cluster."""
        self._configs.mkdir(parents=True)
        (self.folder / "home").mkdir()
        self.hosts.create()
        gateway = self.hosts.gateway
        self.store = ObjectStore(self.folder / "swift", SERVICES)
        self.store.start()
        self.proxy = FaultProxy(gateway, free_port(gateway), self.store.host, self.store.port)
        self.proxy.faults = self.faults
        self.proxy.start()
        self._environment |= {
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "HOME": str(self.folder / "home"),
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": PASSWORD,
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        for bucket in (BUCKET, "mlflow"):
            self.files().create_dir(bucket)
        keys = {k: v for k, v in self._environment.items() if k.startswith("AWS_")}
        keys["AWS_ENDPOINT_URL"] = self.store.endpoint
        self.mlflow = MlflowServer(self.folder / "mlflow", gateway, "s3://mlflow/artifacts", keys)
        self.mlflow.start()
        self._environment["MLFLOW_TRACKING_URI"] = self.mlflow.uri
        self.hosts.start_head()
        for host in range(1, self.hosts.count):
            self.hosts.start_worker(host)

    def stop(self) -> None:
        """End everything, in the reverse order."""
        self.hosts.destroy()
        for name in ("mlflow", "proxy", "store"):
            if hasattr(self, name):
                getattr(self, name).stop()

    def files(self) -> arrow_fs.S3FileSystem:
        """Return the object store's files, past the fault proxy."""
        return arrow_fs.S3FileSystem(
            endpoint_override=f"{self.store.host}:{self.store.port}",
            scheme="http",
            region="us-east-1",
            access_key=KEY,
            secret_key=SECRET,
            allow_bucket_creation=True,
        )

    def submit(
        self,
        job: str,
        config: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        token: str | None = None,
    ) -> str:
        """``ray job submit`` one job with a config; return its id.

        Raises
        ------
        RuntimeError
            With the command's output, if it is refused.
        """
        text = yaml.safe_dump(dict(config))
        name = f"{job}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.yaml"
        (self._configs / name).write_text(text)
        job_id = f"{job}-{secrets.token_hex(4)}"
        command = [RAY, "job", "submit", "--address", self.hosts.dashboard, "--no-wait"]
        command += ["--submission-id", job_id]
        if env:
            command += ["--runtime-env-json", json.dumps({"env_vars": dict(env)})]
        command += ["--", sys.executable, REPOSITORY / "jobs" / f"{job}.py"]
        command += ["--config", self._configs / name]
        self._command(command, token or self.token)
        return job_id

    def stop_job(self, job_id: str) -> None:
        """``ray job stop``: SIGTERM to the driver."""
        command = [RAY, "job", "stop", "--address", self.hosts.dashboard, "--no-wait", job_id]
        self._command(command, self.token)

    def _command(self, command: list[str | Path], token: str) -> None:
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        mine["HOME"] = self._environment["HOME"]
        done = subprocess.run(
            [str(word) for word in command],
            env=os.environ | mine,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def state(self, job_id: str) -> dict[str, Any]:
        """Return what the head says of a job."""
        found: dict[str, Any] = json.loads(self._ask(f"/api/jobs/{job_id}"))
        return found

    def has_ended(self, job_id: str) -> bool:
        """Tell whether a job is over, however it ended."""
        return self.state(job_id)["status"] in _ENDED

    def wait(
        self, job_id: str, seconds: float = 900, watch: Callable[[], object] = lambda: None
    ) -> Ended:
        """Wait for a job's end, calling ``watch`` meanwhile."""
        started = time.monotonic()
        while time.monotonic() < started + seconds:
            state = self.state(job_id)
            if state["status"] in _ENDED:
                logs = json.loads(self._ask(f"/api/jobs/{job_id}/logs"))["logs"]
                span = (state["end_time"] - state["start_time"]) / 1000
                return Ended(state["status"], state.get("driver_exit_code"), logs, span)
            watch()
            time.sleep(0.5)
        logs = json.loads(self._ask(f"/api/jobs/{job_id}/logs"))["logs"]
        raise TimeoutError(f"{job_id} runs for more than {seconds} s:\n{logs[-3000:]}")

    def run(self, job: str, config: Mapping[str, Any], seconds: float = 900) -> Ended:
        """Submit a job and wait for its end."""
        return self.wait(self.submit(job, config), seconds)

    def _ask(self, path: str) -> bytes:
        request = urllib.request.Request(
            self.hosts.dashboard + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        for left in reversed(range(20)):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    content: bytes = answer.read()
                    return content
            except (urllib.error.URLError, TimeoutError):
                if not left:
                    raise
                time.sleep(1)
        raise RuntimeError("unreachable")

    def cells(self, uri: str) -> list[tuple[str, str]]:
        """Return name and content hash of every cell below the plates of a dataset, sorted.

        Read with pyarrow alone, file by file, whether a manifest names it or not; folders whose
        names begin with an underscore are hidden from readers of datasets, and so from this one.
        """
        files, place = self.files(), uri.removeprefix("s3://")
        found = []
        for info in files.get_file_info(arrow_fs.FileSelector(place, recursive=True)):
            inner = info.path.removeprefix(place)
            if inner.startswith("/plate=") and inner.endswith(".parquet"):
                table = pq.read_table(files.open_input_file(info.path))
                found.extend(_rows(table.to_pylist()))
        return sorted(found)

    def objects(self) -> Iterable[tuple[str, bytes]]:
        """Return every object of every bucket."""
        files = self.files()
        for bucket in (BUCKET, "mlflow"):
            for info in files.get_file_info(arrow_fs.FileSelector(bucket, recursive=True)):
                if info.is_file:
                    with files.open_input_file(info.path) as source:
                        yield info.path, source.read()


def _rows(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    for row in rows:
        name = "/".join(f"{k}={row[k]}" for k in sorted(row) if k.startswith("Metadata_"))
        content = repr(sorted(row.items())).encode()
        yield name, hashlib.sha256(content).hexdigest()
