"""What goes wrong in the world, done on purpose, by hand: `python tests/faults.py [script ...]`.

Smoke presets as processes of their own. Each script is killed with SIGKILL at random moments and
started again until it ends, its unit files are cut short, its disk is full (a tmpfs of half the
size that it needs; mounting needs root), its data folder is read-only, and it gets bad command
lines, generated from its own flags. What it computes must equal an undisturbed run's in every
figure, errors must be one line with exit status 2. About twenty minutes for all five.
`--save` puts the table into tests/results.json, from where the README has it.
"""

import argparse
import csv
import importlib
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

SCRIPTS = {
    "ae_cube": ["--tune"],
    "lso_mnist": [],
    "vae_lj_fluid": [],
    "frozen_encoder_vae": [],
    "eae_simmering": [],
}
REAL = {  # flags that ask for data from a folder; the other two make their own
    "lso_mnist": ["--dataset", "mnist"],
    "frozen_encoder_vae": ["--dataset", "mnist"],
    "eae_simmering": ["--dataset", "real", "--experiment", "mnist"],
}
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")


def command(script, *flags, every=0):
    """The script's smoke preset; checkpoints as often as it can, so that there are some."""
    code = f"import common; common.Checkpoint.every = {every}; import {script}; {script}.main()"
    return [sys.executable, "-c", code, "--preset", "smoke", *SCRIPTS[script], *flags]


def run(script, *flags):
    done = subprocess.run(
        command(script, *flags), env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout, done.stderr


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k}
    if isinstance(value, list):
        timed = [isinstance(v, dict) and "second" in str(v.get("claim")) for v in value]
        return [without_times(v) for v, skip in zip(value, timed) if not skip]
    return value


def figures(folder):
    """All that a run found, without the times."""
    report = json.loads(pathlib.Path(folder, "results.json").read_text())
    with open(pathlib.Path(folder, "metrics.csv")) as file:
        return without_times([report["results"], report["claims"], list(csv.DictReader(file))])


def is_refusal(status, error):
    """One line on stderr, status 2."""
    return status == 2 and error.startswith("error: ") and error.count("\n") == 1


# --- the faults: each returns what the table shows, and raises AssertionError -------------------


