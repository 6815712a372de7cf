"""Tiny random models of every kind that the tests hold the compiler to.

Each model is seeded, in evaluation mode and float32; biases and norm weights are random too, so
that nothing vanishes by chance, and no two sizes are equal, so that none is mistaken for another.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

VOCABULARY, HIDDEN, HEADS, LAYERS, INTERMEDIATE, POSITIONS = 61, 32, 4, 2, 48, 40
LABELS = 3
PAD = 0

Inputs = dict[str, Any]


@dataclass(frozen=True, repr=False)
class Case:
    """A model, its inputs and what is explained."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    """(batch, length) → inputs in float32."""
    value: Callable[[Any, Inputs], Tensor]
    """(outputs, inputs) → (batch,): the default target, written anew."""
    casts: str = ""
    """Where the model itself casts to float32, and so how much less than float64 it holds."""
    target: Any = None
    """The target to ask for where the default is not what `value` computes."""
    layers: int = 1
    """Two where layers differ, or where what lies between them is worth a test."""

    def __repr__(self) -> str:
        return self.name

    @property
    def tolerance(self) -> float:
        """Relative; of float64, or of the float32 that the model insists on."""
        return 1e-6 if self.casts else 1e-9

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new instance, always the same."""
        return randomised(self.build).to(dtype).eval()

    def example(
        self, batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32
    ) -> Inputs:
        """Inputs, always the same for the same sizes."""
        given = self.inputs(batch, length)
        return {
            name: value.to(dtype) if is_floating(value) else value for name, value in given.items()
        }


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs in order; key-value caches are none of its outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module and draw its parameters anew: matrices at unit gain, biases not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() < 2:
                    parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
                elif "embed" in name or "wte" in name or "shared" in name or "wpe" in name:
                    parameter.normal_(0.0, 0.7)
                elif "experts" in name:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
                else:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            for name, buffer in model.named_buffers():
                if "running_mean" in name:
                    buffer.normal_(0.0, 0.3)
                elif "running_var" in name:
                    buffer.uniform_(0.5, 2.0)
    return model


def drawn(batch: int, length: int, *sizes: int) -> Tensor:
    """Floats, always the same for the same sizes."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    return torch.randn(batch, length, *sizes, generator=generator)


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without padding, always the same for the same sizes."""
    generator = torch.Generator().manual_seed(1000 * seed + 100 * batch + length)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def tokens(batch: int, length: int) -> Inputs:
    """What a tokenizer returns, without padding."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    return {"input_ids": token_ids(batch, length), "attention_mask": mask}


def seq2seq_tokens(batch: int, length: int) -> Inputs:
    """A source and a target of another length."""
    return {**tokens(batch, length), "decoder_input_ids": token_ids(batch, length + 2, seed=1)}


def transformers_model(module: str, name: str, **config: Any) -> nn.Module:
    """A random instance of a class of transformers, by the folder and the class's name."""
    library = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    cls = getattr(library, name)
    return cls(cls.config_class(**config))


def highest_last_logit(outputs: Any, inputs: Inputs) -> Tensor:
    """Causal language models: the highest logit of the last position."""
    return outputs.logits[:, -1].max(-1).values


def highest_logit(outputs: Any, inputs: Inputs) -> Tensor:
    """Classifiers."""
    return outputs.logits.max(-1).values


def highest_span(outputs: Any, inputs: Inputs) -> Tensor:
    """Question answering: start plus end."""
    return outputs.start_logits.max(-1).values + outputs.end_logits.max(-1).values


def highest(outputs: Tensor, inputs: Inputs) -> Tensor:
    """Plain classifiers."""
    return outputs.max(-1).values


def highest_last(outputs: Any, inputs: Inputs) -> Tensor:
    """Plain sequence models, with or without their attention weights."""
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    return outputs[:, -1].max(-1).values


def energy(outputs: Tensor) -> Tensor:
    """A target that is not linear in the outputs."""
    return outputs.square().sum(-1)


DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ENCODER = {**DECODER, "num_labels": LABELS}
RMS = "RMSNorm computes in float32"


class MLP(nn.Module):
    """A multilayer perceptron with batch norm and unlike activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, features: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.norm(self.first(features)))
        return self.last(torch.tanh(self.second(hidden)))


class Autoencoder(nn.Module):
    """Convolutions down and up again, with pooling and a sigmoid. Even lengths only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, 5, 3, padding=1), nn.SiLU(), nn.AvgPool1d(2), nn.Conv1d(5, 2, 3, padding=1)
        )
        self.decoder = nn.Sequential(nn.ConvTranspose1d(2, 5, 2, stride=2), nn.Softplus())
        self.out = nn.Conv1d(5, 1, 1)

    def forward(self, signal: Tensor) -> Tensor:
        code = self.encoder(signal[:, None])
        return torch.sigmoid(self.out(self.decoder(code)))[:, 0]


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INTERMEDIATE, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def _encoder_inputs(batch: int, length: int) -> Inputs:
    return {"src": drawn(batch, length, HIDDEN)}


