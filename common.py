"""Plumbing that the five scripts share: arguments, the run folder, resumable steps, verdicts,
figures, image data. No document is about anything in here: no model, loss, metric, sampler or
schedule. To take one script away, copy it together with this file.
"""
import argparse
import contextlib
import csv
import datetime
import glob
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import platform
import random
import re
import signal
import socket
import sys
import time


def note(message):
    """One line for the person at the screen, beside the results."""
    with contextlib.suppress(OSError):  # a screen that has gone away
        print(message, file=sys.stderr, flush=True)


def die(message, status=2):
    """End the program with one line on stderr; status 2: bad input, 1: the computation failed."""
    note(f"error: {message}".replace("\n", " "))  # a name may hold a line's end
    raise SystemExit(status)


def say(text=""):
    """Print at once. A closed pipe or a full disk ends the printing, never the run."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            note(f"note: cannot print: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_one_line(kind, error, trace):
    """sys.excepthook: what a user can mend is one line, all else a traceback as ever."""
    text = str(error)
    if issubclass(kind, KeyboardInterrupt):
        note("interrupted; the same command continues")
    elif issubclass(kind, FloatingPointError):
        note(f"error: {text}")
    elif issubclass(kind, MemoryError) or "out of memory" in text or "allocate memory" in text:
        note(f"error: out of memory on the {'GPU' if 'CUDA' in text else 'CPU'}; units that are "
             "done are kept: try a smaller preset or --device")
    else:
        sys.__excepthook__(kind, error, trace)


if not hasattr(sys, "ps1"):  # not in a Python session; before the slow imports, for Ctrl-C
    sys.excepthook = in_one_line
    os.environ.pop("MPLBACKEND", None)  # a notebook's, for its "!python"; figures are files

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from tqdm import tqdm  # noqa: E402

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
           "#888888"]  # Okabe and Ito's, told apart by colour-blind readers; grey for the yellow
GLYPH_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
               "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "cmr10",
               "cmss10"]
EVERY = 15  # seconds between two checkpoints
OWN_FILES = ["units/*.pt", "units/*.checkpoint", "fig_*.png", "results.json", "metrics.csv",
             "table.md"]  # what --fresh deletes


# --- arguments and seeds -------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: an `int` or a finite `float` between low and high, both included."""
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):  # 400 digits are no float
            value = kind(text)
            if low <= value <= high and math.isfinite(value):  # float() takes "nan" and "inf"
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
    return parse


def device(name):
    """An argparse type: 'auto' is CUDA where there is one, else the CPU."""
    usable = ["cpu"]
    if torch.cuda.is_available():
        usable = ["cuda", "cpu"]
    if name == "auto":
        return usable[0]
    if name not in usable:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not available here (usable: auto, {', '.join(usable)})")
    return name


def folder(name):
    """An argparse type: a folder's name, "~" being one's home."""
    if not name:
        raise argparse.ArgumentTypeError("expected a folder's name")
    return os.path.expanduser(name)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the docstring as it stands and the default of every flag that has one."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:  # 0 is a value to show
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose defaults come from `--preset`; a flag that is given wins.

    presets: {"smoke": {flag: value, ...}, "quick": ..., "paper": ...}, keys being the flags' names.
    Errors are one line and exit status 2.
    """

    def __init__(self, doc, presets):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Formatter)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # no flags: -5. and -1e1
        self.presets = presets
        add = self.add_argument_group("flags of all scripts").add_argument
        add("--preset", choices=list(presets), default="quick",
            help="smoke: seconds, offline; quick: minutes on a laptop; paper: full protocol")
        add("--seed", type=number(int, 0, 2**31), default=0,
            help="seed of all random numbers; of several, the first")
        add("--device", type=device, default="auto", metavar="{auto,cpu,cuda}",
            help="where to compute; auto: CUDA if there is one, else the CPU")
        add("--data", type=folder, default="data", metavar="DIR",
            help="folder of the image data")
        add("--out", type=folder, metavar="DIR",
            help="run folder, if not out/<script>-<preset>")
        add("--fresh", action="store_true", help="delete the run in the folder first")
        self.add = self.add_argument_group("flags of this script").add_argument

    def parse(self, argv=None):
        prepare_streams()
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        peek.add_argument("--preset", default="quick")  # first: it sets the others' defaults
        with contextlib.suppress(argparse.ArgumentError):  # the full parser reports it
            preset = peek.parse_known_args(argv)[0].preset
            if preset in list(self.presets):  # of "--preset=--" it is a list
                self.set_defaults(**self.presets[preset])
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            if value == []:  # argparse takes "--flag=--" for a flag without values
                self.error(f"argument --{name.replace('_', '-')}: expected a value")
        join_others(args.device)  # each on its GPU, before any data goes there
        settle()
        return args

    def error(self, message):
        die(message)


def prepare_streams():
    """Letters that a terminal or file cannot show become "?"; a closed stderr is no error."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def need(package, flag):
    """Look for the package of one flag before any work; where it is missing, one line says so."""
    if importlib.util.find_spec(package) is None:
        die(f"argument {flag}: needs the package {package}: pip install {package}")


