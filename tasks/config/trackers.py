"""Where a run is followed beside Prefect: experiment trackers, and metrics for Prometheus."""

from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tasks.config.base import Config

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Prometheus(Config):
    """An address where Prometheus reads how a run stands, while its flow lives: ``http://host:port/metrics``."""

    port: int = Field(default=9464, ge=1, le=65535)
    """Port of the machine where the flow runs; two runs on one machine need two."""
    host: str = "127.0.0.1"
    """Address to listen at; another than loopback needs a token."""
    token_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable, where the flow runs, that holds the token Prometheus has to send (``authorization``)."""

    @model_validator(mode="after")
    def _not_open_to_all(self) -> "Prometheus":
        if self.host not in LOOPBACK and not self.token_variable:
            raise ValueError(
                f"host {self.host} is not loopback: name in token_variable the environment variable that holds a token"
            )
        return self


class Trackers(Config):
    """Where a run is followed beside Prefect. Nothing here changes a result; a tracker that fails ends no run."""

    mlflow: str | None = Field(default=None, pattern=r"^(https?://|sqlite:///|databricks)\S*$")
    """Tracking address of MLflow, such as http://mlflow.example:5000 or sqlite:///runs/mlflow.db. Name and password are
    MLflow's own environment variables. Needs the extra ``mlflow``."""
    wandb: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$")
    """Project in Weights & Biases, or entity/project. The key is its own environment variable; without one, the run is
    written down below the root for ``wandb sync``. Needs the extra ``wandb``."""
    tensorboard: str | None = Field(default=None, pattern=r"^[^\s:]+$")
    """Folder for TensorBoard's files, of the machine where the flow runs; each run gets one below it. Needs the extra
    ``tensorboard``."""
    prometheus: Prometheus | None = None
    """Metrics for Prometheus; absent: none."""

    @field_validator("mlflow")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value and urlsplit(value).password is not None:
            raise ValueError("holds a password, which reports would show: set MLFLOW_TRACKING_PASSWORD instead")
        return value
