"""A plugin of pytest for gpu_check.py: failures at once, and an end in time.

Each failure is printed as it comes, so that none is lost where the time is out. At the end those of
a test function are one line, for the call's summary. GPU_CHECK_END is when it ends; RESERVE before
that no test is begun any more.
"""

from __future__ import annotations

import os
import time

from .failures import MOST
from .running import FAILED

RESERVE = 14.0  # seconds, for workers to end and for the last lines


class Reported:
    def __init__(self, config):
        self.config, self.cases = config, {}
        self.end = float(os.environ.get("GPU_CHECK_END", "inf")) - RESERVE

    def pytest_runtest_logreport(self, report):
        if report.failed:
            error = last_line(report)
            print(f"\n{report.nodeid} ({report.when}): {error}", flush=True)
            function = report.nodeid.partition("[")[0]
            self.cases.setdefault(function, []).append(error)
        if time.monotonic() > self.end:
            # With xdist this process runs no test: its session is the one that ends.
            session = self.config.pluginmanager.getplugin("dsession") or self.config.session
            session.shouldstop = "out of time"

    def pytest_sessionstart(self, session):
        self.config.session = session

    def pytest_terminal_summary(self, terminalreporter):
        """Those with the most failed cases first."""
        for function, errors in sorted(self.cases.items(), key=lambda pair: -len(pair[1]))[:MOST]:
            line = f"{FAILED}{function}: {len(errors)} cases: {errors[0]}"
            terminalreporter.write_line(line)
        if time.monotonic() > self.end:
            terminalreporter.write_line(f"{FAILED}out of time: not every test ran")


def last_line(report) -> str:
    """Of what was raised."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line for line in text.strip().splitlines() if line.strip()] or [""]
    return (lines[0] if crash else lines[-1]).strip()[:160]


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # of xdist: its workers report to us
        config.pluginmanager.register(Reported(config), "reported")