def settle():
    """Call each of MKL's unary functions once, in one thread.

    MKL chooses the kernel of a function at its first call; where several threads make that call at
    once, one may get a kernel of low accuracy, with errors of up to 4,000 ulp in its share of that
    one call (github.com/pytorch/pytorch/issues/188792).
    """
    for dtype in (torch.float, torch.double):
        x = torch.full((1,), 0.5, dtype=dtype)
        for name in ("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10",
                     "log2", "sin", "sqrt", "tan", "tanh", "trunc"):
            getattr(x, name)()


def generator(seed, name, device="cpu"):
    """A generator of its own for everything that is called `name`: a new unit changes no other."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # signed


def seed_weights(seed, name):
    """Seed PyTorch's own generator, from which nets draw their first weights."""
    torch.manual_seed(generator(seed, name).initial_seed())


# --- files ---------------------------------------------------------------------------------------

def write(path, data):
    """Write bytes or text in one step: no kill or full disk leaves half a file under this name."""
    if isinstance(data, str):
        data = data.encode()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except OSError as error:
        die(f"cannot write {path}: {error.strerror}")
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            temporary.unlink()


def on_cpu(value):
    """A value with its tensors on the CPU, those in its lists, tuples and dicts, too."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    if isinstance(value, tuple):
        return tuple(on_cpu(item) for item in value)
    return value


def save(path, value):
    """torch.save in one step: tensors, numbers, strings, and lists, tuples and dicts of them.

    Everything is saved on the CPU, so that a machine without a GPU can load it.
    """
    buffer = io.BytesIO()
    torch.save(on_cpu(value), buffer)
    write(path, buffer.getvalue())


def load(path):
    """What `save` wrote, on the CPU; a file that cannot be read is one line."""
    try:
        data = io.BytesIO(path.read_bytes())
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}")
    try:
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds on a damaged file
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise
        die(f"{path} is damaged: delete it, the same command computes it again")


# --- resumable steps -----------------------------------------------------------------------------

class Work:
    """The unit that is being computed: its file, how many loops it has begun, its last loss."""
    current = None  # set by Run.units, read by steps

    def __init__(self, path):
        self.path, self.loops, self.last, self.start = path, 0, "", time.time()


def steps(name, count, log, terms, *parts):
    """range(count) for long loops: after a kill, the same command goes on where it was.

    It shows a progress bar, looks about once a second whether the log is finite and, within
    `Run.units`, saves log and parts every EVERY seconds and puts them back when it starts again.

    log: tensor (count, len(terms), ...); the loop writes row log[step], one value or more a term
    parts: all else that changes: modules, optimisers, random generators, tensors
    Raises FloatingPointError that names step and term.
    """
    work, parts, first = Work.current, [log, *parts], 0
    if work:
        work.loops += 1
        path = work.path.with_suffix(f".{work.loops}.checkpoint")
        if path.exists():
            first = restore(path, work, parts)
    start = looked = saved = time.time()
    seen = first
    bar = tqdm(range(first, count), name, count, initial=first, disable=None, leave=False)
    for step in bar:
        yield step
        now, last = time.time(), step + 1 == count
        due = now - saved >= EVERY or (last and now - start >= EVERY)
        if last or due or now - looked >= 1:  # looking waits for the device
            check_finite(name, terms, log[seen:step + 1], seen)
            text = f"{terms[0]} {log[step, 0].mean():.4g}"
            bar.set_postfix_str(text, refresh=False)
            seen, looked = step + 1, now
        if work and last:
            work.last = f", {text}"
        if work and due:
            states = [get_state(part) for part in parts]
            save(path, {"step": step + 1, "states": states, "seconds": now - work.start})
            saved = now


def check_finite(name, terms, log, first):
    """FloatingPointError at the first number that is none, in a log whose rows count from first."""
    bad = ~torch.isfinite(log)
    if bad.any():
        step, term = bad.nonzero()[0, :2].tolist()
        raise FloatingPointError(f"{name}: {terms[term]} is not finite at step {first + step}")


def restore(path, work, parts):
    """Put a checkpoint's states back into the parts; returns the step to go on with."""
    found = load(path)
    work.start = time.time() - found["seconds"]
    for part, state in zip(parts, found["states"], strict=True):
        if isinstance(part, torch.Tensor):
            part.data.copy_(state)
        elif isinstance(part, torch.Generator):
            part.set_state(state)
        else:
            part.load_state_dict(state)
    return found["step"]


