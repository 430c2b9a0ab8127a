"""How each model type of Transformers writes down its sizes, and what it has besides routed experts.

A reader takes the keys of its own type and no others. Sizes must be there; what a published config may leave out has the
default of Transformers' config class. Numbers of parameters are those of the class for causal language modelling, without
the layers that predict further tokens; tests compare them with Transformers' own models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit import _check

_OP = "plan"


@dataclass(frozen=True)
class Keys:
    """The keys of one config.

    Attributes:
        name: of the config, for errors.
        content: what the JSON says.
    """

    name: str
    content: Mapping[str, Any]

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number, ``default`` where it is absent or null."""
        value = self.content.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            got = "no such key" if value is None else repr(value)
            raise _check.fail(_OP, f"{key} of {self.name}", f"an integer of at least {least}", got)
        return value

    def size_or(self, key: str, otherwise: int) -> int:
        """A whole number, ``otherwise`` where it is null; it must be there."""
        return otherwise if key in self.content and self.content[key] is None else self.size(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.content.get(key, default)
        if not isinstance(value, bool):
            raise _check.fail(_OP, f"{key} of {self.name}", "true or false", repr(value))
        return value

    def layers_in(self, key: str, layers: int) -> set[int]:
        """Numbers of layers, none where it is absent."""
        value = self.content.get(key) or []
        if not isinstance(value, list) or not all(isinstance(number, int) and 0 <= number < layers for number in value):
            raise _check.fail(_OP, f"{key} of {self.name}", f"a list of layers (0 to {layers - 1})", repr(value))
        return set(value)


@dataclass(frozen=True)
class Counts:
    """Sizes of a model, and parameters of its parts.

    Attributes:
        layers: all.
        moe_layers: those with experts.
        hidden: H.
        inner: I of an expert.
        experts: E.
        topk: K.
        attention: parameters of a layer's attention, norms within it included.
        ends: of embedding and head.
        router: of a layer's.
        shared: of a layer's shared experts, and what weighs them.
        dense: of a layer that has no experts.
        biases: of experts.
        groups: of experts.
        groups_chosen: by a token.
    """

    layers: int
    moe_layers: int
    hidden: int
    inner: int
    experts: int
    topk: int
    attention: int
    ends: int
    router: int
    shared: int = 0
    dense: int = 0
    biases: bool = False
    groups: int = 1
    groups_chosen: int = 1

    def others(self) -> dict[str, int]:
        """Parameters of all but the routed experts, of all layers."""
        return {
            "embedding and head": self.ends,
            "attention": self.layers * self.attention,
            "norms": (2 * self.layers + 1) * self.hidden,
            "routers": self.moe_layers * self.router,
            "shared experts": self.moe_layers * self.shared,
            "dense layers": (self.layers - self.moe_layers) * self.dense,
        }


def _grouped_attention(
    keys: Keys, hidden: int, *, bias: bool, out_bias: bool = False, own_head: bool = False
) -> tuple[int, int, int, int]:
    """Parameters of q, k, v and o; the width of q, that of k, and that of a head, which ``own_head`` says must be given."""
    heads = keys.size("num_attention_heads")
    few = keys.size_or("num_key_value_heads", heads)
    head = keys.size("head_dim", None if own_head else hidden // heads)
    wide, narrow = heads * head, few * head
    weights = 2 * hidden * (wide + narrow)
    return weights + (wide + 2 * narrow if bias else 0) + (hidden if out_bias else 0), wide, narrow, head


def _latent_attention(keys: Keys, hidden: int) -> int:
    """Of DeepSeek-V2 and V3: keys and values from a low-rank product, and queries too, or not."""
    heads, low, rope = (keys.size(key) for key in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
    plain, value = keys.size("qk_nope_head_dim"), keys.size("v_head_dim")
    queries, bias = heads * (plain + rope), keys.flag("attention_bias", False)
    rank = keys.size_or("q_lora_rank", 0)
    q = rank * (hidden + 1 + queries) + (rank if bias else 0) if rank else hidden * queries
    kv = hidden * (low + rope) + low + low * heads * (plain + value) + (low + rope if bias else 0)
    return q + kv + heads * value * hidden + (hidden if bias else 0)


def _ends(keys: Keys, hidden: int) -> int:
    return (1 if keys.flag("tie_word_embeddings", False) else 2) * keys.size("vocab_size") * hidden


def _every_so_many(keys: Keys, layers: int) -> int:
    """Layers with experts where each so-manieth has them, but for those that are named."""
    step, plain = keys.size("decoder_sparse_step", 1), keys.layers_in("mlp_only_layers", layers)
    return sum((layer + 1) % step == 0 and layer not in plain for layer in range(layers))


def _mixtral(keys: Keys) -> Counts:
    layers, hidden, experts = keys.size("num_hidden_layers"), keys.size("hidden_size"), keys.size("num_local_experts")
    attention, *_ = _grouped_attention(keys, hidden, bias=False)
    sizes = (layers, layers, hidden, keys.size("intermediate_size"), experts, keys.size("num_experts_per_tok"))
    return Counts(*sizes, attention, _ends(keys, hidden), router=experts * hidden)


def _minimax_m2(keys: Keys) -> Counts:
    layers, hidden, experts = keys.size("num_hidden_layers"), keys.size("hidden_size"), keys.size("num_local_experts")
    attention, wide, narrow, _ = _grouped_attention(keys, hidden, bias=False, own_head=True)
    sizes = (layers, layers, hidden, keys.size("intermediate_size"), experts, keys.size("num_experts_per_tok"))
    return Counts(*sizes, attention + wide + narrow, _ends(keys, hidden), router=experts * hidden)


def _gpt_oss(keys: Keys) -> Counts:
    layers, hidden, experts = keys.size("num_hidden_layers"), keys.size("hidden_size"), keys.size("num_local_experts")
    bias = keys.flag("attention_bias", True)
    attention, *_ = _grouped_attention(keys, hidden, bias=bias, out_bias=bias, own_head=True)
    sinks, router = keys.size("num_attention_heads"), experts * (hidden + 1)
    sizes = (layers, layers, hidden, keys.size("intermediate_size"), experts, keys.size("num_experts_per_tok"))
    return Counts(*sizes, attention + sinks, _ends(keys, hidden), router, biases=True)


def _olmoe(keys: Keys) -> Counts:
    layers, hidden, experts = keys.size("num_hidden_layers"), keys.size("hidden_size"), keys.size("num_experts")
    bias = keys.flag("attention_bias", False)
    attention, _, narrow, _ = _grouped_attention(keys, hidden, bias=bias, out_bias=bias)
    sizes = (layers, layers, hidden, keys.size("intermediate_size"), experts, keys.size("num_experts_per_tok"))
    return Counts(*sizes, attention + hidden + narrow, _ends(keys, hidden), router=experts * hidden)


def _qwen3_moe(keys: Keys) -> Counts:
    key = "num_experts" if "num_experts" in keys.content else "num_local_experts"  # newer Transformers write the latter
    layers, hidden, experts = keys.size("num_hidden_layers"), keys.size("hidden_size"), keys.size(key)
    bias = keys.flag("attention_bias", False)
    attention, _, _, head = _grouped_attention(keys, hidden, bias=bias, out_bias=bias)
    sizes = (hidden, keys.size("moe_intermediate_size"), experts, keys.size("num_experts_per_tok"))
    dense = 3 * hidden * keys.size("intermediate_size")
    parts = (attention + 2 * head, _ends(keys, hidden), experts * hidden)
    return Counts(layers, _every_so_many(keys, layers), *sizes, *parts, dense=dense)


def _qwen2_moe(keys: Keys) -> Counts:
    layers, hidden, experts = keys.size("num_hidden_layers"), keys.size("hidden_size"), keys.size("num_experts")
    attention, *_ = _grouped_attention(keys, hidden, bias=keys.flag("qkv_bias", True))
    sizes = (hidden, keys.size("moe_intermediate_size"), experts, keys.size("num_experts_per_tok"))
    shared = 3 * hidden * keys.size("shared_expert_intermediate_size") + hidden
    dense = 3 * hidden * keys.size("intermediate_size")
    parts = (attention, _ends(keys, hidden), experts * hidden)
    return Counts(layers, _every_so_many(keys, layers), *sizes, *parts, shared=shared, dense=dense)


def _after_some_dense(keys: Keys, attention: int) -> Counts:
    """DeepSeek-V3, and GLM-4.5 after it: dense layers first, shared experts, groups."""
    layers, hidden, inner = (keys.size(key) for key in ("num_hidden_layers", "hidden_size", "moe_intermediate_size"))
    experts, dense = keys.size("n_routed_experts"), keys.size("first_k_dense_replace", least=0)
    groups, chosen = keys.size("n_group"), keys.size("topk_group")
    if experts % groups or chosen > groups:
        wanted = f"groups that share the {experts} experts equally, and no fewer than topk_group"
        raise _check.fail(_OP, f"n_group of {keys.name}", wanted, f"{groups} with topk_group {chosen}")
    topk, reached = keys.size("num_experts_per_tok"), experts // groups * chosen
    if topk > reached:
        wanted = f"at most the {reached} experts that topk_group {chosen} of n_group {groups} leaves"
        raise _check.fail(_OP, f"num_experts_per_tok of {keys.name}", wanted, topk)
    return Counts(
        *(layers, max(layers - dense, 0), hidden, inner, experts, topk, attention),
        ends=_ends(keys, hidden),
        router=experts * hidden,
        shared=3 * hidden * inner * keys.size("n_shared_experts"),
        dense=3 * hidden * keys.size("intermediate_size"),
        groups=groups,
        groups_chosen=chosen,
    )


def _deepseek_v3(keys: Keys) -> Counts:
    return _after_some_dense(keys, _latent_attention(keys, keys.size("hidden_size")))


def _glm4_moe(keys: Keys) -> Counts:
    hidden = keys.size("hidden_size")
    attention, _, _, head = _grouped_attention(keys, hidden, bias=keys.flag("attention_bias", False))
    return _after_some_dense(keys, attention + (2 * head if keys.flag("use_qk_norm", False) else 0))


FAMILIES: dict[str, Callable[[Keys], Counts]] = {
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "minimax_m2": _minimax_m2,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
