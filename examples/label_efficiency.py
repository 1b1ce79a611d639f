"""Dice on GlaS testA against the number of labelled images: trains, measures, draws.

    python examples/label_efficiency.py DATA/glas runs/labels small/res-unet
    python examples/label_efficiency.py DATA/glas runs/labels \
        few-labels few-labels=runs/few/extractor.safetensors --images 5 10 20 40 0 --seeds 0 1 2

A configuration that starts from a pretrained extractor names its file after a `=` and is called
CONFIG-pretrained. Every run is a folder OUT/METHOD-IMAGES-SEED; what is complete is not done again,
so the same command goes on where it was stopped. OUT/label_efficiency.png and .json hold the
result; `--beside` draws that of another folder, too, measured with another `--set`. A seed draws
the same images for all configurations of one `validation_share`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from wsiseg.training.curves import draw_label_efficiency


def main() -> None:
    """Do all runs of the command line and draw their Dice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of GlaS")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("configs", nargs="+", help="training configurations, NAME or NAME=FILE")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 20, 40, 0], help="0 = all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--with-head", action="store_true", help="go on with the files' heads, too")
    parser.add_argument("--set", action="append", default=[], help="passed to every training")
    parser.add_argument(
        "--beside",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="label_efficiency.json of another OUT, to be drawn as NAME",
    )
    words = parser.parse_args()
    methods: dict[str, tuple[str, str]] = {}
    for config, _, extractor in (text.partition("=") for text in words.configs):
        name = Path(config).stem + ("-pretrained" if extractor else "")
        if name in methods:
            parser.error(f"two methods are called {name}; measure them in two folders")
        methods[name] = config, extractor
    others: dict[str, dict[int, list[float]]] = {}
    for name, row in (drawn_beside(text, parser) for text in words.beside):
        if name in methods or name in others:
            parser.error(f"--beside: there is a method {name} already; give another name")
        others[name] = row
    table: dict[str, dict[int, list[float]]] = {}
    for seed in words.seeds:
        for limit in words.images:
            for name, method in methods.items():
                run = words.out / f"{name}-{limit or 'all'}-{seed}"
                count, dice = measured(words, method, limit, seed, run)
                table.setdefault(name, {}).setdefault(count, []).append(dice)
                print(f"{name}: {count} images, seed {seed}: Dice {dice:.4f}", flush=True)
    (words.out / "label_efficiency.json").write_text(json.dumps(table, indent=1) + "\n")
    draw_label_efficiency(words.out / "label_efficiency.png", table | others)


def drawn_beside(text: str, parser: argparse.ArgumentParser) -> tuple[str, dict[int, list[float]]]:
    """(name, images -> Dice of each seed) of NAME=FILE, whose file has one method."""
    name, _, file = text.partition("=")
    try:
        (row,) = json.loads(Path(file).read_text()).values()
        return name, {int(count): [float(v) for v in values] for count, values in row.items()}
    except (OSError, ValueError, AttributeError, TypeError) as e:
        parser.error(f"--beside {text}: give NAME=label_efficiency.json of one method ({e})")


def measured(
    words: argparse.Namespace, method: tuple[str, str], limit: int, seed: int, run: Path
) -> tuple[int, float]:
    """(images trained on, Dice on testA) of one run, done if it is not there yet."""
    config, extractor = method
    report, made = run / "testA" / "metrics.json", run / "train.json"
    glas = ["--dataset", "glas", "--data", words.data]
    train = ["train", *glas, "--config", config]
    train += ["--set", f"seed={seed}", *(w for s in words.set for w in ("--set", s))]
    train += ["--limit", str(limit)] if limit else []
    train += ["--extractor", extractor] if extractor else []
    train += ["--with-head"] if extractor and words.with_head else []
    begun = any((run / name).exists() for name in ("log.csv", "state.pt"))
    if begun and not (made.is_file() and json.loads(made.read_text()) == train):
        raise SystemExit(f"{run}: was made by another command ({made}); use another OUT")
    if not report.exists():
        again = ["--resume"] if begun else []
        run.mkdir(parents=True, exist_ok=True)
        made.write_text(json.dumps(train))
        wsiseg(*train, "--out", str(run), *again)
        model = str(run / "model.safetensors")
        where = ["--split", "testA", "--panels", "0", "--out", str(report.parent)]
        wsiseg("evaluate", "--model", model, *glas, *where)
    count = len(json.loads((run / "inputs.json").read_text())["images"])
    return count, json.loads(report.read_text())["pixel"]["dice"]


def wsiseg(*words: str) -> None:
    """Run a command of wsiseg and stop if it fails."""
    subprocess.run([sys.executable, "-m", "wsiseg.cli", *words], check=True)


if __name__ == "__main__":
    main()
