"""Who may submit, and what a wrong key or password is told."""

import pytest

pytestmark = pytest.mark.timeout(1800)


def test_submitting_without_the_token_is_refused(laboratory):
    with pytest.raises(RuntimeError, match=r"(?i)401|403|unauthori[sz]ed|token"):
        laboratory.submit("generate", {}, token="0" * 64)


def test_a_wrong_s3_secret_is_named(laboratory):
    config = {"run": {"folder": "s3://screens/denied"}, "tracking": {"enabled": False}}
    wrong = {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    ended = laboratory.wait(laboratory.submit("simulate", config, env=wrong))
    assert ended.exit_code == 2
    assert "S3 secret is wrong (AWS_SECRET_ACCESS_KEY)" in ended.logs
    assert "not-the-secret" not in ended.logs


def test_a_wrong_mlflow_password_is_named(screen):
    wrong = {"MLFLOW_TRACKING_PASSWORD": "not-the-password"}
    config = screen.generating(f"{screen.folder}/unrecorded")
    laboratory = screen.laboratory
    ended = laboratory.wait(laboratory.submit("generate", config, env=wrong))
    assert ended.exit_code == 2
    assert "MLflow" in ended.logs
    assert "MLFLOW_TRACKING_PASSWORD" in ended.logs
    assert "not-the-password" not in ended.logs
    assert not laboratory.cells(f"{screen.folder}/unrecorded")
