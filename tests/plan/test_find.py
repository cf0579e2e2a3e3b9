"""What is found in models as people write them, and what is refused, with the words and numbers."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_bharat.plan.blocks import PlanError, block_list
from lightning_bharat.plan.find import find_plan, structural_plan
from lightning_bharat.plan.layout import Layout, LayoutError
from lightning_bharat.plan.model_plan import Column, ModelPlan
from tests.plan.models import MODELS, TIME, VOCABULARY, FusedBlock, Nano, Wrapped, batch_of, llama, step


def plan_of(module: nn.Module, **kwargs) -> ModelPlan:
    return find_plan(module, step, batch_of(module, 0), **kwargs)


def cuts(plan: ModelPlan) -> dict[str, tuple[str, ...]]:
    return {
        row: tuple(c.module for c in cut.columns) for kind in plan.cuts.values() for cut in kind for row in cut.rows
    }


def test_fused_query_key_value_and_the_attribute_that_must_be_divided():
    plan = plan_of(MODELS["nano"]())
    attention = plan.cuts["a"][0]
    assert attention.columns == (Column("qkv", (48, 48, 48)),)
    assert (attention.rows, attention.attributes, attention.units) == (("out",), ("heads",), 4)
    assert plan.blocks == "layers" and plan.kinds == ("a", "a", "a")
    assert plan.before == ("token", "position") and plan.after == ("norm", "head")
    assert plan.outside[0].rows == ("token",) and plan.sequence == plan.loss == ""


def test_grouped_query_heads_count_in_key_value_heads():
    plan = plan_of(llama())
    assert plan.cuts["a"][0].units == 2
    assert plan.cuts["a"][0].entry == "self_attn"
    with pytest.raises(LayoutError, match="tensor_parallel_size=4 does not divide the 2 heads"):
        Layout(tensor=4).check(plan)


def test_norms_on_queries_and_keys_get_their_gradients_summed():
    assert plan_of(MODELS["qwen3"]()).summed["a"] == ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def test_conv1d_and_split_size():
    plan = plan_of(MODELS["gpt2"]())
    assert plan.cuts["a"][0].attributes == ("attn.split_size",)
    assert plan.tied == (("model.transformer.wte.weight", "model.lm_head.weight"),)


def test_a_model_without_a_list_is_one_block():
    plan = plan_of(MODELS["stack"]())
    assert plan.single and plan.blocks == "net"
    assert cuts(plan) == {"2": ("0",), "6": ("4",)}


def test_a_model_on_meta_is_enough():
    with torch.device("meta"):
        module = llama()
    assert cuts(plan_of(module)) == cuts(plan_of(llama()))


def test_a_plan_survives_json_and_prints_a_picture():
    plan = plan_of(llama())
    assert ModelPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "self_attn.k_proj ┼─▶ self_attn.o_proj   2 heads" in str(plan)


class GroupedFused(nn.Module):
    """Queries, keys and values of unequal sizes in one linear, sizes kept in a list; gate and up in one as well."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.sizes = 4, 2, [width, width // 2, width // 2]
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.gate_up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).split(self.sizes, -1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for t in (k, v))
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        )
        gate, up = self.gate_up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def test_unequal_fused_parts():
    plan = plan_of(Nano(GroupedFused))
    attention, gated = plan.cuts["a"]
    assert attention.columns == (Column("qkv", (48, 24, 24)),)
    assert attention.attributes == ("heads", "kv_heads", "sizes")
    assert gated.columns == (Column("gate_up", (96, 96)),)


class PerHead(nn.Module):
    """Query, key and value of each head side by side (GPT-NeoX)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.size, self.qkv, self.out = width // 4, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3 * self.size)).transpose(1, 2).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_heads_that_hold_their_own_query_key_and_value():
    assert plan_of(Nano(PerHead)).cuts["a"][0].columns == (Column("qkv", (144,)),)


class WidthOfInput(FusedBlock):
    """Shapes its heads from the width of its input, which a rank with half of the heads does not have."""

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def test_what_cannot_be_cut_stays_whole_with_the_reason():
    plan = plan_of(Nano(WidthOfInput))
    assert cuts(plan) == {"down": ("up",)}
    assert "qkv → out" in next(iter(plan.whole)) and "RuntimeError" in next(iter(plan.whole.values()))


class NormInside(nn.Module):
    """A norm over the channels that would be divided."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.up, self.inner, self.down = (
            nn.Linear(width, 96),
            nn.RMSNorm(96, elementwise_affine=False),
            nn.Linear(96, width),
        )

    def forward(self, x):
        return x + self.down(F.rms_norm(self.up(x), self.up(x).shape[-1:]))


class Alone(nn.Module):
    """One linear a block: no pair to cut."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.mix(x))


def test_a_norm_over_divided_channels_is_refused_with_the_difference():
    plan = plan_of(Nano(NormInside))
    assert not cuts(plan)
    assert "differs by" in next(iter(plan.whole.values()))


class Bare(nn.Module):
    """Blocks and nothing else that could be cut."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(8) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x[:, :4]


