"""What is locked: one version of everything that is installed, each in its range."""

import re
import sys
import tomllib
from importlib.metadata import distribution, version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def locked() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by name; several if a version depends on the Python or platform."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            one = Requirement(line)
            found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


def asked() -> list[Requirement]:
    """What the project and its extras ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return [one for one in map(Requirement, lines) if one.name != "sae-census"]


def test_everything_that_is_asked_for_is_locked_to_one_version_in_its_range() -> None:
    lock = locked()
    for one in asked():
        for line in lock[canonicalize_name(one.name)]:
            (pin,) = line.specifier
            assert pin.operator == "=="
            assert one.specifier.contains(pin.version), f"{line} for {one}"


def test_no_line_asks_for_a_build_of_one_machine_or_for_more_than_a_version() -> None:
    for lines in locked().values():
        for line in lines:
            assert re.fullmatch(r"==[^+*]+", str(line.specifier)), line
            assert not line.extras, "pip takes no extras in constraints"
            cuda = re.match(r"nvidia|cuda|triton", line.name)
            assert not cuda or "sys_platform == 'linux'" in str(line.marker).replace('"', "'"), line


@pytest.mark.skipif(Path(sys.prefix).name != ".venv", reason="another environment than the locked one")
def test_what_the_tests_need_is_installed_as_it_is_locked() -> None:
    """Everything that can be reached from the extra `test`."""
    lock, left, seen = locked(), [Requirement("sae-census[test]")], set()
    while left:
        one = left.pop()
        for extra in one.extras or {""}:
            key = canonicalize_name(one.name), extra
            if key in seen:
                continue
            seen.add(key)
            needed = [Requirement(line) for line in distribution(one.name).requires or []]
            left += [n for n in needed if not n.marker or n.marker.evaluate({"extra": extra})]
    names = {name for name, _ in seen} - {"sae-census"}
    assert len(names) > 100
    for name in sorted(names):
        lines = [line for line in lock[name] if not line.marker or line.marker.evaluate()]
        assert [line.specifier.contains(version(name)) for line in lines] == [True], name
