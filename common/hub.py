"""What a run hands to others: a model card in final/, and with --push_to_hub that folder on the Hugging Face hub.

The token is that of `hf auth login` or HF_TOKEN, never a flag: config.yaml and the card are there to be published. Of
this machine the card says its hardware; of an absolute path only the last name.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

SHOWN = ("torch", "transformers", "accelerate", "peft", "vllm")
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
ABSOLUTE = re.compile(r"(?<![\w.~<:/-])(?:~\w*)?/[\w.~-][^\s:,'\"]*")


def check_login(name: str) -> None:
    """Raises whatever keeps this machine from pushing to the repository `name`, as far as the hub tells in advance.

    Nothing is made there yet: a run that fails leaves no empty repository.
    """
    validate_repo_id(name)
    account = HfApi().whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(f"the token of {account['name']} may only read")


def push(folder: Path, name: str, private: bool) -> str:
    """Uploads a folder as the model `name` (without an owner: of whoever is logged in); returns its address."""
    api = HfApi()
    # Not False: an organisation may have said that what is new there is private
    repository = api.create_repo(name, private=private or None, exist_ok=True)
    api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Upload by postscripts")
    return str(repository)


def in_one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())


def model_card(folder: Path) -> str:
    """README.md for final/, all of it from the other files of the run folder.

    Its header names the base model and the data where these are on the hub: `owner/name`, and no file here.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    documented = ast.get_docstring(ast.parse((folder / "script.py").read_text(encoding="utf-8"))) or ""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    step, numbers = last_numbers(lines)

    script, base, data = environment["script"], config["model_name_or_path"], config["dataset_name"]
    held_out = config["eval_dataset_name"] or (data if data.startswith("toy:") else None)
    is_adapter = (folder / "final" / "adapter_config.json").exists()
    header = {"library_name": "peft" if is_adapter else "transformers"}
    if on_hub(base):
        header["base_model"] = base
    if names := dict.fromkeys(name.partition(":")[0] for name in (data, held_out) if name and on_hub(name)):
        header["datasets"] = list(names)
    header["tags"] = ["postscripts", Path(script).stem] + ["lora"] * is_adapter

    eval_split = config.get("eval_split") or ", ".join(config.get("eval_splits", []))
    changed = {True: ", with uncommitted changes", False: "", None: ""}[environment["git_dirty"]]
    versions = {name: environment["packages"][name] for name in SHOWN if name in environment["packages"]}
    processor = f"{environment['cpus']} CPU cores"
    if environment["gpus"]:
        processor = f"{len(environment['gpus'])} x {environment['gpus'][0]}"
    facts = {
        "script": f"`{script}`",
        "base model": f"`{base}`" + ", of which this is a LoRA adapter" * is_adapter,
        "data": f"`{data}`, split `{config['dataset_split']}`",
        "evaluation data": f"`{held_out}`, split `{eval_split}`" if held_out else "none",
        "seed": config["seed"],
        "commit": (environment["git_commit"] or "none") + changed,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "hardware": f"{environment['processes']} process(es), {processor}, {environment['platform']}",
    }
    python, *words = environment["command"]
    return "\n".join([
        "---", yaml.safe_dump(header, sort_keys=False) + "---", "", f"# {folder.resolve().name}", "",
        " ".join(documented.partition("\n\n")[0].split()), "",
        *table({name: without_paths(str(fact)) for name, fact in facts.items()}, "", ""), "",
        "## Results", "", *table(numbers, f"after step {step}", ""), "",
        "## Command", "", "```bash", without_paths(shlex.join([python, *words])), "```", "",
        "<details><summary>Every flag</summary>", "",
        "```yaml", without_paths(yaml.safe_dump(config, sort_keys=False)) + "```", "", "</details>", "",
    ])  # fmt: skip


def last_numbers(lines: list[str]) -> tuple[int, dict[str, str]]:
    """(last step, what metrics.jsonl says of it), evaluations first."""
    step, numbers = 0, {}
    for line in map(json.loads, reversed(lines)):
        step = step or line["step"]
        if line.pop("step") != step:
            break
        numbers = line | numbers
    ordered = sorted(numbers, key=lambda name: not name.startswith("eval/"))  # stable
    return step, {name: "not a number" if numbers[name] is None else f"{numbers[name]:.6g}" for name in ordered}


def table(rows: dict[str, str], *head: str) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows.items())]


def on_hub(name: str) -> bool:
    """Whether this names something of the hub: `owner/name`, for data also `owner/name:config`, and no file here."""
    return HUB_NAME.fullmatch(name.partition(":")[0]) is not None and not Path(name).exists()


def without_paths(text: str) -> str:
    """A text in which every absolute path is its last name."""
    return ABSOLUTE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)
