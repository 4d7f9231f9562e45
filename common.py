"""Plumbing that the five scripts share: arguments and presets, devices and seeds, the run folder, image data, figures.

No document is about anything in here: no model, loss, metric, sampler, schedule or training loop. To take one script
away, copy it together with this file.
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import time

import torch
from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442"]  # Okabe-Ito
GLYPH_FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
               "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
               "STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"]


def note(message):
    """One line for the person at the screen, beside the results."""
    print(message, file=sys.stderr)


def die(message, status=2):
    """End the program with one line on stderr. Status 2: bad input or folder; 1: the computation itself failed."""
    note(f"error: {message}")
    raise SystemExit(status)


# --- arguments -------------------------------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: an `int` or a finite `float` between low and high, both included."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
    return parse


def device(name):
    """An argparse type: 'auto' is CUDA where there is one, else the CPU; MPS is taken when named."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name):
        usable = ", ".join(["auto"] + [key for key in there if there[key]])
        raise argparse.ArgumentTypeError(f"{name!r} is not available here (usable: {usable})")
    return name


class Parser(argparse.ArgumentParser):
    """argparse with presets: `--preset` sets the defaults that `--help` shows, a flag that is given wins.

    presets: {"smoke": {flag: value, ...}, "quick": ..., "paper": ...}, keys being the flags' names. Errors are one
    line and exit status 2.
    """

    def __init__(self, doc, presets):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=type(
            "Formatter", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}))
        self.presets = presets
        group = self.add_argument_group("flags of all scripts")
        group.add_argument("--preset", choices=list(presets), default="quick",
                           help="smoke: seconds, offline; quick: minutes on a laptop; paper: the full protocol")
        group.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="first seed")
        group.add_argument("--device", type=device, default="auto", metavar="{auto,cpu,cuda,mps}",
                           help="where to compute; auto: CUDA if there is one")
        group.add_argument("--data", default="data", metavar="DIR", help="folder of the image data")
        group.add_argument("--out", metavar="DIR", help="run folder (default: out/<script>-<preset>)")
        group.add_argument("--fresh", action="store_true", help="delete the run in the folder first")
        group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                           help="use torch.compile where it applies")

    def parse(self, argv=None):
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        peek.add_argument("--preset", default="quick")
        with contextlib.suppress(argparse.ArgumentError):  # the full parser reports it
            self.set_defaults(**self.presets.get(peek.parse_known_args(argv)[0].preset, {}))
        return self.parse_args(argv)

    def error(self, message):
        die(message)


def generator(seed, name, device="cpu"):
    """A random generator of its own for the work unit `name`, so that adding a unit changes no other."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def batches(n, size, generator):
    """Index batches of one shuffled pass over n items, on the generator's device; the last may be smaller."""
    return torch.randperm(n, generator=generator, device=generator.device).split(size)


def compiled(function, wanted):
    """torch.compile(function) where it is wanted and a C++ compiler is there, else the function itself."""
    if wanted and not shutil.which(os.environ.get("CXX", "g++")):
        note("note: --compile needs a C++ compiler (g++), none found: running without it")
        wanted = False
    return torch.compile(function) if wanted else function


# --- the run folder --------------------------------------------------------------------------------------------------

def write(path, data):
    """Write bytes or text in one step: a kill or a full disk never leaves a half-written file under this name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        die(f"cannot write {path}: {error.strerror}")


def save(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write(path, buffer.getvalue())


def load(path, device):
    """What `save` wrote, or None where there is no such file; a broken file is set aside, named, and counts as none."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception:  # torch.load raises half a dozen kinds on a damaged file
        aside = path.with_name(path.name + ".broken")
        os.replace(path, aside)
        note(f"note: {path} is damaged; set aside as {aside.name}, computing it again")
        return None


class Checkpoint:
    """What is inside an unfinished work unit, saved at most every `every` seconds."""
    every = 15

    def __init__(self, path, device):
        self.path, self.start, self.saved = path, time.time(), time.time()
        self.state, self.earlier = load(path, device) or (None, 0.0)  # what a killed run left

    def seconds(self):
        return self.earlier + time.time() - self.start

    def due(self):
        return time.time() - self.saved >= self.every

    def save(self, progress, *parts):
        """progress: tensors and numbers; parts: modules, optimisers and random generators."""
        states = [part.get_state() if isinstance(part, torch.Generator) else part.state_dict() for part in parts]
        save(self.path, ((progress, states), self.seconds()))
        self.saved = time.time()

    def restore(self, *parts):
        """Put the saved states back into the same parts; returns the progress."""
        progress, states = self.state
        for part, state in zip(parts, states):
            if isinstance(part, torch.Generator):
                part.set_state(state.cpu())
            else:
                part.load_state_dict(state)
        return progress


