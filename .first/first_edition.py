"""What eae_simmering.py, still of the first edition, needs beside common.py; it goes with it."""
import functools
import io
import json
import math
import pathlib
import platform
import time

import common
import torch
from common import *  # noqa: F403
from common import die, note, panels, say, write


class Parser(common.Parser):
    """common.Parser with --compile."""

    def __init__(self, doc, presets):
        super().__init__(doc, presets)
        self.add("--compile", action=common.argparse.BooleanOptionalAction, default=False,
                 help="use torch.compile where it applies")


def compiled(function, wanted, **options):
    """torch.compile(function) where it is wanted and works, else function."""
    return torch.compile(function, **options) if wanted and can_compile() else function


@functools.cache  # one note is enough
def can_compile():
    """Compile something small: compilers that are missing or fail, temporary folders with a space
    in their names or without the right to execute all end in one note."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8))
        return True
    except Exception as error:  # a dozen kinds
        why = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        note(f"note: --compile does not work here ({type(error).__name__}: {why.strip()[:100]}): "
             "running without it")
        return False


class Checkpoint:
    """What is inside an unfinished work unit, saved at most every `every` seconds."""
    every = 15

    def __init__(self, path, device):
        self.path, self.start, self.saved = path, time.time(), time.time()
        self.state, self.earlier = None, 0.0
        if path.exists():  # a killed run left it
            data = io.BytesIO(path.read_bytes())
            self.state, self.earlier = torch.load(data, map_location=device, weights_only=True)

    def seconds(self):
        return self.earlier + time.time() - self.start

    def due(self):
        return time.time() - self.saved >= self.every

    def save(self, progress, *parts):
        """progress: tensors and numbers; parts: modules, optimisers and random generators."""
        states = [common.get_state(part) for part in parts]
        common.save(self.path, ((progress, states), self.seconds()))
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


class Run(common.Run):
    """common.Run with units that get a checkpoint, and the first edition's closing table."""

    def __init__(self, script, args, label, additive=()):
        super().__init__(script, args, label, additive)
        self.device, self.figures = args.device, set()

    def add_earlier_flags(self):
        """These scripts have read their flags by now: tables are those of the last command."""

    @property
    def seconds(self):
        return {name: told["seconds"] for name, told in self.told.items()}

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if isinstance(error, FloatingPointError):
            die(str(error), status=1)
        if isinstance(error, KeyboardInterrupt):
            die("interrupted; the same command continues", status=130)

    def unit(self, name, compute):
        """The result `name` from the folder, else that of compute(checkpoint), saved there."""
        path = self.folder / "units" / f"{name}.checkpoint"
        checkpoint = Checkpoint(path, self.device)
        if checkpoint.state is not None:
            say(f"continuing {name} where it stopped")

        def timed():
            common.Work.current.start -= checkpoint.earlier
            return compute(checkpoint)

        result = super().unit(name, timed)
        path.unlink(missing_ok=True)
        return result

    def figure(self, fig, name, title):
        super().figure(fig, name, title)
        self.figures.add(f"fig_{name}.png")

    def finish(self, results, claims, metrics):
        """Write results.json, table.md and metrics.csv, print the closing table.

        results: what JSON can hold; claims: (claim, document, here, holds); metrics: flat dicts.
        """
        for path in self.folder.glob("fig_*.png"):
            if path.name not in self.figures:
                path.unlink()  # of an earlier command in this folder
        seconds = self.seconds
        device = common.device_name(self.device)
        report = {
            "script": self.script, "label": self.label, "config": self.config, "results": results,
            "device": device, "units": self.told,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "claims": [dict(zip(("claim", "document", "here", "holds"), row)) for row in claims],
            "seconds": {"units": seconds, "all units": sum(seconds.values()),
                        "this command": time.time() - self.start}}
        report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN
        rows = [dict(zip(("claim", "document", "here", "holds?"),
                         (*row, "yes" if holds else "no"))) for *row, holds in claims]
        write(self.folder / "results.json", json.dumps(report, indent=1, allow_nan=False))
        write(self.folder / "metrics.csv", common.as_csv(metrics))
        write(self.folder / "table.md", f"# {self.script}.py\n\n*{self.label}; {device}; "
              f"{sum(seconds.values()):.0f} s of computing*\n\n{common.as_markdown(rows)}")
        say(f"\n{self.label}")
        print_table(["", "document", "here", "holds?"], [list(row.values()) for row in rows])
        say(f"\n{sum(seconds.values()):.0f} s of computing on {device}\n{self.folder}")
        return report


def print_table(head, rows):
    """Print rows under their heads, columns aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, ["-" * width for width in widths], *rows]:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_rows(title, rows, digits=4):
    """Print a list of flat dicts as a table: a column per key, means with their spread."""
    def cell(value):
        if isinstance(value, dict):
            return show(value, digits)
        if isinstance(value, float):
            return f"{value:.{digits}g}"
        return "-" if value is None else value
    keys = list(dict.fromkeys(key for row in rows for key in row))
    say(f"\n{title}")
    print_table(keys, [[cell(row.get(key)) for key in keys] for row in rows])


def mean_std(values):
    """{'mean', 'std', 'n'} of a 1-D tensor of repeats; std is None for a single one."""
    std = values.std().item() if len(values) > 1 else None
    return {"mean": values.mean().item(), "std": std, "n": len(values)}


def show(value, digits=4):
    """'0.0038 ± 0.0001' from what mean_std returns."""
    mean = f"{round(value['mean'], digits) + 0.0:.{digits}f}"  # + 0.0: no negative zero
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"


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


def plot_sheet(images, width, height, rows=(), columns=(), **options):
    """image_sheet in a Figure of its own, each image width x height inches. -> Figure"""
    fig, (ax,) = panels(1, 1, width * images.shape[1] + 1, height * len(images) + 0.5)
    common.image_sheet(ax, images, rows, columns, **options)
    return fig


GLYPH_FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold
    DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic
    STIXGeneralBolIta cmr10 cmb10 cmss10 cmtt10""".split()


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
    g = common.generator(seed, "glyphs")

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
