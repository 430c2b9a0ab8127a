"""The routers of Transformers as data: what each form of ``forward`` does, as arguments of :func:`moekit.route`.

A form is known by the digest of its code (:func:`moekit.hf.gates.digest`), never by the name of its class, and each was
read: ``tests/test_hf_routers.py`` compares every class of the installed Transformers with its form.

Letters: T tokens, E experts, K experts per token, H hidden.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moekit import _check
from moekit.hf.gates import _attached, digest

Arguments = dict[str, Any]  # what forward was called with, by name
Choice = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, K], indices [T, K]
_ROOT_SOFTPLUS = "fcdfd2ee5cf7f190"  # SqrtSoftplusActivation.forward
_STATICS = "22004140da1a35af"  # Ernie4_5_MoeStatics.forward
_LONGCAT_CHOICE = "196a20cdb59941e2"  # LongcatFlashTopkRouter.get_topk_indices
# Ernie divides by the sum of the chosen or this, whichever is more; moekit.route by the sum plus this.
_NO_LARGER_CLAMP = 1e-9


_digests: weakref.WeakKeyDictionary[FunctionType, str] = weakref.WeakKeyDictionary()


def digest_of(function: Any, cells: tuple[str, ...] = (), decorators: tuple[str, ...] = ()) -> str:
    """:func:`moekit.hf.gates.digest`, taken once a function; empty for what is none."""
    if type(function) is not FunctionType:
        return ""
    if function not in _digests:
        _digests[function] = digest(function, cells, decorators)
    return _digests[function]


# --- outputs --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a router's output has its choice; ``unpack(output, k)`` and ``pack(output, weights, indices)``."""

    unpack: Callable[[Any, int], Choice]
    pack: Callable[[Any, Tensor, Tensor], Any]


def flat(rows: Tensor) -> Tensor:
    """``[..., N]`` as ``[T, N]``; what is that already is itself."""
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def _tuple(logits: int = 0, weights: int = 1, indices: int = 2) -> Layout:
    """A tuple, with these positions."""

    def unpack(output: Any, k: int) -> Choice:
        return flat(output[logits]), flat(output[weights]), flat(output[indices])

    def pack(output: Any, new_weights: Tensor, new_indices: Tensor) -> Any:
        changed = list(output)
        changed[weights] = new_weights.to(output[weights].dtype).view_as(output[weights])
        changed[indices] = new_indices.to(output[indices].dtype).view_as(output[indices])
        return tuple(changed)

    return Layout(unpack, pack)


def _unpack_probabilities(output: Any, k: int) -> Choice:
    """The softmax in the place of the logits: its logarithm is logits of the same softmax, and finite."""
    probabilities, weights, indices = map(flat, output)
    return probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log(), weights, indices


def _unpack_llama4(output: Any, k: int) -> Choice:
    """``(scores [T, E], logits)``, where a score is 0 but of the chosen."""
    scores, logits = output
    weights, indices = scores.topk(k, dim=1)
    return logits, weights, indices


def _pack_llama4(output: Any, weights: Tensor, indices: Tensor) -> Any:
    scores = torch.zeros_like(output[0]).scatter(1, indices.long(), weights.to(output[0].dtype))
    return scores, output[1]


def _unpack_sorted(output: Any, k: int) -> Choice:
    """``(slot of each row, its token, its weight, rows of each expert, logits)``, rows sorted by expert."""
    slots, _, gates, sizes, logits = output
    experts = torch.arange(len(sizes), device=slots.device)
    of_row = experts.repeat_interleave(torch.tensor(sizes, device=slots.device), output_size=slots.shape[0])
    indices, weights = torch.empty_like(slots).scatter(0, slots, of_row), torch.empty_like(gates).scatter(0, slots, gates)
    return logits, weights.view(-1, k), indices.view(-1, k)