class Run:
    """One run = one folder of finished work units. Use as `with Run(__file__, args, label) as run:`.

    label names the data for figures and tables. additive: flags that only add units, and so may change in a folder.
    """

    def __init__(self, script, args, label, additive=()):
        self.script, self.label = pathlib.Path(script).stem, f"{label}, preset {args.preset}"
        self.device, self.seconds, self.start, self.figures = args.device, {}, time.time(), set()
        self.config = {k: v for k, v in vars(args).items() if k not in ("out", "data", "fresh")}
        self.source = hashlib.sha256(pathlib.Path(script).read_bytes()).hexdigest()[:12]
        self.folder = pathlib.Path(args.out or f"out/{self.script}-{args.preset}")
        try:
            self.open(args.fresh, additive)
        except OSError as error:
            die(f"cannot use the run folder {self.folder}: {error.strerror}")

    def open(self, fresh, additive):
        config = self.folder / "config.json"
        if self.folder.is_dir() and any(self.folder.iterdir()) and not config.exists():
            die(f"{self.folder} is not empty and holds no run: choose another --out")
        if fresh and config.exists():
            shutil.rmtree(self.folder / "units", ignore_errors=True)
            for path in [*self.folder.glob("fig_*.png"), *self.folder.glob("*.json"), *self.folder.glob("*.csv")]:
                path.unlink()
        if config.exists():
            try:
                old = json.loads(config.read_text())
            except ValueError:
                die(f"{config} is damaged: choose another --out, or --fresh to start over")
            flags = [key for key in self.config if key not in additive and old["config"].get(key) != self.config[key]]
            if flags:
                told = ", ".join(f"--{key.replace('_', '-')} {old['config'].get(key)}" for key in flags)
                die(f"{self.folder} holds a run with {told}: choose another --out, or --fresh to start over")
            if old["source"] != self.source:
                note(f"note: {self.script}.py has changed since the first units of {self.folder} were made")
        (self.folder / "units").mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        if not config.exists():
            write(config, json.dumps({"config": self.config, "source": self.source}, indent=1))

    def __enter__(self):
        self.precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        torch.set_flush_denormal(True)  # gradients of saturated units, many times slower on a CPU
        return self

    def __exit__(self, kind, error, trace):
        torch.set_float32_matmul_precision(self.precision)
        torch.set_flush_denormal(False)
        if isinstance(error, FloatingPointError):
            die(str(error), status=1)

    def unit(self, name, compute):
        """The finished result `name` from the folder, else compute(checkpoint), saved: tensors, numbers, str, dict."""
        path = self.folder / "units" / f"{name}.pt"
        done = load(path, self.device)
        if done is None:
            checkpoint = Checkpoint(path.with_suffix(".checkpoint"), self.device)
            if checkpoint.state is not None:
                print(f"continuing {name} where it stopped")
            result = compute(checkpoint)
            if self.device == "cuda":
                torch.cuda.synchronize()
            done = {"result": result, "seconds": checkpoint.seconds()}
            save(path, done)
            checkpoint.path.unlink(missing_ok=True)
        else:
            print(f"reused {name}")
        self.seconds[name] = done["seconds"]
        return done["result"]

    def figure(self, fig, name, title):
        """Save a matplotlib Figure as fig_<name>.png, titled with the data and the preset."""
        fig.suptitle(f"{title}\n({self.label})", fontsize="medium")
        buffer = io.BytesIO()
        fig.savefig(buffer, dpi=150)
        write(self.folder / f"fig_{name}.png", buffer.getvalue())
        self.figures.add(f"fig_{name}.png")

    def finish(self, results, claims, metrics):
        """Write results.json and metrics.csv, print the closing table; returns what results.json holds.

        results: anything JSON can hold; claims: rows (claim, document, here, holds); metrics: list of flat dicts.
        """
        for path in self.folder.glob("fig_*.png"):
            if path.name not in self.figures:
                path.unlink()  # of an earlier command in this folder
        cpu = f"{torch.get_num_threads()} CPU threads"
        report = {"script": self.script, "label": self.label, "config": self.config, "source": self.source,
                  "device": torch.cuda.get_device_name() if self.device == "cuda" else f"{self.device}, {cpu}",
                  "versions": {"python": platform.python_version(), "torch": torch.__version__}, "results": results,
                  "claims": [dict(zip(("claim", "document", "here", "holds"), row)) for row in claims],
                  "seconds": {"units": self.seconds, "sum of units": sum(self.seconds.values()),
                              "this command": time.time() - self.start}}
        report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # NaN has no JSON
        write(self.folder / "results.json", json.dumps(report, indent=1, allow_nan=False))
        table = io.StringIO()
        rows = csv.DictWriter(table, fieldnames=list(dict.fromkeys(key for row in metrics for key in row)))
        rows.writeheader()
        rows.writerows(metrics)
        write(self.folder / "metrics.csv", table.getvalue())
        print(f"\n{self.label}")
        print_table(["", "document", "here", "holds?"], claims)
        print(f"\n{report['seconds']['sum of units']:.0f} s of computing, {report['device']}\n{self.folder}")
        return report


def print_table(head, rows):
    """Print rows of strings, numbers and booleans under their heads, columns aligned."""
    text = [head] + [[{True: "yes", False: "no", None: "-"}.get(cell, str(cell)) if isinstance(cell, (bool, type(None)))
                      else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(head))]
    for row in [text[0], ["-" * width for width in widths], *text[1:]]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def mean_std(values):
    """{'mean', 'std', 'n'} of a 1-D tensor of repeats; std is None for a single one."""
    std = values.std().item() if len(values) > 1 else None
    return {"mean": values.mean().item(), "std": std, "n": len(values)}


