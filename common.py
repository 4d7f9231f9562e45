"""Plumbing that the five scripts share: arguments, seeds, the run folder, image data, figures.

No document is about anything in here: no model, loss, metric, sampler, schedule or training loop.
To take one script away, copy it together with this file.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import shutil
import sys
import sysconfig
import time

import torch
from matplotlib.figure import Figure

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
           "#888888"]  # Okabe and Ito's, told apart by colour-blind readers; grey for the yellow
GLYPH_FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold
    DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic
    STIXGeneralBolIta cmr10 cmb10 cmss10 cmtt10""".split()


def note(message):
    """One line for the person at the screen, beside the results."""
    print(message, file=sys.stderr)


def die(message, status=2):
    """End the program with one line on stderr; status 2: bad input, 1: the computation failed."""
    note(f"error: {message}")
    raise SystemExit(status)


# --- arguments -----------------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: an `int` or a finite `float` between low and high, both included."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and math.isfinite(value):  # float() takes "nan" and "inf"
                return value
        name = {int: "a whole number", float: "a number"}[kind]
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
    return parse


def device(name):
    """An argparse type: 'auto' is CUDA where there is one, else the CPU; MPS only by name."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    usable = {"cpu": True, "cuda": torch.cuda.is_available(),
              "mps": torch.backends.mps.is_available()}
    if not usable.get(name):
        choice = ", ".join(["auto"] + [key for key in usable if usable[key]])
        raise argparse.ArgumentTypeError(f"{name!r} is not available here (usable: {choice})")
    return name


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the docstring as it stands and the default of every flag that has one."""

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False  # 0 is a value to show
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose defaults come from `--preset`; a flag that is given wins.

    presets: {"smoke": {flag: value, ...}, "quick": ..., "paper": ...}, keys being the flags' names.
    Errors are one line and exit status 2.
    """

    def __init__(self, doc, presets):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Formatter)
        self.presets = presets
        add = self.add_argument_group("flags of all scripts").add_argument
        add("--preset", choices=list(presets), default="quick",
            help="smoke: seconds, offline; quick: minutes on a laptop; paper: full protocol")
        add("--seed", type=number(int, 0, 2**31), default=0,
            help="seed of all random numbers; of several, the first")
        add("--device", type=device, default="auto", metavar="{auto,cpu,cuda,mps}",
            help="where to compute; auto: CUDA if there is one, else the CPU")
        add("--data", default="data", metavar="DIR", help="folder of the image data")
        add("--out", metavar="DIR", help="run folder, if not out/<script>-<preset>")
        add("--fresh", action="store_true", help="delete the run in the folder first")
        add("--compile", action=argparse.BooleanOptionalAction, default=False,
            help="use torch.compile where it applies")
        self.add = self.add_argument_group("flags of this script").add_argument

    def parse(self, argv=None):
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        peek.add_argument("--preset", default="quick")  # first: it sets the others' defaults
        with contextlib.suppress(argparse.ArgumentError):  # the full parser reports it
            self.set_defaults(**self.presets.get(peek.parse_known_args(argv)[0].preset, {}))
        args = self.parse_args(argv)
        for name, value in vars(args).items():
            if value == []:  # argparse takes "--flag=--" for a flag without values
                self.error(f"argument --{name.replace('_', '-')}: expected a value")
        settle()
        return args

    def error(self, message):
        die(message)


def generator(seed, name, device="cpu"):
    """A generator of its own for the work unit `name`, so that adding a unit changes no other."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # signed


def batches(n, size, generator):
    """Index batches of one shuffled pass over n items, on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device).split(size)


def compiled(function, wanted, **options):
    """torch.compile(function) where it is wanted and a C++ compiler is there, else function."""
    possible = wanted and can_compile(os.environ.get("CXX", "g++"))
    return torch.compile(function, **options) if possible else function


@functools.cache  # one note is enough
def can_compile(name):
    header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
    missing = [str(what) for what, there in ((name, shutil.which(name)), (header, header.exists()))
               if not there]
    if missing:
        note(f"note: --compile needs a C++ compiler and Python's headers, there is no "
             f"{' and no '.join(missing)}: running without it")
    return not missing


@functools.cache
def settle():
    """One thread calls MKL's functions once: where two make the first call of one together, one
    may get a kernel with other last digits (github.com/pytorch/pytorch/issues/188792)."""
    for dtype in (torch.float, torch.double):
        x = torch.full((1, 4, 4), 0.5, dtype=dtype)
        for name in ("acos asin atan cos erf erfc erfinv exp expm1 log log10 log1p log2 rsqrt sin "
                     "sqrt tan tanh").split():
            getattr(x, name)()
        x @ x, x[0] @ x[0], x[0] @ x[0, 0], torch.baddbmm(x, x, x), torch.addmm(x[0], x[0], x[0])


# --- the run folder ------------------------------------------------------------------------------

def write(path, data):
    """Write bytes or text in one step: no kill or full disk leaves half a file under this name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        die(f"cannot write {path}: {error.strerror}")


