"""Cuts against independent computations, on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import BLOCKS, CAUSAL, NAMES, WITH_HEADS, small

from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model


def logits(model: Model) -> torch.Tensor:
    return checkpoint.outputs(model.network, checkpoint.probe(model.network))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5 * max(1.0, other.abs().max().item()), rtol=0)


def zeroed_inputs(model: Model, places: dict[str, list[int]]) -> torch.Tensor:
    """Logits with some input channels of some projections set to zero by hooks: what cutting them must amount to."""
    handles = []
    for path, channels in places.items():

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], channels: list[int] = channels) -> tuple[torch.Tensor, ...]:
            value = args[0].clone()
            value[..., channels] = 0
            return (value, *args[1:])

        handles.append(model.network.get_submodule(path).register_forward_pre_hook(hook))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def round_trip(model: Model, folder) -> None:
    """Saved and loaded, the model gives the same logits; exported, plain transformers does."""
    wanted = logits(model)
    model.save(folder / "saved")
    assert close(logits(Model.load(folder / "saved")), wanted)
    model.export(folder / "plain")
    assert not (folder / "plain" / "edits.json").exists()
    plain = type(model.network).from_pretrained(folder / "plain").eval()
    assert close(checkpoint.outputs(plain, checkpoint.probe(plain)), wanted)


def generates_with_cache(model: Model) -> None:
    """Greedy generation with a cache gives what it gives without."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        cached = model.network.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
        plain = model.network.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert cached.tolist() == plain.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_found(name):
    anatomy = small(name).anatomy
    assert list(anatomy.stacks.values()) == [BLOCKS] * (2 if name in ("t5", "bart") else 1)
    for block in anatomy.blocks:
        if name == "mamba":
            assert block.attention is None
            assert block.feed_forward is None
            continue
        assert block.attention.heads == 4
        assert block.attention.key_value_heads == {"llama": 2, "qwen2": 2, "qwen3": 2, "gemma2": 2, "mistral": 2, "phi3": 2, "mixtral": 2, "falcon": 1}.get(name, 4)
        assert block.attention.head_dim == (16 if name in ("qwen3", "gemma2") else 8)
        assert block.feed_forward.channels == (128 if name in ("gpt2", "falcon") else 48)
        assert (block.cross_attention is not None) == ("decoder" in block.stack and name in ("t5", "bart"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [(1, 2), (2, 0), (0, 0, 2, 1)], ids=["drop-first", "reorder", "repeat"])
def test_arranged_blocks_compute_what_a_forward_pass_over_them_does(name, order, tmp_path):
    model = small(name)
    indices = [*order, *(BLOCKS + place for place in order)] if name in ("t5", "bart") else list(order)
    if name == "qwen2" and order == (2, 0):  # its config says only from which block on the window slides
        pytest.skip("full attention after sliding attention is checked by the others")
    model.anatomy.arrange(indices)
    # The independent computation: the very same weights in a network built for that many blocks by transformers itself.
    reference = small(name)
    lists = [reference.network.get_submodule(stack) for stack in reference.anatomy.stacks]
    originals = [list(blocks) for blocks in lists]
    running = [[copy.deepcopy(blocks[place]) for place in order] for blocks in originals]
    hand = checkpoint.rebuild(model.network.config, (), torch.float32)
    for stack, blocks in zip(reference.anatomy.stacks, running, strict=True):
        for fresh, old in zip(hand.get_submodule(stack), blocks, strict=True):
            fresh.load_state_dict(old.state_dict(), strict=False)
        if name == "t5":
            first = hand.get_submodule(stack)[0].layer[0].SelfAttention.relative_attention_bias
            first.load_state_dict(originals[list(reference.anatomy.stacks).index(stack)][0].layer[0].SelfAttention.relative_attention_bias.state_dict())
    outside = {key: value for key, value in reference.network.state_dict().items() if not any(key.startswith(stack + ".") for stack in reference.anatomy.stacks)}
    hand.load_state_dict(outside, strict=False)
    hand.tie_weights()
    assert close(logits(model), checkpoint.outputs(hand.eval(), checkpoint.probe(hand)))
    assert model.plain
    round_trip(model, tmp_path)
    if name in CAUSAL:
        generates_with_cache(model)


@pytest.mark.parametrize("name", NAMES)
def test_skipping_shares_weights_and_leaves_the_model_alone(name):
    model = small(name).frozen_now()
    before, digest = logits(model), checkpoint.digest_state(model.network)
    view = model.skipping(1)
    dropped = model.copy()
    dropped.anatomy.drop([1])
    assert torch.equal(logits(view), logits(dropped))
    assert {p.data_ptr() for p in view.network.parameters()} <= {p.data_ptr() for p in model.network.parameters()}
    assert torch.equal(logits(model), before)
    assert checkpoint.digest_state(model.network) == digest


def heads_to_drop(name: str) -> list[int]:
    """Heads that each architecture's sharing allows to go: a whole group of two, or from falcon's one group any."""
    return [0, 1] if name in ("llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3", "mixtral") else [1]


@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize("where", ["everywhere", "one block"])
def test_dropped_heads_compute_what_silenced_heads_do(name, where, tmp_path):
    model = small(name)
    blocks = model.anatomy.blocks
    chosen = [block for block in blocks if where == "everywhere" or block.index == 1 or (name == "t5" and block.stack == blocks[1].stack)]
    drop = heads_to_drop(name)
    silent = {block.attention.output: [h * block.attention.head_dim + i for h in drop for i in range(block.attention.head_dim)] for block in chosen}
    wanted = zeroed_inputs(small(name), silent)
    before = model.parameters
    model.anatomy.drop_heads({block.index: drop for block in chosen})
    assert close(logits(model), wanted)
    assert model.parameters < before
    assert model.anatomy.blocks[chosen[0].index].attention.heads == 4 - len(drop)
    round_trip(model, tmp_path)
    if name in CAUSAL:
        generates_with_cache(model)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_dropped_cross_attention_heads_compute_what_silenced_heads_do(name, tmp_path):
    model = small(name)
    chosen = [block for block in model.anatomy.blocks if block.cross_attention]
    silent = {block.cross_attention.output: [h * 8 + i for h in (0, 3) for i in range(8)] for block in chosen}
    wanted = zeroed_inputs(small(name), silent)
    model.anatomy.drop_heads({block.index: [0, 3] for block in chosen}, cross=True)
    assert close(logits(model), wanted)
    round_trip(model, tmp_path)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_one_query_head_of_every_group_can_go(name, tmp_path):
    model = small(name)
    silent = {block.attention.output: [h * 8 + i for h in (1, 2) for i in range(8)] for block in model.anatomy.blocks}
    wanted = zeroed_inputs(small(name), silent)
    model.anatomy.drop_heads({block.index: [1, 2] for block in model.anatomy.blocks})
    assert close(logits(model), wanted)
    assert model.anatomy.blocks[0].attention.key_value_heads == 2
    round_trip(model, tmp_path)


@pytest.mark.parametrize("name", WITH_HEADS)
@pytest.mark.parametrize("where", ["everywhere", "one block"])
def test_dropped_channels_compute_what_silenced_channels_do(name, where, tmp_path):
    model = small(name)
    chosen = [block for block in model.anatomy.blocks if where == "everywhere" or block.index == 1]
    drop = [0, 3, 4, 17, 18, 19, 40, 41]
    if name == "mixtral":
        reference = small(name)
        with torch.no_grad():
            for block in chosen:
                reference.network.get_parameter(block.feed_forward.output)[..., drop] = 0
        wanted = logits(reference)
    else:
        wanted = zeroed_inputs(small(name), {block.feed_forward.output: drop for block in chosen})
    model.anatomy.drop_channels({block.index: drop for block in chosen})
    assert close(logits(model), wanted)
    round_trip(model, tmp_path)
    if name in CAUSAL:
        generates_with_cache(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_cuts_of_every_kind_add_up(name, tmp_path):
    """Channels, then blocks, then channels and heads again: the edits merge, and the saved folder replays them."""
    model = small(name)
    count = len(model.anatomy.blocks)
    model.anatomy.drop_channels({1: [0, 1, 2], 2: [5]})
    model.anatomy.drop([0] if count == BLOCKS else [0, BLOCKS])
    model.anatomy.drop_channels({0: [0], 1: [7, 8]})
    heads = {index: heads_to_drop(name) for index in range(len(model.anatomy.blocks))}
    model.anatomy.drop_heads(heads)
    wanted = logits(model)
    assert model.anatomy.blocks[0].feed_forward.channels == (128 if name == "gpt2" else 48) - 4
    round_trip(model, tmp_path)
    assert close(logits(Model.load(tmp_path / "saved").copy()), wanted)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral", "phi3", "mixtral"])
def test_what_the_config_can_say_is_said_there(name, tmp_path):
    model = small(name)
    if name != "phi3":  # its config has no head_dim of its own
        model.anatomy.drop_heads({index: [0, 1] for index in range(BLOCKS)})
    model.anatomy.drop_channels({index: list(range(16)) for index in range(BLOCKS)})
    assert model.plain
    model.save(tmp_path)
    plain = type(model.network).from_pretrained(tmp_path).eval()
    assert sum(p.numel() for p in plain.parameters()) == model.parameters
    assert close(checkpoint.outputs(plain, checkpoint.probe(plain)), logits(model))


def test_impossible_cuts_are_refused_before_anything_changes():
    model = small("llama")
    before = checkpoint.digest_state(model.network)
    with pytest.raises(InputError, match="would leave"):
        model.anatomy.drop_heads({0: [0, 1], 1: [0]})
    with pytest.raises(InputError, match="at least one of its 4 heads"):
        model.anatomy.drop_heads({0: [0, 1, 2, 3]})
    with pytest.raises(InputError, match="keeps at least one"):
        model.anatomy.drop_channels({0: range(48)})
    with pytest.raises(InputError, match="multiple of 8"):
        small("mixtral").anatomy.drop_channels({0: [0]})
    with pytest.raises(InputError, match="at least one block"):
        model.anatomy.drop([0, 1, 2])
    with pytest.raises(InputError, match="blocks 0 to 2"):
        model.anatomy.drop([3])
    with pytest.raises(InputError, match="no attention heads"):
        small("mamba").anatomy.drop_heads({0: [0]})
    with pytest.raises(InputError, match="share one position bias"):
        small("t5").anatomy.drop_heads({0: [1]})
    assert checkpoint.digest_state(model.network) == before


def test_a_frozen_model_cannot_be_cut():
    model = small("llama").frozen_now()
    with pytest.raises(ValueError, match="frozen"):
        model.anatomy.drop([0])
    with pytest.raises(ValueError, match="frozen"):
        model.anatomy.drop_channels({0: [0]})
