"""`ray up` with the file for machines one has, on hosts with sshd."""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.hosts import RAY
from tests.cluster.laboratory import REPOSITORY
from tests.cluster.ssh_hosts import SshHosts, why_no_ssh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
WORKERS = 2
IN_VENV = "cd ~/cp2image && export RAY_AUTH_MODE=token && ~/venv/bin/"


@pytest.fixture(scope="module")
def hosts():
    """A head and two workers that let us in."""
    reason = why_no_ssh()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="cp2u", dir="/tmp"))
    made = SshHosts(folder, WORKERS + 1)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def launched(hosts, tmp_path_factory):
    """Whose home the cluster was started from, and the file with these hosts' addresses."""
    cluster = yaml.safe_load((REPOSITORY / "configs/deployment/on_premise.yaml").read_text())
    address = hosts.hosts.address
    cluster["cluster_name"] += f"-{os.getpid()}"
    cluster["provider"]["head_ip"] = address(0)
    cluster["provider"]["worker_ips"] = [address(host) for host in range(1, WORKERS + 1)]
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.key)}
    cluster["min_workers"] = cluster["max_workers"] = WORKERS
    cluster["setup_commands"][0] = f"sh {hosts.install}"
    home = tmp_path_factory.mktemp("launcher")
    file = home / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster))
    run_ray(home, "get-auth-token", "--generate")
    run_ray(home, "up", "--yes", "--no-config-cache", file)
    return home, file


def run_ray(home, *words):
    done = subprocess.run(
        [RAY, *words],
        cwd=REPOSITORY,
        env=os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_all_hosts_join(hosts, launched):
    for _ in range(90):
        status = hosts.run(0, IN_VENV + "ray status")
        active = re.search(r"Active:\n (\d+) local.cluster.node", status)
        if active and int(active[1]) == WORKERS + 1:
            return
        time.sleep(2)
    pytest.fail(status)


def test_the_package_runs_from_the_files_that_were_copied(hosts, launched):
    where = hosts.run(1, IN_VENV + "python -c 'import cp2image; print(cp2image.__file__)'")
    assert where.strip().endswith("/h1/home/cp2image/cp2image/__init__.py")


def test_a_job_runs_on_the_workers(hosts, launched, tmp_path):
    test_all_hosts_join(hosts, launched)
    command = (
        "ray job submit -- ~/venv/bin/python ~/cp2image/jobs/simulate.py"
        f" --set run.folder={tmp_path} --set simulate.plates=2 --set simulate.wells_per_plate=2"
        " --set tracking.enabled=false"
    )
    said = hosts.run(0, IN_VENV + command, timeout=300)
    assert "succeeded" in said
    assert list((tmp_path / "simulated").rglob("*.tif*"))


def test_who_has_no_token_is_refused(hosts, launched):
    with pytest.raises(RuntimeError, match=r"(?i)token|unauth|401"):
        hosts.run(0, "export RAY_AUTH_TOKEN_PATH=/dev/null; " + IN_VENV + "ray status")


def test_it_is_taken_down(hosts, launched):
    home, file = launched
    run_ray(home, "down", "--yes", file)
    for _ in range(60):
        left = [hosts.hosts.pids_of(host, "raylet") for host in range(WORKERS + 1)]
        if not any(left):
            return
        time.sleep(1)
    pytest.fail(f"raylets by host: {left}")
