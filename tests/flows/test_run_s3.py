"""The same whole run with its root on S3: what one machine writes to a folder, a cluster writes to a bucket."""

import json
import os
import secrets
import subprocess
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.fs
import pytest
import tiny
from whole import COMMAND, ROOT, SECONDS, finish, start
from witness import PLANTED, Witness


def sample_ids(place: str, stage: str) -> list[str]:
    """Ids of a stage's samples below ``bucket/prefix``, read by pyarrow alone."""
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    system = pyarrow.fs.S3FileSystem(endpoint_override=endpoint, scheme="http")
    found = system.get_file_info(pyarrow.fs.FileSelector(f"{place}/stages/{stage}", recursive=True))
    parts = [file.path for file in found if "/samples/" in file.path and file.path.endswith(".parquet")]
    return ds.dataset(parts, filesystem=system).to_table(columns=["sample_id"])["sample_id"].to_pylist()


def fetched(bucket: str, folder: Path) -> Path:
    """The folder, with everything that the bucket has."""
    import boto3

    client = boto3.client("s3")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page["Contents"]:
            place = folder / entry["Key"]
            place.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, entry["Key"], str(place))
    return folder


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS)
def test_a_run_on_s3_completes_is_reused_and_verified(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, root = tiny.write_config(tmp_path), f"s3://{s3_bucket}/runs/tiny"
    # The server takes any key; these are found wherever they are.
    key = secrets.token_hex(20)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
    given = {name: value for name, value in PLANTED.items() if not name.startswith("AWS_")}

    def command(*words: str) -> str:
        done = subprocess.run([*COMMAND, *words, "--root", root], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    with Witness(root, key) as witness:
        result = finish(start(config, root, said=tmp_path / "said.txt", **given))
    assert result["state"] == "Completed"
    said = (tmp_path / "said.txt").read_text() + json.dumps(result)
    assert witness.leaks(fetched(s3_bucket, tmp_path / "fetched"), tmp_path / "home", said=said) == []
    assert any(command.endswith("spec.json") for command in witness.commands)
    assert any(file.name == "gcs_server.out" for file in witness.logs)
    assert result["student"].startswith(root)
    assert len(set(sample_ids(f"{s3_bucket}/runs/tiny", "annotate"))) == 12
    assert len(set(sample_ids(f"{s3_bucket}/runs/tiny", "student-sample"))) == 20 * 3

    planned = json.loads(command("plan", str(config), "--json").splitlines()[-1])
    assert all(stage["done"] for stage in planned["stages"])
    command("verify", "tiny")
    assert json.loads(command("show", "tiny", "--json").splitlines()[-1])["run"] == result["run"]
    again = finish(start(config, root))
    assert all(stage["reused"] for stage in again["stages"])
    assert again["metrics"] == result["metrics"]
