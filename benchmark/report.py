"""Learning curves and result tables from run folders; the only plotting code of the project.

    python benchmark/report.py runs/sft runs/grpo --png demo.png
    python benchmark/report.py runs/grpo_seed* --markdown                            the table, for README.md
    python benchmark/report.py runs/grpo_seed* --collect benchmark/results/grpo_toy  what is small enough to commit
    python benchmark/report.py runs/dpo_seed* runs/kto_seed* --compare eval/exact_match logps/chosen --png both.png
    python benchmark/report.py runs/ppo_seed* runs/rloo_seed* --compare reward completion_kl --samples 3

Runs that differ in nothing but their seed are one experiment: tabulated as mean ± standard deviation, drawn as their
mean in a band from the lowest to the highest. A single run comes with the 95 % intervals that its evaluation logged.
`first` and `last` are the first and the last evaluation; `best` was chosen on the data that measures it: it flatters.
A collected folder is a run folder again, and a run that is still going on can be looked at.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOGS = ("metrics.jsonl", "clock.jsonl", "samples.jsonl")
COLLECTED = (*LOGS[:2], "config.yaml", "environment.json")
CHANGES_NOTHING = ("seed", "output_dir", "resume", "report_to", "save_steps", "keep_checkpoints")
TRAINING = "#0072B2"  # Okabe and Ito's colours keep apart for every kind of colour vision; the markers do without any
SERIES = (("#D55E00", "o"), ("#009E73", "s"), ("#CC79A7", "^"), ("#E69F00", "D"), ("#56B4E9", "v"))
TEMPERATE = re.compile("length|terminated")  # neither more nor less of these is better: no best one, and no curve


@dataclass
class Run:
    """A run folder, read. The three logs are lists of their lines."""

    folder: Path
    config: dict
    environment: dict
    metrics: list[dict]
    clock: list[dict]
    samples: list[dict]

    def curve(self, name: str) -> dict[int, float]:
        """step -> value, wherever it was logged and finite."""
        return {line["step"]: line[name] for line in self.metrics if line.get(name) is not None}

    def seconds(self, name: str) -> float | None:
        """The last value of a stopwatch that begins anew with every resume, all its laps added up."""
        laps = [line[name] for line in self.clock if name in line]
        return sum(lap for lap, after in zip(laps, [*laps[1:], 0.0]) if after < lap) if laps else None


def read_run(folder: Path) -> Run:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {folder} is no run folder: {error}")
    run = Run(folder, config, environment, *(read_lines(folder / name) for name in LOGS))
    run.metrics = [line | completion_kl(line, run) for line in run.metrics]
    return run if run.metrics else sys.exit(f"report.py: {folder} has logged nothing yet")


def read_lines(path: Path) -> list[dict]:
    """The finished lines of a file that may be growing. Not by splitlines(), which cuts at a U+2028 as well."""
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def completion_kl(line: dict, run: Run) -> dict[str, float]:
    """KL of a completion to the reference under one name, where a rollout begins and the policy is still its sampler.

    rloo.py and ppo.py log the sum over a completion, grpo.py a mean over tokens.
    """
    kl = line.get("objective/kl", line.get("kl"))
    steps_per_rollout = run.config.get("steps_per_generation", 0) * run.config.get("num_iterations", 0)
    if kl is None or not steps_per_rollout or (line["step"] - 1) % steps_per_rollout:
        return {}  # kto.py's kl is something else
    return {"completion_kl": kl * line["completions/mean_length"] if script_of(run) == "grpo.py" else kl}


def experiments_of(runs: list[Run]) -> list[list[Run]]:
    """Runs with the same flags but for the seed, which may also stand in a path ("runs/sft_seed1/final")."""
    groups = defaultdict(list)
    for run in runs:
        flags = {name: value for name, value in run.config.items() if name not in CHANGES_NOTHING}
        groups[script_of(run), str(flags).replace(f"seed{run.config['seed']}", "seed*")].append(run)
    return list(groups.values())


def curves(experiment: list[Run], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] that all runs have logged, and their values there [runs, S]."""
    logged = [run.curve(name) for run in experiment]
    steps = sorted(set.intersection(*map(set, logged)))
    return np.array(steps), np.array([[curve[step] for step in steps] for curve in logged])


def spread(experiment: list[Run], name: str) -> np.ndarray:
    """Standard deviation over seeds, or half a 95 % interval for a single run (NaN where none was logged) [S]."""
    steps, values = curves(experiment, name)
    intervals = experiment[0].curve(f"{name}_ci95")
    return values.std(0, ddof=1) if len(values) > 1 else np.array([intervals.get(step, np.nan) for step in steps])


