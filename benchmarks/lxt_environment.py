"""The real lxt 2.1, as a reference: an environment of its own, and a call into it.

lxt 2.1 is the newest release and does not import on transformers 5; it also replaces classes for
the whole process. So it lives in a virtual environment under the user's cache, made once, and each
explanation is a subprocess there (`lxt_worker.py`). Weights go over as safetensors; the config goes
over as the plain arguments of the old config class, since fields moved between the versions
(`legacy_config`).

    python benchmarks/lxt_environment.py      make the environment, print where it is
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file, save_file

WORKER = Path(__file__).with_name("lxt_worker.py")
CACHE_VARIABLE = "ATTNLRP_FX_CACHE"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"

# The default wheel on Linux is a CUDA build of several gigabytes; the others have no local version.
CONSTRAINTS = """\
torch==2.13.0+cpu; sys_platform == "linux"
torch==2.13.0; sys_platform != "linux"
transformers==4.52.4
"""


class LxtError(RuntimeError):
    """The reference could not be installed, or did not explain what it was given."""


@dataclass(frozen=True)
class Step:
    """One call of pip, in the order of `STEPS`."""

    what: str
    """Shown while it runs."""
    arguments: tuple[str, ...]
    """Appended to `pip install`."""


STEPS = (
    Step("torch 2.13.0 for the CPU", ("torch", "numpy")),
    Step("transformers 4.52.4", ("transformers", "safetensors", "pillow")),
    # lxt asks for bitsandbytes, open_clip and more that no explanation needs.
    Step(
        "lxt 2.1",
        ("--no-deps", "lxt==2.1", "zennit==0.5.1", "tabulate==0.9.0", "torchvision==0.28.0"),
    ),
)

RECIPE = json.dumps([CONSTRAINTS, [step.arguments for step in STEPS], sys.version_info[:2]])


def cache_directory() -> Path:
    """Where the environment lies: `$ATTNLRP_FX_CACHE`, or the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "attnlrp_fx"


def environment() -> Path:
    """The Python of an environment with lxt, made on the first call.

    It is built beside its place and renamed into it when lxt imports, so what lies there is
    complete; the recipe kept inside tells an outdated one.
    """
    cache = cache_directory()
    home = cache / "lxt-env"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LxtError(
            f"cannot make the cache {cache} ({error}); set {CACHE_VARIABLE} to a writable directory"
        ) from error
    with FileLock(cache / "lxt-env.lock"):
        recipe = home / "recipe.json"
        if not recipe.is_file() or recipe.read_text() != RECIPE:
            partial = cache / "lxt-env.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _build(partial)
            shutil.rmtree(home, ignore_errors=True)
            partial.rename(home)
    return _python(home)


