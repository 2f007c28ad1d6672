"""The implementations that are timed beside chunkattn: what they compute, and that they fit what they call."""

import importlib
import types

import common
import peers
import pytest
import torch

from chunkattn import reference, rope_table


def test_one_chunk_holds_all_keys():
    assert common.DcaSetting.parse("one", 1000).stride == 1000
    with pytest.raises(ValueError, match="got '8:8'"):
        common.DcaSetting.parse("8:8", 1000)


@pytest.mark.parametrize("seq", [1, 48, 49, 97, 150])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(64, 16), (64, 1), (112, 64)])
def test_composed_dca_is_dca(seq, chunk_size, local_size):
    setting = common.DcaSetting(chunk_size, local_size)
    generator = torch.Generator().manual_seed(seq)
    q, k, v = (torch.randn(2, seq, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    cos, sin = rope_table(chunk_size, 16)
    out = peers.ComposedDca(peers.cpu_engine(), cos, sin, setting, seq)(q, k, v)
    expected = reference.dca(q, k, v, cos, sin, chunk_size=chunk_size, local_size=local_size)
    # The merge weighs by log-sum-exps, which torch's CPU attention gives in float32.
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 48, 49, 97, 150])
@pytest.mark.parametrize(("chunk_size", "local_size"), [(64, 16), (64, 1), (112, 64)])
def test_composed_gradients_are_those_of_dca(seq, chunk_size, local_size):
    setting = common.DcaSetting(chunk_size, local_size)
    generator = torch.Generator().manual_seed(seq)
    q, k, v, dout = (torch.randn(2, seq, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    cos, sin = rope_table(chunk_size, 16)
    composed = peers.ComposedDca(peers.cpu_engine(), cos, sin, setting, seq)
    grads = peers.ComposedGradients(composed, q, k, v, dout)()
    qkv = [x.requires_grad_() for x in (q, k, v)]
    out = reference.dca(*qkv, cos, sin, chunk_size=chunk_size, local_size=local_size)
    for grad, expected in zip(grads, torch.autograd.grad(out, qkv, dout), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 128, 384, 1280, 300])
def test_flex_is_causal(monkeypatch, seq):
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    seen = []

    def attend(q, k, v, *, block_mask, enable_gqa):
        seen.append((block_mask, enable_gqa))
        return q

    monkeypatch.setattr(flex, "flex_attention", attend)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    q, k = (torch.randn(1, seq, heads, 16) for heads in (2, 1))
    assert peers.flex_attention(q, k, k)().shape == q.shape
    ((mask, grouped),) = seen
    expected = flex.create_block_mask(peers.causal_mask, None, None, seq, seq, device="cpu")
    assert grouped
    assert mask.shape == expected.shape
    assert torch.equal(mask.to_dense(), expected.to_dense())
    # For queries that fill no block create_block_mask calls no block of keys whole.
    if seq % 128 == 0:
        for field in ("num_blocks", "indices"):
            for table in (f"kv_{field}", f"full_kv_{field}", f"q_{field}", f"full_q_{field}"):
                assert torch.equal(getattr(mask, table), getattr(expected, table))


def test_fa2_backward_fits_the_schema_of_torch():
    engine = peers.fa2_engine()
    q = torch.empty(1, 300, 8, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 512, 8, 64, device="meta", dtype=torch.bfloat16)
    grads = engine.backward(q, q, k, k, *engine.with_lse(q, k, k, False), False)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("make", [peers.cudnn_engine, peers.fa2_engine])
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_engines_fit_the_schemas_of_torch(monkeypatch, make, causal):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    q = torch.empty(1, 300, 8, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 300 if causal else 512, 2, 64, device="meta", dtype=torch.bfloat16)
    out, lse = make().with_lse(q, k, k, causal)
    assert out.shape == q.shape
    assert lse.shape == (1, 8, 300)
    assert lse.dtype == torch.float32


def test_fa3_engine(monkeypatch, tmp_path):
    calls = []

    def fwd(q, k, v, *, is_causal):
        calls.append(is_causal)
        return q, q[..., 0].transpose(1, 2), None, None

    with pytest.raises(peers.Absent, match="--fa3"):
        peers.load_fa3(None)
    with pytest.raises(peers.Absent, match=r"does not hold libcudart\.so\.12"):
        peers.load_fa3(tmp_path)

    def bwd(dout, q, k, v, out, lse, *, is_causal):
        calls.append(is_causal)
        return q, k, v, None, None

    monkeypatch.setattr(peers, "load_fa3", lambda folder: types.SimpleNamespace(fwd=fwd, bwd=bwd))
    engine = peers.fa3_engine(tmp_path)
    q = torch.zeros(1, 8, 2, 4)
    assert engine.causal(q, q, q).shape == q.shape
    assert engine.with_lse(q, q, q, False)[1].shape == (1, 2, 8)
    assert len(engine.backward(q, q, q, q, q, q[..., 0].transpose(1, 2), True)) == 3
    assert calls == [True, False, True]


def test_portable_kernel_is_given_back(monkeypatch):
    forced = []
    monkeypatch.setattr(torch.ops.chunkattn, "force_kernel", forced.append, raising=False)
    with pytest.raises(RuntimeError), peers.portable_kernel():
        raise RuntimeError
    assert forced == ["portable", "auto"]