def _pack_sorted(output: Any, weights: Tensor, indices: Tensor) -> Any:
    experts = indices.long().flatten()
    slots = experts.argsort(stable=True)
    sizes = experts.bincount(minlength=len(output[3])).tolist()  # a list, as the router itself makes one
    tokens = slots.div(indices.shape[1], rounding_mode="trunc")
    return slots, tokens, weights.to(output[2].dtype).flatten()[slots], sizes, output[4]


PLAIN = _tuple()
_LOGITS_INDICES_WEIGHTS = _tuple(weights=2, indices=1)
_PROBABILITIES = Layout(_unpack_probabilities, PLAIN.pack)
_LLAMA4 = Layout(_unpack_llama4, _pack_llama4)
_SORTED = Layout(_unpack_sorted, _pack_sorted)


# --- logits ---------------------------------------------------------------------------------------------------------
# In the dtype from which moekit.route gives the weights the precision of the router's own: float32 wherever the router
# computes in it, for under autocast a product of float32 is not.


def _rows(arguments: Arguments) -> Tensor:
    return flat(given(arguments, "hidden_states"))


def _matrix(arguments: Arguments) -> Tensor:
    """For routers that normalise along dimension 1 whatever the shape."""
    hidden_states = given(arguments, "hidden_states")
    _check.tensor_dim("hf.routers", "hidden_states", hidden_states, 2)
    return hidden_states


def _native(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_rows(arguments), module.weight)


def _native_then_float(module: Any, arguments: Arguments) -> Tensor:
    return _native(module, arguments).float()


def _native_matrix(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_matrix(arguments), module.weight)


def _float(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_rows(arguments).float(), module.weight.float()).float()


def _float_rows(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_rows(arguments).float(), module.weight).float()


def _float_without_autocast(module: Any, arguments: Arguments) -> Tensor:
    device = _rows(arguments).device.type
    with contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        return _float(module, arguments)


def _as_weight(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_rows(arguments).to(module.weight.dtype), module.weight).float()


def _gate(module: Any, arguments: Arguments) -> Tensor:
    return module.gate(_rows(arguments)).float()


def _layer(module: Any, arguments: Arguments) -> Tensor:
    return module.layer(_matrix(arguments)).float()


def _wg(module: Any, arguments: Arguments) -> Tensor:
    rows = _rows(arguments)
    return module.wg(rows.float() if module.wg.weight.dtype is torch.float32 else rows)


def _classifier(module: Any, arguments: Arguments) -> Tensor:
    """Without the bias that the classifier may have: the router leaves it out."""
    return functional.linear(_rows(arguments).float(), module.classifier.weight.float()).float()


def _gemma4(module: Any, arguments: Arguments) -> Tensor:
    rows = module.norm(_rows(arguments)) * module.scale * module.scalar_root_size
    return module.proj(rows).float()


def _gpt_oss(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_matrix(arguments), module.weight, module.bias)


def _privacy_filter(module: Any, arguments: Arguments) -> Tensor:
    return functional.linear(_matrix(arguments).float(), module.weight.float(), module.bias.float()).float()


def _kolibri1(module: Any, arguments: Arguments) -> Tensor:
    rows, weight = _rows(arguments), module.weight
    if rows.is_cuda and rows.dtype == weight.dtype and not torch.is_grad_enabled():
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    return _float(module, arguments)


def _llama4(module: Any, arguments: Arguments) -> Tensor:
    return nn.Linear.forward(module, _matrix(arguments))


# --- options of moekit.route ----------------------------------------------------------------------------------------


def given(arguments: Arguments, name: str) -> Any:
    """The argument ``name`` of the router's forward, which needs it."""
    value = arguments.get(name)
    if value is None:
        raise _check.fail("hf.routers", name, "given to the router", None)
    return value


def _normalised(flag: Any, epsilon: float) -> dict[str, Any]:
    return {"epsilon": epsilon} if flag else {"normalise": False}