def save(path, value):
    """torch.save in one step: tensors, numbers, strings, and lists, tuples and dicts of them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write(path, buffer.getvalue())


def load(path, device):
    """What `save` wrote; None where there is no file. A damaged one is set aside and is none."""
    try:
        data = io.BytesIO(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}")
    try:
        return torch.load(data, map_location=device, weights_only=True)
    except (MemoryError, torch.cuda.OutOfMemoryError):
        die(f"cannot load {path}: out of memory", status=1)
    except Exception:  # torch.load raises half a dozen kinds on a damaged file
        aside = path.with_name(path.name + ".broken")
        with contextlib.suppress(OSError):  # in a read-only folder it stays
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
        states = [part.get_state() if isinstance(part, torch.Generator) else part.state_dict()
                  for part in parts]
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
    """One folder of finished work units: `with Run(__file__, args, label) as run: ...`.

    label names the data in figures and tables. additive: flags that only add units, and so may
    change between commands in one folder.
    """

    def __init__(self, script, args, label, additive=()):
        self.script, self.label = pathlib.Path(script).stem, f"{label}, preset {args.preset}"
        self.device, self.seconds, self.start, self.figures = args.device, {}, time.time(), set()
        self.config = {"script": self.script} | {
            key: value for key, value in vars(args).items() if key not in ("out", "data", "fresh")}
        text = b"".join(pathlib.Path(file).read_bytes() for file in (script, __file__))
        self.source = hashlib.sha256(text).hexdigest()[:12]
        self.sources = {self.source}  # of the units, too: an earlier version may have made some
        self.folder = pathlib.Path(args.out or f"out/{self.script}-{args.preset}")
        try:
            self.open(args.fresh, additive)
        except OSError as error:
            die(f"cannot use the run folder {self.folder}: {error.strerror}")

    def open(self, fresh, additive):
        config, units = self.folder / "config.json", self.folder / "units"
        if config.exists():
            try:
                old = json.loads(config.read_text())
                old_config, old_source = old["config"], old["source"]
            except (ValueError, KeyError, TypeError):
                die(f"{config} is damaged, or not of a run: choose another --out")
        elif self.folder.is_dir() and any(p.suffix != ".tmp" for p in self.folder.iterdir()):
            die(f"{self.folder} is not empty and holds no run: choose another --out")
        if fresh and config.exists():  # which stays until the last: a kill leaves a run
            if units.exists():
                shutil.rmtree(units)
            for pattern in ("fig_*.png", "results.json", "metrics.csv"):
                for path in self.folder.glob(pattern):
                    path.unlink()
        elif config.exists():
            told = [f"--{key.replace('_', '-')} {old_config.get(key)}" for key in self.config
                    if key not in additive and old_config.get(key) != self.config[key]]
            if told:
                die(f"{self.folder} holds a run with {', '.join(told)}: choose another --out, "
                    "or --fresh to start over")
            if old_source != self.source:
                note(f"note: {self.script}.py or common.py has changed since this run began")
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.rglob(".*.tmp"):  # of a command killed inside `write`
            if not pathlib.Path("/proc", leftover.suffixes[-2][1:]).exists():  # or one at work
                leftover.unlink()
        if fresh or not config.exists():
            write(config, json.dumps({"config": self.config, "source": self.source}, indent=1))
        units.mkdir(exist_ok=True)

    def __enter__(self):
        self.precision, self.random = torch.get_float32_matmul_precision(), torch.get_rng_state()
        torch.set_float32_matmul_precision("high")
        return self

    def __exit__(self, kind, error, trace):
        torch.set_float32_matmul_precision(self.precision)
        torch.set_rng_state(self.random)  # PyTorch draws first weights from the global generator
        if isinstance(error, FloatingPointError):
            die(str(error), status=1)
        if isinstance(error, KeyboardInterrupt):
            die("interrupted; the same command continues", status=130)

    def unit(self, name, compute):
        """The result `name` from the folder, else that of compute(checkpoint), saved there."""
        path = self.folder / "units" / f"{name}.pt"
        done = load(path, "cpu")
        if done is None:
            checkpoint = Checkpoint(path.with_suffix(".checkpoint"), self.device)
            if checkpoint.state is not None:
                print(f"continuing {name} where it stopped")
            result = compute(checkpoint)
            if self.device == "cuda":
                torch.cuda.synchronize()  # kernels run on after their call: wait, then read clocks
            done = {"result": result, "seconds": checkpoint.seconds(), "source": self.source}
            save(path, done)
            checkpoint.path.unlink(missing_ok=True)
        else:
            print(f"reused {name}")
        self.seconds[name] = done["seconds"]
        self.sources.add(done.get("source", "unknown"))
        return done["result"]

    def figure(self, fig, name, title):
        """Save a matplotlib Figure as fig_<name>.png, titled with the data and the preset."""
        fig.suptitle(f"{title}\n({self.label})", fontsize="medium")
        buffer = io.BytesIO()
        fig.savefig(buffer, dpi=150)
        write(self.folder / f"fig_{name}.png", buffer.getvalue())
        self.figures.add(f"fig_{name}.png")

    def finish(self, results, claims, metrics):
        """Write results.json and metrics.csv, print the closing table; returns the results.json.

        results: what JSON can hold; claims: (claim, document, here, holds); metrics: flat dicts.
        """
        for path in self.folder.glob("fig_*.png"):
            if path.name not in self.figures:
                path.unlink()  # of an earlier command in this folder
        cuda, threads = self.device == "cuda", torch.get_num_threads()
        units = sum(self.seconds.values())
        report = {
            "script": self.script, "label": self.label, "config": self.config,
            "sources": sorted(self.sources), "results": results,
            "device": torch.cuda.get_device_name() if cuda else f"{self.device}, {threads} threads",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "claims": [dict(zip(("claim", "document", "here", "holds"), row)) for row in claims],
            "seconds": {"units": self.seconds, "all units": units,
                        "this command": time.time() - self.start}}
        report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN
        write(self.folder / "results.json", json.dumps(report, indent=1, allow_nan=False))
        table = io.StringIO()
        rows = csv.DictWriter(table, list(dict.fromkeys(key for row in metrics for key in row)))
        rows.writeheader()
        rows.writerows(metrics)
        write(self.folder / "metrics.csv", table.getvalue())
        print(f"\n{self.label}")
        print_table(["", "document", "here", "holds?"],
                    [(*row, "yes" if holds else "no") for *row, holds in claims])
        print(f"\n{units:.0f} s of computing on {report['device']}\n{self.folder}")
        return report


def print_table(head, rows):
    """Print rows under their heads, columns aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_rows(title, rows, digits=4):
    """Print a list of flat dicts as a table: a column per key, means with their spread."""
    def cell(value):
        if isinstance(value, dict):
            return show(value, digits)
        if isinstance(value, float):
            return f"{value:.{digits}g}"
        return "-" if value is None else value
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{title}")
    print_table(keys, [[cell(row.get(key)) for key in keys] for row in rows])