def kills(script, folder, count, seconds, expected, dice):
    """SIGKILL at `count` random moments; whenever a run ends before, it is compared."""
    killed, ended, times = 0, 0, []
    while killed < count or times:
        target = folder / f"killed-{ended}"
        process = subprocess.Popen(
            command(script, "--out", str(target)),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            pause = dice.uniform(0, seconds) if killed < count else None
            _, error = process.communicate(timeout=pause)
            assert process.returncode == 0, error.decode()
            assert figures(target) == expected, f"{script}: killed after {times}"
            assert not list(target.rglob("*.tmp")) and not list(target.rglob("*.checkpoint"))
            shutil.rmtree(target)
            ended, times = ended + 1, []
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed, times = killed + 1, times + [round(pause, 2)]
    return f"{killed}, {ended} runs equal"


def cut_short(script, folder, expected, dice):
    """Every unit file of a finished run, cut at a random place."""
    units = sorted(pathlib.Path(folder, "units").glob("*.pt"))
    for unit in units:
        unit.write_bytes(unit.read_bytes()[: dice.randrange(unit.stat().st_size)])
    status, _, error = run(script, "--out", str(folder))
    assert status == 0 and error.count("set aside") == len(units), error
    assert figures(folder) == expected
    return f"{len(units)} set aside, equal"


def full_disk(script, folder, size, expected):
    """A file system of half the size, then one that is large enough."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={max(4, size // 8192)}k", "none", folder], check=True
    )
    try:
        status, _, error = run(script, "--out", str(folder / "run"))
        assert is_refusal(status, error) and "No space left" in error, (status, error)
        subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)
        status, _, error = run(script, "--out", str(folder / "run"))
        assert status == 0 and figures(folder / "run") == expected, error
        return "one line, then equal"
    finally:
        subprocess.run(["umount", folder], check=True)


def read_only_data(script, folder):
    """An empty read-only data folder ends in one line; one that holds real MNIST is used."""
    if script not in REAL:
        return "makes its own"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    source = next((p for p in (ROOT / "data", ROOT.parent / "shared/data") if p.exists()), None)
    found = []
    try:
        for name in ["empty"] + ["MNIST"] * bool(source):
            if name == "MNIST":
                subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
                shutil.copytree(source / "MNIST", folder / "MNIST")
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            status, _, error = run(
                script, *REAL[script], "--data", str(folder), "--out", f"{folder}-{name}"
            )
            if name == "empty":
                assert is_refusal(status, error), (status, error)
                assert not pathlib.Path(f"{folder}-{name}").exists()
                found.append("missing: one line")
            else:
                assert status == 0, error
                found.append("there: used")
        return ", ".join(found)
    finally:
        subprocess.run(["umount", folder], check=True)


def bad_values(action):
    """Values that this flag cannot take: wrong types, just outside the range, no such choice."""
    if action.nargs == 0:
        return ["=1"]  # a switch takes none
    if action.choices:
        return ["", "nothing-of-the-kind", str(next(iter(action.choices))).upper() + "x", "0"]
    if action.type is common.device:
        return ["abacus", "", "cuda:99", "CPU"]
    if action.type is None:
        return []  # any text is a folder or a file
    try:
        action.type("abc")
    except argparse.ArgumentTypeError as error:
        whole, low, high = re.search(r"is not a (\w+).* from (\S+) to (\S+)$", str(error)).groups()
    values = ["abc", "", "nan", "inf", "-inf", "1e400", "1,5", "0x10", "--", "None", "1 2"]
    values += ["2.5", "1e3"] if whole == "whole" else []
    values += [str(float(low) - 1) if whole != "whole" else str(int(low) - 1)]
    return values + ([str(int(high) + 1)] if whole == "whole" and high != "inf" else [])


def bad_lines(script, count, dice):
    """Generated bad command lines, in this process: one line, status 2, nothing written."""
    module = importlib.import_module(script)
    parsers = []
    original = common.Parser.parse
    common.Parser.parse = lambda self, argv=None: parsers.append(self) or original(self, argv)
    module.arguments(["--preset", "smoke"])
    common.Parser.parse = original
    actions = [a for a in parsers[0]._actions if a.option_strings and a.dest != "help"]
    good = [["--seed", "3"], ["--preset", "smoke"], ["--device", "cpu"], ["--out", "x"]]
    good.append(["--fresh"])
    seen, before = set(), sorted(os.listdir())
    while len(seen) < count:
        action = dice.choice(actions)
        flag = dice.choice(action.option_strings)
        kind = dice.randrange(10)
        if kind == 0:
            bad = [dice.choice(["--no-such-flag", "stray", "-x", flag[:-1], flag.upper(), "--"])]
            bad += ["stray"] if bad == ["--"] else []
        elif kind == 1 and action.nargs != 0:
            bad = [flag]  # its value is missing
        else:
            values = bad_values(action)
            if not values:
                continue
            value = dice.choice(values)
            joined = value.startswith(("=", "-")) or not value
            bad = [f"{flag}={value.removeprefix('=')}"] if joined else [flag, value]
        argv = [*sum(dice.sample(good, dice.randrange(4)), [])]
        last = kind == 1 or bad[-1].endswith("=--")  # a later flag of the same name would mend it
        argv = argv + bad if last or dice.random() < 0.5 else bad + argv
        if tuple(argv) in seen:
            continue
        seen.add(tuple(argv))
        error, status = io.StringIO(), "accepted"
        with redirect_stderr(error), redirect_stdout(io.StringIO()):
            try:
                module.arguments(argv)  # main() calls it first; it alone cannot begin to compute
            except SystemExit as stop:
                status = stop.code
        assert is_refusal(status, error.getvalue()), (script, argv, status, error.getvalue())
        assert sorted(os.listdir()) == before, (script, argv)
    for argv in dice.sample(sorted(seen), 3):  # and as a user sees it
        done = subprocess.run(
            [sys.executable, str(ROOT / f"{script}.py"), *argv], capture_output=True, text=True
        )
        assert is_refusal(done.returncode, done.stderr) and not done.stdout, (argv, done)
        assert sorted(os.listdir()) == before, (script, argv)
    return f"{len(seen)} refused"


def torture(script, args):
    dice = random.Random(f"{script} {args.seed}")
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"faults-{script}-"))
    os.chdir(folder)
    row = [script, bad_lines(script, args.lines, dice)]
    start = time.time()
    status, _, error = run(script, "--out", str(folder / "whole"))
    seconds = time.time() - start
    assert status == 0, error
    expected = figures(folder / "whole")
    size = sum(path.stat().st_size for path in (folder / "whole").rglob("*"))
    row.append(kills(script, folder, args.kills, seconds, expected, dice))
    row.append(cut_short(script, folder / "whole", expected, dice))
    row.append(full_disk(script, folder / "small", size, expected))
    row.append(read_only_data(script, folder / "data"))
    os.chdir("/")
    shutil.rmtree(folder)
    return row


HEAD = ["script", "bad command lines", "SIGKILL", "unit files cut short", "full disk",
        "read-only data folder"]

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(SCRIPTS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="the table into tests/results.json")
    args = parser.parse_args()
    rows = []
    for script in args.scripts or SCRIPTS:
        rows.append(torture(script, args))
        print(" | ".join(rows[-1]), flush=True)
    print()
    common.print_table(HEAD, rows)
    if args.save:
        import report

        kept = {row[0]: row for row in report.stored().get("faults", [])[1:] + rows}
        report.update("faults", [HEAD, *(kept[name] for name in SCRIPTS if name in kept)])
