"""ComfyUI's attention calling convention, read and answered."""
import pytest
import torch

from comfyui_spargeattn.nodes.calling import AttentionCall, UnsupportedCall

B, H, L, D = 2, 3, 5, 8


def split(heads=H, tokens=L):
    """(B, H, L, D), every element different."""
    return torch.arange(B * heads * tokens * D, dtype=torch.float32).reshape(B, heads, tokens, D)


def flat(x):
    """(B, H, L, D) as (B, L, H * D)."""
    return x.transpose(1, 2).reshape(B, -1, x.shape[1] * D)


def parse(*args, **kwargs):
    return AttentionCall.parse(args, kwargs)


def as_bhnd(x, layout):
    return x if layout == "BHND" else x.transpose(1, 2)


@pytest.mark.parametrize("skip_output_reshape", (False, True))
@pytest.mark.parametrize("skip_reshape", (False, True))
def test_layouts(skip_reshape, skip_output_reshape):
    x = split()
    given = [(x + i) if skip_reshape else flat(x + i) for i in range(3)]
    call = parse(*given, H, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    for i, seen in enumerate((call.q, call.k, call.v)):
        assert torch.equal(as_bhnd(seen, call.layout), x + i)
        assert seen.untyped_storage().data_ptr() == given[i].untyped_storage().data_ptr()
    assert (call.batch, call.queries, call.keys, call.heads) == (B, L, L, (H, H))
    # A kernel returns a contiguous tensor in the call's layout; going back must neither reorder nor copy it.
    result = call.q.contiguous()
    back = call.give_back(result)
    assert torch.equal(back, x if skip_output_reshape else flat(x))
    assert back.data_ptr() == result.data_ptr()


def test_everything_positional():
    x, mask = flat(split()), torch.ones(B, 1, 1, L, dtype=torch.bool)
    call = parse(x, x, x, H, mask, None, False, True)
    assert call.mask is mask and call.layout == "BHND"


def test_everything_by_keyword():
    x = flat(split())
    options = {"block_index": 3}
    call = parse(v=x + 2, k=x + 1, q=x, heads=H, mask=None, attn_precision=torch.float32, scale=0.5,
                 transformer_options=options, low_precision_attention=False, _inside_attn_wrapper=True)
    assert torch.equal(as_bhnd(call.v, call.layout), split() + 2)
    assert call.scale == 0.5 and call.transformer_options is options and not call.low_precision


def test_defaults():
    call = parse(flat(split()), flat(split()), flat(split()), H, transformer_options=None)
    assert (call.mask, call.scale, call.enable_gqa, call.low_precision) == (None, None, False, True)
    assert call.transformer_options == {}


def test_value_with_split_heads_beside_flat_queries():
    v = split().transpose(1, 2).contiguous()  # (B, L, H, D), as SD3 passes it
    call = parse(flat(split()), flat(split()), v, H)
    assert torch.equal(call.v, v)


@pytest.mark.parametrize("skip_reshape", (False, True))
def test_grouped_queries(skip_reshape):
    q, k = split(4), split(2)
    if not skip_reshape:
        q, k = flat(q), flat(k)
    call = parse(q, k, k, 4, skip_reshape=skip_reshape, enable_gqa=True)
    assert call.enable_gqa and call.heads == (4, 2)
    assert torch.equal(as_bhnd(call.k, call.layout), split(2))


def test_strided_views_stay_views():
    packed = torch.randn(B, L, 3 * H * D)
    call = parse(*packed.chunk(3, -1), H)
    assert all(x.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for x in (call.q, call.k, call.v))
    assert torch.equal(call.k, packed[..., H * D:2 * H * D].unflatten(-1, (H, D)))


def test_cross_attention_lengths():
    call = parse(flat(split()), flat(split(tokens=7)), flat(split(tokens=7)), H)
    assert (call.queries, call.keys) == (L, 7)


@pytest.mark.parametrize("args, kwargs, problem", (
    ((flat(split()),) * 3 + (H, None, None, False, False, 1), {}, "9 positional"),
    ((flat(split()),) * 3 + (H,), {"is_causal": True}, "'is_causal'"),
    ((flat(split()),) * 3, {}, "'heads'"),
    ((flat(split()),) * 3 + (H, [True]), {}, "mask is a list"),
    ((flat(split()), None, flat(split()), H), {}, "k is a NoneType"),
    ((flat(split()),) * 3 + (H,), {"skip_reshape": True}, "3-D"),
    ((flat(split()), flat(split())[..., :-1], flat(split()), H), {}, "23 channels"),
))
def test_unknown_forms_are_refused(args, kwargs, problem):
    with pytest.raises(UnsupportedCall, match=problem):
        parse(*args, **kwargs)


def test_unknown_arguments_that_are_off_are_ignored():
    parse(flat(split()), flat(split()), flat(split()), H, is_causal=False, window=None)


@pytest.mark.parametrize("shape", ((1, L), (1, 1, L), (B, 1, L), (1, 1, 1, L), (B, 1, 1, L)))
def test_masks_over_keys(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    visible = parse(*(flat(split()),) * 3, H, mask).visible_keys()
    assert visible.shape == (B, L) and torch.equal(visible, mask.reshape(-1, L).expand(B, L))


@pytest.mark.parametrize("mask", (
    torch.ones(L, L, dtype=torch.bool), torch.ones(B, L, L, dtype=torch.bool),
    torch.ones(B, H, 1, L, dtype=torch.bool), torch.ones(3, 1, 1, L, dtype=torch.bool),
    torch.ones(1, L + 1, dtype=torch.bool), torch.ones(L, dtype=torch.bool), torch.zeros(B, 1, 1, L),
    torch.ones(B, 1, 1, L, dtype=torch.uint8),
), ids=lambda mask: str(tuple(mask.shape)))
def test_other_masks(mask):
    assert parse(*(flat(split()),) * 3, H, mask).visible_keys() is None