def get_state(part):
    if isinstance(part, torch.Tensor):
        return part
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part.state_dict()


# --- the run folder ------------------------------------------------------------------------------

class Run:
    """One folder of finished work units: `with Run(__file__, args, label) as run: ...`.

    label names the data in figures and tables. additive: flags that only add units; a command has
    those of all that finished in this folder before it, so that it keeps what they left. Under
    torchrun every process has a Run, and the first one writes what is not a unit.
    """

    def __init__(self, script, args, label, additive=()):
        self.script, self.args, self.additive = pathlib.Path(script).stem, args, additive
        self.label = f"{label}, preset {args.preset}"
        self.folder = pathlib.Path(args.out or f"out/{self.script}-{args.preset}")
        self.file = self.folder / "config.json"
        self.start, self.told = time.time(), {}  # told: {unit: {seconds, device, torch}}
        flags = {key: value for key, value in vars(args).items()
                 if key not in ("out", "data", "fresh", *additive)}  # these change no result
        self.config = {"script": self.script, **flags}
        self.rank, self.world = join_others(args.device)
        self.lock = contextlib.ExitStack()
        if self.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock.enter_context(locked(self.folder))
                self.open()
            except OSError as error:
                die(f"cannot use the run folder {self.folder}: {error.strerror}")
            except SystemExit:
                self.lock.close()
                if not self.file.exists():  # no run's folder: leave it as it was
                    (self.folder / ".lock").unlink(missing_ok=True)
                raise
        self.wait()
        self.add_earlier_flags()

    def open(self):
        """Make sure that the folder is empty or holds a run with these flags."""
        if self.file.exists():
            old = read_config(self.file)["config"]
            told = [f"--{key.replace('_', '-')} {value}" for key, value in old.items()
                    if self.config.get(key) != value]
            if told and not (self.args.fresh and old["script"] == self.script):
                die(f"{self.folder} holds a run with {', '.join(told)}: choose another --out, or "
                    "--fresh to start over")
        elif any(not path.name.startswith(".") for path in self.folder.iterdir()):
            die(f"{self.folder} is not empty and holds no run: choose another --out")
        if self.args.fresh:  # config.json stays, the sign of a run: a kill leaves one
            for pattern in OWN_FILES:
                for path in self.folder.glob(pattern):
                    path.unlink()
        (self.folder / "units").mkdir(exist_ok=True)
        if self.args.fresh or not self.file.exists():
            self.write_config({})

    def write_config(self, finished):
        write(self.file, json.dumps({"config": self.config, "finished": finished}, indent=1))

    def add_earlier_flags(self):
        """Additive flags of the commands that finished here before: numbers rise, lists grow."""
        finished = read_config(self.file)["finished"]
        for key in self.additive:
            new = getattr(self.args, key)
            old = finished.get(key, new)
            if isinstance(old, list):
                setattr(self.args, key, old + [value for value in new if value not in old])
            else:
                setattr(self.args, key, max(old, new))

    def __enter__(self):
        self.random = torch.get_rng_state()  # PyTorch draws first weights from this generator
        return self

    def __exit__(self, kind, error, trace):
        torch.set_rng_state(self.random)
        self.lock.close()
        if self.world > 1:
            dist.destroy_process_group()

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            together()

    def units(self, names, compute):
        """{name: result}: from the folder's files, else of compute(name), saved there.

        Under torchrun each process computes its share, and all wait until everything is there.
        """
        for name in names[self.rank::self.world]:
            path = self.folder / "units" / f"{name}.pt"
            if path.exists():
                say(f"reused {name}")
            else:
                self.compute(name, path, compute)
            for checkpoint in path.parent.glob(f"{glob.escape(name)}.*.checkpoint"):
                checkpoint.unlink()
        self.wait()
        return {name: self.read(name) for name in names}

    def compute(self, name, path, compute):
        """One unit: compute it, save it, say so."""
        work = Work.current = Work(path)
        try:
            result = compute(name)
        finally:
            Work.current = None
        device, seconds = device_name(self.args.device), time.time() - work.start
        save(path, {"unit": name, "config": self.config, "result": result, "seconds": seconds,
                    "device": device, "torch": str(torch.__version__)})
        say(f"{name}: {seconds:.1f} s{work.last}")

    def unit(self, name, compute):
        """The result of one unit that stands alone: from its file, else of compute()."""
        return self.units([name], lambda name: compute())[name]

    def read(self, name):
        path = self.folder / "units" / f"{name}.pt"
        found = load(path)
        known = isinstance(found, dict) and found.get("unit") == name
        if not known or found.get("config", self.config) != self.config:  # of another seed, say
            die(f"{path} is not the unit {name} of this run: delete it, the same command computes "
                "it again")
        self.told[name] = {key: found[key] for key in ("seconds", "device", "torch")}
        return found["result"]

    def figure(self, fig, name, title):
        """Save a matplotlib Figure as fig_<name>.png, titled with the data and the preset."""
        if self.rank == 0:
            fig.suptitle(f"{title}\n({self.label})", fontsize="medium")
            buffer = io.BytesIO()
            fig.savefig(buffer, format="png", dpi=150)
            write(self.folder / f"fig_{name}.png", buffer.getvalue())

    def finish(self, results, claims, tables, metrics, verdicts=True):
        """Write results.json, metrics.csv and table.md, print the tables; returns the results.json.

        results: what JSON can hold, and tensors; claims, metrics: rows, that is flat dicts;
        tables: {title: rows}; verdicts: False where nothing has been learned, or once alone.
        """
        tables = {"The document's figures and claims": claims} | tables
        tables = {title: rows for title, rows in tables.items() if rows}
        for rows in tables.values():
            for row in rows:
                if "verdict" in row and not verdicts:
                    row["verdict"] = "-"
        units = self.told.values()
        devices = sorted({f"{unit['device']}, torch {unit['torch']}" for unit in units})
        seconds = sum(unit["seconds"] for unit in units)
        caption = f"{self.label}; {'; '.join(devices)}; {seconds:.0f} s of computing"
        text = f"# {self.script}.py\n\n*{caption}*\n"
        for title, rows in tables.items():
            text += f"\n## {title}\n\n{as_markdown(rows)}"
        report = {"label": self.label, "config": self.config, "python": platform.python_version(),
                  "units": self.told, "tables": tables, "results": results,
                  "seconds of this command": time.time() - self.start}
        text_of_all = json.dumps(report, default=lambda tensor: tensor.tolist())
        report = json.loads(text_of_all, parse_constant=lambda _: None)  # JSON has no NaN
        if self.rank == 0:
            write(self.folder / "results.json", json.dumps(report, indent=1))
            write(self.folder / "metrics.csv", as_csv(metrics))
            write(self.folder / "table.md", text)
            self.write_config({key: getattr(self.args, key) for key in self.additive})
            say(f"\n{text}\n{self.folder}")
        return report