@pytest.mark.parametrize("block", [Alone, lambda w: NormInside(w)], ids=["no pair", "norm"])
def test_nothing_to_cut_says_what_was_tried(block):
    batch = {"x": torch.randn(4, 8), "y": torch.randn(4, 4)}
    with pytest.raises(
        PlanError, match="nothing in 'blocks' can be cut over 2 tensor ranks .*Write tensor_parallel_size=1"
    ):
        find_plan(Bare(block), lambda m, b: F.mse_loss(m(b["x"]), b["y"]), batch)


class TiedByHand(Nano):
    def forward(self, ids):
        x = self.token(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.token.weight) + 0 * self.head(x)


def test_a_weight_read_outside_its_module_stays_whole():
    plan = plan_of(TiedByHand())
    assert not plan.outside
    assert "token.weight is read in the training step" in plan.whole["head, token"]


class PeekingBlock(FusedBlock):
    def forward(self, x):
        return super().forward(x) + 0 * F.linear(x, self.up.weight).sum()


def test_a_block_that_reads_a_weight_by_itself_keeps_it_whole():
    plan = plan_of(Nano(PeekingBlock))
    assert cuts(plan) == {"out": ("qkv",)}
    assert any("up.weight is read in" in why for why in plan.whole.values())


class Encoder(nn.TransformerEncoderLayer):
    """torch's own layer: in evaluation it leaves its modules aside and reads their weights."""

    def __init__(self, width: int = 48) -> None:
        super().__init__(width, 4, 96, dropout=0.0, batch_first=True)


def test_a_fast_path_in_evaluation_is_seen():
    plan = plan_of(Nano(Encoder))
    assert not cuts(plan)
    assert plan.whole


class Alternating(Nano):
    def __init__(self) -> None:
        super().__init__()
        for i, layer in enumerate(self.layers):
            layer.index = i  # only counts
            layer.scale = 1.0 if i % 2 else 0.5  # a setting


def test_blocks_of_different_settings_are_proven_apart():
    assert plan_of(Alternating()).kinds == ("a", "b", "a")


class Skip(Nano):
    def forward(self, ids):
        x = first = self.token(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            first = x if i == 0 else first
        return self.head(self.norm(x + first))


def test_a_skip_past_blocks_keeps_the_sequence_whole():
    plan = plan_of(Skip())
    assert "layers.0" in plan.sequence and cuts(plan)


def test_lora_is_cut_with_what_it_adds_to():
    peft = pytest.importorskip("peft")
    model = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], lora_dropout=0.1)
    module = Wrapped(peft.get_peft_model(model.model, config))
    plan = find_plan(module, step, batch_of(module, 0))
    rows = {tuple(cut.rows): tuple(c.module for c in cut.columns) for cut in plan.cuts["a"]}
    assert ("self_attn.o_proj.base_layer", "self_attn.o_proj.lora_A.default") in rows
    assert "self_attn.q_proj.lora_B.default" in rows["self_attn.o_proj.base_layer", "self_attn.o_proj.lora_A.default"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layer.*.qkv": "colwise"}, r"no module has this name; nearest: layers\.\*\.qkv"),
        ({"layers.*.qkv": "columnwise"}, "write one of .*colwise"),
        ({"layers.*.qkv": "colwise"}, "'layers.0.qkv' is named as a column, but no cut"),
        ({"layers.*.qkv": "colwise", "layers.*.down": "rowwise"}, "is named as a"),
    ],
)
def test_a_wrong_plan_is_refused(given, words):
    with pytest.raises(PlanError, match=words):
        plan_of(Nano(), plan=given)


def test_a_plan_of_ones_own_is_kept_to():
    plan = plan_of(Nano(), plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"})
    assert cuts(plan) == {"down": ("up",)}


def test_a_plan_of_ones_own_that_is_wrong_is_refused_with_the_numbers():
    with pytest.raises(PlanError, match="the cut of layers.0: up → down is not right: .*differs by"):
        plan_of(Nano(NormInside), plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"})


def test_values_in_the_step_are_answered():
    def looks(module, batch):
        loss = step(module, batch)
        if loss > 3 and loss.isfinite().all():
            print(f"{loss:.3f} {loss.item()} {float(loss)} {loss.tolist()}")
        return loss

    module = Nano()
    assert cuts(find_plan(module, looks, batch_of(module, 0))) == cuts(plan_of(module))


def test_a_step_that_cannot_be_observed_says_so():
    module = Nano()

    def fails(module, batch):
        raise KeyError("input_ids")

    with pytest.raises(PlanError, match="could not be run on fake tensors: KeyError: 'input_ids'"):
        find_plan(module, fails, batch_of(module, 0))


def test_a_vocabulary_that_does_not_divide_stays_whole():
    plan = plan_of(Nano(), ranks=4) if VOCABULARY % 4 else None
    module = Nano()
    module.token, module.head = nn.Embedding(97, 48), nn.Linear(48, 97)
    plan = plan_of(module)
    assert "the vocabulary of 97 does not divide by 2; pad it to 98" in plan.whole["head, token"]


def test_the_structure_alone_gives_the_blocks():
    assert block_list(llama()) == "model.model.layers"
    plan = structural_plan(llama())
    assert plan.depth == 2 and not list(plan.all_cuts())


def test_the_module_is_left_as_it_was():
    module = Nano()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    classes = [type(m) for m in module.modules()]
    state = torch.get_rng_state()
    plan_of(module)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert classes == [type(m) for m in module.modules()] and TIME
