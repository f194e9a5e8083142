"""The cost of a step against numbers computed by hand, and against what was measured."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from fourfold.planning.cost import bubble_seconds, bubble_share, cut_step, estimate_cost
from fourfold.planning.engines import COMPILED, EAGER, Engine
from fourfold.planning.flops import Flops, head_flops, layer_flops, layer_products, model_flops, visible_keys
from fourfold.planning.hardware import Cluster, build_cluster, find_device
from fourfold.planning.job import Job
from fourfold.planning.kernels import Place, head_seconds, layer_seconds
from fourfold.planning.layout import Layout
from fourfold.planning.read_shape import read_shape
from fourfold.planning.shape import Layer, ModelShape, Weight
from fourfold.planning.traffic import groups_of, pipeline_sends, strides

MODELS = Path(__file__).parents[3] / "examples" / "models"
H100 = find_device("h100")


def _linear(name: str, rows: int, columns: int, cut: int, **more: Any) -> Weight:
    kind = "attention" if "attn" in name else "mlp"
    return Weight(f"{name}.weight", (rows, columns), kind, cut, linear=True, **more)


# hidden 8, two heads of 4, one key head; 64 + 32 + 32 + 64 + 3 x 128 = 576 numbers in matrices, 16 in norms
ATTENTION = (
    _linear("self_attn.q_proj", 8, 8, 0),
    _linear("self_attn.k_proj", 4, 8, 0, of_kv=True),
    _linear("self_attn.v_proj", 4, 8, 0, of_kv=True),
    _linear("self_attn.o_proj", 8, 8, 1),
)
NORMS = (Weight("input_layernorm.weight", (8,), "norm"), Weight("post_attention_layernorm.weight", (8,), "norm"))
DENSE = Layer(
    (*ATTENTION, _linear("mlp.gate_proj", 16, 8, 0), _linear("mlp.up_proj", 16, 8, 0),
     _linear("mlp.down_proj", 8, 16, 1), *NORMS)
)  # fmt: skip
SPARSE = Layer(
    (*ATTENTION, Weight("mlp.gate.weight", (4, 8), "router"), Weight("mlp.experts.gate_up_proj", (4, 32, 8), "experts"),
     Weight("mlp.experts.down_proj", (4, 8, 16), "experts"), *NORMS)
)  # fmt: skip
OUTER = (
    Weight("model.embed_tokens.weight", (32, 8), "embedding", 0),
    Weight("model.norm.weight", (8,), "norm"),
    Weight("lm_head.weight", (32, 8), "head", 0),
)


def _shape(layer: Layer, layers: int = 2, **more: Any) -> ModelShape:
    experts = 4 if layer.has_experts else 0
    facts: dict[str, Any] = {
        "family": "llama", "hidden": 8, "intermediate": 16, "heads": 2, "kv_heads": 1, "head_dim": 4, "value_dim": 4,
        "vocab": 32, "max_positions": 64, "tied": False, "experts": experts, "experts_per_token": experts // 2,
        "expert_intermediate": 4 * experts, "gated": True, "kinds": (layer,), "order": (0,) * layers, "outer": OUTER,
    }  # fmt: skip
    return ModelShape(**{**facts, **more})


TINY = _shape(DENSE)
MOE = _shape(SPARSE)
FULL = Job(tuning="full", sequence=10, sequences_per_step=4)
LORA = replace(FULL, tuning="lora", lora_rank=2)


def _sent(
    layout: Layout, *, shape: ModelShape = TINY, job: Job = FULL, recompute: Any = "none", micro: int = 20
) -> Any:
    cluster = build_cluster("h100", min(8, layout.world_size))
    job = replace(job, sequences_per_step=4 * layout.dp)  # two micro-batches of 20 positions on each rank
    return estimate_cost(shape, job, layout, cluster, recompute, micro).bytes_sent


# Operations. A token: linear 2 x 576 = 1152, scores and values over 5 keys 2 x 5 x 2 x (4 + 4) = 160.


def test_flops_when_full_tuning_are_twice_forward_for_backward() -> None:
    assert layer_flops(TINY, 0, FULL, "trained") == Flops(1312.0, 1152.0 + 320.0, 1152.0)
    assert head_flops(TINY, FULL) == Flops(512.0, 512.0, 512.0)


def test_flops_when_full_tuning_are_six_n_and_attention() -> None:
    n = 2 * 576 + 256
    assert model_flops(TINY, FULL) == 6 * n + 6 * 2 * 8 * 10


def test_flops_when_lora_have_no_weight_gradient_of_the_base() -> None:
    # adapters: 2 (in + out) = 32 + 24 + 24 + 32 + 3 x 48 = 256 numbers, 2 FLOPs each forward and 4 backward
    assert layer_flops(TINY, 0, LORA, "adapted") == Flops(1312.0 + 512.0, 1152.0 + 320.0 + 1024.0, 0.0)
    assert model_flops(TINY, LORA) == 2 * (1824 + 2496) + 2 * 512


def test_flops_when_lora_targets_two_projections_count_their_adapters_only() -> None:
    job = replace(LORA, lora_targets=("q_proj", "v_proj"))
    assert layer_flops(TINY, 0, job, "adapted").forward == 1312 + 2 * (32 + 24)


def test_flops_when_freezing_are_forward_alone_below_the_trained_layer() -> None:
    job = replace(FULL, tuning="freeze", trained_layers=1)
    assert model_flops(TINY, job) == 1312 + 3936 + 2 * 512


def test_flops_when_a_share_of_positions_is_trained_make_fewer_logits() -> None:
    assert head_flops(TINY, replace(FULL, trained_share=0.25)).forward == 128


def test_products_when_experts_are_cut_keep_their_own_and_their_tokens() -> None:
    up = layer_products(MOE, 0, FULL, ep=2)[5]
    assert (up.rows, up.columns, up.groups, up.rows_of_token) == (32, 8, 2, 2.0)
    assert up.flops == 2 * 32 * 8 * 2


def test_products_when_ranks_outnumber_key_heads_keep_one_head_each() -> None:
    query, key, *_ = layer_products(TINY, 0, FULL, tp=2)
    assert (query.rows, key.rows) == (4, 4)


def test_keys_when_a_window_is_shorter_are_fewer() -> None:
    assert visible_keys(100, None) == 50
    assert visible_keys(100, 20) == 20 - 400 / 200
    assert visible_keys(100, 100) == 50


# Time on one device.

NO_LAUNCH = Engine("none", launch_ops=0.0)


def test_backward_when_recomputing_takes_a_forward_pass_more() -> None:
    place = Place(4096)
    none, selective, full = (
        layer_seconds(TINY, 0, "trained", FULL, place, kind, H100, NO_LAUNCH) for kind in ("none", "selective", "full")
    )
    assert full.backward - none.backward == pytest.approx(none.forward)
    assert 0 < selective.backward - none.backward < none.forward


def test_backward_when_zero_bubble_splits_it_recomputes_for_inputs_and_each_group_of_weights() -> None:
    once, split = (
        layer_seconds(TINY, 0, "trained", FULL, Place(4096, splits_backward=split), "full", H100, NO_LAUNCH)
        for split in (False, True)
    )
    assert split.backward - once.backward == pytest.approx(9 * once.forward)  # seven matrices and two norms


def test_layer_when_the_host_is_slow_takes_its_launches() -> None:
    pure = replace(FULL, master="bf16")
    card = replace(H100, host_op_s=1e-3)
    slow = layer_seconds(TINY, 0, "trained", pure, Place(16), "none", card, replace(EAGER, launch_ops=1.0))
    # two norms of 7, rotation 12, attention 10, two residuals, activation 2, seven products
    assert slow.forward == pytest.approx(47e-3)
    assert slow.backward == pytest.approx(94e-3)


@pytest.mark.parametrize(
    ("job", "kernels", "again"),
    [
        (FULL, 47 + 7 * 1.9, 120),  # autocast copies seven matrices
        (LORA, 47 + 7 * (1 + 8) - 7, 120),  # a product each, and what eight kernels take of the adapter
        (replace(LORA, bits=4), 47 + 7 * 8 + 7 * 4.5, 120 + 7 * 10),  # unpacked, too
    ],
)
def test_layer_when_the_host_is_slow_takes_what_tuning_adds(job: Job, kernels: float, again: float) -> None:
    mode = "trained" if job.tuning == "full" else "adapted"
    card, engine = replace(H100, host_op_s=1e-3), replace(EAGER, launch_ops=1.0)
    none, full = (layer_seconds(TINY, 0, mode, job, Place(16), kind, card, engine) for kind in ("none", "full"))
    assert none.forward == pytest.approx(kernels * 1e-3)
    assert full.backward - none.backward == pytest.approx((kernels + again) * 1e-3)


def test_layer_when_frozen_has_no_backward_pass() -> None:
    job = replace(FULL, tuning="freeze")
    assert layer_seconds(TINY, 0, "frozen", job, Place(64), "full", H100, EAGER).backward == 0


def test_layer_when_packed_unpacks_in_both_directions() -> None:
    plain, packed = (
        layer_seconds(TINY, 0, "adapted", replace(LORA, bits=bits), Place(64), "none", H100, NO_LAUNCH)
        for bits in (None, 4)
    )
    unpack = 2.1 * 576 / (0.7 * 3352e9)
    assert packed.forward - plain.forward == pytest.approx(unpack)
    assert packed.backward - plain.backward == pytest.approx(unpack)


def test_head_when_frozen_makes_its_gradient_in_the_forward_pass() -> None:
    frozen, trained = (head_seconds(TINY, job, 1000, 1, H100) for job in (LORA, FULL))
    assert frozen.backward == 0
    assert frozen.forward == pytest.approx(trained.forward + trained.backward - trained.weight_grad)


def test_head_when_trained_with_several_chunks_makes_logits_again() -> None:
    one, several = (head_seconds(TINY, replace(FULL, chunk=chunk), 4096, 1, H100) for chunk in (4096, 2048))
    assert several.backward > one.backward + 0.9 * one.forward


# Bytes that one rank sends. 592 numbers in a layer, 520 outside: 1704 in all.


def test_sent_when_fully_sharded_gathers_twice_and_scatters_once_each_micro_batch() -> None:
    gathers = 0.75 * 2 * (2 * 2 * 592 + 520)  # bf16; what no layer holds stays for the backward pass
    scatters = 0.75 * 4 * 1704  # fp32
    assert _sent(Layout(dp_shard=4)) == {"dp_shard": 2 * (gathers + scatters)}


def test_sent_when_gathered_weights_are_kept_has_no_second_gather() -> None:
    assert _sent(Layout(dp_shard=4, reshard=False)) == {"dp_shard": 2 * 0.75 * (2 * 1704 + 4 * 1704)}


@pytest.mark.parametrize(("zero", "scatters"), [(2, 2), (1, 1)])
def test_sent_when_weights_stay_whole_gathers_once_a_step(zero: int, scatters: int) -> None:
    assert _sent(Layout(dp_shard=4, zero=zero)) == {"dp_shard": 0.75 * 1704 * (2 + 4 * scatters)}


def test_sent_when_lora_is_sharded_scatters_adapters_only() -> None:
    # 256 numbers of adapters in a layer, which are gathered, too
    gathers = 0.75 * 2 * (2 * 2 * (592 + 256) + 520)
    assert _sent(Layout(dp_shard=4), job=LORA) == {"dp_shard": 2 * (gathers + 0.75 * 4 * 512)}


def test_sent_when_packed_is_sharded_gathers_half_a_byte() -> None:
    layer = 0.5 * 576 + 2 * (16 + 256)
    gathers = 0.75 * (2 * 2 * layer + 2 * 520)
    assert _sent(Layout(dp_shard=4), job=replace(LORA, bits=4)) == {"dp_shard": 2 * (gathers + 0.75 * 4 * 512)}


def test_sent_when_replicated_adds_up_gradients_once_a_step() -> None:
    assert _sent(Layout(dp_replicate=4)) == {"dp_replicate": 2 * 0.75 * 4 * 1704}


def test_sent_when_replicas_are_sharded_adds_up_shards() -> None:
    sent = _sent(Layout(dp_replicate=2, dp_shard=2))
    assert sent["dp_replicate"] == 2 * 0.5 * 4 * 1704 / 2


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("selective", 3), ("full", 3)])
def test_sent_when_matrices_are_shared_exchanges_twice_in_a_region(recompute: str, passes: int) -> None:
    half = 0.5 * 20 * 8 * 2
    layers = 2 * passes * 2 * 2 * half  # two layers of two regions, each a gather and a scatter
    outside = 2 * half + 2 * half + 2 * half + 0.5 * 20 * 24  # embedding, both ends of the layers, head, loss
    assert _sent(Layout(tp=2), recompute=recompute) == {"tp": 2 * (layers + outside)}


def test_sent_when_positions_are_not_shared_saves_the_ends_only() -> None:
    shared, whole = (_sent(Layout(tp=2, sequence_parallel=sequence))["tp"] for sequence in (True, False))
    assert shared - whole == 2 * 2 * 0.5 * 20 * 8 * 2


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        ("allgather", 2 * 80 * 2),  # 10 positions of a key and a value of 4, there and back
        ("ring", 80 * 2 + 80 * (2 + 2 * 4)),  # back: once more, and gradients in fp32 that come home
        ("ulysses", 2 * 0.5 * (160 + 2 * 80) * 2),  # queries and outputs, the one key head given to both
    ],
)
def test_sent_when_positions_of_a_row_are_shared_depends_on_the_method(method: Any, layer: float) -> None:
    gradients = 2 * 0.5 * 4 * 1704
    assert _sent(Layout(cp=2, cp_method=method)) == {"cp": gradients + 2 * 2 * layer}


def test_sent_when_experts_are_shared_is_two_exchanges_a_pass() -> None:
    sent = _sent(Layout(dp_shard=2, ep=2), shape=MOE)
    assert sent["ep"] == 2 * 2 * 4 * 0.5 * 20 * 2 * 8 * 2  # micro-batches, layers, exchanges; two experts a token
    # of the experts nothing is gathered: 192 in attention, 32 in the router, 16 in norms
    assert sent["dp_shard"] == 2 * 0.5 * ((2 * 2 * 240 + 520) * 2 + (2 * 240 + 520) * 4)


@pytest.mark.parametrize(
    ("pp", "schedule", "sends"), [(2, "1f1b", 1), (4, "1f1b", 2), (2, "interleaved_1f1b", 3), (2, "zbv", 2)]
)
def test_sent_when_stages_follow_is_what_the_busiest_rank_hands_on(pp: int, schedule: Any, sends: int) -> None:
    layout = Layout(pp=pp, pp_schedule=schedule)
    assert pipeline_sends(layout) == sends
    micro_batches = max(pp, 2)
    size = max(40 / micro_batches, 10) * 8 * 2
    assert _sent(layout, shape=_shape(DENSE, 8)) == {"pp": micro_batches * sends * size}


def test_strides_when_all_axes_are_used_make_tp_ranks_neighbours() -> None:
    layout = Layout(dp_replicate=2, dp_shard=3, cp=5, tp=7, pp=2)
    assert strides(layout) == {"tp": 1, "cp": 7, "dp_shard": 35, "dp_replicate": 105, "pp": 210}
    groups = groups_of(layout)
    assert (groups.shard.size, groups.shard.stride) == (15, 7)
    assert (groups.replicate.size, groups.replicate.stride) == (2, 105)


def test_time_of_a_gather_when_local_is_bytes_over_the_link_and_a_wait_for_each_hop() -> None:
    shard = groups_of(Layout(dp_shard=8)).shard
    assert shard.seconds(build_cluster("h100", 8), 7e9) == pytest.approx(7e9 / 320.4e9 + 7 * 3.4e-6)


def test_time_of_a_gather_when_it_crosses_nodes_waits_for_the_network_once_a_node() -> None:
    cluster = build_cluster("h100", 8, 2)
    ring = groups_of(Layout(dp_shard=16)).shard
    assert ring.seconds(cluster, 1.0) == pytest.approx(2 * 9.6e-6 + 13 * 3.4e-6, rel=1e-4)
    spread = groups_of(Layout(dp_shard=2, tp=8)).shard  # eight rings share the node's 400 GB/s
    assert spread.seconds(cluster, 1e9) == pytest.approx(1e9 / (0.8 * 50e9), rel=1e-3)


# Steps.


def test_step_when_cut_has_as_many_micro_batches_as_the_fullest_rank() -> None:
    job = replace(FULL, sequences_per_step=10)
    cut = cut_step(job, Layout(dp_shard=4), 20)  # three sequences on some ranks
    assert (cut.count, cut.tokens) == (2, 15.0)


def test_step_when_a_pipeline_wants_more_micro_batches_fills_up() -> None:
    cut = cut_step(replace(FULL, sequences_per_step=3), Layout(pp=4, pp_schedule="interleaved_1f1b"), 10)
    assert (cut.count, cut.tokens) == (4, 10.0)


@pytest.mark.parametrize(
    ("schedule", "share"), [("gpipe", 3 / 11), ("1f1b", 3 / 11), ("interleaved_1f1b", 3 / 19), ("zbv", 0.0)]
)
def test_bubble_when_passes_take_equally_long_is_that_of_the_schedule(schedule: Any, share: float) -> None:
    idle = bubble_seconds(Layout(pp=4, pp_schedule=schedule), 1.0, 1.0, 1.0)
    assert bubble_share(idle, 8 * 3.0) == pytest.approx(share)


def test_bubble_when_interleaved_messages_share_a_group_is_half_for_two_ranks_and_from_four_on_that_of_1f1b() -> None:
    for ranks, share in ((2, 0.5), (3, 0.75), (8, 1.0)):
        together = Layout(pp=ranks, pp_schedule="interleaved_1f1b", pp_overlap_p2p=False)
        assert bubble_seconds(together, 1.0, 1.0, 1.0) == pytest.approx(share * (ranks - 1) * 3.0)
        apart = replace(together, pp_overlap_p2p=True)
        assert bubble_seconds(apart, 1.0, 1.0, 1.0) == pytest.approx((ranks - 1) * 1.5)


def test_bubble_when_zero_bubble_has_no_weight_gradients_is_that_of_two_stages() -> None:
    idle = bubble_seconds(Layout(pp=4, pp_schedule="zbv"), 1.0, 2.0, 0.0)
    assert bubble_share(idle, 8 * 3.0) == pytest.approx(3 / 19)


def _cost(
    layout: Layout, cluster: Cluster, *, recompute: Any = "none", shape: str = "Llama-3-8B", micro: int = 8192
) -> Any:
    job = Job(tuning="full", sequence=4096, sequences_per_step=64)
    return estimate_cost(_read(shape), job, layout, cluster, recompute, micro)


_SHAPES: dict[str, ModelShape] = {}


def _read(name: str) -> ModelShape:
    if name not in _SHAPES:
        _SHAPES[name] = read_shape(AutoConfig.from_pretrained(MODELS / name))
    return _SHAPES[name]


def test_step_when_more_is_recomputed_takes_longer() -> None:
    cluster = build_cluster("h100", 8)
    none, selective, full = (
        _cost(Layout(dp_shard=8), cluster, recompute=kind).step_s for kind in ("none", "selective", "full")
    )
    assert none < selective < full < 1.5 * none


def test_step_when_tp_leaves_the_node_takes_longer() -> None:
    inside, across = (
        _cost(Layout(tp=8), cluster) for cluster in (build_cluster("h100", 8), build_cluster("h100", 4, 2))
    )
    # 320 GB/s of NVLink against four fifths of the 200 GB/s of four network ports; calls and hops take as long in both
    assert 1.4 * inside.exposed_s < across.exposed_s < 2.0 * inside.exposed_s
    assert across.step_s > inside.step_s
    assert across.bytes_sent == inside.bytes_sent


def test_step_when_the_link_is_slow_prefers_the_pipeline_to_shared_matrices() -> None:
    cluster = build_cluster("a10", 8)
    assert _cost(Layout(pp=8), cluster).step_s < _cost(Layout(tp=8), cluster).step_s


def test_step_when_parts_are_added_up_is_their_sum_and_the_bubble() -> None:
    cost = _cost(Layout(dp_shard=2, pp=4), build_cluster("h100", 8))
    assert 0 < cost.bubble < 3 / (3 + 16)
    assert cost.step_s == pytest.approx((cost.compute_s + cost.exposed_s) / (1 - cost.bubble))
    assert cost.tokens_per_s == pytest.approx(64 * 4096 / cost.step_s)


def test_mfu_when_nothing_is_recomputed_is_that_of_the_formula() -> None:
    cost = _cost(Layout(dp_shard=8), build_cluster("h100", 8), shape="Llama-3.2-3B")
    per_token = 6 * 3_212_749_824 + 6 * 28 * 3072 * 4096
    # the parameters of norms take part in no product
    assert cost.mfu == pytest.approx(per_token * cost.tokens_per_s / (8 * 989.4e12), rel=1e-4)


@pytest.mark.parametrize("offload", ["optimizer", "params"])
def test_step_when_the_host_keeps_something_takes_longer(offload: Any) -> None:
    cluster = build_cluster("h100", 8)
    kept = _cost(Layout(dp_shard=8), cluster).step_s
    assert _cost(Layout(dp_shard=8, offload=offload), cluster).step_s > kept


def test_step_when_hidden_traffic_is_small_is_little_longer_than_computing() -> None:
    alone = _cost(Layout(), build_cluster("h200", 1))
    sharded = _cost(Layout(dp_shard=8), build_cluster("h200", 8))
    assert 0.8 < sharded.tokens_per_s / (8 * alone.tokens_per_s) < 1.15


@pytest.mark.parametrize(
    ("model", "tuning", "batch", "engine", "measured"),
    [
        ("Llama-3.2-3B", "full", 2, EAGER, 17_966),
        ("Llama-3.2-3B", "full", 4, replace(COMPILED, attention=()), 23_840),  # by PyTorch's attention
        ("Llama-3-8B", "lora", 2, EAGER, 12_410),
    ],
)
def test_speed_when_measured_on_an_h200_is_met(
    model: str, tuning: Any, batch: int, engine: Engine, measured: float
) -> None:
    job = Job(tuning=tuning, sequence=4096, sequences_per_step=batch)
    cost = estimate_cost(_read(model), job, Layout(), build_cluster("h200", 1), "none", batch * 4096, engine)
    assert cost.tokens_per_s == pytest.approx(measured, rel=0.05)


def test_estimates_when_a_thousand_are_made_take_less_than_a_second() -> None:
    shape, cluster = _read("Llama-3.1-405B"), build_cluster("h100", 8, 64)
    job = Job(tuning="full", sequence=8192, sequences_per_step=512)
    layouts = [
        Layout(dp_shard=512 // tp // pp, tp=tp, pp=pp, pp_schedule=schedule)
        for tp in (1, 2, 4, 8)
        for pp in (1, 2, 4, 8)
        for schedule in ("1f1b", "interleaved_1f1b", "zbv")
    ]
    began = time.process_time()
    for number in range(1000):
        estimate_cost(shape, job, layouts[number % len(layouts)], cluster, "full", 8192 * (1 + number % 5))
    assert time.process_time() - began < 1.0


def test_estimates_when_experts_are_shared_cost_less_than_gathering_them() -> None:
    cluster, job = build_cluster("h100", 8), Job(tuning="full", sequence=4096, sequences_per_step=16)
    gathered, shared = (
        estimate_cost(_read("Qwen3-235B-A22B"), job, Layout(dp_shard=8, ep=ep), cluster, "full", 4096) for ep in (1, 8)
    )
    assert shared.step_s < gathered.step_s
