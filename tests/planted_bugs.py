"""Plants bugs in scheduler and cache, one at a time, and says which of them the tests find.

`python -m tests.planted_bugs` copies the tree, changes one place of it, builds the C++ part anew
where that is what changed, and runs the tests of scheduler and cache until one fails. It takes some
20 minutes on two cores and exits with 1 where fewer than 95 % of the bugs are found, or one cannot
be planted any more because the code has changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parent.parent
NEEDED = 0.95
SUITE = (
    "tests/cache/test_block_manager.py",
    "tests/engine/test_scheduler.py",
    "tests/engine/test_waiting_queue.py",
    "tests/engine/test_session.py",
    "tests/engine/test_scheduler_traces.py",
    "tests/engine",
    "tests/sampling/test_beam_search.py",
    "tests/bench/test_replay.py",
)
CPP_SUITE = ("tests/cache/test_decode_rows.py", "tests/cache", *SUITE)
CPP_TESTS = ("test_block_allocator", "test_decode_rows")
TIMEOUT = 300
"""Seconds that the tests may take."""
CORE_SOURCES = (
    "csrc/bindings/core.cpp",
    "csrc/bindings/decode_rows_core.cpp",
    "csrc/cache/block_allocator.cpp",
    "csrc/cache/decode_rows.cpp",
    "csrc/cache/prepare_batch.cpp",
    "csrc/cache/shared_prefix.cpp",
)
BUGS = Path(__file__).with_suffix(".txt")


class Bug(NamedTuple):
    """In `file`, the lines `right`, which stand there once, become `wrong`."""

    what: str
    file: str
    right: str
    wrong: str


def read_bugs() -> list[Bug]:
    """Those of planted_bugs.txt."""
    bugs = []
    for entry in BUGS.read_text().split("\n# ")[1:]:
        what, file, *lines = entry.rstrip("\n").split("\n")
        right, wrong = (
            "".join(f"{line[1:]}\n" for line in lines if line[0] == sign) for sign in "-+"
        )
        bugs.append(Bug(what, file, right, wrong))
    return bugs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="bugs whose name or file has this in it")
    parser.add_argument("--plant", action="store_true", help="see that all can be planted")
    args = parser.parse_args()
    bugs = [bug for bug in read_bugs() if args.only is None or args.only in bug.what + bug.file]
    misplaced = [bug for bug in bugs if (ROOT / bug.file).read_text().count(bug.right) != 1]
    for bug in misplaced:
        print(f"cannot be planted, {bug.file} has changed: {bug.what}")
    if misplaced or args.plant:
        return int(bool(misplaced))
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for bug in bugs:
            start = time.monotonic()
            finder = find(tree, bug)
            if finder is None:
                missed.append(bug)
            seconds = time.monotonic() - start
            print(f"{finder or 'MISSED'}: {bug.what} ({seconds:.0f} s)", flush=True)
    found = len(bugs) - len(missed)
    print(f"{found} of {len(bugs)} bugs are found")
    return int(found < NEEDED * len(bugs))


def copy_tree(folder: Path) -> Path:
    """What git knows of, and the built extensions."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    built = (str(path.relative_to(ROOT)) for path in ROOT.glob("nano_vllm/*.so"))
    for name in (*listed.split("\0")[:-1], *built):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def find(tree: Path, bug: Bug) -> str | None:
    """The test that finds the bug, or `build`."""
    path = tree / bug.file
    whole = path.read_text()
    path.write_text(whole.replace(bug.right, bug.wrong))
    is_built = path.suffix in (".cpp", ".h")
    try:
        if not is_built:
            return failing_test(tree, SUITE)
        if not build(tree, bug.file):
            return "build"
        return failing_cpp_test(tree, bug.file) or failing_test(tree, CPP_SUITE)
    finally:
        path.write_text(whole)
        if is_built:
            module = module_path(tree)
            shutil.copy2(ROOT / module.relative_to(tree), module)


def module_path(tree: Path) -> Path:
    return tree / "nano_vllm" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(tree: Path, changed: str) -> bool:
    """The allocator's module, of objects that are kept, but for those that a change is part of."""
    objects = []
    for source in CORE_SOURCES:
        kept = tree / "kept" / f"{Path(source).stem}.o"
        kept.parent.mkdir(exist_ok=True)
        is_changed = changed == source or changed.endswith(".h")
        out = kept.with_suffix(".changed.o") if is_changed else kept
        if (is_changed or not kept.exists()) and not compile_cpp(tree, "-c", source, "-o", out):
            return False
        objects.append(out)
    return compile_cpp(tree, "-shared", *objects, "-o", module_path(tree))


def failing_cpp_test(tree: Path, changed: str) -> str | None:
    for test in CPP_TESTS:
        program = tree / "kept" / test
        objects = [
            name
            if changed == name or changed.endswith(".h")
            else tree / f"kept/{Path(name).stem}.o"
            for name in CORE_SOURCES
            if name.startswith("csrc/cache/")
        ]
        source = f"tests/csrc/{test}.cpp"
        if not compile_cpp(tree, "-Itests/csrc", source, *objects, "-o", program):
            return f"build of {test}"
        if subprocess.run([program], capture_output=True, timeout=TIMEOUT).returncode:
            return test
    return None


def compile_cpp(tree: Path, *arguments: str | Path) -> bool:
    """Without much optimisation: the tests do not take long."""
    command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    includes = ("csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command += ["-w", *(f"-I{path}" for path in includes), *map(str, arguments)]
    return not subprocess.run(command, cwd=tree, stderr=subprocess.DEVNULL).returncode


def failing_test(tree: Path, suite: tuple[str, ...]) -> str | None:
    env = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "NANO_VLLM_TEST_TRACES": "2000",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command.append("--hypothesis-profile=unshrunk")
    try:
        done = subprocess.run(
            [*command, *(name for name in suite if (tree / name).exists())],
            cwd=tree,
            env=env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"exit status {done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
