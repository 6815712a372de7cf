"""Agreement with the real lxt: tiny random models of each family that it knows, and SmolLM2.

One column a candidate: the largest difference to lxt's relevance over lxt's largest relevance. The
weights, norms and biases included, are drawn wide, so that a rule applied wrongly shows. The models
have no meaning; they need none, since both sides must compute the same number. SmolLM2-135M comes
with its real weights.

    python benchmarks/lxt_peer.py             exit status 1 if any difference is above 1e-5
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import typer
from lxt_environment import LxtError, LxtExplanation, run_lxt
from peer import patched, relevance
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import attnlrp_fx

TOLERANCE = 1e-5
VOCABULARY = 97

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

Candidate = Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]


def families() -> dict[str, tuple[PreTrainedConfig, PreTrainedModel]]:
    """A tiny seeded float32 model of each family, with the config it was made from.

    The sliding window and rotary scaling are there because they are translated for lxt.
    """
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    kinds: dict[str, tuple[PreTrainedConfig, type[PreTrainedModel]]] = {
        "llama": (LlamaConfig(**DECODER, rope_parameters=llama3, mlp_bias=True), LlamaForCausalLM),
        "qwen2": (Qwen2Config(**DECODER), Qwen2ForCausalLM),
        "qwen3": (Qwen3Config(**DECODER, head_dim=8), Qwen3ForCausalLM),
        "gemma3": (
            Gemma3TextConfig(
                **DECODER,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            Gemma3ForCausalLM,
        ),
        "gpt2": (
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=128,
                n_embd=32,
                n_layer=3,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            ),
            GPT2LMHeadModel,
        ),
    }
    return {name: (config, _random(kind, config)) for name, (config, kind) in kinds.items()}


def _random(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Norms stay near one and biases near zero, but none of them exactly there."""
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    model: PreTrainedModel = kind(config)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def peer_relevance(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The column "peer": `peer.py` in this process."""
    with patched(model):
        return relevance(model, {"input_ids": input_ids})


def our_relevance(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The column "ours": this package, eager backend."""
    explainer = attnlrp_fx.compile(model, {"input_ids": input_ids}, backend="eager")
    found: torch.Tensor = explainer(input_ids=input_ids).relevance["input_ids"]
    return found


CANDIDATES: dict[str, Candidate] = {"ours": our_relevance, "peer": peer_relevance}
"""Column name → relevance (batch, sequence) of the largest last logit of each row."""


def reference(model: PreTrainedModel, input_ids: torch.Tensor) -> LxtExplanation:
    """The same model and input, explained by the real lxt."""
    with tempfile.TemporaryDirectory(prefix="lxt-peer-") as folder:
        weights = Path(folder) / "model.safetensors"
        save_model(model, str(weights))
        return run_lxt(model.config.to_dict(), weights, {"input_ids": input_ids})


def difference(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """max |a − b| / max |a|"""
    return float((reference - candidate).abs().max() / reference.abs().max())


def _cell(value: float) -> str:
    return f"[{'green' if value <= TOLERANCE else 'red'}]{value:.1e}"


def main(batch: int = 2, length: int = 17) -> None:
    """Print the table; exit with 1 if a difference is above the tolerance."""
    console = Console()
    table = Table(title=f"max |lxt − candidate| / max |lxt|, float32, batch {batch} × {length}")
    for column in ("family", "logit", *CANDIDATES):
        table.add_column(column, justify="left" if column == "family" else "right")
    agree = True
    input_ids = torch.randint(
        VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1)
    )
    contestants = {name: model for name, (_, model) in families().items()}
    smollm2 = AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype=torch.float32)
    contestants["SmolLM2-135M"] = smollm2.train(False)
    for name, model in contestants.items():
        try:
            expected = reference(model, input_ids)
        except LxtError as error:
            console.print(f"error: {error}", style="red", markup=False)
            raise typer.Exit(1) from error
        with torch.no_grad():
            logits = model(input_ids).logits[:, -1]
        values = [difference(expected.logit, logits.gather(-1, expected.index[:, None])[:, 0])]
        for explain in CANDIDATES.values():
            values.append(difference(expected.relevance, explain(model, input_ids)))
        agree &= all(value <= TOLERANCE for value in values)  # and none is NaN
        table.add_row(name, *map(_cell, values))
    console.print(table)
    if not agree:
        console.print(f"[red]a difference is above the tolerance of {TOLERANCE:.0e}")
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    typer.run(main)
