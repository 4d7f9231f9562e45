"""The README's figures, kept in tests/results.json: `python tests/report.py NAME=FOLDER ...`.

Takes what the README needs out of run folders (by hand, after a run), and writes the tables that
stand below a line `<!-- results: NAME -->` or `<!-- results: bench -->` anew. A number in the text
must stand in a closing table, in the script, or be one of FACTS; test_readme.py checks all that.
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "tests" / "results.json"
HEAD = ["claim", "document", "here", "holds?"]
# a line that names its source, then optional text, then a table
MARKED = re.compile(r"<!-- results: (\S+?)( all)? -->\n([^|<]*\n)?((?:\|.*\n)+)")
NUMBER = re.compile(r"(?<![\w.,/^-])[-−]?\d+\.\d+(?:e[-+]?\d+)?(?![\w.]*[\w])|\d+(?= ?%)")


def best_trial(key):
    return lambda results: min(results["trials"], key=lambda trial: trial["knn_kl"])[key]


def cube(name, d, measure):
    return lambda results: next(
        point["measures"][measure]["mean"]
        for point in results["points"]
        if (point["name"], point["snr"], point["d"]) == (name, 15, d)
    )


def cell(encoder, key, prior="flow6"):
    """Of frozen_encoder_vae.py under convolutional layers."""

    def find(results):
        at = {(c["layers"], c["prior"], c["encoder"]): c for c in results["cells"]}
        return at["conv", prior, encoder][key]["mean"]

    return find


def real(row):
    """Of frozen_encoder_vae.py: distance of training images (1) or naive samples (2)."""
    return lambda results: results["real"][row]["distance"]


def sample(name):
    """Of eae_simmering.py's generations."""
    return lambda results: next(
        row["frechet"] for row in results["mnist"]["samples"] if row["row"] == name
    )


FACTS = {  # by run: numbers of the text that no closing table has, and where results.json does
    "ae_cube": {
        "0.0077": best_trial("beta"),
        "4.8": best_trial("lam"),
        "0.0035": cube("f2", 6, "mse"),
        "15.1": cube("f2", 6, "bits"),
    },
    "frozen_encoder_vae-paper": {
        token: cell(encoder, key)
        for key, tokens in {
            "negative ELBO": ("-25.13", "-15.64", "-15.05"),
            "RT": ("42.92", "38.96", "38.54"),
            "RE": ("17.79", "23.32", "23.49"),
            "log p": ("-613.5", "-618.2", "-621.4"),
        }.items()
        for encoder, token in zip(("PNL", "NL", "RKS"), tokens)
    },
    "frozen_encoder_vae-corrected": {
        "-617.0": cell("L", "log p"),
        "-619.9": cell("NL", "log p"),
        "-618.8": cell("RKS", "log p"),
        "-655.6": cell("NL", "log p", "normal"),
        "0.3": real(1),
        "250.1": real(2),
    },
    "frozen_encoder_vae-repeats": {
        "22.0": cell("PRKS", "RE"),
        "23.5": cell("PNL", "RE"),
        "20.2": cell("L", "RE"),
        "473.4": cell("PRKS", "distance"),
        "215.0": cell("PNL", "distance"),
        "1.23": cell("PRKS", "seconds"),
        "0.86": cell("PNL", "seconds"),
    },
    "eae_simmering": {
        token: sample(name)
        for token, name in (("54.3", "EAE, mixture"), ("70.6", "VAE, prior"))
    },
}


def stored():
    empty = {"runs": {}, "facts": {}}
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else empty


def write(data):
    RESULTS.write_text(json.dumps(data, indent=0, ensure_ascii=False) + "\n")


def update(key, value):
    """Keep the table (rows of strings, head first) of another tool, and show it."""
    data = stored() | {key: value}
    write(data)
    README.write_text(rendered(README.read_text(), data))


