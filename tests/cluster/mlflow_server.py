"""An MLflow server as labs have it: PostgreSQL behind it, artifacts on S3, passwords."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.processes import Service, free_port, listens, wait_for

USER, PASSWORD = "admin", "a-password-for-tests"


class MlflowServer:
    """PostgreSQL and ``mlflow server`` with basic authentication.

    Parameters
    ----------
    folder
        Logs and configuration.
    host
        Address it listens on.
    artifacts
        ``s3://`` folder of the artifacts.
    env
        Credentials for it.
    """

    def __init__(self, folder: Path, host: str, artifacts: str, env: dict[str, str]) -> None:
        self._folder, self._host, self._artifacts, self._env = folder, host, artifacts, env
        self._port, self._database_port = free_port(host), free_port()
        self._data = Path(tempfile.mkdtemp(prefix="cp2pg", dir="/tmp"))
        self._services: list[Service] = []

    @property
    def uri(self) -> str:
        """Tracking URI."""
        return f"http://{self._host}:{self._port}"

    @property
    def client_environment(self) -> dict[str, str]:
        """What a client needs to log in."""
        return {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}

    @property
    def database(self) -> str:
        """URI of the database with all runs."""
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self._database_port}/postgres"

    def start(self) -> None:
        """Start both and wait until they answer."""
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.chown(self._data, "postgres")
        as_owner = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        subprocess.run(
            [*as_owner, "initdb", "-D", self._data / "db", "-A", "trust", "-U", "postgres"],
            check=True,
            capture_output=True,
            timeout=120,
        )
        postgres = [*as_owner, "postgres", "-D", self._data / "db"]
        postgres += ["-p", str(self._database_port), "-k", self._data, "-h", "127.0.0.1"]
        database = Service(postgres, self._folder / "postgres.log")
        self._services.append(database)
        wait_for("PostgreSQL", self._answers, database)
        settings = self._folder / "auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = {self.database}\n"
            f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
        )
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._host]
        command += ["--port", str(self._port), "--workers", "1", "--app-name", "basic-auth"]
        command += ["--backend-store-uri", self.database, "--allowed-hosts", "*"]
        command += ["--artifacts-destination", self._artifacts]
        env = {
            **self._env,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-flask-secret-for-tests",
        }
        server = Service(command, self._folder / "mlflow.log", env)
        self._services.append(server)
        wait_for("MLflow", lambda: listens(self._host, self._port), server, 120)

    def _answers(self) -> bool:
        words = ["psql", "-h", "127.0.0.1", "-p", str(self._database_port), "-U", "postgres"]
        asked = subprocess.run([*words, "-c", "select 1"], capture_output=True, env=os.environ)
        return asked.returncode == 0

    def dump(self) -> str:
        """Return everything the database holds, as SQL."""
        words = ["pg_dump", "-h", "127.0.0.1", "-p", str(self._database_port), "-U", "postgres"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout

    def stop(self) -> None:
        """End both and remove the database."""
        for service in reversed(self._services):
            service.stop()
        shutil.rmtree(self._data, ignore_errors=True)