def _groups(module: Any, best: int) -> dict[str, Any]:
    """Nothing where a token may use every group."""
    if module.topk_group == module.num_group:
        return {}
    return {"num_groups": module.num_group, "group_topk": module.topk_group, "group_best": best}


def score_of(act: Any) -> str | None:
    """The score by moekit's name that the activation ``act`` computes, None for another."""
    if not isinstance(act, nn.Module) or _attached(act) or type(act).__call__ is not nn.Module.__call__:
        return None
    if type(act) is nn.Sigmoid:
        return "sigmoid"
    return "sqrtsoftplus" if digest_of(type(act).forward) == _ROOT_SOFTPLUS else None


def _softmax_then_k(module: Any, arguments: Arguments) -> dict[str, Any]:
    return _normalised(module.norm_topk_prob, 0.0)


def _softmax_normalised(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"epsilon": 0.0}


def _softmax_of_chosen(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"select_by": "logits"}


def _softmax_as_is(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"normalise": False}


def _shared_out(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"select_by": "logits", "scale": 1.0 / module.top_k}


def _deepseek_v2(module: Any, arguments: Arguments) -> dict[str, Any]:
    groups = _groups(module, 1) if module.topk_method == "group_limited_greedy" else {}
    return {"normalise": False, "scale": module.routed_scaling_factor, **groups}


