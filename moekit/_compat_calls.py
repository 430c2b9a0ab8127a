"""Which calls of a framework's functions moekit answers, for :mod:`moekit.compat`.

:func:`replacement` finds the form of a function that the installed release has, and returns a function that answers
what this form knows and passes the rest on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from moekit import _compat_probes, megatron, moe_utils
from moekit.ops.losses import DROP_POLICIES
from moekit.ops.topk import SCORE_FUNCTIONS

# The forms of the functions that releases disagree on; all others have the one of moe_utils.
_FORMS: dict[str, tuple[Callable, ...]] = {
    "permute": (moe_utils.permute, megatron.permute),
    "unpermute": (moe_utils.unpermute, megatron.unpermute),
    "topk_routing_with_score_function": (
        moe_utils.topk_routing_with_score_function,
        megatron.topk_routing_with_score_function,
    ),
    "get_updated_expert_bias": (megatron.get_updated_expert_bias,),
    "pad_routing_map": (megatron.pad_routing_map,),
    "qb_dual_update": (megatron.qb_dual_update,),
}
# Names beside those of moe_utils. Megatron-core's router_gating_linear multiplies mixed precisions in one call of
# TransformerEngine's, and get_tokens_per_expert_and_token_count sums over its groups: these stay theirs.
ALSO = ("qb_dual_update",)

DIFFERENCES = {
    "permute": "num_out_tokens below the number of routed pairs raises on a CPU, above it the rows at the end are zero with"
    " index -1, None counts the pairs; fused=True runs without TransformerEngine, returns the same indices as fused=False"
    " and honours drop_and_pad",
    "unpermute": "rows are added in float32 in a fixed order and rounded once; a restore_shape that is too narrow raises",
    "topk_routing_with_score_function": "expert_bias acts with softmax as well; scaling_factor=0.0 is zero; ties go to the"
    " lowest expert; float64 is computed in float64",
    "compute_routing_scores_for_aux_loss": "ties go to the lowest expert",
    "group_limited_topk": "ties go to the lowest group and expert; group_topk may be above topk",
    "switch_load_balancing_loss_func": "the loss is float32 whatever the dtype of probs; a padding_mask (True for valid"
    " tokens there) takes the call to the framework",
    "z_loss_func": "the loss is float32 whatever the dtype of logits",
    "sinkhorn": "finite for large logits; a token whose logits are all below -10 keeps its share",
    "apply_router_token_dropping": "ties, and drop_policy='position', keep the earliest tokens",
    "pad_routing_map": "returns a new map and does not write into its argument",
    "get_updated_expert_bias": "tokens_per_expert is not written; without a group the call goes to the framework",
    "qb_dual_update": "ties go to the lowest expert; T*k that is no multiple of E raises ValueError",
    "MoEAuxLossAutoScaler": "backward writes no scale; set_loss_scale keeps a copy: writing into the tensor it was given"
    " does not change the scale",
    **dict.fromkeys(
        (
            "weighted_swiglu",
            "weighted_geglu",
            "weighted_quick_geglu",
            "weighted_bias_swiglu_impl",
            "weighted_bias_geglu_impl",
        ),
        "float32 inside, rounded once; weights must be one a row, [N, 1]: others raise instead of broadcasting",
    ),
    "weighted_bias_quick_geglu_impl": "alpha acts; float32 inside, rounded once; weights must be one a row, [N, 1]: others"
    " raise instead of broadcasting",
}

# Values of parameters, by name, that moekit answers; others go to the framework.
_NUMBERS = (
    "topk",
    "router_topk",
    "k",
    "num_tokens",
    "num_experts",
    "num_groups",
    "group_topk",
    "pad_multiple",
    "align_size",
    "min_capacity",
    "alpha",
    "capacity_factor",
    "scaling_factor",
    "moe_aux_loss_coeff",
    "z_loss_coeff",
    "tol",
    "expert_bias_update_rate",
)
_KNOWN_VALUES: dict[str, Callable[[Any], bool]] = {
    "score_function": lambda value: value in SCORE_FUNCTIONS,
    "drop_policy": lambda value: value in DROP_POLICIES,
    "router_replay": lambda value: value is None,
    "tp_dp_cp_group": lambda value: value is not None,  # None is a group of Megatron-core's global state
    # TransformerEngine's row_id_map has two dimensions: whoever made it has to read it.
    "sorted_indices": lambda value: not (isinstance(value, Tensor) and value.dim() == 2),
    **dict.fromkeys(_NUMBERS, lambda value: not isinstance(value, Tensor)),
}
# Megatron-core's mask is True for valid tokens here and for padding elsewhere.
_OTHER_MEANING = {"switch_load_balancing_loss_func": {"padding_mask"}}


def replacement(name: str, theirs: Any, module: ModuleType) -> Any:
    """What stands in for ``theirs``, the ``name`` of a framework's ``module``; a text that says why if nothing can."""
    if inspect.isclass(theirs):
        return _class_for(name, theirs)
    original = getattr(theirs, "_torchdynamo_orig_callable", theirs)
    try:
        signature = inspect.signature(original)
    except (TypeError, ValueError):
        return "its parameters cannot be read"
    forms = _FORMS.get(name) or (getattr(moe_utils, name),)
    chosen = _choose_form(name, forms, original, signature)
    if isinstance(chosen, str):
        return chosen
    mode = vars(module).get("is_batch_invariant_mode_enabled")
    return _dispatch(name, chosen, theirs, signature, mode if name in ("permute", "unpermute") else None)


