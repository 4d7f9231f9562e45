"""Faults on purpose, by hand: kills, full disks, cut files, lost processes, bad command lines.

    python tests/faults.py [script ...]

After a fault the same command must end with an undisturbed run's results, times apart. About ten
minutes a script.
"""
import collections
import contextlib
import importlib
import io
import json
import os
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ["lso_mnist", "ae_cube", "vae_lj_fluid", "frozen_encoder_vae", "eae_simmering"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
BAD = ["", " ", "many", "nan", "-inf", "1e999", "9" * 401, "9" * 5000, "0x1", "1,5", "1\n2", "--",
       "²", "-99999999", "99999999999999"]  # for numbers and choices
NO_FOLDER = ["", "/dev/null/x", "/proc/x", "x" * 300]
CHECKS, FAILED = collections.Counter(), []


def check(what, good, detail):
    CHECKS[what] += 1
    if not good:
        FAILED.append(what)
        print(f"FAILED {what}: {detail}", flush=True)


def start(script, folder, torchrun=False, limit=resource.RLIM_INFINITY):
    """The smoke run, with a checkpoint ten times a second; no file may be longer than limit."""
    command = ["-c", f"import common, {script}; common.EVERY = 0.1; {script}.main()"]
    if torchrun:
        command = [*TORCHRUN, f"{ROOT}/{script}.py"]
    return subprocess.Popen(
        [sys.executable, *command, "--preset", "smoke", "--out", folder], text=True,
        env=dict(os.environ, PYTHONPATH=ROOT), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def refused(what, process, word):
    """Status 2, and one line that names the fault."""
    error = process.communicate()[1]
    good = process.returncode == 2 and error.count("\n") == 1 and word in error
    check(what, good, f"status {process.returncode}, {word} expected: {error[-500:]}")


def results(folder):
    def without_times(found):
        return {key: found[key] for key in found if "second" not in key}

    report = json.loads((folder / "results.json").read_text(), object_hook=without_times)
    return report["results"], (folder / "metrics.csv").read_text()


def kills(script, folder, seconds):
    """At random moments, until nothing is left to kill."""
    shutil.rmtree(folder)
    while True:
        process = start(script, folder)
        try:
            process.communicate(timeout=random.uniform(1, 1.3 * seconds))
            return
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        CHECKS["kills"] += 1


def full_disks(script, folder, seconds):
    limit = max(path.stat().st_size for path in folder.glob("fig_*")) ** random.uniform(0.3, 0.99)
    for path in folder.glob("units/*.pt"):
        if random.random() < 0.2:
            path.unlink()
    refused("full disks", start(script, folder, limit=int(limit)), "cannot write")


def cut_files(script, folder, seconds):
    for path in random.sample(sorted(folder.glob("units/*.pt")), 2) + [folder / "config.json"]:
        whole = path.read_bytes()
        path.write_bytes(whole[:random.randrange(len(whole))])
        refused("cut files", start(script, folder), path.name)
        path.unlink()
    path.write_bytes(whole)  # config.json


def lost_processes(script, folder, seconds):
    """One of torchrun's two is killed: soon all have ended, the other one with at most a line."""
    shutil.rmtree(folder)
    process = start(script, folder, torchrun=True)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:
        time.sleep(0.1)
    time.sleep(random.uniform(0, seconds / 2))
    os.kill(int(random.choice(children.read_text().split())), 9)
    killed = time.time()
    error = process.communicate()[1]
    good = time.time() < killed + 60 and error.count("Traceback (") == 1  # torchrun's own
    check("lost processes", good, f"{time.time() - killed:.0f} s: {error}")


def bad_command_lines(script):
    """In this process and an empty folder: status 2, one line, nothing written."""
    main, text = importlib.import_module(script).main, io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main(["--help"])
    lines = [["--nonsense"], ["two\nlines"], ["--data"], ["--data="]]
    for flag in set(re.findall(r"^  (--[a-z-]+)", text.getvalue(), re.M)) - {"--data"}:
        for value in NO_FOLDER if flag == "--out" else BAD:
            lines += [[flag, value], [f"{flag}={value}"]]
    for line in lines:
        error, status = io.StringIO(), None
        with contextlib.redirect_stderr(error):
            try:
                main(["--preset", "smoke", *line])
            except SystemExit as stop:
                status = stop.code
        good = status == 2 and error.getvalue().count("\n") == 1 and not os.listdir()
        check("bad command lines", good, f"{line} {status}: {error.getvalue()}"[:200])


def main(scripts):
    for script in scripts or SCRIPTS:
        with tempfile.TemporaryDirectory() as home:
            os.chdir(home)
            bad_command_lines(script)
            whole, folder, begun = pathlib.Path("whole"), pathlib.Path("run"), time.time()
            print(start(script, whole).communicate()[1], end="")
            seconds = time.time() - begun
            for fault in 2 * [kills, full_disks, cut_files, lost_processes]:
                shutil.copytree(whole, folder)
                fault(script, folder, seconds)
                process = start(script, folder, torchrun=fault is lost_processes)
                error = process.communicate()[1]
                same = process.returncode == 0 and results(folder) == results(whole)
                check(f"{fault.__name__}, continued", same, error or "other results")
                shutil.rmtree(folder)
            os.chdir(ROOT)
        print(f"{script}: {json.dumps(CHECKS)}, {len(FAILED)} failed so far", flush=True)
    return int(bool(FAILED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