def slim(folder):
    """What the README needs of a run: where it was made, and its closing table."""
    report = json.loads((pathlib.Path(folder) / "results.json").read_text())
    return {
        "script": report["script"],
        "label": report["label"],
        "device": report["device"],
        "torch": report["versions"]["torch"],
        "n": report["config"].get("seeds") or report["config"].get("repeats", 1),
        "seconds": round(report["seconds"]["all units"]),
        "claims": [list(claim.values()) for claim in report["claims"]],
    }


def source(run):
    """The line below a marker: where the table's figures come from."""
    seconds = run["seconds"]
    time = f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    spread = f"; mean ± std of n = {run['n']}" if run["n"] > 1 else ""
    device = f"{run['device']}, torch {run['torch']}"
    return f"*{run['label']}{spread}; {device}, {time} of computing.*\n"


def row(cells):
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"


def table(head, rows):
    return row(head) + "|" + "---|" * len(head) + "\n" + "".join(map(row, rows))


def claim_rows(run):
    """{claim: its cells}"""
    return {c[0]: [*c[:3], "yes" if c[3] else "**no**"] for c in run["claims"]}


def cells(line):
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rendered(text, data):
    """The README with every marked table written anew: those rows that it has, or `all`."""

    def one(match):
        name, every, between, old = match.groups()
        mark = f"<!-- results: {name}{every or ''} -->\n"
        if name not in data["runs"]:
            head, *rows = data[name]
            return mark + between + table(head, rows)
        run = data["runs"][name]
        rows = claim_rows(run)
        wanted = [cells(line)[0] for line in old.splitlines()[2:]]
        missing = [claim for claim in wanted if claim not in rows]
        if missing and not every:
            sys.exit(f"error: {name} has no claim {missing}")
        chosen = rows.values() if every else [rows[claim] for claim in wanted]
        return mark + source(run) + "\n" + table(HEAD, chosen)

    return MARKED.sub(one, text)


def sections(text):
    """{script: its part of the README}"""
    parts = re.split(r"^## `(\w+)\.py`$", text, flags=re.M)
    return {name: re.split(r"^## ", part, flags=re.M)[0] for name, part in
            zip(parts[1::2], parts[2::2])}


def numbers(section, data):
    """The numbers (decimals and percentages) outside code and the tables of claims."""
    text = MARKED.sub(lambda m: "" if m[1] in data["runs"] else m[0], section)
    text = re.sub(r"```[\s\S]*?```|`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", text)
    return {token.replace("−", "-") for token in NUMBER.findall(text)}


def said_by(value, token):
    """Is the number `token` this value, sign and all, rounded as it stands there?"""
    return f"{value:.{len(token.partition('.')[2])}f}" == token


def literal(section, script, data):
    """Numbers that the script's closing tables or the script itself (constants) say."""
    runs = [run for run in data["runs"].values() if run["script"] == script]
    said = " ".join(str(cell) for run in runs for claim in run["claims"] for cell in claim)
    said += (ROOT / f"{script}.py").read_text()
    return set(re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", said))


def unfounded(section, script, data):
    """Numbers of the text that nothing says."""
    facts, said = data["facts"].get(script, {}), literal(section, script, data)
    return {token for token in numbers(section, data) if token.lstrip("-") not in said
            and not (token in facts and said_by(facts[token], token))}


def main(argv):
    """Take run folders in, and the facts that the text states from them."""
    data = stored()
    for name, folder in (argument.split("=") for argument in argv):
        data["runs"][name] = run = slim(folder)
        results = json.loads((pathlib.Path(folder) / "results.json").read_text())["results"]
        facts = data["facts"].setdefault(run["script"], {})
        facts |= {token: find(results) for token, find in FACTS.get(name, {}).items()}
    text = rendered(README.read_text(), data)
    write(data)
    README.write_text(text)
    for script, section in sections(text).items():
        print(f"{script}: {sorted(unfounded(section, script, data)) or 'every number is founded'}")


if __name__ == "__main__":
    main(sys.argv[1:])