def mean_std(values):
    """{'mean', 'std', 'n'} of a 1-D tensor of repeats; std is None for a single one."""
    std = values.std().item() if len(values) > 1 else None
    return {"mean": values.mean().item(), "std": std, "n": len(values)}


def show(value, digits=4):
    """'0.0038 ± 0.0001' from what mean_std returns."""
    mean = f"{round(value['mean'], digits) + 0.0:.{digits}f}"  # + 0.0: no negative zero
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


def panels(rows, columns, width=3.4, height=3.2, **options):
    """(Figure, flat list of its rows x columns axes), each of width x height inches."""
    fig = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes:
        ax.set_prop_cycle(color=COLOURS)
    return fig, axes


def plot_lines(charts, columns=4, width=3.4, height=3.4, legend="right"):
    """Line charts side by side: {title: (lines, what Axes.set takes)}, lines being
    [(label, x (None: 1, 2, ...), y, what Axes.plot takes)]; "std" among it: a band of y +- std.

    legend: "right" (the first chart's, beside all), "each" (one per chart) or None. -> Figure
    """
    columns = min(columns, len(charts))
    fig, axes = panels(math.ceil(len(charts) / columns), columns, width, height)
    for ax, (title, (lines, settings)) in zip(axes, charts.items()):
        for label, x, y, style in lines:
            x, style = range(1, len(y) + 1) if x is None else x, dict(style)
            std = style.pop("std", None)
            (line,) = ax.plot(x, y, label=label, **style)
            if std is not None:
                ax.fill_between(x, y - std, y + std, color=line.get_color(), alpha=0.3, lw=0)
        ax.set(**settings)
        ax.set_title(title, fontsize="medium")
        if legend == "each":
            ax.legend(fontsize="small")
    for ax in axes[len(charts):]:
        ax.set_axis_off()
    if legend == "right":
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
        fig.set_figwidth(fig.get_figwidth() + 1.6)
    return fig


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