def evaluations(experiment: list[Run]) -> list[str]:
    """Names of what was evaluated, without a score that a pass rate with an interval repeats number for number."""
    logged = dict.fromkeys(name for line in experiment[0].metrics for name in line if name.startswith("eval/"))
    held_out = {name: [run.curve(name) for run in experiment] for name in logged if not name.endswith("_ci95")}
    held_out = {name: found for name, found in held_out.items() if all(found)}  # a reward model is called by its run
    twins = [held_out[name] for name in held_out if f"{name}_ci95" in logged]
    return [name for name in held_out if f"{name}_ci95" in logged or held_out[name] not in twins]


# -------------------------------------------------------------------------------------------------------------- tables


def script_of(run: Run) -> str:
    return next(Path(word).name for word in run.environment["command"] if word.endswith(".py"))


def title_of(experiment: list[Run]) -> tuple[str, str]:
    """Model and data by their last names: "runs/sft_seed1/final" is sft_seed1, and sft_seed* of several seeds."""
    config = experiment[0].config
    model = re.sub(r"(/final|\.gguf)?/?$", "", config["model_name_or_path"]).split("/")[-1]
    model = model.replace(f"seed{config['seed']}", "seed*") if len(experiment) > 1 else model
    return model, re.sub(r"\.(jsonl|json|parquet|csv)(\.gz)?$", "", config["dataset_name"].split("/")[-1])


def facts(experiment: list[Run]) -> dict[str, str]:
    """What a table says beside the evaluation."""
    environment, (model, data) = experiment[0].environment, title_of(experiment)
    steps, planned = min(run.metrics[-1]["step"] for run in experiment), experiment[0].config["max_steps"]
    walls = [run.seconds("seconds") or sum(line.get("time/step", 0.0) for line in run.clock) for run in experiment]
    cpus = [run.seconds("cpu_seconds") for run in experiment]
    times = [None if None in laps else str(timedelta(seconds=round(np.mean(laps)))) for laps in (walls, cpus)]
    commits = {str(run.environment["git_commit"])[:7] for run in experiment}
    changed = " + changes" * any(run.environment["git_dirty"] for run in experiment)
    return {
        "script": script_of(experiment[0]), "model": model, "data": data,
        "steps": str(steps) if planned in (steps, -1) else f"{steps} of {planned}",
        "seeds": " ".join(str(run.config["seed"]) for run in experiment),
        "wall": times[0], "CPU": times[1] or "not logged",
        "hardware": ", ".join(environment["gpus"]) or "{torch_threads} of {cpus} CPU cores".format(**environment),
        "commit": ", ".join(sorted(commits)) + changed,
    }  # fmt: skip


def result_rows(experiment: list[Run]) -> list[tuple[str, str, str, str]]:
    """(name, first, last, best) of each evaluation, "0.431 ± 0.061"."""
    rows = []
    for name in evaluations(experiment):
        steps, values = curves(experiment, name)
        cells = [
            f"{mean:.3f}" + (f" ± {width:.3f}" if np.isfinite(width) else "")
            for mean, width in zip(values.mean(0), spread(experiment, name))
        ]
        best = (np.argmin if "loss" in name else np.argmax)(values.mean(0))
        choice = "–" if TEMPERATE.search(name) else f"{cells[best]} (step {steps[best]})"
        rows.append((name.removeprefix("eval/"), cells[0] if len(cells) > 1 else "–", cells[-1], choice))
    return rows


def print_table(console: Console, experiment: list[Run]) -> None:
    about = facts(experiment)
    width = "half a 95 % interval" if len(experiment) == 1 else "standard deviation over seeds"
    console.print("{script}: {model} on {data}".format(**about), style="bold")
    console.print("{steps} steps, seed {seeds}, {wall} of training (CPU time {CPU})".format(**about))
    console.print("{hardware}, commit {commit}".format(**about))
    table, rows = Table("evaluation", "first", "last", "best", caption_justify="left"), result_rows(experiment)
    table.caption = f"±: {width}" if "±" in str(rows) else None
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table if table.rows else "no evaluation yet", "")


def evaluation_samples(run: Run) -> list[tuple[str, dict[str, dict]]]:
    """(title, prompt -> sample) of the first evaluation and of the last, one if there is one, at its temperature."""
    evaluated = [sample for sample in run.samples if "temperature" in sample["title"]]
    setting = evaluated[0]["title"].rpartition(", ")[2] if evaluated else ""
    titles = list(dict.fromkeys(sample["title"] for sample in evaluated if sample["title"].endswith(setting)))
    ends = dict.fromkeys([*titles[:1], *titles[-1:]])
    return [(title, {sample["prompt"]: sample for sample in evaluated if sample["title"] == title}) for title in ends]