def _class_for(name: str, theirs: type) -> type | str:
    ours = getattr(moe_utils, name)
    wanted, known = _forward_parameters(theirs), _forward_parameters(ours)
    if wanted is not None and known is not None and wanted != known:
        return f"its forward takes ({', '.join(wanted)}), moekit's ({', '.join(known)})"
    return ours


def _forward_parameters(cls: type) -> list[str] | None:
    """The names that ``apply`` takes; None if the class does not say."""
    parameters = inspect.signature(getattr(cls, "forward", lambda *args: None)).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return None
    return [name for name in parameters if name != "ctx"]


def _choose_form(name: str, forms: tuple[Callable, ...], original: Callable, signature: inspect.Signature) -> Any:
    """The form that the framework's function has; a text if it has none of them.

    The parameters say which: the shortest form that knows them all, the longest if none does. The small example may
    contradict, and then another form is tried.
    """
    theirs = set(signature.parameters)
    ranked = sorted(forms, key=lambda form: not theirs <= set(_parameters(form)))
    if not theirs <= set(_parameters(ranked[0])):
        ranked.reverse()
    reasons = []
    for form in ranked:
        required = {key for key, p in _parameters(form).items() if p.default is p.empty}
        if name == "get_updated_expert_bias" and "tp_dp_cp_group" not in theirs:
            reasons.append("it sums over the framework's global process group")
        elif not required <= theirs:
            reasons.append(f"it has no parameter {', '.join(sorted(required - theirs))}, which moekit's needs")
        else:
            reason = _contradiction(name, form, original, signature)
            if reason is None:
                return form
            reasons.append(f"it {reason}")
    return reasons[0]


def _contradiction(name: str, form: Callable, original: Callable, signature: inspect.Signature) -> str | None:
    """How the two differ on a small example. An example that the framework's function cannot run says nothing."""
    make = _compat_probes.ARGUMENTS.get(name)
    if make is None:
        return None
    names = list(_parameters(form))
    try:
        found = _compat_probes.call(original, make(), names, list(signature.parameters), {})
    except Exception:  # for want of a GPU, a process group, another package
        return None
    return _compat_probes.difference(found, _compat_probes.call(form, make(), names, names, _implied(form, signature)))


def _implied(form: Callable, signature: inspect.Signature) -> dict[str, Any]:
    """What the framework takes where nothing is given, if moekit would take something else."""
    ours, empty = _parameters(form), inspect.Parameter.empty
    return {
        key: p.default
        for key, p in signature.parameters.items()
        if key in ours and p.default is not empty and not _same(p.default, ours[key].default)
    }


def _dispatch(name: str, ours: Callable, theirs: Any, signature: inspect.Signature, mode: Callable | None) -> Callable:
    """``ours``, but a call with an argument or a value that only ``theirs`` understands goes there.

    Written with plain dictionaries, which torch.compile traces. ``mode`` says whether Megatron-core's batch-invariant
    mode is on, which is theirs.
    """
    order = [key for key, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {key for key, p in signature.parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = _parameters(ours)
    other = set(keywords) - set(known) | _OTHER_MEANING.get(name, set())
    required = {key for key in keywords if signature.parameters[key].default is inspect.Parameter.empty}
    defaults = {key: signature.parameters[key].default for key in keywords - required}
    implied = {key: value for key, value in _implied(ours, signature).items() if key not in other}
    checks = {key: check for key, check in _KNOWN_VALUES.items() if key in keywords and key not in other}
    to_be_given = [key for key, check in checks.items() if key in defaults and not check(defaults[key])]
    plain = not (other or implied or checks or mode) and order == list(known)[: len(order)] and keywords == set(order)

    def is_ours(args: tuple, given: dict[str, Any], count: int) -> bool:
        missing = [key for key in required if key not in given]
        if missing or len(args) > len(order) or len(given) != count or any(key not in keywords for key in given):
            return False  # a mistake, or an open-ended argument: theirs to answer
        for key in other:
            if key in given and not (key in defaults and _same(given[key], defaults[key])):
                return False
        for key, check in checks.items():
            if key in given and not check(given[key]):
                return False
        for key in to_be_given:
            if key not in given:
                return False
        return mode is None or not mode()

    @functools.wraps(ours)
    def call(*args: Any, **kwargs: Any) -> Any:
        if plain:
            return ours(*args, **kwargs)
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        if not is_ours(args, given, len(args) + len(kwargs)):
            if name == "unpermute":
                _refuse_foreign_reader(given)
            return theirs(*args, **kwargs)
        return ours(**{**implied, **{key: value for key, value in given.items() if key not in other}})

    return call


def _refuse_foreign_reader(given: dict[str, Any]) -> None:
    """Row indices of moekit's must not reach TransformerEngine, which reads them as a map."""
    indices = given.get("sorted_indices")
    if given.get("fused") and isinstance(indices, Tensor) and indices.dim() == 1:
        arguments = ", ".join(key for key in given)
        raise TypeError(
            "moekit.compat: unpermute(fused=True) of rows that moekit permuted has an argument or a mode that only the"
            f" framework knows, and the framework cannot read their indices (given: {arguments})"
        )


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _same(value: Any, other: Any) -> bool:
    """The same default: identical, or equal numbers or texts."""
    return value is other or (type(value) is type(other) and isinstance(value, (int, float, str, bool)) and value == other)
