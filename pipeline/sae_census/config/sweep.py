"""Config of scheduled runs: entries with rules, and what raises an alarm."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import Field, field_validator, model_validator

from sae_census.config.sections import Section, StoreConfig
from sae_census.types import twins, wrong_with_name

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
Statistic = Literal["rank_correlation", "overlap_100", "dead_share_change", "frequency_shift", "fvu_change"]


class AlertConfig(Section):
    """A bound on one statistic of a new snapshot against the one before, for the worst of its SAEs."""

    statistic: Statistic
    """rank_correlation: Spearman's, of scores; overlap_100: of the best hundred features; dead_share_change: new share
    of dead features minus the old; frequency_shift: median |log2(new / old frequency)| of features alive in both;
    fvu_change: new fraction of variance unexplained minus the old."""
    below: float | None = None
    """Alarm if it is less."""
    above: float | None = None
    """Alarm if it is more."""

    @model_validator(mode="after")
    def _one_bound(self) -> "AlertConfig":
        if (self.below is None) == (self.above is None):
            raise ValueError("expected either below or above")
        return self


class EntryConfig(Section):
    """One scheduled run of `sae-census analyze`."""

    every: str | None = None
    """Period, as 30m, 12h, 1d, 1w."""
    cron: str | None = None
    """Or a schedule of five fields, as '0 3 * * 1'."""
    timezone: str = "UTC"
    """In which cron is read."""
    config: dict[str, Any] = Field(default={})
    """Keys of `sae-census analyze`, over those of `shared`."""
    alerts: tuple[AlertConfig, ...] = ()

    @property
    def period(self) -> timedelta | None:
        """`every` as a duration."""
        found = re.fullmatch(r"(\d+)([mhdw])", self.every or "")
        return timedelta(**{_UNITS[found[2]]: int(found[1])}) if found else None

    @field_validator("timezone")
    @classmethod
    def _zone(cls, zone: str) -> str:
        try:
            ZoneInfo(zone)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError("expected a time zone such as Europe/Berlin") from error
        return zone

    @model_validator(mode="after")
    def _rule(self) -> "EntryConfig":
        if (self.every is None) == (self.cron is None):
            raise ValueError("expected either every or cron")
        if self.every is not None and not self.period:
            raise ValueError(f"every is {self.every!r}; expected a number and m, h, d or w, as 12h")
        try:
            CronSim(self.cron or "* * * * *", datetime.now(UTC))
        except CronSimError as error:
            raise ValueError(f"cron is {self.cron!r}; expected five fields, as '0 3 * * 1' ({error})") from error
        return self


class SweepConfig(Section):
    """`sae-census sweep`: one tick; what is due runs."""

    file: str | None = None
    """A YAML file with the keys below; what the command line says goes before it."""
    store: StoreConfig = StoreConfig()
    """Of the ledger and of all entries."""
    shared: dict[str, Any] = Field(default={})
    """Keys of `sae-census analyze` for all entries."""
    entries: dict[str, EntryConfig] = Field(default={})
    """By name; an entry's catalog has its name unless it says another."""
    only: tuple[str, ...] = ()
    """Look at these entries alone."""
    force: bool = False
    """Run them whether or not they are due."""

    @model_validator(mode="after")
    def _known(self) -> "SweepConfig":
        for name in self.entries:
            if reason := wrong_with_name(name):
                raise ValueError(f"entry {name!r:.80}: {reason}")
        if same := twins(self.entries):
            raise ValueError(f"entries {same[0]!r} and {same[1]!r} differ by case only; give one another name")
        missing = [name for name in self.only if name not in self.entries]
        if missing and self.file is None:
            raise ValueError(f"only names {missing[0]!r}; there are {', '.join(self.entries) or 'no entries'}")
        return self
