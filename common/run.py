"""The folder of one run: what was asked, what came out, and how to go on after a kill.

    config.yaml        every flag; `python grpo.py --config runs/grpo/config.yaml --output_dir runs/again` repeats it
    script.py          the script as it was when the run started
    environment.json   command line, commit, package versions, hardware, seed; never an environment variable
    metrics.jsonl      one flat line per logged step; only values that a repeated run gives again, byte for byte
    clock.jsonl        seconds, tokens per second, memory: what no rerun repeats
    samples.jsonl      what the model wrote
    checkpoints/       step-00000100/{state.pt, manifest.json}, each whole or not there; sharded: slices-0.pt, ... too
    final/             the trained model, with a model card
    best/              with --metric_for_best_model: the model that evaluated best, and best.json: when, and how well

A checkpoint is written under another name, synced to disk and renamed, so a process killed at any instruction leaves
only whole ones. Its manifest holds the checksum of the state and the length of the .jsonl files, which are cut back to
that length on resume: a killed and resumed run ends with the same bytes as one that was left alone.

On several ranks every rank builds a `Run`; only the main one writes and prints, all read the same folder. Of what is
cut over the ranks (`Sliced`) each writes its own slices into the checkpoint; any number of ranks can go on from them.
"""

import argparse
import dataclasses
import datetime
import difflib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import typeguard
import tyro
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.hub import check_login, in_one_line, model_card, push

ALL_ITEMS = typeguard.CollectionCheckStrategy.ALL_ITEMS
LOGS = ("metrics.jsonl", "clock.jsonl", "samples.jsonl")
PATIENCE = 30  # seconds that a call which is told to end may take to do so
DISK_FULL = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


class UserError(Exception):
    """A mistake that the user can mend: one sentence that names the file, the row and the remedy."""


def launch(main: Callable[[Any], None], Args: type, argv: list[str] | None = None) -> None:
    """`main(args)` with the flags of the command line, as a well-behaved program.

    `--config FILE` reads defaults from the config.yaml of a run; flags override it. Exit status: 0, 1 (a mistake of the
    user, a full disk, a rank that died: told in one sentence), 130 (Ctrl-C). Anything else is a bug here and keeps its
    traceback. Whatever it is, a run that had begun is saved as `Run.save_alone` can.
    """
    try:
        main(parse_flags(Args, sys.argv[1:] if argv is None else argv, sys.modules[main.__module__].__doc__))
    except UserError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        console.print(f"error: {error}{Run.save_alone()}", style="red")
        sys.exit(1)
    except Exception as error:
        Run.save_alone()
        if (reason := outside_reason(error)) is None:
            raise
        print(f"error: {reason}; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def outside_reason(error: Exception) -> str | None:
    """What befell this process, when that is what the error tells of; None for a bug.

    Known by its words: torch and safetensors wrap what the system said in errors of their own.
    """
    told = f"{error} {error.__context__}"
    if any(words in told for words in DISK_FULL):
        reason = error if isinstance(error, OSError) else error.__context__ or error
        return f"the disk is full ({reason}), make room: what was saved before is whole"
    if dist.is_initialized() and " by peer" in told:
        return "another rank of this run has died; torchrun tells which and how"
    if dist.is_initialized() and "Timed out waiting" in told:
        return "another rank of this run has not answered for --ddp_timeout seconds: it hangs, or is stopped"
    return None


class _Overdue(BaseException):
    """Not an Exception: a judge that answers slowly is often asked again by an `except Exception`."""


@contextmanager
def time_limit(seconds: float, sentence: str) -> Iterator[None]:
    """UserError(sentence) when what is inside takes longer, whether it computes or waits; 0: it may take for ever.

    SIGUSR2, and not the alarm that graders (math_verify) set for themselves; once a second, for one may be swallowed.
    A call that does not return to Python hears no signal: then this process ends with the same sentence.
    """
    done = threading.Event()

    def overdue(*_) -> None:
        if not done.is_set():
            raise _Overdue

    def watch() -> None:
        if done.wait(seconds):
            return
        for _ in range(PATIENCE):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
            if done.wait(1):
                return
        print(f"error: {sentence}", end="", file=sys.stderr, flush=True)
        threading.Timer(600, os._exit, [1]).start()  # a GPU that hangs lets nobody copy its memory
        print(Run.save_alone(), file=sys.stderr, flush=True)
        os._exit(1)

    if seconds <= 0:
        yield
        return
    previous = signal.signal(signal.SIGUSR2, overdue)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except _Overdue:
        raise UserError(sentence) from None
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGUSR2, previous)


