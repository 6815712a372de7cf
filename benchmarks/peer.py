"""A peer to time against: AttnLRP by patched modules and plain autograd, as lxt does it.

Written from the paper's formulas in coefficient form (relevance R = x·c, c carried by autograd):

    activation y = f(x)      c·f(x)/x            the ratio is kept, f's derivative is not used
    RMSNorm, LayerNorm       the statistic is constant
    product of two values    c/2 to each
    attention                1/4 to q and k, 1/2 to v, around whatever kernel runs

The real lxt cannot share a process with a current transformers, and two processes cannot be timed
against each other fairly. This one does the same work in the same process, on any model built from
RMSNorm or LayerNorm modules, transformers' activation modules, `gate_proj`/`up_proj`/`down_proj`
MLPs and the attention registry; `lxt_peer.py` checks it against the real one. It is meant to be as
fast as this approach can be, in eager mode and under `torch.compile`. It keeps lxt's ε of 1e-10 in
the ratio, so a preactivation of exactly zero gets 0 rather than the limit.

    with patched(model):
        maps = relevance(model, tokenizer(text, return_tensors="pt"))

What a model computes outside such modules keeps its plain gradient, silently; that is the approach.
A model is compiled, and its compiled form called, inside one `with`: each `with` makes new methods.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EPSILON = 1e-10
GATED = ("gate_proj", "up_proj", "down_proj")

ACTIVATIONS: tuple[Any, ...] = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
)


class _Coefficient(torch.autograd.Function):
    """The value `y`, with `ratio` as its derivative in `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(ratio)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return c * ratio, None, None


class _ScaledGradient(torch.autograd.Function):
    """The identity, with `factor` as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None]:
        return c * ctx.factor, None


class _ConstantDeviationNorm(torch.autograd.Function):
    """LayerNorm by the fused kernel; its derivative keeps the mean and drops the deviation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, _, inverse = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(inverse, weight)
        return y

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, weight = ctx.saved_tensors
        scaled = c * inverse if weight is None else c * weight * inverse
        return scaled - scaled.mean(-1, keepdim=True), None, None, None


def _identity(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        y = function(x)
        ratio = y / (x + EPSILON)
    result: Tensor = _Coefficient.apply(x, y, ratio)  # type: ignore[no-untyped-call]
    return result


def _scaled(x: Tensor, factor: float) -> Tensor:
    result: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return result


def _layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    result: Tensor = _ConstantDeviationNorm.apply(x, module.weight, module.bias, module.eps)  # type: ignore[no-untyped-call]
    return result


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    with torch.no_grad():
        return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    wide = x.float()
    unit = (wide * _inverse_rms(wide, module.variance_epsilon)).to(x.dtype)
    result: Tensor = module.weight * unit
    return result


def _normed(module: Any, x: Tensor) -> Tensor:
    """The part of a norm that Gemma's family keeps in `_norm`, apart from weight and casts."""
    return x * _inverse_rms(x, module.eps)


def _gated_projection(project: Callable[[Tensor], Tensor], product: Tensor) -> Tensor:
    """The projection behind a gate: its input is a product of two explained values."""
    return project(_scaled(product, 0.5))


def _attention(
    kernel: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *arguments: Any,
    **options: Any,
) -> Any:
    query, key, value = _scaled(query, 0.25), _scaled(key, 0.25), _scaled(value, 0.5)
    return kernel(module, query, key, value, *arguments, **options)


def _rules(module: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[[Tensor], Tensor]]]:
    """The methods that one module's rules replace: where, which, by what."""
    if isinstance(module, ACTIVATIONS):
        yield module, "forward", partial(_identity, module.forward)
    elif isinstance(module, nn.LayerNorm):
        yield module, "forward", partial(_layer_norm, module)
    elif type(module).__name__.endswith("RMSNorm"):
        if hasattr(module, "_norm"):
            yield module, "_norm", partial(_normed, module)
        elif hasattr(module, "variance_epsilon"):
            yield module, "forward", partial(_rms_norm, module)
        else:
            raise NotImplementedError(f"{type(module).__name__} is a norm of no known form")
    elif all(isinstance(getattr(module, name, None), nn.Linear) for name in GATED):
        down = module.get_submodule("down_proj")
        yield down, "forward", partial(_gated_projection, down.forward)


@contextmanager
def _replaced(owner: nn.Module, name: str, method: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`owner.name` is `method` for a while; what the instance itself held comes back."""
    own = vars(owner).get(name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def _registered(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention kernel, for all models, with scaled gradients."""
    name = model.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(f'attention "{name}" is no registry entry; load the model with "sdpa"')
    kernel = ALL_ATTENTION_FUNCTIONS[name]
    if isinstance(kernel, partial) and kernel.func is _attention:
        raise RuntimeError("a model is already patched, and the attention registry is shared")
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, kernel))
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, kernel)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter requires a gradient, so that none is stored for or computed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def patched(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model's gradients are AttnLRP coefficients inside; afterwards it is what it was."""
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    with ExitStack() as stack:
        stack.enter_context(_registered(model))
        stack.enter_context(_frozen(model))
        for module in model.modules():
            for replacement in _rules(module):
                stack.enter_context(_replaced(*replacement))
        yield model


def relevance(
    model: Any,
    inputs: Mapping[str, Tensor],
    target_index: int | Tensor | None = None,
    logits_to_keep: int = 1,
) -> Tensor:
    """Relevance (batch, sequence) of each token for one logit per row.

    The logit is the one of `target_index`, or the largest; of a language model, at the last
    position. `logits_to_keep` saves the others where the model can leave them out. `model` may be
    compiled, and must be patched.
    """
    rest: dict[str, Any] = {name: value for name, value in inputs.items() if name != "input_ids"}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        rest["logits_to_keep"] = logits_to_keep
    if getattr(model.config, "use_cache", False):
        rest["use_cache"] = False
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **rest).logits
    logits = logits[:, -1] if logits.dim() == 3 else logits
    if target_index is None:
        index = logits.detach().argmax(-1)
    else:
        index = torch.as_tensor(target_index, device=logits.device).expand(logits.shape[:1])
    explained = logits.gather(-1, index[:, None]).sum()
    (coefficient,) = torch.autograd.grad(explained, embeds)
    wide = torch.promote_types(embeds.dtype, torch.float32)
    product: Tensor = embeds.detach().to(wide) * coefficient.to(wide)
    return product.sum(-1)
