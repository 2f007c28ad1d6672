"""The examples run: text collection, a few training steps, and the context demo."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import byte_model  # noqa: E402
import corpus  # noqa: E402
import extend_context  # noqa: E402
import finetune_dca  # noqa: E402
import finetune_select_merge  # noqa: E402
import finetuning  # noqa: E402
import passkey  # noqa: E402
import serve  # noqa: E402
import train_byte_llama  # noqa: E402
from next_token_loss import next_token_loss  # noqa: E402
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import chunkattn  # noqa: E402
from chunkattn.integrations.transformers import enable_dca  # noqa: E402


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """An empty site-packages folder that is the only source of training text."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(corpus, "package_roots", lambda: [folder])
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path):
    torch.manual_seed(0)
    config = byte_model.byte_llama_config()
    config.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1})
    config.num_key_value_heads = 1
    config.initializer_range = 0.5  # sharp attention: positions matter although nothing was learned
    folder = tmp_path / "checkpoint"
    byte_model.save(LlamaForCausalLM(config), folder, torch.bfloat16)
    return folder


def source_lines(name: str, count: int) -> bytes:
    return b"".join(b"%s_%d = %d * offset\n" % (name.encode(), line, line) for line in range(count))


def test_training_text_is_deduplicated_and_ordered_by_content(site_packages):
    first, second = source_lines("first", 30), source_lines("second", 40)
    for path, source in (("a/one.py", first), ("b/again.py", first), ("two.py", second), ("b/data.txt", b"text")):
        (site_packages / path).parent.mkdir(exist_ok=True)
        (site_packages / path).write_bytes(source)
    text = corpus.training_text(10**6)
    assert sorted(text.data.tobytes().split(b"\0")) == sorted([first, second, b""])
    assert text.files == 2

    (site_packages / "a/one.py").rename(site_packages / "z.py")
    assert corpus.training_text(10**6).sha256 == text.sha256
    assert len(corpus.training_text(len(text.data) - 1).data) < len(text.data)


def test_training_text_leaves_out_copies_of_the_standard_library(site_packages):
    library = (corpus.standard_library() / "argparse.py").read_bytes()
    own = source_lines("own", 60)
    (site_packages / "copy.py").write_bytes(library)
    (site_packages / "backport.py").write_bytes(own + library[20000:24000] + own)
    (site_packages / "own.py").write_bytes(own)
    text = corpus.training_text(10**7)
    assert text.data.tobytes() == own + b"\0"
    assert text.copies_left_out == 2


def test_package_roots_are_not_the_standard_library():
    library = corpus.standard_library()
    roots = corpus.package_roots()
    assert roots
    assert library not in roots
    assert not any(root in library.parents for root in roots)


def test_held_out_text_is_the_start_of_named_modules():
    assert len(corpus.held_out_text(16384)) >= 50
    modules = corpus.held_out_text(1000, 5)
    assert list(modules) == sorted(modules)
    assert len(modules) == 5
    for name, text in modules.items():
        assert text == (corpus.standard_library() / f"{name}.py").read_bytes()[:1000]
    with pytest.raises(ValueError, match=r"must be between 1 and [0-9]+, all that have 1000 bytes"):
        corpus.held_out_text(1000, len(corpus.HELD_OUT_MODULES) + 1)
    with pytest.raises(ValueError, match="between 1 and 0, all that have 1000000000 bytes"):
        corpus.held_out_text(10**9)


def run_schedule(schedule, seconds_per_step, monkeypatch):
    """The learning rates of a schedule whose steps take `seconds_per_step(step)`; the last element is the time used."""
    clock, rates = 0.0, []
    monkeypatch.setattr(train_byte_llama.time, "monotonic", lambda: clock)
    while schedule.remaining:
        rates.append(schedule.next_rate())
        clock += seconds_per_step(schedule.done)
        if schedule.done % 100 == 0:
            schedule.fit(seconds_per_step(schedule.done))
    return rates, clock


def test_schedule_warms_up_and_ends_the_cosine(monkeypatch):
    rates, _ = run_schedule(train_byte_llama.Schedule(8000, peak=2.0), lambda step: 0.01, monkeypatch)
    assert len(rates) == 8000
    assert rates[0] < 0.01
    assert max(rates) == pytest.approx(2.0, rel=0.02)
    assert rates.index(max(rates)) == train_byte_llama.WARMUP_STEPS - 1
    assert rates[4000] == pytest.approx(2.0 * (1 + train_byte_llama.FINAL_RATE) / 2, rel=0.01)
    assert rates[-1] == pytest.approx(2.0 * train_byte_llama.FINAL_RATE)


