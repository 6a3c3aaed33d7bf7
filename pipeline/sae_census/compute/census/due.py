"""When is a scheduled entry due? Pure functions of a rule, the last run and the clock.

A tick that comes late finds everything that became due since the last run, and runs it once: missed ticks are
not made up for one by one.
"""

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim


def every_is_due(every: timedelta, last: datetime | None, now: datetime) -> bool:
    """Whether `every` has passed since the last run was due; a first run is due at once.

    Args:
        every: the period.
        last: when the last run was started; None if there was none.
        now: aware of its time zone, as `last`.
    """
    return last is None or now - last >= every


def cron_is_due(cron: str, zone: str, last: datetime | None, now: datetime) -> bool:
    """Whether a time of the schedule lies after `last` and not after `now`; a first run is due at once.

    Times that daylight saving skips come at the next time that exists; times that it repeats come once, as in
    Debian's cron.

    Args:
        cron: five fields: minute, hour, day of month, month, day of week.
        zone: in which the fields are read, as `Europe/Berlin`.
        last: when the last run was started; None if there was none.
        now: aware of its time zone, as `last`.
    """
    if last is None:
        return True
    following: datetime = next(CronSim(cron, last.astimezone(ZoneInfo(zone))))
    return following <= now
