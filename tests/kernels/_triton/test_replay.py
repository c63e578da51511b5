"""Recorded launches: which calls repeat them, and with which arguments. tests/gpu/test_runtime.py launches them."""
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from comfyui_spargeattn.kernels import Residual, SpargeParams, attention_residual, sparge_attention
from comfyui_spargeattn.kernels._triton import replay

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def recordings():
    replay.forget()
    outer, replay._thread.off = replay._thread.off, False  # see conftest.py
    yield
    replay._thread.off = outer
    replay.forget()


def tensors(n=3):
    return [torch.zeros(1, 2, 4, 8) for _ in range(n)]


ROOM = partial(replay.room_for_attention, heads=None)


@contextmanager
def recorded(inputs, out, form=("a form",), room=ROOM):
    with replay.recorded(form, (*inputs, out), room, lambda index: 7):
        yield replay.recording()


def launch(recording, arguments, addresses, started):
    recording.launched(lambda bound: (lambda stream, given: started.append((stream, given)), bound), arguments,
                       [(place, arguments[place], None) for place in addresses])


def test_a_repetition_launches_with_its_own_addresses():
    (q, k, out), started = tensors(), []
    with recorded((q, None, k), out) as recording:
        recording.allocated(1 << 40, 512)
        recording.allocated(1 << 42, 256)
        launch(recording, [q.data_ptr(), None, (1 << 40) + 256, 0.5], (0, 2), started)
        launch(recording, [1 << 42, k.data_ptr(), out.data_ptr(), 3], (0, 1, 2), started)
    q, k, _ = tensors()
    for _ in range(2):
        result = replay.repeat(("a form",), (q, None, k))
        (stream, first), (_, second) = started
        base = second[0] - 512
        assert stream == 7 and first == [q.data_ptr(), None, base + 256, 0.5]
        assert second == [base + 512, k.data_ptr(), result.data_ptr(), 3]
        assert result.shape == q.shape and result.dtype == q.dtype and result.is_contiguous()
        started.clear()


def test_a_residual_that_is_made_again():
    (q, dense), made, started = tensors(2), Residual.empty((1, 2, 4, 8), DEVICE), []
    room = partial(replay.room_for_residual, shape=(1, 2, 4, 8))
    with recorded((q, dense, made.quantised), made.scale, room=room) as recording:
        launch(recording, [dense.data_ptr(), made.quantised.data_ptr(), made.scale.data_ptr()], (0, 1, 2), started)
    q, dense = tensors(2)
    again = replay.repeat(("a form",), (q, dense))
    assert started == [(7, [dense.data_ptr(), again.quantised.data_ptr(), again.scale.data_ptr()])]
    assert again.quantised.shape == q.shape and again.scale.shape == q.shape[:3]


def test_an_argument_that_is_made_from_an_address():
    (q, out), made = tensors(2), []
    with recorded((q,), out) as recording:
        recording.allocated(1 << 40, 512)
        recording.launched(lambda bound: (lambda stream, given: made.extend(given), bound), ["a descriptor"],
                           [(0, 1 << 40, lambda x: [x])])
    replay.repeat(("a form",), (q,))
    [[address]] = made
    assert address > 0 and address != 1 << 40


def test_an_argument_may_move_where_it_is_bound():
    (q, k, out), started = tensors(), []

    def bind(arguments):
        return lambda stream, given: started.extend(given), ["first", *reversed(arguments)]

    with recorded((q, k), out) as recording:
        recording.launched(bind, [q.data_ptr(), 3, k.data_ptr()], [(0, q.data_ptr(), None), (2, k.data_ptr(), None)])
    q, k, _ = tensors()
    replay.repeat(("a form",), (q, k))
    assert started == ["first", k.data_ptr(), 3, q.data_ptr()]


def test_no_repetition_without_a_stream():
    q, out = tensors(2)
    with replay.recorded(("a form",), (q, out), ROOM, lambda index: None):
        pass
    assert replay.repeat(("a form",), (q,)) is None


@pytest.mark.parametrize("kind", ("unknown tensor", "two inputs in one place", "not repeatable", "failed"))
def test_what_is_not_recorded(kind):
    q, k, out = tensors()
    k = q if kind == "two inputs in one place" else k
    with pytest.raises(torch.OutOfMemoryError) if kind == "failed" else contextmanager(lambda: iter([0]))():
        with recorded((q, k), out) as recording:
            if kind == "unknown tensor":
                launch(recording, [tensors(1)[0].data_ptr()], (0,), [])
            elif kind == "not repeatable":
                recording.launched(None, [], [])
            elif kind == "failed":
                raise torch.OutOfMemoryError("no room")
    assert replay.repeat(("a form",), (q, k)) is None and replay.recording() is None


def test_forms_tell_calls_apart():
    q, order = torch.zeros(1, 2, 4, 8), torch.zeros(4, dtype=torch.int32)
    others = [(q.half(), order), (q.transpose(1, 2), order), (q[:, :1], order), (q, None), (q, order.long()),
              (q.view(-1)[1:33].view(1, 1, 4, 8), order)]
    forms = [replay.form_of(inputs, ("BHND",)) for inputs in [(q, order), *others]]
    forms.append(replay.form_of((q, order), ("BNHD",)))
    assert len(set(forms)) == len(forms)
    assert replay.form_of((torch.ones_like(q), order.clone()), ("BHND",)) == forms[0]


def test_tensors_that_have_no_form():
    """A copy of thresholds that lie elsewhere, and tensors whose memory is their own affair."""
    q = torch.zeros(1, 2, 4, 8)
    assert replay.form_of((q, torch.zeros(3, 2, device="meta")), ()) is None
    assert replay.form_of((torch.nn.Parameter(q),), ()) is None and replay.form_of((None,), ()) is not None


def test_no_repetition_without_room(monkeypatch):
    q, out = tensors(2)
    with recorded((q,), out):
        pass

    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    assert replay.repeat(("a form",), (q,)) is not None
    with monkeypatch.context() as patch:  # undone before conftest.py undoes its own patch of it
        patch.setattr(torch, "empty", empty)
        assert replay.repeat(("a form",), (q,)) is None


def test_recordings_are_bounded_and_forgotten():
    q, out = tensors(2)
    for number in range(replay._MOST + 1):
        with recorded((q,), out, form=(number,)):
            pass
    assert 0 < len(replay._recordings) <= replay._MOST
    with replay.off():
        assert replay.repeat((replay._MOST,), (q,)) is None
    assert replay.repeat((replay._MOST,), (q,)) is not None
    replay.forget()
    assert replay.repeat((replay._MOST,), (q,)) is None


@pytest.mark.parametrize("argument", (dict(scale="x"), dict(layout=[]), dict(sink_keys=[[3, 1]]), dict(impl="fast"),
                                      dict(params=0.5), dict(order=[0])), ids=str)
def test_bad_arguments_are_told_whatever_was_recorded(argument):
    q = torch.zeros(1, 2, 64, 16)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=next(iter(argument))):
            sparge_attention(q, q, q, **argument)
        with pytest.raises((TypeError, ValueError), match=next(iter(argument))):
            attention_residual(q, q, q, q, **argument)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's kernels can't be launched again")
def test_the_interpreter_records_nothing():
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    sparge_attention(q, k, v, params=SpargeParams(topk=1.0), impl="triton", sink_keys=((0, 1),))
    attention_residual(q, k, v, q, impl="triton")
    assert not replay._recordings