def print_samples(console: Console, run: Run, count: int = 4) -> None:
    """What the model wrote for the same prompts at the first evaluation and at the last."""
    ends = evaluation_samples(run)
    if not ends:
        return
    table = Table("end of the prompt", *(title for title, _ in ends), show_lines=True)
    for prompt in list(ends[-1][1])[:count]:
        table.add_row(Text(prompt[-60:]), *(Text(written(samples.get(prompt))) for _, samples in ends))
    console.print(f"{run.folder} wrote", table, "")


def written(sample: dict | None) -> str:
    """A completion, line ends visible, and its scores."""
    if sample is None:
        return "–"
    scores = "  ".join(f"{name} {value:g}" for name, value in sample.items() if isinstance(value, int | float))
    return sample["completion"].strip(" ").replace("\n", "⏎") + f"\n{scores}" * bool(scores)


def name_of(experiment: list[Run]) -> str:
    """runs/toy_dpo_seed1: toy_dpo."""
    return re.sub(r"_?seed\d+$", "", experiment[0].folder.name)


def comparison(experiments: list[list[Run]], names: list[str]) -> str:
    """Markdown: a row for each experiment, what it logged last under each name; above, where the first one started."""
    rows = []
    for label, place, some in [("before", 0, experiments[:1]), *(("", -1, [one]) for one in experiments)]:
        for experiment in some:
            cells = []
            for name in names:
                steps, values = curves(experiment, name)
                if not len(steps) or (place == 0 and steps[0] > 0):
                    cells.append("–")
                    continue
                width = spread(experiment, name)[place]
                cells.append(f"{values.mean(0)[place]:.3f}" + (f" ± {width:.3f}" if np.isfinite(width) else ""))
            rows.append([label or name_of(experiment), *cells])
    lines = [["", *(name.removeprefix("eval/") for name in names)], ["---"] * (len(names) + 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def sample_comparison(experiments: list[list[Run]], count: int) -> str:
    """Markdown: what the first seed of each experiment wrote in the end for the same held-out prompts."""
    ends = {name_of(runs): evaluation_samples(runs[0]) for runs in experiments}
    if not all(ends.values()):
        sys.exit("report.py: --samples needs samples.jsonl with an evaluation, which a collected folder does not keep")
    (_, before), *_ = next(iter(ends.values()))
    columns = [("before", before), *((name, samples) for name, (*_, (_, samples)) in ends.items())]
    lines = [["prompt", *(name for name, _ in columns)], ["---"] * (len(columns) + 1)]
    for prompt in list(columns[0][1])[:count]:
        cells = [prompt.removeprefix("<s>"), *(written(samples.get(prompt)) for _, samples in columns)]
        lines.append([cell.strip().replace("|", "\\|").replace("\n", "<br>") for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(experiments: list[list[Run]]) -> str:
    lines = []
    for experiment in experiments:
        rows = [row for row in result_rows(experiment) if not TEMPERATE.search(row[0])]
        results = [f"{name} {first} → **{last}**" for name, first, last, _ in rows]
        about = facts(experiment) | {"first → last": "<br>".join(results).replace(" – →", "")}
        lines.append("| " + " | ".join(about.values()) + " |")
    return "\n".join(["| " + " | ".join(about) + " |", "|" + "---|" * len(about), *lines])


# -------------------------------------------------------------------------------------------------------------- curves


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving mean, a twentieth of the run to each side: it does not lag behind as an exponential one would."""
    reach = len(values) // 20
    return np.array([values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))])


def draw_training(axes, experiment: list[Run], name: str) -> None:
    steps, values = curves(experiment, name)
    smooth = np.array([smoothed(value) for value in values])
    if len(values) > 1:
        axes.fill_between(steps, smooth.min(0), smooth.max(0), color=TRAINING, alpha=0.2, linewidth=0)
    else:
        axes.plot(steps, values[0], color=TRAINING, alpha=0.35, linewidth=0.7)
    axes.plot(steps, smooth.mean(0), color=TRAINING, linewidth=1.8, label=f"training {name}")


def draw_evaluation(axes, experiment: list[Run], names: list[str]) -> None:
    for name, (colour, marker) in zip(names, SERIES):
        steps, values = curves(experiment, name)
        bars = spread(experiment, name)
        if len(values) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        label = "held-out " + name.removeprefix("eval/").replace("_greedy", ", greedy").replace("_", " ")
        style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1, "linestyle": (0, (4, 2))}
        shown = bars if len(values) == 1 and np.isfinite(bars).all() else None
        axes.errorbar(steps, values.mean(0), shown, elinewidth=1, capsize=2.5, label=label, **style)


def draw(experiments: list[list[Run]], path: Path) -> None:
    """One panel for an online experiment, its reward; two for a supervised one, its loss and its scores."""
    panels = []
    for experiment in experiments:
        names = [name for name in evaluations(experiment) if not TEMPERATE.search(name)]
        losses, scores = ([name for name in names if ("loss" in name) == is_loss] for is_loss in (True, False))
        if experiment[0].curve("reward"):
            panels.append((experiment, "reward", scores, "mean reward or pass rate"))
        else:
            panels.append((experiment, "loss", losses, "loss (nats per token)"))
            panels.extend([(experiment, None, scores, "share of held-out tokens or answers")] * bool(scores))
    rows, columns = -(-len(panels) // 3), min(3, len(panels))
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    size = (max(6.4, 4.9 * columns), 3.9 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (experiment, training, names, unit) in zip(grid.flat, panels):
        if training:
            draw_training(axes, experiment, training)
        draw_evaluation(axes, experiment, names)
        seeds = f"\nmean of {len(experiment)} seeds, lowest to highest" if len(experiment) > 1 else ""
        about = " on ".join(title_of(experiment))
        axes.set_title(f"{script_of(experiment[0])}: {about}{seeds}", loc="left", fontsize=9.5)
        axes.set(xlabel="optimiser step", ylabel=unit)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        if axes.dataLim.ymin >= 0:
            axes.set_ylim(bottom=0)  # half of a curve looks like twice the effect
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8.5)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_comparison(experiments: list[list[Run]], names: list[str], path: Path) -> None:
    """A panel for each name, a colour for each experiment; what was logged at every step is smoothed."""
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    rows, columns = -(-len(names) // 3), min(3, len(names))
    figure, grid = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    palette = [TRAINING, *(colour for colour, _ in SERIES), "#000000", "#999999"]
    for axes, name in zip(grid.flat, names):
        for number, experiment in enumerate(experiments):
            steps, values = curves(experiment, name)
            if len(steps):
                lines = values if name.startswith("eval/") else np.array([smoothed(value) for value in values])
                colour = palette[number % len(palette)]
                axes.fill_between(steps, lines.min(0), lines.max(0), color=colour, alpha=0.12, linewidth=0)
                axes.plot(steps, lines.mean(0), color=colour, linewidth=1.5, label=name_of(experiment))
        axes.set(title=name, xlabel="optimiser step")
        axes.grid(color="0.9", linewidth=0.6)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def collect(runs: list[Run], curve: Path, target: Path) -> None:
    """Copies what is small to target/<name of the run>/ and the curves beside; refuses what should not be published."""
    root = str(Path(__file__).resolve().parents[1]).encode()
    files = {target / run.folder.name / name: (run.folder / name).read_bytes() for run in runs for name in COLLECTED}
    if len(files) < len(runs) * len(COLLECTED):
        sys.exit(f"report.py: two of the runs have the same folder name, and only one of them fits into {target}")
    for path, content in (files | {target / "curve.png": curve.read_bytes()}).items():
        if len(content) > 1_000_000:
            sys.exit(f"report.py: {path} would have {len(content):,} bytes, and over 1 MB is not collected")
        if root in content:
            sys.exit(f"report.py: {path} would name a folder of this machine; run the script with relative paths")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if curve != target / "curve.png":
        (target / "curve.png").write_bytes(curve.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that a script wrote")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the learning curves")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown and nothing else")
    parser.add_argument("--compare", nargs="+", metavar="METRIC", help="a Markdown table of these, experiments side by "
                        "side, and with --png a panel for each")
    parser.add_argument("--samples", type=int, metavar="N", help="with --compare, what N prompts led to")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="copy the small result files and the curves to DIR")
    flags = parser.parse_args()
    runs = [read_run(folder) for folder in flags.runs]
    experiments = experiments_of(runs)
    if flags.compare:
        print(comparison(experiments, flags.compare))
        if flags.samples:
            print("", sample_comparison(experiments, flags.samples), sep="\n")
    elif flags.markdown:
        print(markdown(experiments))
    else:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
        for experiment in experiments:
            print_table(console, experiment)
            print_samples(console, experiment[0])
    curve = flags.png or (flags.collect and flags.collect / "curve.png")
    if curve and flags.compare:
        draw_comparison(experiments, flags.compare, curve)
    elif curve:
        draw(experiments, curve)
    if flags.collect:
        collect(runs, curve, flags.collect)


if __name__ == "__main__":
    main()
