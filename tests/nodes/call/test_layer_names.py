"""Names of layers: one a call, whoever takes it, and in doubt where an evaluation may leave layers out."""
from comfyui_spargeattn.nodes.call.layer_names import LayerNames, handed_on
from comfyui_spargeattn.nodes.call.transformer_blocks import TransformerBlock

SKIPS = {"patches_replace": {"dit": {("double_block", 1): None}}}


def evaluate(names, blocks, options=None):
    """(name, whether it is in doubt) of the calls of an evaluation whose calls come from these blocks."""
    found = []

    def model(x, t, c_concat, c_crossattn, control, options, **conds):
        for block in blocks:
            name = names.name(options, block)
            found.append((name, bool(names.doubt(name, options))))

    names.count(model, None, None, transformer_options=options)
    return found


def sure(*names):
    return [(name, False) for name in names]


def doubted(*names):
    return [(name, True) for name in names]


def test_names():
    single, double = TransformerBlock("single", 1), TransformerBlock("double", 1)
    blocks = [None, double, double, single, None]
    for _ in range(2):  # every evaluation counts anew
        assert evaluate(LayerNames(), blocks) == sure("#1", "double:1", "double:1#2", "single:1", "#2")


def test_no_name():
    assert LayerNames().name({}, None) is None


def test_the_callers_options_stay_as_they_are():
    options = {"sigmas": None}
    evaluate(LayerNames(), [None], options)
    assert options == {"sigmas": None}


def test_a_call_that_is_handed_on_keeps_its_name():
    outer, inner = LayerNames(), LayerNames()
    found = []

    def model(x, t, c_concat, c_crossattn, control, options, **conds):
        for _ in range(3):
            name = outer.name(options, None)
            with handed_on(name):
                found.append((name, inner.name(options, None)))

    outer.count(lambda *args, **conds: inner.count(model, *args[:5], transformer_options=args[5], **conds), None, None)
    assert found == [("#1", "#1"), ("#2", "#2"), ("#3", "#3")]
    for names in (outer, inner):  # both know how many there were
        assert evaluate(names, [None] * 2) == sure("#1", "#2") and evaluate(names, [None]) == doubted("#1")


def test_blocks_of_a_run():
    names = LayerNames()
    evaluate(names, [None, TransformerBlock("", 3), TransformerBlock("", 3)])
    assert names.blocks == {TransformerBlock("", 3)}
    names.begin()
    assert names.blocks == set()


def test_replaced_blocks_are_in_doubt():
    names = LayerNames(("#1", "#2", "#3"))
    assert evaluate(names, [None] * 3) == sure("#1", "#2", "#3")
    for _ in range(2):
        assert evaluate(names, [None] * 2, SKIPS) == doubted("#1", "#2")
        assert evaluate(names, [None] * 3) == sure("#1", "#2", "#3")


def test_replaced_blocks_that_make_every_call_are_trusted_from_then_on():
    names = LayerNames()
    assert evaluate(names, [None] * 3, SKIPS) == doubted("#1", "#2", "#3")
    assert evaluate(names, [None] * 3, SKIPS) == sure("#1", "#2", "#3")
    names.begin()
    assert evaluate(names, [None] * 3, SKIPS) == doubted("#1", "#2", "#3")


def test_the_whole_evaluation_may_come_last():
    names = LayerNames()
    assert evaluate(names, [None] * 2, SKIPS) == doubted("#1", "#2")
    evaluate(names, [None] * 3)
    assert evaluate(names, [None] * 2, SKIPS) == doubted("#1", "#2")


def test_fewer_calls_than_were_tuned():
    """Layers that are left out by other means show in the next evaluation of that kind, and in that kind alone."""
    names, positive, negative = LayerNames(("single:0", "#7", "#x", "#3")), {"cond_or_uncond": [0]}, \
        {"cond_or_uncond": [1]}
    assert evaluate(names, [None] * 6, positive) == sure(*(f"#{i}" for i in range(1, 7)))
    assert evaluate(names, [None] * 6, positive) == doubted(*(f"#{i}" for i in range(1, 7)))
    for _ in range(2):  # it may fall short again
        assert evaluate(names, [None] * 7, positive)[0] == ("#1", True)
    assert evaluate(names, [None] * 7, negative) == evaluate(names, [None] * 7, negative) == \
        sure(*(f"#{i}" for i in range(1, 8)))


def test_numbered_blocks_are_never_in_doubt():
    names, blocks = LayerNames(("single:0", "single:1")), [TransformerBlock("single", 0), TransformerBlock("single", 1)]
    assert evaluate(names, blocks) == sure("single:0", "single:1")
    assert evaluate(names, blocks[1:], SKIPS) == evaluate(names, blocks[1:], SKIPS) == sure("single:1")


def test_evaluations_out_of_a_cache_tell_nothing():
    names = LayerNames(("#1", "#2"))
    evaluate(names, [])
    assert evaluate(names, [None] * 2) == sure("#1", "#2")


def test_odd_options():
    names = LayerNames()
    options = {"patches_replace": None, "cond_or_uncond": None}
    assert evaluate(names, [None], options) == sure("#1")
    assert evaluate(names, [None], {"patches_replace": {"dit": None}}) == sure("#1")