def _attention_inputs(batch: int, length: int) -> Inputs:
    names = ("query", "key", "value")
    return {
        name: drawn(batch, length + (name != "query"), HIDDEN) + i for i, name in enumerate(names)
    }


def _decoder(
    module: str, name: str, config: dict[str, Any], casts: str = "", layers: int = 1, **more: Any
) -> Case:
    config = {**config, **({} if module == "gpt2" else {"num_hidden_layers": layers}), **more}
    build = functools.partial(transformers_model, module, name, **config)
    return Case(module, build, tokens, highest_last_logit, casts, layers=layers)


def _classifier(module: str, name: str, layers: int = 1, casts: str = "", **more: Any) -> Case:
    config = {**ENCODER, "num_hidden_layers": layers, **more}
    build = functools.partial(transformers_model, module, name, **config)
    return Case(module, build, tokens, highest_logit, casts, layers=layers)


CAUSAL = (
    _decoder("llama", "LlamaForCausalLM", GROUPED, RMS, LAYERS),
    _decoder("qwen2", "Qwen2ForCausalLM", GROUPED, RMS),
    _decoder("qwen3", "Qwen3ForCausalLM", GROUPED, RMS, head_dim=8),
    _decoder(
        "gemma3",
        "Gemma3ForCausalLM",
        GROUPED,
        RMS,
        LAYERS,
        head_dim=8,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention"],
    ),
    _decoder("phi3", "Phi3ForCausalLM", GROUPED, RMS),
    _decoder(
        "mixtral",
        "MixtralForCausalLM",
        GROUPED,
        RMS,
        num_local_experts=5,
        experts_implementation="eager",
    ),
    _decoder(
        "gpt2",
        "GPT2LMHeadModel",
        {},
        layers=LAYERS,
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
    ),
    _decoder("opt", "OPTForCausalLM", DECODER, ffn_dim=INTERMEDIATE, word_embed_proj_dim=HIDDEN),
    _decoder("gpt_neox", "GPTNeoXForCausalLM", DECODER),
)

CLASSIFIERS = (
    _classifier("bert", "BertForSequenceClassification", LAYERS),
    _classifier(
        "distilbert",
        "DistilBertForSequenceClassification",
        dim=HIDDEN,
        n_layers=1,
        n_heads=HEADS,
        hidden_dim=INTERMEDIATE,
    ),
    _classifier("roberta", "RobertaForSequenceClassification"),
    _classifier(
        "modernbert",
        "ModernBertForSequenceClassification",
        LAYERS,
        "rotary embeddings are applied in float32",
        local_attention=4,
        cls_token_id=1,
        sep_token_id=2,
        reference_compile=False,
    ),
)

HEADED = (
    Case(
        "albert-token-classification",
        functools.partial(
            transformers_model,
            "albert",
            "AlbertForTokenClassification",
            **{**ENCODER, "embedding_size": 16},
        ),
        tokens,
        highest_last_logit,
    ),
    Case(
        "bert-question-answering",
        functools.partial(
            transformers_model, "bert", "BertForQuestionAnswering", **{**DECODER, "num_labels": 2}
        ),
        tokens,
        highest_span,
    ),
)

SEQ2SEQ = (
    Case(
        "t5",
        functools.partial(
            transformers_model,
            "t5",
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=INTERMEDIATE,
            num_layers=1,
            num_heads=HEADS,
            decoder_start_token_id=PAD,
        ),
        seq2seq_tokens,
        highest_last_logit,
        "RMSNorm and the softmax compute in float32",
    ),
    Case(
        "bart",
        functools.partial(
            transformers_model,
            "bart",
            "BartForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INTERMEDIATE,
            decoder_ffn_dim=INTERMEDIATE,
            max_position_embeddings=POSITIONS,
            pad_token_id=PAD,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        seq2seq_tokens,
        highest_last_logit,
    ),
)

PLAIN = (
    Case("transformer-encoder", _encoder, _encoder_inputs, highest_last),
    Case(
        "multihead-attention",
        lambda: nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True),
        _attention_inputs,
        highest_last,
    ),
    Case("mlp", MLP, lambda batch, length: {"features": drawn(batch, 6)}, highest),
    Case(
        "autoencoder",
        Autoencoder,
        lambda batch, length: {"signal": drawn(batch, 2 * length)},
        lambda outputs, inputs: energy(outputs),
        target=energy,
    ),
)

TRANSFORMERS = (*CAUSAL, *CLASSIFIERS, *HEADED, *SEQ2SEQ)
CASES = (*TRANSFORMERS, *PLAIN)
BY_NAME = {case.name: case for case in CASES}
