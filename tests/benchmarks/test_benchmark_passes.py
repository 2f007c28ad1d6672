"""The benchmarks of the forward, the backward and packed sequences on the CPU. No speed is asserted."""

import types

import peers
import pytest
import torch
from runs import HEADER_FIELDS, ROW_FIELDS, run_backward, run_forward, run_varlen


@pytest.mark.usefixtures("quick_ceilings")
class TestForward:
    def test_results(self, tmp_path, capsys):
        status, results = run_forward(tmp_path / "forward.json", "--dca", "64:16", "one")
        assert status == 0
        assert results["header"].keys() >= HEADER_FIELDS
        rows = [(row["impl"], row["chunk_size"], row["local_size"]) for row in results["rows"]]
        assert rows == [
            ("sdpa", None, None),
            ("composed-sdpa", 64, 16),
            ("chunkattn", 64, 16),
            ("chunkattn", 662, 512),
        ]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert 0 < row["max_error"] < 0.02
        assert {"fa3", "cudnn", "fa2", "flex", "composed-fa3", "chunkattn-portable"} <= results["absent"].keys()
        assert "absent: fa3" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda out: out[:, -1].add_(0.1), "output is wrong"),
            (lambda out: out[:, 70].fill_(torch.nan), "not written"),
        ],
    )
    def test_wrong_output_is_not_timed(self, monkeypatch, tmp_path, spoil, message):
        correct = peers.chunkattn_call

        def make_call(*arguments):
            def call():
                out = correct(*arguments)()
                spoil(out)
                return out

            return call

        monkeypatch.setattr(peers, "chunkattn_call", make_call)
        status, results = run_forward(tmp_path / "forward.json", "--dca", "64:16")
        assert status == 1
        assert [row["impl"] for row in results["rows"]] == ["sdpa", "composed-sdpa"]
        assert [failure["impl"] for failure in results["failed"]] == ["chunkattn"]
        assert message in results["failed"][0]["error"]

    def test_broken_peer_does_not_stop_the_others(self, monkeypatch, tmp_path):
        def broken(q, k, v):
            raise RuntimeError("no kernel\nfor this shape")

        engine = peers.Engine(broken, peers.cpu_engine().with_lse)
        monkeypatch.setattr(peers, "cpu_engine", lambda: engine)
        status, results = run_forward(tmp_path / "forward.json", "--dca", "64:16")
        assert status == 0
        assert [row["impl"] for row in results["rows"]] == ["composed-sdpa", "chunkattn"]
        assert results["failed"][0]["error"] == "RuntimeError: no kernel"

    def test_time_limit(self, tmp_path):
        status, results = run_forward(tmp_path / "forward.json", "--time-limit", "1e-9")
        assert status == 1
        assert "time limit" in results["failed"][0]["error"]

    def test_once_times_nothing(self, tmp_path):
        status, results = run_forward(tmp_path / "forward.json", "--once", "--impls", "chunkattn")
        assert (status, results["rows"]) == (0, [])


@pytest.mark.usefixtures("quick_ceilings")
class TestVarlen:
    def test_results(self, tmp_path):
        status, results = run_varlen(tmp_path / "varlen.json")
        assert status == 0
        assert results["header"]["benchmark"] == "varlen"
        impls = ("chunkattn", "chunkattn-alone", "chunkattn-longest")
        passes = ("forward", "forward+backward")
        assert [(row["pass"], row["impl"]) for row in results["rows"]] == [(p, impl) for p in passes for impl in impls]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert 0 < row["max_error"] < 0.2
            assert row["batch"] == (1 if row["impl"] == "chunkattn-longest" else 3)
        assert {"fa3", "chunkattn-portable"} <= results["absent"].keys()

    def test_wrong_output_is_not_timed(self, monkeypatch, tmp_path):
        correct = peers.chunkattn_step

        def spoiled(name, *arguments):
            def call():
                results = correct(name, *arguments)()
                if name == "dca_varlen":
                    results[0][-1] += 0.5
                return results

            return call

        monkeypatch.setattr(peers, "chunkattn_step", spoiled)
        status, results = run_varlen(tmp_path / "varlen.json", "--impls", "chunkattn", "chunkattn-alone")
        assert status == 1
        assert {row["impl"] for row in results["rows"]} == {"chunkattn-alone"}
        assert [failure["error"].partition(":")[0] for failure in results["failed"]] == [
            "output is wrong",
            "dq is wrong",
        ]

    def test_packed_fa3(self):
        called = []

        def fwd(*tensors, **keywords):
            called.append((tensors, keywords))
            return "out", "lse", None, None

        def bwd(*tensors, **keywords):
            called.append((tensors, keywords))
            return "dq", "dk", "dv", None

        ops = types.SimpleNamespace(fwd=fwd, bwd=bwd)
        packing = {"cu_seqlens_q": 1, "max_seqlen_q": 2}
        assert peers.packed_fa3_call(ops, "q", "k", "v", "dout", packing, False)() == ("out",)
        assert peers.packed_fa3_call(ops, "q", "k", "v", "dout", packing, True)() == ("dq", "dk", "dv")
        keywords = packing | {"is_causal": True}
        assert called[-1] == (("dout", "q", "k", "v", "out", "lse"), keywords)
        assert called[0] == (("q", "k", "v"), keywords)


@pytest.mark.usefixtures("quick_ceilings")
class TestBackward:
    def test_results(self, tmp_path):
        status, results = run_backward(tmp_path / "backward.json", "--dca", "64:16", "one")
        assert status == 0
        rows = [(row["impl"], row["pass"], row["chunk_size"], row["local_size"]) for row in results["rows"]]
        assert rows == [
            ("sdpa", "backward", None, None),
            ("composed-sdpa", "backward", 64, 16),
            ("chunkattn", "backward", 64, 16),
            ("chunkattn", "backward", 662, 512),
        ]
        for row in results["rows"]:
            assert row.keys() >= ROW_FIELDS
            assert 0 < row["max_error"] < 0.2
        assert {"fa3", "cudnn", "fa2", "flex", "composed-fa3", "chunkattn-portable"} <= results["absent"].keys()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda dq, dk, dv: dq[:, 70].mul_(1.5), "dq is wrong"),
            (lambda dq, dk, dv: dk[:, :40].add_(0.5), "dk is wrong"),
            (lambda dq, dk, dv: dv[:, 149].mul_(2), "dv is wrong"),
            (lambda dq, dk, dv: dk[:, 3].fill_(torch.nan), "dk has elements that are not finite"),
        ],
    )
    def test_wrong_gradients_are_not_timed(self, monkeypatch, tmp_path, spoil, message):
        correct = peers.chunkattn_gradients

        def make_gradients(*arguments, **options):
            def call():
                grads = correct(*arguments, **options)()
                spoil(*grads)
                return grads

            return call

        monkeypatch.setattr(peers, "chunkattn_gradients", make_gradients)
        status, results = run_backward(tmp_path / "backward.json", "--dca", "64:16", "--dtype", "float32")
        assert status == 1
        assert [row["impl"] for row in results["rows"]] == ["sdpa", "composed-sdpa"]
        assert [failure["impl"] for failure in results["failed"]] == ["chunkattn"]
        assert message in results["failed"][0]["error"]
