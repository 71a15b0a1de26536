"""driftprobe doctor: what it says works does, what is missing has its install line, and no library is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

from driftprobe import doctor as module
from driftprobe.doctor import CORE_INSTALL, doctor, version_of
from driftprobe.engines import ENGINES
from driftprobe.fingerprint import BUILT
from test_output import driftprobe


def named() -> dict[str, module.Check]:
    return {check.name: check for check in doctor().checks}


def test_versions_are_those_of_the_packages():
    checks = named()
    assert checks["numpy"].found == version("numpy") and checks["numpy"].works and not checks["numpy"].install
    assert checks["fingerprints in C"].works is BUILT
    assert not checks["hf"].works or doctor().next_step == "driftprobe run"
    for name, entry in ENGINES.items():
        assert checks[name].works is not bool(entry.missing)
        assert checks[name].install == (entry.install if entry.missing else "")


def test_what_is_missing_has_its_install_line(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr("driftprobe.engines.find_spec", lambda name: None)
    monkeypatch.setattr(module, "BUILT", False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "entry_points", lambda group: ())
    missing = {check.name for check in doctor().checks if not check.works}
    assert missing == named().keys() - {"command"}
    assert all(check.install for check in doctor().checks if not check.works)
    assert doctor().next_step == ENGINES["hf"].install
    text = driftprobe("doctor").output
    for words in (
        CORE_INSTALL,
        ENGINES["llamacpp"].install,
        "torch missing, transformers missing",
        "pip install polars",
    ):
        assert words in text


def test_a_package_without_metadata_is_told(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    assert version_of("no_such_package") == "version unknown"


def test_json_has_every_check():
    body = json.loads(driftprobe("doctor", "--json").stdout)
    assert body["schema"] == "driftprobe/doctor/1" and body["next"] == doctor().next_step
    assert [check["name"] for check in body["checks"]] == [check.name for check in doctor().checks]


def test_nothing_heavy_is_imported():
    code = "import sys, driftprobe.doctor as d; d.doctor(); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX paths")
def test_the_exit_code_is_no_verdict():
    assert driftprobe("doctor").exit_code == 0
