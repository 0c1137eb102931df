"""Remembered results of operators on meta: the same tensors as without, and views stay views."""

import torch

from ftkit.core.meta_kernels import run_on_meta

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def same(ours, theirs):
    return (ours.shape, ours.stride(), ours.dtype, ours.device) == (
        theirs.shape,
        theirs.stride(),
        theirs.dtype,
        theirs.device,
    )


def test_the_second_call_gives_what_the_first_gave():
    cases = [
        (aten.mm.default, (meta(3, 4), meta(4, 5))),
        (aten.add.Tensor, (meta(3, 4).t(), meta(4, 3))),
        (aten._to_copy.default, (meta(6),)),
        (aten.native_dropout.default, (meta(3, 4), 0.1, True)),
        (aten.cat.default, ([meta(2, 3), meta(5, 3)],)),
    ]
    for func, args in cases:
        outputs = [run_on_meta(func, args, {}) for _ in range(3)]
        real = func(*args)
        for out in outputs:
            pairs = zip(out, real, strict=True) if isinstance(real, tuple) else [(out, real)]
            assert all(same(ours, theirs) for ours, theirs in pairs)
        storages = {(out[0] if isinstance(out, tuple) else out).untyped_storage()._cdata for out in outputs}
        assert len(storages) == 3, "each call owns its memory"


def test_the_argument_decides_not_only_its_shape():
    x = meta(4)
    made = [run_on_meta(aten._to_copy.default, (x,), {"dtype": dtype}) for dtype in (torch.float16, torch.int64) * 2]
    assert [each.dtype for each in made] == [torch.float16, torch.int64] * 2


def test_a_view_shares_its_inputs_memory_also_where_the_schema_does_not_say_so():
    x = meta(4, 6)
    for func, shape in ((aten.view.default, [24]), (aten._unsafe_view.default, [2, 12])):
        for _ in range(3):
            assert run_on_meta(func, (x, shape), {}).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_what_writes_into_its_input_returns_that_input():
    x = meta(4)
    assert run_on_meta(aten.add_.Tensor, (x, meta(4)), {}) is x