def parse_flags(Args: type, argv: list[str], script_doc: str | None) -> Any:
    """An `Args`. Wrong flags are told by tyro in a box and leave with status 1, like every other mistake."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    description = (script_doc or "").strip().split("\n\n")[0]
    description += "\n\n--config FILE takes the defaults from the config.yaml of a run; flags override it."
    try:
        known, flags = parser.parse_known_args(argv)
        default = Args() if known.config is None else read_config(Path(known.config), Args)
        return tyro.cli(Args, args=flags, default=default, description=description, use_underscores=True)
    except SystemExit as stop:
        sys.exit(1 if stop.code else 0)


def read_config(path: Path, Args: type) -> Any:
    """`Args` with the values of a yaml file; UserError for a file, a key or a value that does not fit."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        hints = typing.get_type_hints(Args)
        for name, value in values.items():
            if name not in hints:
                near = difflib.get_close_matches(str(name), hints, n=1)
                hint = f"; did you mean `{near[0]}`?" if near else ""
                raise UserError(f"--config {path}: unknown key `{name}`{hint}")
            if isinstance(value, str) and hints[name] in (float, float | None):
                values[name] = float(value)  # yaml takes 1e-5, without a point, for text
            elif isinstance(value, list) and typing.get_origin(hints[name]) is tuple:
                values[name] = tuple(value)
            typeguard.check_type(values[name], hints[name], collection_check_strategy=ALL_ITEMS)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not a readable list of `name: value`: {reason}") from None
    except (ValueError, typeguard.TypeCheckError):
        wanted = getattr(hints[name], "__name__", str(hints[name]).replace("typing.", ""))
        raise UserError(f"--config {path}: `{name}: {value}` does not fit, {name} takes {wanted}") from None
    return Args(**values)


def require_at_least(minimum: float, args: Any, *names: str) -> None:
    """UserError that names the first of these flags below `minimum`."""
    for name in names:
        if getattr(args, name) < minimum:
            raise UserError(f"--{name} must be at least {minimum}, not {getattr(args, name)}")