def test_deadline_shortens_the_schedule_and_still_ends_the_cosine(monkeypatch):
    # The device turns slower halfway.
    schedule = train_byte_llama.Schedule(10_000, peak=1.0, deadline=60.0)
    rates, seconds = run_schedule(schedule, lambda step: 0.02 if step < 1000 else 0.03, monkeypatch)
    assert len(rates) == pytest.approx(1000 + 40 / 0.03, abs=5)
    assert 59.0 < seconds <= 60.1
    assert rates[-1] == pytest.approx(train_byte_llama.FINAL_RATE)
    assert max(abs(after - before) for before, after in pairwise(rates)) < 0.01

    unhurried = train_byte_llama.Schedule(1000, peak=1.0, deadline=1e6)
    assert len(run_schedule(unhurried, lambda step: 0.02, monkeypatch)[0]) == 1000


def test_training_lowers_the_loss_and_writes_a_checkpoint(site_packages, tmp_path):
    # The embedding learns which bytes occur within a few steps.
    (site_packages / "module.py").write_bytes(source_lines("value", 30_000))
    output = tmp_path / "trained"
    options = ["--steps", "3", "--batch", "1", "--learning-rate", "0.01", "--eval-windows", "2", "--device", "cpu"]
    train_byte_llama.main(["--output", str(output), *options, "--no-compile", "--no-bfloat16"])
    report = json.loads((output / "training.json").read_text())
    assert report["steps"] == 3
    assert report["data"]["package_bytes"] == {"module": report["data"]["bytes"] - 1}
    held_out = report["held_out"]
    assert held_out["bits_per_byte_as_stored_in_bfloat16"] == pytest.approx(
        held_out["bits_per_byte_float32_weights"], rel=0.01
    )
    untrained = math.log2(256)
    assert report["loss_bits_per_byte"][-1][1] < untrained
    model = byte_model.load(output, torch.float32, "cpu")
    assert model.num_parameters() == report["parameters"]
    assert (output / "model.safetensors").stat().st_size <= 8_000_000


def test_demo_tabulates_and_draws(tiny_checkpoint, tmp_path):
    plot, table = tmp_path / "plot.png", tmp_path / "table.json"
    arguments = ["--checkpoint", str(tiny_checkpoint), "--samples", "1", "--lengths", "1024", "512", "--device", "cpu"]
    extend_context.main([*arguments, "--output", str(plot), "--json", str(table)])
    assert plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(table.read_text())
    assert report["lengths"] == [512, 1024]
    scores = report["bits_per_byte"]
    assert len(scores) == 6
    assert all(0 < value < 20 for row in scores.values() for value in row)
    # Within the trained length dynamic NTK and the temperature change nothing; past it they do.
    for plain, changed in (
        ("plain RoPE", "dynamic NTK"),
        ("DCA s=384 w=128", "DCA s=384 w=128 t=m²"),
        ("DCA s=384 w=64", "DCA s=384 w=64 t=m²"),
    ):
        assert scores[plain][0] == scores[changed][0]
        assert scores[plain][1] != scores[changed][1]


def test_demo_summary_states_the_ratio_and_its_error(capsys):
    # Means 1.0 and 1.1; the residuals of after - 1.1 * before are -0.15, 0 and 0.15.
    dca = torch.tensor([[0.5, 1.0, 1.5], [0.4, 1.1, 1.8]], dtype=torch.float64)
    extend_context.print_summary({"plain RoPE": 2 * dca[:, :1], "DCA": dca}, [512, 4096], 512)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "DCA: 1.100 at 4096 bytes, 1.10 times its value at 512 (standard error over 3 modules: 0.09)",
        "plain RoPE: 0.800 at 4096 bytes, 0.80 times its value at 512",
    ]
    extend_context.print_summary({"plain RoPE": dca, "DCA": dca}, [512, 1024], 512)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["--samples", "1000"], ", all that have 16384 bytes in this standard library; got 1000"),
        (["--lengths", "100000000"], "all that have 100000000 bytes"),
    ],
)
def test_demo_explains_bad_options_in_one_sentence(tiny_checkpoint, arguments, message):
    with pytest.raises(SystemExit) as failure:
        extend_context.main(["--checkpoint", str(tiny_checkpoint), "--device", "cpu", *arguments])
    assert message in failure.value.code
    assert "\n" not in failure.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "256"], "--lengths must be above 256"),
        (["--output", "nowhere/plot.png"], "there is no folder nowhere"),
    ],
)
def test_demo_checks_options_before_it_measures(arguments, message, capsys):
    with pytest.raises(SystemExit):
        extend_context.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_shipped_checkpoint_reads_past_its_training_length_with_dca():
    assert (byte_model.CHECKPOINT / "model.safetensors").stat().st_size <= 8_000_000
    model = byte_model.load(byte_model.CHECKPOINT, torch.float32, "cpu")
    modules = corpus.held_out_text(16384, 2).values()
    texts = torch.stack([torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in modules])
    at_trained_length = byte_model.bits_per_byte(model, texts[:, -512:]).mean()
    plain = byte_model.bits_per_byte(model, texts[:, -4096:]).mean()
    with extend_context.dual_chunk_attention(model, chunk_size=384, local_size=128):
        dual_chunk = byte_model.bits_per_byte(model, texts[:, -4096:]).mean()
    assert dual_chunk < 1.1 * at_trained_length
    assert plain > 2 * at_trained_length


