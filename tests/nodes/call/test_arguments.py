"""ComfyUI's attention calling convention, read and answered."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.arguments import AttentionCall, UnsupportedCall
from comfyui_spargeattn.nodes.call.plan import Dense, NodeSettings, plan_call

B, H, L, D = 2, 3, 5, 8


def split(heads=H, tokens=L):
    """(B, H, L, D), every element different."""
    return torch.arange(B * heads * tokens * D, dtype=torch.float32).reshape(B, heads, tokens, D)


def flat(x):
    """(B, H, L, D) as (B, L, H * D)."""
    return x.transpose(1, 2).flatten(2)


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
    assert (call.batch, call.q_tokens, call.k_tokens, call.heads) == (B, L, L, (H, H))
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
    assert (call.q_tokens, call.k_tokens) == (L, 7)


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


BY_KEY = (1, L), (1, 1, L), (B, 1, L), (1, 1, 1, L), (B, 1, 1, L)


@pytest.mark.parametrize("shape", BY_KEY)
def test_masks_that_hide_keys(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    [(name, padding)] = parse(*(flat(split()),) * 3, H, mask).key_mask.items()
    assert name == "key_padding_mask" and padding.shape == (B, L)
    assert torch.equal(~padding, mask.reshape(-1, L).expand(B, L))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("shape", BY_KEY)
def test_floating_masks_are_a_bias_of_keys(shape, dtype):
    """HunyuanVideo's are (1, 1, L) and Qwen-Image's (B, 1, L), zero or the dtype's lowest."""
    mask = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.finfo(dtype).min
    [(name, bias)] = parse(*(flat(split()),) * 3, H, mask).key_mask.items()
    assert name == "key_bias" and bias.dtype == dtype and torch.equal(bias, mask.reshape(-1, L).expand(B, L))


def test_no_mask():
    assert parse(*(flat(split()),) * 3, H).key_mask == {}


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32))
@pytest.mark.parametrize("shape", ((L, L), (B, L, L), (B, H, 1, L), (3, 1, 1, L), (1, L + 1), (L,), (1, B, 1, 1, L)))
def test_masks_that_depend_on_more_than_the_key(shape, dtype):
    assert parse(*(flat(split()),) * 3, H, torch.zeros(shape, dtype=dtype)).key_mask is None


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int64, torch.float64))
def test_masks_of_other_dtypes(dtype):
    assert parse(*(flat(split()),) * 3, H, torch.zeros(B, 1, 1, L, dtype=dtype)).key_mask is None


SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=5).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=400, database=None)
@given(st.tuples(SHAPES, SHAPES, SHAPES), st.sampled_from((0, -1, 1, 2, 3, 100, 2.5, None, "2")),
       st.none() | SHAPES, st.booleans(), st.booleans(), st.booleans())
def test_odd_calls_are_refused_or_planned(shapes, heads, mask, skip_reshape, skip_output_reshape, enable_gqa):
    """Nothing but UnsupportedCall leaves parse, and nothing at all the plan, whatever the shapes."""
    q, k, v = map(torch.zeros, shapes)
    try:
        call = parse(q, k, v, heads, None if mask is None else torch.zeros(mask), skip_reshape=skip_reshape,
                     skip_output_reshape=skip_output_reshape, enable_gqa=enable_gqa)
    except UnsupportedCall:
        return
    plan = plan_call(call, NodeSettings(SpargeParams(), min_tokens=0))
    assert isinstance(plan, Dense) or 0 not in call.q.shape + call.k.shape


@pytest.mark.parametrize("heads", (0, -2, None, 2.0, "2"))
def test_odd_numbers_of_heads_are_refused(heads):
    with pytest.raises(UnsupportedCall, match="heads"):
        parse(*(flat(split()),) * 3, heads)


@pytest.mark.parametrize("split_heads", (False, True))
def test_calls_without_tokens(split_heads):
    x = split(tokens=0)
    call = parse(*(x if split_heads else flat(x),) * 3, H, skip_reshape=split_heads)
    assert (call.q_tokens, call.k_tokens, call.heads) == (0, 0, (H, H))