class Run:
    """A run folder with its logs, its checkpoints and its console.

    Of `args`, a dataclass, it reads output_dir, resume, seed, save_steps, keep_checkpoints, report_to, inspect, what is
    said of the best model (and whether anything is evaluated), and what is said of the hub.
    """

    current: "Run | None" = None  # the one that this process is in the middle of

    def __init__(self, args: Any, script: str, is_main: bool = True):
        """Opens `args.output_dir` for a new run, or for the rest of an interrupted one with `args.resume`.

        A look with `args.inspect` prints and leaves no trace. Raises UserError when the folder holds a run already, or,
        on resume, one that other flags began.
        """
        self.args, self.is_main, self.writes = args, is_main, is_main and not args.inspect
        self.folder = Path(args.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        # Without a terminal rich would wrap at 80 columns; log files read better with one line per line.
        self.console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
        self.opened = time.perf_counter()
        self.pace: tuple[int, float] | None = None  # step and time of the first progress line
        self.wandb = self.tensorboard = None
        # What save_checkpoint takes of the last whole step; None where there is none, or an update has changed it since
        self.latest: tuple[int, dict, dict] | None = None
        self.stopping = False  # SIGTERM has come
        if args.metric_for_best_model and not args.eval_steps:
            raise UserError("--metric_for_best_model compares evaluations: give --eval_steps, how often to evaluate")
        if args.metric_for_best_model and not (args.eval_dataset_name or args.dataset_name.startswith("toy:")):
            raise UserError("--metric_for_best_model compares evaluations: give --eval_dataset_name, held-out data")
        Run.current = self
        if not self.writes:
            return

        config = plain_config(args)
        # A first try that failed before its first step has left nothing worth keeping: the mended command may follow.
        logged = self.folder / "metrics.jsonl"
        holds_a_run = any(self.checkpoints.glob("step-*")) or (logged.exists() and logged.stat().st_size > 0)
        if holds_a_run and not args.resume:
            remedy = "continue it with --resume, choose another --output_dir, or delete it"
            raise UserError(f"{self.folder} already holds a run: {remedy}")
        if holds_a_run:
            refuse_other_config(self.folder / "config.yaml", config)
        self.hub_name = args.hub_model_id or self.folder.resolve().name
        if args.push_to_hub:
            try:
                check_login(self.hub_name)
            except Exception as error:  # no token, a wrong one, no network, a name that is none
                remedy = "log in by `hf auth login` or HF_TOKEN, mend --hub_model_id, or leave --push_to_hub out"
                raise UserError(f"cannot push to {self.hub_name} ({in_one_line(error)}): {remedy}") from error
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.folder} cannot be created: {error.strerror}") from None
        self.lock = lock_folder(self.folder)
        for leftover in [*self.checkpoints.glob(".tmp-*"), *self.folder.glob(".tmp-best*")]:  # of a killed process
            shutil.rmtree(leftover)

        source = Path(script).read_text(encoding="utf-8")
        environment = {"script": Path(script).name} | describe_environment(Path(script).parent, args.seed)
        if holds_a_run:
            before = json.loads((self.folder / "environment.json").read_text(encoding="utf-8"))
            environment |= {"run_id": before["run_id"], "before_resume": before}
            if (self.folder / "script.py").read_text(encoding="utf-8") != source:
                self.print(f"{script} has changed since this run began: it may not end as it would have")
        write_whole(self.folder / "script.py", source)
        write_whole(self.folder / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_whole(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        self.open_trackers(config, environment["run_id"])

    def open_trackers(self, config: dict, run_id: str) -> None:
        """wandb and tensorboard, each imported only when asked for."""
        try:
            if "wandb" in self.args.report_to:
                import wandb

                names = {"project": "postscripts", "name": self.folder.name, "id": run_id}
                self.wandb = wandb.init(**names, resume="allow", dir=self.folder, config=config)
            if "tensorboard" in self.args.report_to:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"))
        except ImportError as error:
            raise UserError(f"--report_to needs a package that is not installed: pip install {error.name}") from None

    def log(self, step: int, metrics: dict[str, float], clock: dict[str, float] | None = None) -> None:
        """One line in metrics.jsonl and, for what no rerun repeats, one in clock.jsonl; both go to the trackers.

        To `clock` are added the seconds since this process opened the run and its CPU seconds.

        Values may be numbers or tensors of one element. NaN and infinities become null; integers stay integers.
        """
        if not self.writes:
            return
        if clock is not None:
            clock = {**clock, "seconds": time.perf_counter() - self.opened, "cpu_seconds": time.process_time()}
        metrics, clock = plain_numbers(metrics), plain_numbers(clock or {})
        self.append("metrics.jsonl", {"step": step, **metrics})
        if clock:
            self.append("clock.jsonl", {"step": step, **clock})
        if self.wandb is not None:
            self.wandb.log(metrics | clock, step=step)
        if self.tensorboard is not None:
            for name, value in (metrics | clock).items():
                self.tensorboard.add_scalar(name, math.nan if value is None else value, step)

    def append(self, name: str, record: dict) -> None:
        """One JSON line at the end of a file of the run, handed to the system at once."""
        if not self.writes:
            return
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def print(self, *renderables: Any) -> None:
        """Text or rich objects, on the main process only. Plain text is printed as it is, brackets included."""
        if self.is_main:
            self.console.print(*renderables, soft_wrap=all(isinstance(item, str) for item in renderables))

    def progress(self, step: int, total: int, metrics_to_show: dict[str, float]) -> None:
        """One line: step 120/300, the time left at this process's own pace (from its second line on), some numbers."""
        now = time.monotonic()
        self.pace = self.pace or (step, now)
        first, since = self.pace
        left = ""
        if step > first:
            left = f"{datetime.timedelta(seconds=round((now - since) / (step - first) * (total - step)))} left"
        numbers = "  ".join(f"{name} {show(value)}" for name, value in plain_numbers(metrics_to_show).items())
        self.print(f"step {step:>{len(str(total))}}/{total}  {left:<12}  {numbers}")

    def gate(self, name: str, value: float, expected: str, ok: bool) -> None:
        """A number that must hold before (or right after) the first update; UserError when it does not."""
        self.print(f"gate  {name:<44}  {show(value):>10}  (expected {expected})  {'ok' if ok else 'FAILED'}")
        if not ok:
            raise UserError(f"gate `{name}` failed: {show(value)}, expected {expected}; the run stops here")

    def samples(self, title: str, columns: list[str], rows: list[list]) -> None:
        """A table of what the model wrote, long texts cropped; whole in samples.jsonl."""
        if not self.is_main:
            return
        table = Table(title=Text(title), title_justify="left", show_lines=True)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        for row in rows:
            table.add_row(*(Text(crop(show(cell))) for cell in row))
            self.append("samples.jsonl", {"title": title} | plain_numbers(dict(zip(columns, row, strict=True))))
        self.console.print(table)

    @property
    def final_folder(self) -> Path:
        """Where the trained model goes."""
        return self.folder / "final"

    def keep_best(self, step: int, metrics: dict[str, float], save: Callable[[Path], None]) -> None:
        """To be called when an evaluation has been logged: if it is the best so far, `save(folder)` makes best/ anew.

        Equal is not better, and what is no number never is. What came before is read in metrics.jsonl, which is cut
        back on resume: there is no state to lose. The old best/ goes when the new one is whole. Every rank calls it.
        Raises UserError when the evaluation has no `args.metric_for_best_model`.
        """
        name, higher = self.args.metric_for_best_model, self.args.greater_is_better
        if not name:
            return
        if name not in metrics:
            there_are = ", ".join(metrics) or "none"
            raise UserError(f"--metric_for_best_model {name} is in no evaluation; their numbers are: {there_are}")
        value = plain_numbers({name: metrics[name]})[name]
        sign, is_best = 1 if (not name.endswith("loss") if higher is None else higher) else -1, False
        if self.writes and value is not None:
            with (self.folder / "metrics.jsonl").open(encoding="utf-8") as file:
                lines = [json.loads(line) for line in file if json.dumps(name, ensure_ascii=False) in line]
            before = [line[name] for line in lines if line["step"] < step and line[name] is not None]
            is_best = all(sign * value > sign * other for other in before)
        if not on_any_rank(is_best):
            return
        best, aside, old = (self.folder / name for name in ("best", ".tmp-best", ".tmp-best-old"))
        save(aside)
        if self.writes:
            write_whole(aside / "best.json", json.dumps({"step": step, "metric": name, "value": value}) + "\n")
            for path in aside.iterdir():  # a checkpoint from here on relies on it
                with path.open("a") as file:
                    os.fsync(file.fileno())
            if best.exists():
                best.rename(old)
            aside.rename(best)
            sync_folder(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        self.print(f"the best {name} so far, {show(value)}: saved {best}")

    def end_step(self, step: int, state: dict) -> None:
        """To be called after every step but the last: saves `state` every `args.save_steps`, and when told to stop.

        The state is kept until the next update, at no cost, for its tensors are not copied: what fails before that is
        saved from. After a SIGTERM on any rank all processes end with status 0, to be started again with --resume.
        """
        self.latest = step, state, self.log_bytes()
        stopping = on_any_rank(self.stopping)
        if stopping or (self.args.save_steps and step % self.args.save_steps == 0):
            self.save_checkpoint(*self.latest)
        if stopping:
            self.print(f"SIGTERM: saved after step {step}; the same command with --resume goes on from there")
            self.close()
            sys.exit(0)

    def require_finite(
        self, norm: torch.Tensor, loss: torch.Tensor | float, step: int, places: Iterable[str]
    ) -> None:
        """UserError, with the state before this step saved, when its loss or its gradient is NaN or infinite.

        To be called right before the update.

        Args:
            norm: of the gradient, the same on all ranks, and no number where the loss is none (`clip_gradients`).
            places: where each row of the step stands: "train.jsonl, line 17".
        """
        if norm.isfinite():
            self.latest = None
            return
        if self.latest is not None:  # else there is a checkpoint, or nothing was learned yet
            self.save_checkpoint(*self.latest)
            self.latest = None
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves takes the others with it, and the main one may still be writing
        numbers: dict[str, list[str]] = {}
        for place in dict.fromkeys(places):
            file, _, number = place.rpartition(" ")
            numbers.setdefault(file, []).append(number)
        batch = "; ".join(f"{file}s {', '.join(found)}" for file, found in numbers.items())
        kept = f"what was before it is {self.checkpoints / f'step-{step - 1:08d}'}" if step > 1 else "it was the first"
        found = f"the gradient of step {step} has a norm of {norm.item()}"
        if not math.isfinite(loss):
            found = f"the loss of step {step} is {float(loss)}"
        raise UserError(f"{found}, and {kept}; its batch: {batch}")

    @staticmethod
    def save_alone() -> str:
        """Saves the last whole step of the run that this process leaves; what to say of that.

        Not of a sharded one, whose slices only all ranks together could write: they may be anywhere.
        """
        run = Run.current
        if run is None or run.latest is None or not run.writes or layout_asked() != "replicated":
            return ""
        latest, run.latest = run.latest, None
        try:
            run.save_checkpoint(*latest)
        except (OSError, RuntimeError):  # on top of what is being told: a full disk, say
            return ""
        return f"; the same command with --resume goes on after step {latest[0]}"

    def log_bytes(self) -> dict[str, int]:
        """Lengths of the logs."""
        paths = [self.folder / name for name in LOGS if self.writes]
        return {path.name: path.stat().st_size for path in paths if path.exists()}

    def save_checkpoint(self, step: int, state: dict, log_bytes: dict[str, int] | None = None) -> None:
        """Writes `state` (nested dicts and lists of tensors, numbers, strings, None), whole or not at all.

        `log_bytes` are the logs' lengths when `state` was what it is (None: now). Keeps the newest
        `args.keep_checkpoints` (0: all). Raises pickle.UnpicklingError, on the first call rather than on the resume
        that needs it, when the state holds something that cannot be loaded safely. Every rank calls it.
        """
        folder, slices = self.checkpoints / f"step-{step:08d}", []
        state = without_slices(state, slices)
        # There already: a finished run, resumed at its last step
        if self.args.inspect or not (self.writes or slices) or folder.exists():
            return
        aside = self.checkpoints / f".tmp-{folder.name}"
        try:
            if self.writes:
                for name in LOGS:  # the manifest must not promise lines that a power cut can still take
                    with (self.folder / name).open("a") as file:
                        os.fsync(file.fileno())
                aside.mkdir()
                save_tensors(state, aside / "state.pt")
            if slices:
                dist.barrier()
                save_tensors(slices, aside / f"slices-{dist.get_rank()}.pt")
                dist.barrier()
            if not self.writes:
                return
            manifest = {
                "step": step, "layout": layout_asked(),
                "sha256": {path.name: sha256(path) for path in sorted(aside.glob("*.pt"))},
                "log_bytes": self.log_bytes() if log_bytes is None else log_bytes,
            }
            write_whole(aside / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        except BaseException:
            if self.writes:
                shutil.rmtree(aside, ignore_errors=True)  # on a full disk it is in everybody's way
            raise
        aside.rename(folder)
        sync_folder(self.checkpoints)
        keep = self.args.keep_checkpoints
        for old in sorted(self.checkpoints.glob("step-*"), reverse=True)[keep:] if keep else ():
            # Renamed first: killed in the middle, what remains is a leftover and not a torn checkpoint.
            shutil.rmtree(old.rename(self.checkpoints / f".tmp-{old.name}"))

    def load_checkpoint(self) -> tuple[int, dict] | None:
        """(step, state on the CPU) of the newest whole checkpoint, or None: not resuming, or nothing to resume from.

        A checkpoint whose bytes are not those of its manifest is renamed to torn-..., and that is said. The logs are
        cut back to where they were when the checkpoint was written, or emptied. From here on SIGTERM lets a step end.
        """
        if not self.args.inspect:
            catch_sigterm(lambda: setattr(self, "stopping", True))
        if not self.args.resume:
            return None
        for folder in sorted(self.checkpoints.glob("step-*"), reverse=True):
            manifest = read_manifest(folder)
            if manifest is not None:
                if manifest["layout"] != layout_asked():
                    raise UserError(
                        f"{folder} was written by a run in the layout {manifest['layout']}, this one is "
                        f"{layout_asked()}: launch it as before, on any number of ranks"
                    )
                self.cut_logs(manifest["log_bytes"])
                self.print(f"resuming after step {manifest['step']} from {folder}")
                try:
                    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                    count = len(manifest["sha256"]) - 1
                    slices = [
                        torch.load(folder / f"slices-{rank}.pt", map_location="cpu", weights_only=True, mmap=True)
                        for rank in range(count)
                    ]
                except UnpicklingError:
                    raise UserError(
                        f"{folder} is whole, and holds more than tensors and numbers, which no run of ours writes: "
                        "nothing of it was run; delete it, or begin a new run with another --output_dir"
                    ) from None
                return manifest["step"], with_slices(state, slices)
            torn = folder.with_name(f"torn-{time.time_ns()}-{folder.name}")
            self.print(f"{folder} is torn (its bytes are not those of its manifest): skipped, kept as {torn.name}")
            if self.writes:
                folder.rename(torn)
        self.cut_logs({})
        self.print(f"nothing to resume in {self.folder}: starting from the beginning")
        return None

    def cut_logs(self, log_bytes: dict[str, int]) -> None:
        """Cuts the logs back to the given lengths; those not named are emptied."""
        for name in LOGS if self.writes else ():
            with (self.folder / name).open("ab") as file:
                file.truncate(min(file.tell(), log_bytes.get(name, 0)))

    def finish(self) -> None:
        """Puts a model card in final/, closes the run and, if `args.push_to_hub`, puts final/ on the hub.

        Raises UserError, which says how to do it by hand, when the push fails.
        """
        final, private = self.final_folder, self.args.hub_private_repo
        saved = self.writes and final.exists()  # not after a resume with --max_steps below what was done
        if saved:
            write_whole(final / "README.md", model_card(self.folder))
        self.close()
        if saved and self.args.push_to_hub:
            try:
                self.print(f"pushed {final} to {push(final, self.hub_name, private)}")
            except Exception as error:  # whatever it was, the model is there
                by_hand = f"hf upload {self.hub_name} {final}" + " --private" * private
                raise UserError(
                    f"the model is safe in {final}, but pushing it failed ({in_one_line(error)}): `{by_hand}` does it"
                ) from error

    def close(self) -> None:
        """Flushes the trackers and frees the folder."""
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.writes:
            self.lock.close()
        Run.current = None
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def catch_sigterm(then: Callable[[], None]) -> None:
    """Calls `then` when this process is asked to end. One that it forks, such as a reward's workers, ends as usual."""
    signal.signal(signal.SIGTERM, lambda *_: then())
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def on_any_rank(happened: bool) -> bool:
    """Whether it happened on one rank at least; every rank has to ask, and all get the same answer."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return happened
    count = torch.tensor(float(happened), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(count)
    return count.item() > 0


def layout_asked() -> str:
    """How the launcher wants a model to lie on the ranks: "replicated", "FSDP2", "ZeRO-2" or "ZeRO-3".

    Raises:
        UserError: DeepSpeed with another stage.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "FSDP2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return "replicated"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage not in ("2", "3"):
        raise UserError(f"the launcher asks for DeepSpeed with zero_stage {stage or 'unset'}: 2 and 3 are done here")
    return f"ZeRO-{stage}"


def plain_config(args: Any) -> dict:
    """What config.yaml says of `args`, read back (tuples are lists). `resume` is off, for a config repeats a run."""
    return yaml.safe_load(yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)) | {"resume": False}


def refuse_other_config(path: Path, config: dict) -> None:
    """UserError when a resumed run would go on with other flags; how long, how often and where to is free to change."""
    free = re.compile(
        r"resume|output_dir|max_steps|keep_checkpoints|inspect|(save|log|logging|report|push|hub)_.*|.*_timeout"
    )
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [name for name in {**before, **config} if not free.fullmatch(name) and before.get(name) != config.get(name)]
    if names:
        changes = ", ".join(f"{name} (was {before.get(name)}, now {config.get(name)})" for name in names[:5])
        changes += f" and {len(names) - 5} more" * (len(names) > 5)
        remedy = f"use the same, for example by --config {path}, or begin a new run with another --output_dir"
        raise UserError(f"--resume with other flags than the run in {path.parent} began with: {changes}; {remedy}")


def lock_folder(folder: Path) -> typing.TextIO:
    """An open, locked file, freed when the process ends however it ends; UserError when another process holds it."""
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"another process is writing to {folder}: wait for it, or choose another --output_dir"
        ) from None
    except OSError:
        pass  # a file system without locks
    return file


def describe_environment(folder: Path, seed: int) -> dict:
    """What a reader needs to repeat or to judge the run. No environment variables, no host name: logs get published."""

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", folder, *words], check=True, capture_output=True, text=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    metadata = [item.metadata for item in importlib.metadata.distributions()]  # each access parses it anew
    return {
        "run_id": secrets.token_hex(4),  # carried over a resume: one wandb run before and after
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.executable).name, *sys.argv],
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "packages": dict(sorted((found["Name"], found["Version"]) for found in metadata)),
    }


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that a kill or a power cut leaves the old one or the new one."""
    aside = path.with_name(f".tmp-{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder (a rename is only that) survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def sha256(path: Path) -> str:
    """Checksum of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a whole checkpoint; None when anything is missing or differs."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest if all(sha256(folder / name) == sum for name, sum in manifest["sha256"].items()) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def save_tensors(state: Any, path: Path) -> None:
    """torch.save, on the disk when it returns; raises pickle.UnpicklingError for what could not be loaded safely."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    torch.load(path, weights_only=True, map_location="cpu", mmap=True)  # reads only the structure


@dataclasses.dataclass
class Sliced:
    """What a state to be saved holds of a tensor that is cut along its first dimension: this rank's slice.

    The slices of all ranks, one after the other, begin with the `rows` of the whole tensor; padding may follow.
    """

    tensor: torch.Tensor
    rows: int


@dataclasses.dataclass
class Slices:
    """The same in a state that was loaded: the slices of all ranks that saved it, still in the files."""

    tensors: list[torch.Tensor]
    rows: int

    def part(self, start: int, count: int) -> torch.Tensor:
        """`count` rows of the whole tensor from `start` on, zeros beyond its end."""
        part, end, first = self.tensors[0].new_zeros(count, *self.tensors[0].shape[1:]), self.rows, 0
        for tensor in self.tensors:
            low, high = max(start, first), min(start + count, first + len(tensor), end)
            if low < high:
                part[low - start : high - start] = tensor[low - first : high - first]
            first += len(tensor)
        return part


def without_slices(state: Any, slices: list[torch.Tensor]) -> Any:
    """`state` with every Sliced replaced by where its tensor now stands in `slices`, the same place on all ranks."""
    if isinstance(state, Sliced):
        slices.append(state.tensor)
        return {"slice": len(slices) - 1, "rows": state.rows}
    if isinstance(state, dict):
        return {name: without_slices(value, slices) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(without_slices(value, slices) for value in state)
    return state


def with_slices(state: Any, slices: list[list[torch.Tensor]]) -> Any:
    """The inverse, given the `slices` of every rank: a Slices in each place."""
    if isinstance(state, dict):
        if state.keys() == {"slice", "rows"}:
            return Slices([of_rank[state["slice"]] for of_rank in slices], state["rows"])
        return {name: with_slices(value, slices) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(with_slices(value, slices) for value in state)
    return state


def plain_numbers(values: dict) -> dict:
    """Tensors and numpy numbers of one element as Python numbers, NaN and infinities as None, the rest as it is."""
    values = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def show(value: Any) -> str:
    """A number as the console shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def crop(text: str, length: int = 400) -> str:
    """Both ends of a long text, line breaks visible."""
    text = text.replace("\n", "⏎\n")
    return text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}"