def finetune(checkpoint, tmp_path, *arguments):
    """Runs a short fine-tuning and returns its report."""
    table = tmp_path / "finetune.json"
    quick = ["--model", str(checkpoint), "--length", "1024", "--steps", "8", "--batch", "1", "--samples", "2"]
    files = ["--plot", str(tmp_path / "finetune.png"), "--json", str(table)]
    finetune_dca.main([*quick, *files, "--device", "cpu", "--learning-rate", "0.01", *arguments])
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(table.read_text())


def test_finetuning_lowers_the_held_out_score_and_saves_the_model(site_packages, tiny_checkpoint, tmp_path, capsys):
    source = source_lines("value", 3000)
    (site_packages / "module.py").write_bytes(source)
    output = tmp_path / "finetuned"
    report = finetune(tiny_checkpoint, tmp_path, "--output", str(output))
    assert report["model"] == tiny_checkpoint.name
    assert report["lengths"] == [512, 1024, 2048]
    assert report["held_out_windows"] == 2
    assert len(report["loss_bits_per_token"]) == 8
    before, after = (report["bits_per_byte"][when] for when in ("before", "after"))
    assert all(new < old for old, new in zip(before, after, strict=True))
    assert "8 steps of 1 windows" in capsys.readouterr().out

    trained = byte_model.load(output, torch.float32, "cpu")
    untrained = byte_model.load(tiny_checkpoint, torch.float32, "cpu")
    assert report["trained_parameters"] == trained.num_parameters()
    window = torch.frombuffer(bytearray(source[:1024]), dtype=torch.uint8).unsqueeze(0)
    for model in (trained, untrained):
        enable_dca(model)
    assert byte_model.bits_per_byte(trained, window) < byte_model.bits_per_byte(untrained, window)


def test_finetuning_of_adapters_leaves_the_weights_alone(tiny_checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    text, output = tmp_path / "text.txt", tmp_path / "adapters"
    text.write_bytes(source_lines("value", 1000))
    arguments = ["--text", str(text), "--lora", "4", "--gradient-checkpointing", "--dtype", "bfloat16"]
    report = finetune(tiny_checkpoint, tmp_path, *arguments, "--output", str(output))
    assert report["lengths"] == [512, 1024, 2048]
    assert report["trained_parameters"] == 4 * 4 * (64 + 64)
    assert (output / "adapter_model.safetensors").is_file()
    base = byte_model.load(tiny_checkpoint, torch.float32, "cpu")
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, output)
    adapters = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(adapters) == 4
    assert all(weight.abs().max() > 0 for weight in adapters)
    loaded = adapted.unload().state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in weights.items())


def test_finetuning_with_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    source = source_lines("value", 2000)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([source.decode()], vocab_size=280, show_progress=False)
    config = byte_model.byte_llama_config()
    config.update({"vocab_size": 280, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 1})
    folder, text, output = (tmp_path / name for name in ("model", "text.txt", "output"))
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(folder)
    text.write_bytes(source)
    report = finetune(folder, tmp_path, "--text", str(text), "--output", str(output))
    # A token stands for more than one byte: an untrained model needs about log2(280) bits for each.
    assert 1 < report["bits_per_byte"]["before"][0] < 0.8 * math.log2(280)
    assert report["loss_bits_per_token"][0] == pytest.approx(math.log2(280), rel=0.1)
    assert report["loss_bits_per_token"][-1] < 0.9 * report["loss_bits_per_token"][0]
    assert (output / "tokenizer.json").is_file()


