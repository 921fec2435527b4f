"""The same whole run with its root on S3: what one machine writes to a folder, a cluster writes to a bucket."""

import json
import os
import subprocess
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.fs
import pytest
import tiny
from test_run import COMMAND, ROOT, SECONDS, finish, start


def sample_ids(place: str, stage: str) -> list[str]:
    """Ids of a stage's samples below ``bucket/prefix``, read by pyarrow alone."""
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    system = pyarrow.fs.S3FileSystem(endpoint_override=endpoint, scheme="http")
    found = system.get_file_info(pyarrow.fs.FileSelector(f"{place}/stages/{stage}", recursive=True))
    parts = [file.path for file in found if "/samples/" in file.path and file.path.endswith(".parquet")]
    return ds.dataset(parts, filesystem=system).to_table(columns=["sample_id"])["sample_id"].to_pylist()


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS)
def test_a_run_on_s3_completes_is_reused_and_verified(s3_bucket: str, tmp_path: Path) -> None:
    config, root = tiny.write_config(tmp_path), f"s3://{s3_bucket}/runs/tiny"

    def command(*words: str) -> str:
        done = subprocess.run([*COMMAND, *words, "--root", root], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    result = finish(start(config, root))
    assert result["state"] == "Completed"
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
