"""Runs inside the environment that `lxt_environment` makes: one explanation by the real lxt.

lxt patches classes for the whole process and wants an old transformers, so it gets a process of
its own. The two processes talk through files only: a JSON request here, safetensors both ways.
This file therefore imports nothing of the project, and runs on the old versions of everything.

    python lxt_worker.py check            import everything once, print the versions
    python lxt_worker.py explain REQUEST  REQUEST holds the keys of `lxt_environment.run_lxt`
"""

import json
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file

MODELING_MODULES = {
    "llama": "llama.modeling_llama",
    "qwen2": "qwen2.modeling_qwen2",
    "qwen3": "qwen3.modeling_qwen3",
    "gemma3_text": "gemma3.modeling_gemma3",
    "gpt2": "gpt2.modeling_gpt2",
}


# torchvision was built for another device than this torch: its compiled part cannot be loaded, and
# its Python part registers shape functions for operators that this part would have defined.
# Declaring them is all that the import needs; no explanation calls one.
TORCHVISION: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]  # untyped
for operator in ("nms", "qnms"):
    TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def build(model_type: str, config: dict[str, Any], attention: str, weights: Path) -> Any:
    """The caller's model in this environment's transformers, in the dtype of its weights.

    The modeling module is patched before the model exists, which is the order lxt prescribes.
    """
    modeling = import_module(f"transformers.models.{MODELING_MODULES[model_type]}")
    import_module("lxt.efficient").monkey_patch(modeling)
    transformers = import_module("transformers")
    config_class = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    configuration = config_class[model_type](**config, attn_implementation=attention)
    model = transformers.AutoModelForCausalLM.from_config(configuration)
    dtype = next(iter(load_file(weights).values())).dtype
    model = model.to(dtype).eval().requires_grad_(False)
    load_model(model, weights)
    return model


def explain(
    model: Any, inputs: dict[str, torch.Tensor], position: int, index: int | None
) -> dict[str, torch.Tensor]:
    """Gradient times input at the embeddings, for one logit per batch row."""
    inputs = dict(inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False, **inputs).logits[:, position]
    chosen = logits.argmax(-1) if index is None else torch.full(logits.shape[:1], index)
    explained = logits.gather(-1, chosen[:, None])[:, 0]
    explained.sum().backward()
    relevance = (embeds * embeds.grad).sum(-1)
    return {
        "relevance": relevance.detach().contiguous(),
        "logit": explained.detach().contiguous(),
        "index": chosen.contiguous(),
    }


def main(arguments: list[str]) -> None:
    """Do what the command line asks; any failure is a traceback that the caller shows."""
    match arguments:
        case ["check"]:
            import_module("lxt.efficient")
            print({name: metadata.version(name) for name in ("lxt", "torch", "transformers")})
        case ["explain", request_file]:
            request = json.loads(Path(request_file).read_text())
            model = build(
                request["model_type"],
                request["config"],
                request["attention"],
                Path(request["weights"]),
            )
            inputs = load_file(request["inputs"])
            result = explain(model, inputs, request["position"], request["index"])
            save_file(result, request["result"])
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
