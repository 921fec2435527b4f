"""Every setting, as pydantic models that import no torch, ray or vllm."""

from tasks.config.run import RunConfig, load_config

__all__ = ["RunConfig", "load_config"]