@pytest.mark.parametrize("tokens_per_block", [7, 64])
def test_next_token_loss_is_that_of_all_logits(tiny_checkpoint, tokens_per_block):
    model = byte_model.load(tiny_checkpoint, torch.float32, "cpu")
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for loss in (
        next_token_loss(model, tokens, tokens_per_block),
        model(input_ids=tokens, labels=tokens, use_cache=False).loss,
    ):
        model.zero_grad()
        loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters())])
    torch.testing.assert_close(*results)


def test_windows_are_drawn_from_all_of_every_document():
    documents = [torch.arange(begin, begin + 12, dtype=torch.uint8) for begin in (0, 100)]
    windows = finetuning.Windows(documents, 10, seed=0)
    drawn = {tuple(windows.draw("cpu")[0].tolist()) for _ in range(64)}
    assert drawn == {tuple(range(start, start + 11)) for start in (0, 1, 100, 101)}


def test_held_out_windows_of_every_length_end_alike():
    documents = [torch.arange(3000) % 251, torch.arange(2000) % 249]
    text = finetuning.hold_out(documents, None, [512, 1024], 4)
    assert text.windows.shape == (4, 1024)
    scored = {tuple(window[-byte_model.SCORED_BYTES :].tolist()) for window in text.windows}
    assert len(scored) == 4
    assert len(finetuning.hold_out(documents, None, [512, 1024], 1000).windows) == 8 + 4


@pytest.mark.parametrize(
    ("trained_length", "length", "longest", "lengths"),
    [
        (512, 2048, 10_000, [512, 1024, 2048, 4096]),
        (512, 3000, 5000, [512, 1024, 2048, 3000]),
        (4096, 1024, 10_000, [1024, 2048]),
        (64, 1024, 10_000, [512, 1024, 2048]),
    ],
)
def test_finetuning_is_scored_from_the_trained_length_on(trained_length, length, longest, lengths):
    assert finetuning.evaluation_lengths(trained_length, length, longest) == lengths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{folder}"], "--model must name a causal language model of Hugging Face, got"),
        (["--local-size", "400"], "local_size must lie between 0 and chunk_size"),
        (
            ["--text", "{folder}/short.txt"],
            "--length must be below the length of a document, got 1024: none to train on",
        ),
        (["--text", "{folder}/text.txt", "--length", "4000"], "got 4000: none to hold out is longer"),
    ],
)
def test_finetuning_explains_what_does_not_fit_in_one_sentence(tiny_checkpoint, tmp_path, arguments, message):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "short.txt").write_bytes(b"x" * 900)
    (folder / "text.txt").write_bytes(b"x" * 20_000)
    with pytest.raises(SystemExit) as failure:
        finetune(tiny_checkpoint, tmp_path, *(argument.format(folder=folder) for argument in arguments))
    assert message in failure.value.code
    assert "\n" not in failure.value.code