def plot_sheet(images, width, height, rows=(), columns=(), **options):
    """image_sheet in a Figure of its own, each image width x height inches. -> Figure"""
    fig, (ax,) = panels(1, 1, width * images.shape[1] + 1, height * len(images) + 0.5)
    image_sheet(ax, images, rows, columns, **options)
    return fig


# --- image data ----------------------------------------------------------------------------------

def images(dataset, train, folder, device="cpu"):
    """'mnist' or 'svhn' through torchvision: x (N, C, H, W) in [0, 1], labels y (N,).

    Missing files are downloaded into `folder`; where that fails, one line names them.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity
    folder = pathlib.Path(folder)
    if dataset == "mnist":
        home, files = folder / "MNIST" / "raw", datasets.MNIST.resources
    else:
        home, files = folder / "SVHN", [datasets.SVHN.split_list[k][1:] for k in ("train", "test")]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if dataset == "mnist":
                data = datasets.MNIST(folder, train=train, download=True)
                x, y = data.data[:, None], data.targets
            else:
                data = datasets.SVHN(home, split="train" if train else "test", download=True)
                x, y = torch.from_numpy(data.data), torch.from_numpy(data.labels)
        return x.to(device).float() / 255, y.to(device)
    except Exception as error:  # no network, damaged file, read-only folder: many kinds
        bad = [name for name, md5 in files if not check_integrity(home / name, md5)]
        why = " ".join(str(error).split())[:120]
        die(f"cannot load {dataset}: missing or damaged {', '.join(bad) or 'unpacked files'} in "
            f"{home} ({why}); put the files there or use --dataset glyphs")


def glyphs(n, seed, channels=1, device="cpu"):
    """Digits in matplotlib's own fonts, warped: x (n, channels, 28, 28) in [0, 1], labels y (n,).

    Rotation within 15 degrees, shear 0.25, scale 0.8 to 1.15, shift 2 pixels, three stroke widths;
    with 3 channels also random colours of ink and ground. Equal n and seed give equal images.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    folder, shapes = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf"), []
    for name in GLYPH_FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 50)
        for digit in "0123456789":
            for stroke in range(3):
                image = Image.new("L", (56, 56))
                left, top, right, bottom = font.getbbox(digit, stroke_width=stroke)
                ImageDraw.Draw(image).text((28 - (left + right) / 2, 28 - (top + bottom) / 2),
                                           digit, 255, font, stroke_width=stroke)
                shapes.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8))
    shapes = torch.stack(shapes).view(len(GLYPH_FONTS), 10, 3, 1, 56, 56)
    g = generator(seed, "glyphs")

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(size, generator=g)

    font, y, stroke = (torch.randint(k, (n,), generator=g) for k in shapes.shape[:3])
    angle, shear, scale = uniform(-0.26, 0.26, n), uniform(-0.25, 0.25, n), uniform(0.8, 1.15, n)
    turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1)
    turn = turn.view(n, 2, 2) / scale.view(n, 1, 1)  # where to look in the drawing: inverse scale
    theta = torch.cat([turn, uniform(-0.14, 0.14, n, 2, 1)], 2)  # (n, 2, 3)
    x = torch.empty(n, 1, 28, 28)
    for part in torch.arange(n).split(2000):
        fine = shapes[font[part], y[part], stroke[part]].float() / 255  # (2000, 1, 56, 56)
        grid = torch.nn.functional.affine_grid(theta[part], list(fine.shape), align_corners=False)
        fine = torch.nn.functional.grid_sample(fine, grid, align_corners=False)  # twice too large
        x[part] = torch.nn.functional.avg_pool2d(fine, 2)
    if channels == 3:
        dark, light = uniform(0, 0.45, n, 3, 1, 1), uniform(0.55, 1, n, 3, 1, 1)
        swap = torch.rand(n, 1, 1, 1, generator=g) < 0.5
        ground, ink = torch.where(swap, light, dark), torch.where(swap, dark, light)
        x = ground + (ink - ground) * x  # (n, 3, 28, 28)
    return x.clamp(0, 1).to(device), y.to(device)
