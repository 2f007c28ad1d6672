"""Pictures and tables that are made from result files."""

import importlib

import common
import pytest


class TestPlot:
    @pytest.fixture
    def results(self, tmp_path):
        rows = []
        timing = common.Timing((1.0, 1.1))
        for text in ("s8k-h32-d128", "s16k-h32-d128", "s32k-h32/8-d128"):
            shape = common.Shape.parse(text)
            rows.append(common.make_row("fa3", "forward", shape, timing))
            for impl, setting in (("composed-fa3", "3072:512"), ("chunkattn", "3072:512"), ("chunkattn", "one")):
                setting = common.DcaSetting.parse(setting, shape.seq_k)
                rows.append(common.make_row(impl, "forward", shape, timing, setting=setting, max_error=0.01))
        path = tmp_path / "h100" / "forward.json"
        common.write_results(path, common.make_header("forward", "cpu"), rows, {"cudnn": "not here"})
        return path

    def test_page_and_image(self, results, tmp_path):
        plot = importlib.import_module("plot")
        page = tmp_path / "docs" / "performance.md"
        page.parent.mkdir()
        page.write_text("# Speed\n\nBy hand.\n")
        for _ in range(2):
            assert plot.main([str(results), "--page", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("# Speed\n\nBy hand.\n")
        assert text.count("benchmark h100-forward: begin") == 1
        assert "| 32/8 heads, d 128, bf16, 32,768 keys | 3072:512 |" in text
        assert "cudnn (not here)" in text
        assert "100.0%" in text
        image = tmp_path / "docs" / "images" / "h100-forward.png"
        assert image.read_bytes().startswith(b"\x89PNG")

    def test_backward(self, tmp_path):
        plot = importlib.import_module("plot")
        shape, setting = common.Shape.parse("s8k-h32-d128"), common.DcaSetting(3072, 512)
        rows = [
            common.make_row(impl, "backward", shape, common.Timing((1.0,)), setting=setting)
            for impl in ("chunkattn", "chunkattn-deterministic", "chunkattn-portable", "composed-fa3")
        ]
        path = tmp_path / "h100" / "backward.json"
        common.write_results(path, common.make_header("backward", "cpu"), rows)
        page = tmp_path / "performance.md"
        assert plot.main([str(path), "--page", str(page)]) == 0
        assert "| chunkattn | chunkattn-deterministic | chunkattn-portable | composed-fa3 |" in page.read_text()
        assert (tmp_path / "images" / "h100-backward.png").is_file()

    def test_decode(self, tmp_path):
        plot = importlib.import_module("plot")
        setting = common.DcaSetting(3072, 512)
        step, prompt = (common.Shape.parse(text) for text in ("b16-s1/32k-h32/8-d128", "s128k-h32/8-d128"))

        def row(impl, pass_, shape, cache, ms, **extra):
            timing = common.Timing((ms,))
            if pass_ != "prefill":
                extra["bytes_moved"] = 10**9
            return common.make_row(impl, pass_, shape, timing, setting=setting, cache=cache, **extra)

        rows = [
            row("chunkattn", "decode", step, "rows", 1.0),
            row("chunkattn", "decode", step, "float8", 0.5),
            row("fa3", "decode", step, "rows", 1.1),
            row("composed-fa3", "decode", step, "rows", 1.25),
            row("chunkattn", "step", step, "rows", 0.0083, steps_in_graph=50),
            row("chunkattn", "prefill", prompt, None, 200.0),
            row("chunkattn", "prefill", prompt, "rows", 210.0, tokens=8192),
        ]
        header = common.make_header("decode", "cpu", {"matmul_tflops": 1, "matmul": "1^3", "copy_gbps": 1250})
        path = tmp_path / "h100" / "decode.json"
        common.write_results(path, header, rows)
        page = tmp_path / "performance.md"
        assert plot.main([str(path), "--page", str(page)]) == 0
        text = page.read_text()
        assert "| 16 x 32k | rows | 3072:512 | 1000 | 80.0% | 909 | 800 | 1.10 | 1.25 | - |" in text
        assert "| 16 x 32k | float8 | 3072:512 | 2000 | 160.0% | - | - | - | - | 2.00 |" in text
        assert "| 32,768 keys | 8.3 |" in text
        assert "chunks of 8k, rows | 210 |" in text
        assert "| 1.050 |" in text
        assert (tmp_path / "images" / "h100-decode.png").is_file()

    def test_select_merge(self, tmp_path):
        plot = importlib.import_module("plot")
        shape, setting = common.Shape.parse("s32k-h32-d128"), common.DcaSetting(3072, 512)

        def row(impl, pass_, ms, text=None, **options):
            at = common.Shape.parse(text) if text else shape
            return common.make_row(impl, pass_, at, common.Timing((ms,)), **options)

        rows = [
            row("chunkattn-dca", "attention", 10.0, setting=setting),
            row("chunkattn", "attention", 5.0, flops=4e12),
        ]
        rows += [row("fa3", "training", 50.0, flops=1e13), row("chunkattn", "training", 20.0, flops=5e12)]
        for text, ms in (("s8k-h32/8-d128", 1.0), ("s1024k-h32/8-d128", 200.0)):
            rows += [
                row("chunkattn", "selection", ms / 10, text, flops=1e9),
                row("chunkattn", "forward", ms, text, flops=1e9),
            ]
        rows.append(row("fa3", "forward", 2.0, "s8k-h32/8-d128"))
        path = tmp_path / "h100" / "select_merge.json"
        common.write_results(path, common.make_header("select_merge", "cpu"), rows)
        page = tmp_path / "performance.md"
        assert plot.main([str(path), "--page", str(page)]) == 0
        text = page.read_text()
        assert "| 8,192 | 1 | 10.0% | 2 | 2.00 |" in text
        assert "| 1,048,576 | 200 | 10.0% | - | - |" in text
        assert "| training | 32 heads, d 128, bf16, 32,768 keys | fa3 | 20 ms | 50 ms | 2.50 |" in text
        assert "| fa3 at 8,192 x 16384 | 200 ms | 2 ms x 16384 | 163.8 |" in text
        assert (tmp_path / "images" / "h100-select_merge.png").is_file()

    def test_missing_end_marker(self):
        plot = importlib.import_module("plot")
        page = plot.replace_section("", "x", "text").replace("<!-- benchmark x: end -->", "")
        with pytest.raises(ValueError, match="begin, generated"):
            plot.replace_section(page, "x", "text")