def _deepseek_v3(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {**_beam(module, arguments), "scale": module.routed_scaling_factor}


def _beam(module: Any, arguments: Arguments) -> dict[str, Any]:
    options = {"score": "sigmoid", "bias": module.e_score_correction_bias, **_groups(module, 2)}
    return {**options, **_normalised(module.norm_topk_prob, 1e-20)}


def _axk2(module: Any, arguments: Arguments) -> dict[str, Any]:
    options = {"score": "sigmoid", "bias": module.e_score_correction_bias, "scale": module.routed_scaling_factor}
    return {**options, **_normalised(module.norm_topk_prob, 1e-20)}


def _deepseek_v4(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"bias": module.e_score_correction_bias, **_weighed_v4(module)}


def _hash(module: Any, arguments: Arguments) -> dict[str, Any]:
    table = module.tid2eid[given(arguments, "input_ids").reshape(-1)]
    return {"indices": table.long(), **_weighed_v4(module)}


def _weighed_v4(module: Any) -> dict[str, Any]:
    return {"score": score_of(module.score_fn), "epsilon": 1e-20, "scale": module.routed_scaling_factor}


def _muse_spark(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {
        "score": "sigmoid",
        "multiplier": module.output_multiplier,
        "bias": module.e_score_correction_bias,
        "epsilon": module.norm_topk_prob_eps,
        "scale": module.routed_scaling_factor,
    }


def _gemma4_options(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"epsilon": 0.0, "expert_scale": module.per_expert_scale}


def _hy_v3(module: Any, arguments: Arguments) -> dict[str, Any]:
    bias = given(arguments, "e_score_correction_bias")
    return {"score": "sigmoid", "bias": bias, "epsilon": 1e-20, "scale": module.router_scaling_factor}


def _afmoe(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"score": "sigmoid", "bias": given(arguments, "expert_bias"), "epsilon": 1e-20, "scale": module.route_scale}


def _minimax_m2(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"score": "sigmoid", "bias": given(arguments, "e_score_correction_bias"), "epsilon": 0.0}


def _minimax_m3(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"score": "sigmoid", "bias": module.e_score_correction_bias, "epsilon": 0.0}


def _lfm2(module: Any, arguments: Arguments) -> dict[str, Any]:
    bias = {"bias": given(arguments, "expert_bias")} if module.use_expert_bias else {}
    options = {"score": "sigmoid", "scale": module.routed_scaling_factor, **bias}
    return {**options, **_normalised(module.norm_topk_prob, 1e-6)}


def _ernie(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"bias": module.moe_statics.e_score_correction_bias.squeeze(), "epsilon": module.norm_min}


def _cohere2(module: Any, arguments: Arguments) -> dict[str, Any]:
    if module.expert_selection_fn == "softmax":
        return {"select_by": "logits"}
    return {"select_by": "logits", "score": "sigmoid", **_normalised(module.norm_topk_prob, 0.0)}


def _flint(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"score": "sigmoid", **_normalised(module.norm_topk_prob, 0.0)}


def _kolibri1_options(module: Any, arguments: Arguments) -> dict[str, Any]:
    bias = module.e_score_correction_bias
    return {"score": "sigmoid", "select_by": "logits", "bias": bias, **_normalised(module.norm_topk_prob, 0.0)}


def _laguna(module: Any, arguments: Arguments) -> dict[str, Any]:
    softcap = module.router_logit_softcapping
    return {**_minimax_m3(module, arguments), **({"softcap": softcap} if softcap > 0.0 else {})}


def _llama4_options(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"score": "sigmoid", "select_by": "logits", "normalise": False}


def _longcat(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {"bias": module.e_score_correction_bias, "normalise": False, "scale": module.routed_scaling_factor}


def _mistral4(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {**_groups(module, 2), **_normalised(module.norm_topk_prob, 1e-20), "scale": module.routed_scaling_factor}


def _mistral_large4(module: Any, arguments: Arguments) -> dict[str, Any]:
    return {**_groups(module, 2), "epsilon": 1e-20, "scale": module.routed_scaling_factor}


# --- what an instance must be like ----------------------------------------------------------------------------------


def _any(module: Any) -> bool:
    return True


def _known_method(module: Any) -> bool:
    return module.topk_method in ("greedy", "group_limited_greedy")


def _groups_without_effect(module: Any) -> bool:
    """AXK2 gives experts outside the chosen groups a score of 0, above those of a negative bias: no group limit."""
    return module.num_group is None or module.topk_group == module.num_group


def _known_score(module: Any) -> bool:
    return score_of(module.score_fn) is not None


def _sigmoid(module: Any) -> bool:
    return score_of(module.scoring_function) == "sigmoid"


def _known_selection(module: Any) -> bool:
    return module.expert_selection_fn in ("softmax", "sigmoid")


def _plain_statics(module: Any) -> bool:
    statics = module.moe_statics
    adds = digest_of(type(statics).forward) == _STATICS and not _attached(statics)
    return adds and 0 <= module.norm_min <= _NO_LARGER_CLAMP


def _selects_by_scores(module: Any) -> bool:
    """LongCat's choice is in a method of its own, under ``torch.no_grad``."""
    chooses = type(module).get_topk_indices
    if "get_topk_indices" in module.__dict__ or getattr(chooses, "__code__", None) is not _UNDER_NO_GRAD:
        return False
    inner = getattr(chooses, "__wrapped__", None)
    return digest_of(inner, decorators=("torch.no_grad()",)) == _LONGCAT_CHOICE


_UNDER_NO_GRAD = torch.no_grad()(lambda: None).__code__


def _is_linear(module: Any) -> bool:
    """``super().forward`` is a linear layer's."""
    (cell,) = type(module).forward.__closure__
    return super(cell.cell_contents, module).forward.__func__ is nn.Linear.forward


# --- the forms ------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """What one form of a router does.

    Attributes:
        logits: of the module and forward's arguments.
        options: of the same: :func:`moekit.route`'s without ``k``.
        layout: the router's output.
        fits: whether an instance, as it is set, does nothing else.
        k: K of the module.
    """

    logits: Callable[[Any, Arguments], Tensor]
    options: Callable[[Any, Arguments], dict[str, Any]]
    layout: Layout = PLAIN
    fits: Callable[[Any], bool] = _any
    k: Callable[[Any], int] = lambda module: module.top_k


_ERNIE = Form(_float_without_autocast, _ernie, fits=_plain_statics)
_GEMMA4 = Form(_gemma4, _gemma4_options, _PROBABILITIES, k=lambda module: module.config.top_k_experts)

# By the digest of forward. Of Transformers 5.24; the last ones are of 5.12, where it is written otherwise.
FORMS: dict[str, Form] = {
    "041f60160d01b9a7": Form(_float, _deepseek_v3),  # AXK1, BailingHybrid, DeepseekV3, Glm4Moe, KimiLinear, NemotronH ...
    "2d54438b2f025a5c": Form(_float, _beam),
    "b230fb052c4018b1": Form(_float, _axk2, fits=_groups_without_effect),
    "f1724a9d826d028c": Form(_native, _softmax_then_k),  # Qwen2Moe, Qwen3Moe, Qwen3Next, Olmoe, FlexOlmo, Mellum ...
    "5ddbaad4affd642a": Form(_native, _softmax_normalised),  # Qwen3VLMoe, Qwen3OmniMoeText, Qwen3_5Moe
    "2305117e27e74552": Form(_float, _softmax_then_k),  # LaraMini
    "14e22a67b9a329d4": Form(_wg, _softmax_normalised),  # HunYuanMoEV1
    "91bf9b97fdddc7a7": Form(_native_then_float, _softmax_normalised),  # Mixtral, MiniMax
    "1d3f4e2516edddf3": Form(_native, _softmax_as_is),  # Jamba
    "780e4db63f985098": Form(_native_then_float, _softmax_of_chosen),  # GraniteMoe and kin
    "09962a89e30b078e": Form(_native, _softmax_of_chosen),  # AriaText
    "9de56af7854a7a15": Form(_gpt_oss, _softmax_of_chosen),
    "a740850f39bae3fc": Form(_privacy_filter, _shared_out),  # OpenAIPrivacyFilter
    "fb27649086adc1c2": Form(_layer, _softmax_of_chosen, _SORTED),  # JetMoe; GraniteMoe of 5.12
    "7942376fe007aa14": Form(_native_matrix, _cohere2, fits=_known_selection),
    "705580386fb1c93a": Form(_float, _deepseek_v2, fits=_known_method),  # DeepseekV2, DeepseekOcr2, UnlimitedOcr
    "126786e2b78dbee5": Form(_native, _deepseek_v4, fits=_known_score),
    "79c71c3648aa6a9d": Form(_native, _hash, fits=_known_score),  # DeepseekV4
    "35cc700b03d12c1f": Form(_float_rows, _deepseek_v4, fits=_known_score),  # Inkling2
    "480e1446ef5a1abc": Form(_float, _muse_spark, fits=_sigmoid),
    "527f97e097723ee2": _GEMMA4,  # Gemma4, DiffusionGemma
    "d4e46fa6a6659754": Form(_float, _hy_v3),  # HYV3, Dots3NoteVision
    "2a17167d2f75771c": _ERNIE,  # Ernie4_5_Moe, Ernie4_5_VLMoe
    "bf2a1d0f85b58a6f": Form(_gate, _afmoe),
    "16b0e5d8999e1006": Form(_float_without_autocast, _flint),
    "0e2c1fd22511ffc9": Form(_kolibri1, _kolibri1_options),
    "1872a6b4f02d645f": Form(_native_then_float, _laguna),
    "a98fe4eb43d7c7cf": Form(_native, _lfm2),
    "5ebd1866821cce61": Form(_llama4, _llama4_options, _LLAMA4, fits=_is_linear),
    "32e26cde7c7b6456": Form(_classifier, _longcat, fits=_selects_by_scores),
    "50eac694aa22044e": Form(_as_weight, _minimax_m2),
    "9388975a9eee35f8": Form(_as_weight, _minimax_m3),  # MiniMaxM3VL, Step3p7
    "2b67bcc0f0915421": Form(_native, _mistral4),
    "e10be5366104cf98": Form(_float, _mistral_large4),
    "a1613e99c4687e77": _ERNIE._replace(layout=_LOGITS_INDICES_WEIGHTS),
    "ace4641aeba4b53c": _GEMMA4,
}