def test_finetuning_stops_when_it_diverges(site_packages, tiny_checkpoint, tmp_path):
    (site_packages / "module.py").write_bytes(source_lines("value", 3000))
    with pytest.raises(SystemExit, match=r"training diverged at step [2-8]: try a lower --learning-rate"):
        finetune(tiny_checkpoint, tmp_path, "--learning-rate", "1e30")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "256"], "--length must be above 256, the tokens that are scored; got 256"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lora", "0"], "--lora must be at least 1, got 0"),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0.0"),
        (["--text", "nowhere.txt"], "--text must name a file, got nowhere.txt"),
        (["--plot", "nowhere/plot.png"], "there is no folder nowhere"),
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16'"),
    ],
)
def test_finetuning_checks_options_before_it_loads(arguments, message, capsys):
    with pytest.raises(SystemExit):
        finetune_dca.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_finetuning_on_a_gpu_takes_no_float32(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert finetune_dca.parse_arguments([]).dtype == "bfloat16"
    with pytest.raises(SystemExit):
        finetune_dca.parse_arguments(["--dtype", "float32"])
    assert "--dtype must be bfloat16 on a GPU" in capsys.readouterr().err


def finetune_select_merge_quickly(tmp_path, *arguments):
    """Runs a short fine-tuning and returns its report."""
    table = tmp_path / "finetune.json"
    quick = ["--length", "1024", "--steps", "8", "--batch", "1", "--samples", "2", "--top-k", "4", "--merge", "4"]
    files = ["--plot", str(tmp_path / "finetune.png"), "--json", str(table)]
    finetune_select_merge.main([*quick, *files, "--device", "cpu", "--learning-rate", "0.01", *arguments])
    assert (tmp_path / "finetune.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(table.read_text())


def test_finetuning_with_select_and_merge(tiny_checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    draws = []
    draw = chunkattn.CRDNTK.draw

    def record(rule, step, length, generator):
        draws.append(draw(rule, step, length, generator))
        return draws[-1]

    monkeypatch.setattr(chunkattn.CRDNTK, "draw", record)
    text = tmp_path / "text.txt"
    text.write_bytes(source_lines("value", 1000))
    report = finetune_select_merge_quickly(tmp_path, "--model", str(tiny_checkpoint), "--text", str(text))
    assert report["lengths"] == [512, 1024, 2048]
    assert report["trained_parameters"] == 4 * 8 * (64 + 64), "adapters of rank 8"
    assert report["ntk_scale"] == 4, "twice 1024 tokens of a model trained on 512"
    before, after = (report["bits_per_byte"][when] for when in ("before", "after"))
    assert all(new < old for old, new in zip(before, after, strict=True))
    assert len({draw.offset for draw in draws}) == 8, "a draw for each step"
    assert all(2 * 512 + 1024 <= draw.cycle < 2 * 512 + 1024 + 4 * 512 for draw in draws)


def test_finetuning_of_weights_at_true_positions(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(chunkattn.CRDNTK, "draw", lambda *_: pytest.fail("positions were drawn"))
    text = tmp_path / "text.txt"
    text.write_bytes(source_lines("value", 1000))
    arguments = ["--model", str(tiny_checkpoint), "--text", str(text), "--full", "--no-crd-ntk", "--ntk-scale", "2"]
    report = finetune_select_merge_quickly(tmp_path, *arguments)
    model = byte_model.load(tiny_checkpoint, torch.float32, "cpu")
    assert (report["trained_parameters"], report["ntk_scale"]) == (model.num_parameters(), 2)
    assert report["loss_bits_per_token"][-1] < report["loss_bits_per_token"][0]


def test_finetuning_of_a_shape_with_random_weights(site_packages, tmp_path):
    pytest.importorskip("peft")
    (site_packages / "module.py").write_bytes(source_lines("value", 3000))
    report = finetune_select_merge_quickly(tmp_path, "--shape", "tiny", "--gradient-checkpointing")
    assert report["trained_parameters"] == 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32))
    assert report["loss_bits_per_token"][0] == pytest.approx(math.log2(512), rel=0.1)


def test_the_papers_shape_has_the_papers_lengths():
    args = finetune_select_merge.parse_arguments(["--shape", "llama2-7b"])
    sizes = {"length": 32768, "region_size": 16, "top_k": 384, "merge": 128, "lora": 8, "gradient_checkpointing": True}
    assert {name: getattr(args, name) for name in sizes} == sizes
    assert finetune_select_merge.parse_arguments(["--shape", "llama2-7b", "--length", "16384"]).length == 16384


def test_passkey_texts():
    generator = torch.Generator().manual_seed(0)
    for depth in (0.0, 0.5, 1.0, None):
        texts = passkey.make_texts(4, depth, 100, generator)
        assert texts.shape == (4, 100)
        for text in texts.tolist():
            words = " ".join(passkey.WORDS[token] for token in text)
            key = " ".join(words.split()[-passkey.DIGITS :])
            statement = passkey.STATEMENT.replace("{key}", key)
            filler, question = words.split(statement)
            assert question.endswith(f"{passkey.QUESTION} {key}")
            if depth is not None:
                # Of 100 tokens the statement has 23 and the question, with the key, 15.
                assert len(filler.split()) == round(62 * depth)
    assert len(passkey.WORDS) == len(set(passkey.WORDS)) == 33


def test_passkey(tmp_path, capsys):
    table, plot = tmp_path / "passkey.json", tmp_path / "passkey.png"
    quick = ["--device", "cpu", "--length", "96", "--steps", "3", "--lengths", "96", "200", "--depths", "3"]
    passkey.main([*quick, "--samples", "2", "--plot", str(plot), "--json", str(table)])
    report = json.loads(table.read_text())
    assert (report["steps"], report["lengths"], report["depths"]) == (3, [96, 200], [0, 0.5, 1])
    assert [len(row) for row in report["accuracy"]] == [3, 3]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "Passkeys found" in capsys.readouterr().out


def test_passkey_asks_the_model_that_was_trained(monkeypatch):
    """generate() answers in the evaluation: a model that knows the answers finds all, one that does not none."""
    args = passkey.parse_arguments(["--device", "cpu", "--lengths", "60", "--samples", "3"])
    model = passkey.make_model(96, "cpu")
    depths = [0.0, 1.0]
    assert passkey.evaluate(model, args, depths) == [[0.0, 0.0]]
    texts = []
    make_texts = passkey.make_texts
    monkeypatch.setattr(passkey, "make_texts", lambda *given: texts.append(make_texts(*given)) or texts[-1])
    monkeypatch.setattr(model, "generate", lambda prompts, **options: texts[-1])
    assert passkey.evaluate(model, args, depths) == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "40"], "--length must be at least 48, got 40"),
        (["--lengths", "30"], "--lengths must be at least 38, got 30"),
        (["--depths", "1"], "--depths must be at least 2, got 1"),
        (["--plot", "nowhere/plot.png"], "there is no folder nowhere"),
    ],
)
def test_passkey_checks_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        passkey.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def run_serve(folder, tmp_path, *arguments):
    output = tmp_path / "serve.json"
    sizes = ("--requests", "4", "--shortest", "5", "--longest", "90", "--new-tokens", "12", "--max-batch", "3")
    options = ("--prefill-chunk", "32", "--chunk-size", "40", "--local-size", "13", "--json", str(output))
    serve.main(["--model", str(folder), "--device", "cpu", "--dtype", "float32", *sizes, *options, *arguments])
    return json.loads(output.read_text())