def show(value, digits=4):
    """'0.0038 ± 0.0001' from what mean_std returns."""
    mean = f"{round(value['mean'], digits) + 0.0:.{digits}f}"  # + 0.0: no negative zero
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def plot_curves(panels, scales):
    """Curves over the epochs; panels {title: [(label, values (epochs,), colour, line style)]}, y scales in their order."""
    fig = Figure(figsize=(3.2 * len(panels) + 1.8, 4), layout="constrained")
    for ax, (title, lines), scale in zip(fig.subplots(1, len(panels)), panels.items(), scales):
        for label, values, colour, style in lines:
            ax.plot(range(1, len(values) + 1), values, color=colour, linestyle=style, label=label)
        ax.set(xlabel="epoch", yscale=scale)
        ax.set_title(title, fontsize="medium")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right", fontsize="x-small")
    return fig


# --- image data ------------------------------------------------------------------------------------------------------

def images(dataset, train, folder, device="cpu"):
    """'mnist' or 'svhn' through torchvision: x (N, C, H, W) in [0, 1] and labels y (N,), on the device.

    Missing files are downloaded into `folder`; where that fails, one line names them and the way without a network.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity
    folder = pathlib.Path(folder)
    if dataset == "mnist":
        home, files = folder / "MNIST" / "raw", datasets.MNIST.resources
    else:
        home, files = folder / "SVHN", [split[1:] for key, split in datasets.SVHN.split_list.items() if key != "extra"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if dataset == "mnist":
                data = datasets.MNIST(folder, train=train, download=True)
                x, y = data.data[:, None], data.targets
            else:
                data = datasets.SVHN(home, split="train" if train else "test", download=True)
                x, y = torch.from_numpy(data.data), torch.from_numpy(data.labels)
        return x.to(device).float() / 255, y.to(device)
    except Exception as error:  # no network, damaged file, read-only folder: torchvision raises many kinds
        bad = [name for name, md5 in files if not check_integrity(home / name, md5)]
        why = " ".join(str(error).split())[:120]
        die(f"cannot load {dataset}: missing or damaged {', '.join(bad) or 'unpacked files'} in {home} ({why}); "
            "put the files there or use --dataset glyphs")


def glyphs(n, seed, channels=1, device="cpu"):
    """Digits from matplotlib's own fonts, randomly warped: x (n, channels, 28, 28) in [0, 1], labels y (n,).

    Rotation within 15 degrees, shear 0.25, scale 0.8 to 1.15, shift 2 pixels, three stroke widths; with 3 channels
    also random colours for stroke and ground. The same n and seed give the same images.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    fonts, shapes = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf"), []
    for name in GLYPH_FONTS:
        font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 50)
        for digit in "0123456789":
            for stroke in range(3):
                image = Image.new("L", (56, 56))
                box = font.getbbox(digit, stroke_width=stroke)
                corner = (28 - (box[0] + box[2]) / 2, 28 - (box[1] + box[3]) / 2)
                ImageDraw.Draw(image).text(corner, digit, 255, font, stroke_width=stroke)
                shapes.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 56, 56))
    shapes = torch.stack(shapes).view(len(GLYPH_FONTS), 10, 3, 1, 56, 56)
    g = generator(seed, "glyphs")

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(size, generator=g)

    def choose(k):
        return torch.randint(k, (n,), generator=g)

    y = choose(10)
    font, stroke = choose(len(GLYPH_FONTS)), choose(3)
    angle, shear, shift = uniform(-0.26, 0.26, n), uniform(-0.25, 0.25, n), uniform(-0.14, 0.14, n, 2)
    turn = torch.stack([torch.stack([angle.cos(), shear - angle.sin()], 1),
                        torch.stack([angle.sin(), angle.cos()], 1)], 1) / uniform(0.8, 1.15, n)[:, None, None]
    theta, x = torch.cat([turn, shift[:, :, None]], 2), torch.empty(n, 1, 28, 28)  # (n, 2, 3)
    for i in range(0, n, 2000):
        part = slice(i, i + 2000)
        fine = shapes[font[part], y[part], stroke[part]].float() / 255  # (2000, 1, 56, 56)
        grid = torch.nn.functional.affine_grid(theta[part], list(fine.shape), align_corners=False)
        x[part] = torch.nn.functional.avg_pool2d(
            torch.nn.functional.grid_sample(fine, grid, align_corners=False), 2)
    if channels == 3:
        ground, ink = uniform(0, 0.45, n, 3, 1, 1), uniform(0.55, 1, n, 3, 1, 1)
        swap = torch.rand(n, 1, 1, 1, generator=g) < 0.5
        ground, ink = torch.where(swap, ink, ground), torch.where(swap, ground, ink)
        x = ground + (ink - ground) * x  # (n, 3, 28, 28)
    return x.clamp(0, 1).to(device), y.to(device)
