"""Runs rdma-core's own tests (Python over pyverbs), each in a process of its own with a time limit.

Usage: driver.py TESTS_DIR --dev NAME --limit SECONDS [--only TEXT]... [--skip-module PREFIX]...

Prints a line a test, `RESULT <outcome> <seconds> <test> <reason>`, where the outcome is ok, skip or fail; what a
failed test printed comes before its line, each line after a `| `. The tests are those of the folder, unchanged; what
they cannot find on a device without a kernel behind it (the IP address that belongs to the device) is told here.
"""

import argparse
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
import unittest


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("tests")
    parser.add_argument("--dev", required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--skip-module", action="append", default=[])
    return parser.parse_args()


class Recorder(unittest.TestResult):
    """Keeps the one outcome of the one test that a process runs."""

    outcome, reason = "ok", ""

    def _note(self, outcome, reason):
        # The first trouble is the cause; what `tearDown` adds is not.
        if self.outcome != "fail":
            self.outcome, self.reason = outcome, reason

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._note("skip", reason)

    def addError(self, test, err):
        super().addError(test, err)
        self._note("fail", f"{err[0].__name__}: {err[1]}")
        traceback.print_exception(*err)

    addFailure = addError


def run_in_child(test, report):
    """Runs the test and writes its outcome. Never returns."""
    os.setsid()
    recorder = Recorder()
    try:
        test.run(recorder)
    except BaseException as error:  # the process ends here, whatever it was
        recorder._note("fail", f"{type(error).__name__}: {error}")
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(report, json.dumps([recorder.outcome, recorder.reason]).encode())
    os._exit(0)


def in_process(body, limit):
    """Forks, runs `body(pipe)` in the child, and returns what came through the pipe and what was printed."""
    out = tempfile.TemporaryFile()
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        body(write)
        os._exit(1)
    os.close(write)
    ready, _, _ = select.select([read], [], [], limit)
    said = os.read(read, 65536) if ready else b""
    os.close(read)
    # A moment for an ordinary end; then the whole group goes, with whatever the test left behind.
    deadline = time.monotonic() + (2 if said else 0)
    status = None
    while status is None:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() > deadline:
            kill_group(pid)
            _, status = os.waitpid(pid, 0)
        else:
            time.sleep(0.005)
    kill_group(pid)
    out.seek(0)
    printed = out.read().decode(errors="replace")
    return said, status, bool(ready), printed


def kill_group(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def run(test, limit):
    """The outcome of one test, its reason, and what it printed."""
    said, status, in_time, printed = in_process(lambda report: run_in_child(test, report), limit)
    if said:
        outcome, reason = json.loads(said)
    elif not in_time:
        outcome, reason = "fail", f"not done within {limit:.0f} s"
    elif os.WIFSIGNALED(status):
        outcome, reason = "fail", f"died of signal {os.WTERMSIG(status)}"
    else:
        outcome, reason = "fail", f"its process exited with {os.WEXITSTATUS(status)}"
    return outcome, " ".join(reason.split()), printed


def find_address(dev):
    """The index and the IP address of the first GID that is an IPv4 address, loopback last."""

    def body(report):
        import pyverbs.device

        context = pyverbs.device.Context(name=dev)
        found = []
        for index in range(context.query_port(1).gid_tbl_len):
            gid = bytes.fromhex(context.query_gid(1, index).gid.replace(":", ""))
            if gid[:12] == bytes(10) + b"\xff\xff":
                found.append((gid[12] == 127, index, socket.inet_ntoa(gid[12:])))
        os.write(report, json.dumps(min(found, default=None)).encode())
        os._exit(0)

    said, _, _, printed = in_process(body, 30)
    if not said:
        sys.exit(f"cannot ask {dev} for its addresses:\n{printed}")
    found = json.loads(said)
    return (found[1], found[2]) if found else (0, None)


def tell_what_the_kernel_would(address):
    """Tells the tests what they would look for in /sys or ask the kernel for: the device's IP address, its P_Key."""
    import tests.base
    import tests.utils

    def told(self, dev, port, index, *_):
        self.args.append([dev, port, index, address, "02:00:00:00:00:01"])

    tests.base.RDMATestCase._get_ip_mac = told
    tests.utils.get_pkey_from_kernel = lambda device, port=1, index=0: 0xFFFF


def load(folder, dev, gid, unwanted):
    """Every test of the folder but those of unwanted modules, in the order of their names."""
    import importlib
    import types

    sys.path.insert(0, folder)
    from args_parser import parser

    sys.argv = ["run_tests.py", "--dev", dev, "--port", "1", "--gid", str(gid)]
    parser.parse_args()
    package = types.ModuleType("tests")
    package.__path__ = [folder]
    sys.modules["tests"] = package
    loader = unittest.defaultTestLoader
    found = []
    for name in sorted(os.listdir(folder)):
        stem, end = os.path.splitext(name)
        if end != ".py" or not stem.startswith("test_") or any(stem.startswith(word) for word in unwanted):
            continue
        module = importlib.import_module(f"tests.{stem}")
        for suite in loader.loadTestsFromModule(module):
            # A module shows the classes that it imports, too: theirs is the module that has them.
            found.extend(test for test in suite if type(test).__module__ == module.__name__)
    return found


def main():
    options = arguments()
    gid, address = find_address(options.dev)
    tests = load(os.path.abspath(options.tests), options.dev, gid, options.skip_module)
    tell_what_the_kernel_would(address)
    for test in tests:
        name = test.id().removeprefix("tests.")
        if options.only and not any(word in name for word in options.only):
            continue
        start = time.monotonic()
        outcome, reason, printed = run(test, options.limit)
        if outcome == "fail":
            for line in printed.splitlines():
                print(f"| {line}")
        print(f"RESULT {outcome} {time.monotonic() - start:.2f} {name} {reason}", flush=True)


if __name__ == "__main__":
    main()