@pytest.fixture
def tiny_grouped_checkpoint(tmp_path):
    """Two layers, four heads that share two KV heads."""
    torch.manual_seed(0)
    config = byte_model.byte_llama_config()
    config.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2})
    config.initializer_range = 0.3
    folder = tmp_path / "grouped"
    byte_model.save(LlamaForCausalLM(config), folder, torch.float32)
    return folder


@pytest.mark.parametrize("scarce", [False, True])
def test_serving_generates_what_generate_does(tiny_grouped_checkpoint, tmp_path, capsys, scarce):
    # With pages for the longest request alone, the others wait for it to leave.
    results = run_serve(tiny_grouped_checkpoint, tmp_path, *(("--pages", "5") if scarce else ()))
    assert "tokens/s" in capsys.readouterr().out
    model = byte_model.load(tiny_grouped_checkpoint, torch.float32, "cpu")
    arguments = serve.parse_arguments(["--requests", "4", "--shortest", "5", "--longest", "90", "--new-tokens", "12"])
    requests = serve.make_requests(arguments, model.config.vocab_size)
    assert len({len(request.prompt) for request in requests}) > 1
    for name in ("plain", "DCA"):
        if name == "DCA":
            enable_dca(model, 40, 13)
        for request, tokens in zip(requests, results[name]["tokens"], strict=True):
            expected = model.generate(torch.tensor([request.prompt]), max_new_tokens=12, do_sample=False)
            assert tokens == expected[0, len(request.prompt) :].tolist()
    assert results["DCA"]["tokens"] != results["plain"]["tokens"]


def test_serving_with_a_float8_cache(tiny_grouped_checkpoint, tmp_path):
    results = run_serve(tiny_grouped_checkpoint, tmp_path, "--float8", "--page-size", "48")
    assert [len(tokens) for tokens in results["DCA"]["tokens"]] == [12] * 4
    assert results["DCA"]["tokens_per_second"]["generated"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pages", "3"], "--pages must be at least 5 for the longest request, got 3"),
        (["--local-size", "40"], "local_size must lie in 1 .. chunk_size - 1, got 40"),
        (["--model", "{folder}"], "--model must name a causal language model of Hugging Face, got"),
    ],
)
def test_serving_explains_what_does_not_fit(tiny_grouped_checkpoint, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(folder=tmp_path / "empty") for argument in arguments]
    with pytest.raises(SystemExit) as failure:
        run_serve(tiny_grouped_checkpoint, tmp_path, *arguments)
    assert message in failure.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "--requests must be at least 1, got 0"),
        (["--longest", "10"], "--longest must be --shortest, 64, or more, got 10"),
        (["--page-size", "8"], "--page-size must be at least 16, got 8"),
    ],
)
def test_serving_checks_options_before_it_loads(arguments, message, capsys):
    with pytest.raises(SystemExit):
        serve.parse_arguments(arguments)
    assert message in capsys.readouterr().err