def join_others(device):
    """(rank, size) of this process under torchrun, else (0, 1)."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "MASTER_ADDR" not in os.environ:  # cluster managers may set RANK alone
        return 0, 1
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        signal.signal(signal.SIGTERM, one_has_ended)  # torchrun's, where one has failed
    return dist.get_rank(), size


def one_has_ended(*_):
    die("a process of this run has ended; the same command continues", status=1)


def together():
    """Wait for the other processes."""
    try:
        dist.barrier()
    except RuntimeError:
        one_has_ended()


def locked(folder):
    """An open file that keeps other commands out of the folder; a killed command's is closed."""
    file = open(folder / ".lock", "w")
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        die(f"another command is at work in {folder}: wait, or choose another --out")
    return file


def read_config(path):
    try:
        found = json.loads(path.read_text())
        if found["config"]["script"] and isinstance(found["finished"], dict):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    die(f"{path} is damaged, or not of a run: choose another --out")


def device_name(device):
    if device == "cuda":
        torch.cuda.synchronize()  # kernels run on after their call: wait, then read clocks
        return torch.cuda.get_device_name()
    return f"{device}, {torch.get_num_threads()} threads"


# --- tables and verdicts -------------------------------------------------------------------------

def as_csv(rows):
    """Flat dicts as CSV, a column for every key."""
    buffer = io.StringIO()
    keys = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(buffer, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_markdown(rows):
    """Flat dicts as a table in Markdown, columns aligned; what a row lacks is left blank."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys] + [[str(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    text = ""
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text += f"| {' | '.join(cells)} |\n"
    return text


def over_repeats(measures):
    """One {name: number} for each repeat, as {name: tensor (repeats,)} on the CPU."""
    return {key: torch.tensor([float(one[key]) for one in measures]) for key in measures[0]}


def in_blocks(log, count=100):
    """Means of at most `count` blocks of successive rows of a log (steps, ...)."""
    return torch.stack([block.mean(0) for block in log.chunk(count)])


def show(values):
    """'0.003921 ± 0.0002' of repeats (a tensor, a list or a number); of a single one no ±."""
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(values) == 1:
        return f"{values.item():.4g}"
    return f"{values.mean():.4g} ± {values.std():.1g}"


def reproduced(claim, published, here, tolerance=None, better="", fitted=False, earned=True):
    """Row of a published figure. here: repeats; tolerance: the document's own, else a tenth of it.

    better: "lower" or "higher", what counts as better outside of it; fitted: a setting was chosen
    to meet the figure; earned: have the nets learned what this figure needs?
    """
    if tolerance is None:
        tolerance = abs(published) / 10
    apart = torch.as_tensor(here, dtype=torch.float64).mean().item() - published
    side = "lower" if apart < 0 else "higher"
    if abs(apart) <= tolerance:
        verdict = "fitted" if fitted else "reproduced"
    elif not better:
        verdict = "differs"
    else:
        verdict = "better" if side == better else "worse"
    if not earned and verdict not in ("worse", "differs"):
        verdict = "open"
    return dict(claim=claim, document=f"{published:.4g}", here=show(here), verdict=verdict)


def ordered(claim, low, high, earned=True, document="yes"):
    """Row of a claim that the figures low lie below high, both repeats.

    "yes" or "no" where the mean difference, paired by repeat, is above two standard errors (the
    number behind the means), else "open". The side that is claimed to be less is shown first.
    earned: have the nets learned what a "yes" needs?
    """
    low, high = torch.as_tensor(low).double(), torch.as_tensor(high).double()
    gap, error, verdict = high - low, math.inf, "open"
    if len(gap) > 1:
        error = gap.std() / len(gap) ** 0.5
    if gap.mean() < -2 * error:
        verdict = "no"
    elif gap.mean() > 2 * error and earned:
        verdict = "yes"
    return dict(claim=claim, document=document, here=side_by_side(low, high, error),
                verdict=verdict)


def side_by_side(low, high, error):
    """'0.14 < 0.71 (± 0.05)': the means of what is claimed to be less, and of the other."""
    low, high = f"{low.mean():.3g}", f"{high.mean():.3g}"
    sign = "="  # as printed
    if float(low) < float(high):
        sign = "<"
    elif float(low) > float(high):
        sign = ">"
    return f"{low} {sign} {high} (± {error:.1g})"


def throughout(claim, rows, document="yes"):
    """Row of a claim that holds only if all these rows do."""
    count = sum(row["verdict"] == "yes" for row in rows)
    verdict = "open"
    if count == len(rows):
        verdict = "yes"
    elif any(row["verdict"] == "no" for row in rows):
        verdict = "no"
    return dict(claim=claim, document=document, here=f"{count} of {len(rows)}", verdict=verdict)


# --- figures -------------------------------------------------------------------------------------

def panels(rows, columns, width=3.4, height=3.2, **options):
    """(Figure, flat list of its rows x columns axes), each of width x height inches."""
    fig = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.set_prop_cycle(color=COLOURS)
    return fig, axes


def image_sheet(ax, images, rows=(), columns=(), cmap="gray"):
    """One sheet of images (rows, columns, C, H, W) in [0, 1], labelled at its left and top."""
    r, c, channels, h, w = images.shape
    white = 1.0 if cmap == "gray" else math.nan
    sheet = torch.full((r, c, channels, h + 2, w + 2), white)  # white gaps
    sheet[..., 1:-1, 1:-1] = images.clamp(0, 1)
    sheet = sheet.permute(0, 3, 1, 4, 2).reshape(r * (h + 2), c * (w + 2), channels)
    ax.imshow(sheet.squeeze(-1).numpy(), cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([(w + 2) * (j + 0.5) - 0.5 for j in range(len(columns))], columns)
    ax.set_yticks([(h + 2) * (i + 0.5) - 0.5 for i in range(len(rows))], rows)
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)


# --- image data ----------------------------------------------------------------------------------

def images(dataset, train, folder, device="cpu"):
    """'mnist' or 'svhn' through torchvision: x (N, C, H, W) in [0, 1], labels y (N,).

    Missing files are downloaded into `folder`; where that fails, one line says what to do.
    """
    from torchvision import datasets
    if dist.is_initialized() and dist.get_rank() > 0:
        together()  # the first process downloads, alone
    timeout, folder = socket.getdefaulttimeout(), pathlib.Path(folder)
    socket.setdefaulttimeout(30)  # for a server that hangs
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if dataset == "mnist":
                data = datasets.MNIST(folder, train=train, download=True)
                x, y = data.data[:, None], data.targets
            else:
                split = "train" if train else "test"
                data = datasets.SVHN(folder / "SVHN", split=split, download=True)
                x, y = torch.from_numpy(data.data), torch.from_numpy(data.labels)
    except Exception as error:  # no network, damaged file, read-only folder: many kinds
        why = " ".join(str(error).split())[-90:]  # its end says why
        instead = {"mnist": "glyphs", "svhn": "glyphs-rgb"}[dataset]
        die(f"cannot load {dataset} (… {why}): {remedy(dataset, folder)}, or use --dataset "
            f"{instead}")
    finally:
        socket.setdefaulttimeout(timeout)
        if dist.is_initialized() and dist.get_rank() == 0:
            together()
    return x.to(device).float() / 255, y.to(device)


def remedy(dataset, folder):
    """Which files to put where, or which to delete, before torchvision can read them."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity
    home, files = folder / "MNIST" / "raw", datasets.MNIST.resources
    if dataset == "svhn":
        home, files = folder / "SVHN", [datasets.SVHN.split_list[k][1:] for k in ("train", "test")]
    missing = [name for name, md5 in files if not check_integrity(home / name, md5)]
    if missing:
        return f"put {', '.join(missing)} into {home}"
    cut = []
    for name, _ in files:  # a gzip file ends with the size of what it holds
        size, path = (home / name).read_bytes()[-4:], home / name.removesuffix(".gz")
        if path.exists() and path.stat().st_size != int.from_bytes(size, "little"):
            cut.append(path.name)
    return f"delete the damaged {', '.join(cut) or 'unpacked files'} in {home}"


def glyphs(n, seed, channels=1, device="cpu"):
    """Digits in ten of matplotlib's own fonts: x (n, channels, 28, 28) in [0, 1], labels y (n,).

    Height 18 to 26 pixels, shifts of 2, rotations within 15 degrees; with 3 channels also random
    colours of ink and ground. Equal n and seed give equal images.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    folder, dice = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf"), random.Random(seed)
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", size)
             for name in GLYPH_FONTS for size in range(20, 29, 2)]
    x, y = torch.empty(n, 1, 28, 28), torch.empty(n, dtype=torch.long)
    for i in range(n):
        y[i] = dice.randrange(10)
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), str(y[i].item()), 255, dice.choice(fonts), anchor="mm")
        shift = dice.uniform(-2, 2), dice.uniform(-2, 2)
        image = image.rotate(dice.uniform(-15, 15), Image.Resampling.BILINEAR, translate=shift)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x[i] = pixels.view(1, 28, 28) / 255
    if channels == 3:
        g = generator(seed, "colours")
        ground = 0.45 * torch.rand(n, 3, 1, 1, generator=g)
        ink = 1 - 0.45 * torch.rand(n, 3, 1, 1, generator=g)
        x = ground + (ink - ground) * x  # (n, 3, 28, 28)
        negative = torch.rand(n, 1, 1, 1, generator=g) < 0.5
        x = torch.where(negative, 1 - x, x)  # dark on light
    return x.to(device), y.to(device)