def _python(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _build(home: Path) -> None:
    console = Console(stderr=True)
    python = _python(home)
    constraints = home / "constraints.txt"
    steps = len(STEPS) + 2
    with console.status(f"[1/{steps}] virtual environment {home}") as status:
        _call("making the virtual environment", sys.executable, "-m", "venv", str(home))
        constraints.write_text(CONSTRAINTS)
        for number, step in enumerate(STEPS, start=2):
            status.update(f"[{number}/{steps}] installing {step.what}")
            _install(python, constraints, step)
            console.print(f"[{number}/{steps}] installed {step.what}")
        status.update(f"[{steps}/{steps}] importing lxt")
        versions = _call("importing lxt", str(python), "-I", str(WORKER), "check")
    console.print(f"[{steps}/{steps}] {versions.strip()}", highlight=False)
    (home / "recipe.json").write_text(RECIPE)


def _install(python: Path, constraints: Path, step: Step) -> None:
    """Install from where pip is configured to look; failing that, add PyTorch's own index.

    A machine with a mirror or a wheel folder of its own needs, and may reach, nothing else.
    """
    command = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    arguments = ("--constraint", str(constraints), *step.arguments)
    try:
        _call(f"installing {step.what}", *command, *arguments)
    except LxtError as first:
        try:
            _call(f"installing {step.what}", *command, "--extra-index-url", CPU_WHEELS, *arguments)
        except LxtError as second:
            raise LxtError(f"{first}\nand with {CPU_WHEELS}:\n{second}") from second


def _call(what: str, *command: str) -> str:
    """Run one command; its output is returned, or becomes the error."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | quiet
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise LxtError(f"{what} failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


PLAIN_FIELDS = {
    "llama": ("hidden_act", "head_dim", "attention_bias", "mlp_bias"),
    "qwen2": ("hidden_act", "use_sliding_window", "sliding_window", "max_window_layers"),
    "qwen3": (
        "hidden_act",
        "head_dim",
        "attention_bias",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
    ),
    "gemma3_text": (
        "hidden_activation",
        "head_dim",
        "attention_bias",
        "query_pre_attn_scalar",
        "sliding_window",
        "final_logit_softcapping",
        "attn_logit_softcapping",
    ),
    "gpt2": (
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
    ),
}
"""The fields of each family that mean the same in both versions and decide what is computed."""

DECODER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
TOKEN_FIELDS = (
    "vocab_size",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the transformers 4.52 config class for a config of transformers 5."""
    family = config["model_type"]
    if family not in PLAIN_FIELDS:
        raise LxtError(f"no translation for model_type {family!r}; known: {sorted(PLAIN_FIELDS)}")
    fields = TOKEN_FIELDS + PLAIN_FIELDS[family]
    if family == "gpt2":
        return {name: config[name] for name in fields}
    plain = {name: config[name] for name in fields + DECODER_FIELDS}
    rope = config["rope_parameters"]
    if family != "gemma3_text":
        return plain | _legacy_rope(rope)
    local = _legacy_rope(rope["sliding_attention"])
    if local["rope_scaling"] is not None:
        raise LxtError(f"transformers 4.52 scales no local rotary table: {local['rope_scaling']}")
    return (
        plain
        | _legacy_rope(rope["full_attention"])
        | {
            "rope_local_base_freq": local["rope_theta"],
            "sliding_window_pattern": _sliding_pattern(config["layer_types"]),
        }
    )


def _legacy_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """One `rope_parameters` of version 5 as `rope_theta` and `rope_scaling`."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


def _sliding_pattern(layer_types: list[str]) -> int:
    """The period p for which every p-th layer, and no other, attends to everything.

    One more than the number of layers says that none does.
    """
    count = len(layer_types)
    for period in range(1, count + 2):
        expected = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(count)
        ]
        if layer_types == expected:
            return period
    raise LxtError(f"transformers 4.52 has only periodic sliding layers, not {layer_types}")


@dataclass(frozen=True)
class LxtExplanation:
    """What the real lxt says about one batch."""

    relevance: torch.Tensor
    """(batch, sequence): embedding times gradient, summed over features."""
    logit: torch.Tensor
    """(batch,): the explained values, to check that both models compute the same."""
    index: torch.Tensor
    """(batch,): which logits these are."""


def run_lxt(
    config: dict[str, Any],
    state: Path,
    inputs: dict[str, torch.Tensor],
    *,
    position: int = -1,
    index: int | None = None,
    attention: str = "sdpa",
) -> LxtExplanation:
    """Explain one logit per row with the real lxt, in a subprocess of its environment.

    `config` is a transformers 5 `config.to_dict()`, `state` a file of `safetensors.torch.
    save_model`, `inputs` holds `input_ids` and what else the model's forward takes. The logit is
    the one at `position` with `index`, or the largest there.
    """
    python = environment()
    with tempfile.TemporaryDirectory(prefix="lxt-") as name:
        folder = Path(name)
        request = {
            "model_type": config["model_type"],
            "config": legacy_config(config),
            "attention": attention,
            "weights": str(state.resolve()),
            "inputs": str(folder / "inputs.safetensors"),
            "result": str(folder / "result.safetensors"),
            "position": position,
            "index": index,
        }
        save_file({key: value.contiguous() for key, value in inputs.items()}, request["inputs"])
        (folder / "request.json").write_text(json.dumps(request))
        what = f"lxt on {config['model_type']}"
        _call(what, str(python), "-I", str(WORKER), "explain", str(folder / "request.json"))
        return LxtExplanation(**load_file(request["result"]))


if __name__ == "__main__":
    try:
        print(environment())
    except LxtError as failure:
        raise SystemExit(f"error: {failure}") from failure
