"""What `mutants.py` adds to pytest.

Either every test's lines and time are recorded, or the tests run in a given order, each
with a time limit.
"""

import json
import os
import pathlib
import signal

import coverage
import pytest


def pytest_configure(config):
    record, order = (os.environ.get(f"MUTANTS_{w}") for w in ("RECORD", "ORDER"))
    if record and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Times(pathlib.Path(record)))
    if record and not config.getoption("numprocesses", None):
        config.pluginmanager.register(Lines(pathlib.Path(record)))
    if order:
        config.pluginmanager.register(
            Order(json.loads(pathlib.Path(order).read_text()))
        )


class Times:
    """How long each test took that passed."""

    def __init__(self, folder):
        self.folder, self.seconds, self.failed = folder, {}, set()

    def pytest_runtest_logreport(self, report):
        before = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = before + report.duration
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        passed = {t: s for t, s in self.seconds.items() if t not in self.failed}
        (self.folder / "seconds.json").write_text(json.dumps(passed))


class Lines:
    """Which lines each test runs; what a module's fixture runs is all its tests'."""

    def __init__(self, folder):
        data = str(folder / "coverage")
        self.coverage = coverage.Coverage(
            data, data_suffix=True, config_file=False, include=["hk_stack/*"]
        )
        self.coverage.set_option("run:relative_files", True)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.test = item.nodeid
        for value in vars(getattr(item, "module", object)).values():
            if hasattr(value, "cache_clear"):  # Or another test would have the lines.
                value.cache_clear()
        self.coverage.switch_context(self.test)
        result = yield
        self.coverage.switch_context("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, request):
        self.coverage.switch_context(request.node.nodeid)
        result = yield
        self.coverage.switch_context(self.test)
        return result

    def pytest_sessionfinish(self):
        self.coverage.stop()
        self.coverage.save()


class Order:
    """Runs the tests of `limits`, a list of tests and seconds, in this order."""

    def __init__(self, limits):
        self.limits = dict(limits)
        self.order = {test: i for i, test in enumerate(self.limits)}
        signal.alarm(120)  # Ends the process, whatever it is doing.

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.order[item.nodeid])

    def pytest_runtest_protocol(self, item):
        signal.alarm(self.limits[item.nodeid])
