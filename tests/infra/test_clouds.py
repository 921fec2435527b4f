"""The files of Ray's cluster launcher, read by Ray's own checker. No cloud is asked."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent.parent
CLOUDS = ["aws", "gcp"]


def launcher(cloud: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / f"infra/clouds/{cloud}.yaml").read_text())
    return found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_rays_checker_accepts_it(cloud: str) -> None:
    config = prepare_config(launcher(cloud))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["head"]["max_workers"] == 0
    workers = [entry for name, entry in types.items() if name != "head"]
    assert all(entry["min_workers"] == 0 < entry["resources"]["GPU"] for entry in workers)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_rays_checker_refuses_what_it_does_not_know(cloud: str) -> None:
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(prepare_config({**launcher(cloud), "setup_comands": []}))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nobody_gets_in_without_the_token(cloud: str) -> None:
    config = launcher(cloud)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [line for line in starts if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "--num-cpus=0" in starts[0]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    text = (ROOT / f"infra/clouds/{cloud}.yaml").read_text()
    assert "0.0.0.0/0" not in text
    assert not re.search("AKIA|PRIVATE KEY|SECRET_ACCESS_KEY", text)
    (settings,) = re.findall(r"switchyard run (\S+)", text)
    assert (ROOT / settings).is_file()
