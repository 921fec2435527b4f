"""Shipped settings by name, with changes: what a form offers beside settings written out."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from tasks.config.base import Config
from tasks.config.form import Choice
from tasks.config.run import RunConfig, load_config

FOLDER = Path(__file__).parent.parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"no preset {name!r}: there are {', '.join(NAMES)}")
    return name


class Preset(Config):
    """One of the shipped configurations, with changes."""

    preset: Annotated[str, AfterValidator(known)] = Field(json_schema_extra={"enum": NAMES})
    """Which configuration. ``gsm8k`` and ``dolly`` want the paths of your files as changes."""
    changes: list[Annotated[str, Field(pattern="^[^=]+=")]] = Field(default_factory=list)
    """Settings to change, each as ``key.path=value``, such as ``train.steps=200``."""

    @property
    def name(self) -> str:
        """What a flow run of it is called."""
        return self.preset

    def settings(self) -> RunConfig:
        """The settings in full. ValueError, or pydantic's ValidationError, with the field at fault."""
        return load_config(FOLDER / f"{self.preset}.yaml", self.changes)


def kind(value: Any) -> str:
    """By its shape, not by a tag: files of settings carry none."""
    return "preset" if isinstance(value, Preset) or (isinstance(value, dict) and "preset" in value) else "settings"


Settings = Annotated[
    Annotated[Preset, Tag("preset")] | Annotated[RunConfig, Tag("settings")], Discriminator(kind), Choice
]