def set_seed(seed: int) -> None:
    """Seeds python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict:
    """The generators of this process, in types that `torch.load(weights_only=True)` accepts."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict) -> None:
    """The inverse of `random_state`, on the same kind of machine."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def show_batch(run: Run, tokenizer: Any, batch: Any, advantages_N: torch.Tensor | None = None) -> None:
    """Prints one packed micro-batch: per sequence its place, positions and advantage, then its tokens coloured by role.

    batch: a common.data.MicroBatch. advantages_N: [N] or None. Where colours do not show, «» enclose trained tokens.
    """
    colours = {"prompt": "bright_black", "trained": "green", "trained, advantage < 0": "red", "masked": "yellow"}
    counts = dict.fromkeys(colours, 0)
    plain = not run.console.is_terminal
    start = 0
    for sequence, length in enumerate(batch.lengths):
        tokens = slice(start, start + length)
        positions, mask = batch.position_ids_N[tokens].tolist(), batch.loss_mask_N[tokens].tolist()
        advantages = [0.0] * length if advantages_N is None else advantages_N[tokens].tolist()
        head = f"sequence {sequence}  tokens {start}..{start + length - 1}  positions {positions[0]}..{positions[-1]}"
        if advantages_N is not None:
            trained = [value for value, is_trained in zip(advantages, mask, strict=True) if is_trained] or [math.nan]
            head += f"  advantage {min(trained):+.3f}" + (
                f"..{max(trained):+.3f}" if min(trained) != max(trained) else ""
            )
        text = Text()
        for offset, token in enumerate(batch.input_ids_N[tokens].tolist()):
            role = "masked" if any(mask[:offset]) else "prompt"
            if mask[offset]:
                role = "trained, advantage < 0" if advantages[offset] < 0 else "trained"
            counts[role] += 1
            opens = plain and mask[offset] and not (offset and mask[offset - 1])
            closes = plain and mask[offset] and not (offset + 1 < length and mask[offset + 1])
            word = tokenizer.decode([token]).replace("\n", "⏎\n")
            text.append("«" * opens + word + "»" * closes, style=colours[role])
        run.print(Text(head, style="bold"))
        run.print(text)
        start += length
    legend = Text(f"{start} tokens: ", style="bold")
    for role, colour in colours.items():
        legend.append(f"  {role} {counts[role]}", style=colour)
    run.print(legend)
